"""The import rule and the house rules, checked by parsing every file; each check can fail.

Also here: the test setting of conftest.py, and that the page of environment variables is complete.
"""

import ast
import os
import re
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "nanochat_jax"

BASE = {"types", "files", "blocks", "validation", "config", "params", "tokenizer", "processes", "chat"}
TOWER = ("kernels", "quant", "model", "losses")
BESIDE = {"optim", "parallel", "data", "checkpoint", "telemetry"}
OPTIM_KERNELS = {"dispatch", "int8", "symmetric"}
NO_TOKENIZER = BASE - {"tokenizer", "chat"}
# Room -> rooms it may import, beside itself. `__main__` files and cli may import anything.
RULES: dict[str, set[str]] = {
    "types": set(),
    "files": set(),
    "blocks": set(),
    "validation": {"config"},
    "config": {"blocks", "validation"},
    "params": {"types"},
    "tokenizer": set(),
    "processes": {"config"},
    "flags": {"config"},
    "cluster": {"config", "processes"},
    "chat": {"tokenizer"},
    "kernels": BASE,
    "quant": BASE | set(TOWER[:1]),
    "model": BASE | set(TOWER[:2]),
    "losses": BASE | set(TOWER[:3]),
    "optim": BASE | {"kernels"},  # OPTIM_KERNELS only
    "parallel": BASE,
    "data": BASE,
    "checkpoint": BASE,
    "telemetry": {"config", "files"},
    "train": BASE | set(TOWER) | BESIDE,
    "inference": NO_TOKENIZER | set(TOWER[:3]),
    "evals": BASE | set(TOWER) | {"inference", "data"},
    "rl": BASE | set(TOWER) | BESIDE | {"train", "inference", "evals"},
    "export": BASE | set(TOWER[:3]),
    "serve": BASE | {"inference"},
    "plan": BASE | set(TOWER) | BESIDE | {"train"},
    "doctor": BASE | {"kernels"},
    "bench": BASE | set(TOWER) | BESIDE | {"train", "inference", "evals", "rl", "export", "serve"},
}
# File -> what it may import beyond its room, because it puts a run together from its parts as a
# `__main__` would, for several `__main__` files.
COMPOSERS = {
    "train/program.py": {"evals", "inference"},
    "inference/load.py": {"checkpoint", "parallel", "tokenizer"},
    "inference/terminal.py": {"chat", "tokenizer"},
    "export/adopt.py": {"checkpoint"},
}
NO_JAX = {"data", "telemetry", "files", "blocks", "config", "validation", "tokenizer", "chat"}
# Files that print although they are no command line: progress lines, and the report of --verify_resume.
PRINTERS = {"telemetry/console.py", "train/verify.py"}
MAX_LINES, MAX_MAIN_LINES = 500, 60
# Beside the package in a checkout; they import the package, never the reverse.
OUTSIDE = {"configs", "experiments", "tests", "notebooks"}


def imports(tree):
    """Dotted names imported anywhere in a file, `from a import b` as a.b; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            name = node.args[0]  # importlib.import_module("a.b"), __import__("a")
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def defined(node):
    """Names that a node binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.asname] if isinstance(node, ast.alias) and node.asname else []


def import_problems(path: str, tree: ast.AST) -> list[str]:
    """Imports that a file may not have."""
    room, found = room_of(path), []
    allowed = RULES.get(room, set()) | COMPOSERS.get(path, set()) | {room}
    for name in imports(tree):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif parts[0] in OUTSIDE:
            found.append(f"the package must not import {parts[0]}")
        elif parts[0] == "ml_collections" and path not in ("config.py", "cli.py"):
            found.append("ml_collections outside config.py and cli.py")
        elif parts[0] in ("jax", "jaxlib") and room in NO_JAX:
            found.append(f"{room} must not import jax")
        elif parts[0] == "os" and parts[-1] in ("environ", "getenv") and path != "cli.py":
            found.append("environment variables are read in cli.py only")
        elif parts[0] == "nanochat_jax" and not entry(path):
            other = parts[1] if len(parts) > 1 else "the whole package"
            if other not in allowed | {"__version__"}:
                found.append(f"{room} must not import {other}")
            elif room == "optim" and other == "kernels" and not {*parts[2:3]} <= OPTIM_KERNELS:
                found.append("optim may import kernels.int8 and kernels.symmetric only")
    return found


def problems(path: str, source: str) -> list[str]:
    """What is wrong with a file of the package; `path` is relative to it."""
    tree, lines = ast.parse(source), len(source.splitlines())
    found = import_problems(path, tree)
    if lines > MAX_LINES:
        found.append(f"{lines} lines, at most {MAX_LINES}")
    if path.endswith("__main__.py") and lines > MAX_MAIN_LINES:
        found.append(f"{lines} lines, at most {MAX_MAIN_LINES} for a __main__")
    for node in ast.walk(tree):
        found += [f"name {n}: state a neutral value instead" for n in defined(node) if n.startswith("use_")]
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and path != "cli.py":
            found.append("environment variables are read in cli.py only")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if {"cfg", "config"} & set(re.findall(r"\w+", ast.unparse(node.func.value).split("(")[0])):
                found.append("a config has no .get: every key exists")
        elif ast.unparse(node.func) == "print" and not entry(path) and path not in PRINTERS:
            found.append("print outside the command line")
    return found


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def entry(path: str) -> bool:
    return path.endswith("__main__.py") or path in ("cli.py", "__init__.py")


FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if "configs" not in p.parts)


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path):
    assert problems(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("model/x.py", "from nanochat_jax import optim", "model must not import optim"),
        ("model/x.py", "def f():\n    from nanochat_jax.train import loop", "model must not import train"),
        ("model/x.py", "import nanochat_jax", "model must not import the whole package"),
        ("model/x.py", "from nanochat_jax import *", "model must not import *"),
        ("model/x.py", "import importlib\nimportlib.import_module('nanochat_jax.optim')", "not import optim"),
        ("optim/x.py", "import nanochat_jax.model.layers", "optim must not import model"),
        ("optim/x.py", "from nanochat_jax.kernels import attention", "kernels.symmetric only"),
        ("parallel.py", "from nanochat_jax import optim", "parallel must not import optim"),
        ("checkpoint.py", "from nanochat_jax import parallel", "checkpoint must not import parallel"),
        ("telemetry/x.py", "from nanochat_jax import params", "telemetry must not import params"),
        ("telemetry/x.py", "import jax", "telemetry must not import jax"),
        ("data/x.py", "import jax.numpy as jnp", "data must not import jax"),
        ("data/x.py", "from jax import numpy", "data must not import jax"),
        ("types.py", "from nanochat_jax import config", "types must not import config"),
        ("train/step.py", "from nanochat_jax.evals import loss", "train must not import evals"),
        ("train/program.py", "from nanochat_jax import serve", "train must not import serve"),
        ("inference/engine.py", "from nanochat_jax import tokenizer", "inference must not import tokenizer"),
        ("newroom/x.py", "from nanochat_jax import types", "newroom must not import types"),
        ("model/x.py", "from . import layers", "relative import"),
        ("model/x.py", "from configs import tiny", "must not import configs"),
        ("model/x.py", "import ml_collections", "ml_collections outside"),
        ("model/x.py", "from ml_collections import ConfigDict", "ml_collections outside"),
        ("model/x.py", "import os\nos.environ['A']", "environment variables"),
        ("model/x.py", "from os import getenv", "environment variables"),
        ("model/x.py", "import os\nos.getenv('A')", "environment variables"),
        ("model/x.py", "def f(cfg):\n    return cfg.get('a')", "no .get"),
        ("model/x.py", "def f(config):\n    return config.model.get('a')", "no .get"),
        ("model/x.py", "def f(use_bias):\n    pass", "name use_bias"),
        ("model/x.py", "class C:\n    use_bias: bool = False", "name use_bias"),
        ("model/x.py", "def f(x):\n    x.use_bias = 1", "name use_bias"),
        ("model/x.py", "def use_bias():\n    pass", "name use_bias"),
        ("model/x.py", "print(1)", "print outside"),
        ("model/x.py", "\n" * 501, "501 lines"),
        ("train/__main__.py", "\n" * 61, "61 lines"),
    ],
)
def test_every_check_can_fail(path, source, message):
    assert any(message in problem for problem in problems(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("optim/x.py", "from nanochat_jax.kernels import int8, symmetric"),
        ("optim/x.py", "from nanochat_jax.kernels.int8 import quantize"),
        ("data/x.py", "import grain\nfrom nanochat_jax import tokenizer"),
        ("train/loop.py", "from nanochat_jax import checkpoint, losses, optim, parallel\nimport jax"),
        ("train/__main__.py", "from nanochat_jax import cli, evals\nprint(1)"),
        ("cli.py", "import os\nos.environ['A']\nimport ml_collections\nprint(1)"),
        ("telemetry/console.py", "print(1)"),
        ("model/x.py", "def f(table, cfg):\n    return table.get(cfg.norm)"),
        ("model/x.py", "\n" * 500),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert problems(path, source) == []


def test_every_room_has_a_rule():
    assert {room_of(path) for path in FILES} - {"cli", "__init__", "__main__"} <= set(RULES)


def test_exceptions_are_needed():
    """An exception that nothing uses any more must go."""
    for path, extra in COMPOSERS.items():
        names = {name.split(".")[1] for name in imports(ast.parse((ROOT / path).read_text())) if "." in name}
        assert extra <= names, f"{path} no longer imports {extra - names}"
    for path in PRINTERS:
        assert "print(" in (ROOT / path).read_text()


def test_environment_page_is_complete():
    """Each variable that cli.py names stands in docs/environment.md."""
    source = (ROOT / "cli.py").read_text()
    names = set(re.findall(r"environ(?:\.get|\.setdefault|)[(\[]\s*['\"]([A-Z_]+)", source))
    page = (REPOSITORY / "docs/environment.md").read_text()
    assert "NANOCHAT_JAX_HOME" in names
    assert sorted(name for name in names if f"`{name}`" not in page) == []


def test_setting():
    """What conftest.py promises holds in every test."""
    assert jax.default_backend() == "cpu" and jax.device_count() == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    cached = "JAX_COMPILATION_CACHE_DIR" in os.environ
    assert jax.config.jax_enable_compilation_cache == cached


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_network_is_refused(call):
    with socket.socket() as outside, pytest.raises(OSError, match="must not use the network"):
        getattr(outside, call)(("192.0.2.1", 80))  # an address reserved for documentation
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_children_see_one_device(child_env):
    assert "XLA_FLAGS" in os.environ and "XLA_FLAGS" not in child_env
