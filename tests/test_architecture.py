"""The import rule and the house rules, checked by parsing every file; each check can fail."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nanochat_jax"

BASE = {"types", "validation", "config", "params", "tokenizer"}
# Room -> rooms it may import. `__main__` files and cli may import anything.
RULES: dict[str, set[str]] = {
    "types": set(), "validation": {"config"}, "config": {"validation"}, "params": {"types"}, "tokenizer": set(),
    "kernels": BASE,
    "quant": BASE | {"kernels"},
    "model": BASE | {"kernels", "quant"},
    "losses": BASE | {"kernels", "quant", "model"},
    "optim": BASE | {"kernels"},
    "parallel": BASE,
    "data": BASE,
    "checkpoint": BASE,
    "telemetry": {"config"},
    "train": BASE | {"kernels", "quant", "model", "losses", "optim", "parallel", "data", "checkpoint", "telemetry"},
    "inference": BASE | {"kernels", "quant", "model", "parallel", "checkpoint"},
    "evals": BASE | {"kernels", "quant", "model", "losses", "inference", "data"},
    "bench": BASE | {"kernels", "quant", "model", "losses", "optim", "parallel", "data", "train"},
}  # fmt: skip
# Composition of a whole run from its parts, as a `__main__` would do in 60 lines less.
COMPOSERS = {"train/program.py"}
NO_JAX = {"data", "telemetry", "config", "tokenizer"}


def imports(tree):
    """Dotted names imported anywhere in a file; relative imports start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "nanochat_jax":
                yield from (f"nanochat_jax.{alias.name}" for alias in node.names)
            else:
                yield module


def problems(path: str, source: str) -> list[str]:
    """What is wrong with a file of the package; `path` is relative to it."""
    tree, room = ast.parse(source), path.split("/")[0].removesuffix(".py")
    entry = path.endswith("__main__.py") or path in ("cli.py", "__init__.py") or path in COMPOSERS
    found = []
    lines = source.count("\n")
    if lines > 500:
        found.append(f"{lines} lines, at most 500")
    if path.endswith("__main__.py") and lines > 60:
        found.append(f"{lines} lines, at most 60 for a __main__")
    for name in imports(tree):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"relative import {name}")
        elif parts[0] == "nanochat_jax" and len(parts) > 1 and not entry:
            other = parts[1]
            if other != room and other not in RULES[room] and other != "__version__":
                found.append(f"{room} must not import {other}")
            if room == "optim" and other == "kernels" and parts[2:] != ["int8"]:
                found.append("optim may import kernels.int8 only")
        elif parts[0] == "ml_collections" and path not in ("config.py", "cli.py"):
            found.append("ml_collections outside config.py and cli.py")
        elif parts[0] == "jax" and room in NO_JAX:
            found.append(f"{room} must not import jax")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and path != "cli.py":
            found.append("environment variables are read in cli.py only")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("cfg", "config"):
                found.append("a config has no .get: every key exists")
        names = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        found += [f"name {name}: state a neutral value instead" for name in names if name.startswith("use_")]
        if (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            and not entry and path not in ("telemetry/console.py", "train/verify.py")
        ):  # fmt: skip
            found.append("print outside the command line")
    return found


FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if "configs" not in p.parts)


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path):
    assert problems(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("model/x.py", "from nanochat_jax import optim", "model must not import optim"),
        ("optim/x.py", "import nanochat_jax.model.layers", "optim must not import model"),
        ("optim/x.py", "from nanochat_jax.kernels import attention", "kernels.int8 only"),
        ("data/x.py", "import jax.numpy as jnp", "data must not import jax"),
        ("train/step.py", "from nanochat_jax.evals import loss", "train must not import evals"),
        ("model/x.py", "from . import layers", "relative import"),
        ("model/x.py", "import ml_collections", "ml_collections outside"),
        ("model/x.py", "import os\nos.environ['A']", "environment variables"),
        ("model/x.py", "def f(cfg):\n    return cfg.get('a')", "no .get"),
        ("model/x.py", "def f(use_bias):\n    pass", "name use_bias"),
        ("model/x.py", "print(1)", "print outside"),
        ("model/x.py", "\n" * 501, "501 lines"),
        ("train/__main__.py", "\n" * 61, "61 lines"),
    ],
)
def test_every_check_can_fail(path, source, message):
    assert any(message in problem for problem in problems(path, source))


def test_every_room_has_a_rule():
    rooms = {path.split("/")[0].removesuffix(".py") for path in FILES} - {"cli", "__init__", "__main__"}
    assert rooms <= set(RULES)
