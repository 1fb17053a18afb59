"""The one door: flags -> Config, errors in one line, runtime set-up, interrupts.

Every room's `__main__` is `cli.run("room", main, flags)`. Nothing here imports jax before the
configuration is resolved, so `--help` and mistakes are answered at once. Only this file reads
environment variables.
"""

import ast
import ctypes
import dataclasses
import difflib
import importlib.util
import json
import logging
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanochat_jax import __version__
from nanochat_jax import config as config_lib
from nanochat_jax.config import Config, ConfigError

ROOMS = ("train", "inference", "bench")
SHARED_FLAGS = {
    "config": "path or name of a config, argument behind a colon: configs/tiny.py:preset=portable",
    "workdir": "where outputs go; default runs/<name>",
    "verbosity": "1 shows tracebacks",
    "help": "this text",
    "help_config": "list every setting",
}
log = logging.getLogger("nanochat_jax")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a room: its default gives its type; a bool needs no value."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What was typed: the config's file, the overrides of its keys, and the room's flags."""

    config_path: str
    overrides: dict[str, str]
    flags: dict[str, Any]
    argv: tuple[str, ...]
    workdir: str = ""

    def __getattr__(self, name: str) -> Any:
        if name in self.flags:
            return self.flags[name]
        raise AttributeError(name)


class UsageError(ConfigError):
    """The command line is wrong."""


def run(
    room: str,
    main: Callable[[Config, Invocation], int | None],
    flags: dict[str, Flag] | None = None,
    needs_config: bool = True,
) -> None:
    """Parse the command line, resolve the config, call main(config, invocation), exit.

    Exit status: 0 done, 1 failed, 2 usage or config, 3 environment, 130 interrupted.
    Errors of this package print one line; --verbosity=1 adds the traceback.
    """
    argv = sys.argv[1:]
    verbose = any(a in ("--verbosity=1", "-v") for a in argv)
    try:
        if "--help" in argv or "-h" in argv:
            print(_help(room, flags or {}))
            sys.exit(0)
        if "--help_config" in argv:
            print(_help_config())
            sys.exit(0)
        invocation = parse(argv, flags or {})
        if needs_config and not invocation.config_path:
            raise UsageError(
                f"--config is missing, e.g. --config=configs/tiny.py; known: {', '.join(_configs())}"
            )
        config = load(invocation) if invocation.config_path else Config()
        status = main(config, invocation)
    except ConfigError as error:
        _fail("usage" if isinstance(error, UsageError) else "config", error, 2, verbose)
    except KeyboardInterrupt:
        _fail("interrupted", "stopped at once; the last checkpoint is intact", 130, verbose)
    except Exception as error:
        if _is_ours(error) or isinstance(error, OSError):
            _fail("error", error, getattr(error, "exit_code", 1), verbose)
        raise
    sys.exit(status or 0)


def _is_ours(error: Exception) -> bool:
    raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
    here = str(Path(__file__).parent)
    return type(error).__module__.startswith("nanochat_jax") or (
        isinstance(error, (ValueError, NotImplementedError)) and raised_by.startswith(here)
    )


def _fail(kind: str, error: Any, status: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"{kind}{'' if kind in ('error', 'interrupted') else ' error'}: {error}", file=sys.stderr)
    sys.exit(status)


def parse(argv: list[str], known: dict[str, Flag]) -> Invocation:
    """Split the command line. Raises: UsageError for an unknown flag, a bad value, or leftovers."""
    values = {name: flag.default for name, flag in known.items()}
    shared = {"config": "", "workdir": "", "verbosity": "0"}
    overrides: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected '{word}'; settings are written --config.group.key=value")
        name, equals, text = word[2:].partition("=")
        if not equals and _takes_value(name, known) and rest and not rest[0].startswith("--"):
            text, equals = rest.pop(0), "="
        if name.startswith("config."):
            overrides[name[len("config.") :]] = text if equals else "true"
        elif name in shared:
            shared[name] = text
        elif name in known:
            values[name] = _value(name, known[name], text, bool(equals))
        else:
            close = difflib.get_close_matches(name, [*known, *SHARED_FLAGS], 1)
            raise UsageError(
                f"no flag --{name}" + (f". Did you mean --{close[0]}?" if close else "; see --help")
            )
    return Invocation(shared["config"], overrides, values, tuple(argv), shared["workdir"])


def _takes_value(name: str, known: dict[str, Flag]) -> bool:
    return name in ("config", "workdir", "verbosity") or (
        name in known and not isinstance(known[name].default, bool)
    )


def _value(name: str, flag: Flag, text: str, given: bool) -> Any:
    if isinstance(flag.default, bool):
        if text not in ("", "true", "false"):
            raise UsageError(f"--{name} must be true or false, got '{text}'")
        return text != "false"
    if not given:
        raise UsageError(f"--{name} needs a value: {flag.help}")
    if flag.choices and text not in flag.choices:
        raise UsageError(f"--{name} must be one of {', '.join(flag.choices)}, got '{text}'")
    kind = type(flag.default)
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"--{name} must be {kind.__name__}, got '{text}'") from None


def load(invocation: Invocation) -> Config:
    """Read the config file, apply the overrides and resolve. Raises: ConfigError."""
    settings = read_config(invocation.config_path)
    kinds = config_lib.all_keys()
    for key, text in invocation.overrides.items():
        if key not in kinds:
            raise ConfigError(
                f"no key '{key}'{config_lib.nearest_key(key)} ({Path(invocation.config_path).name})"
            )
        group: Any = settings
        *path, last = key.split(".")
        for part in path:
            group = group[part]
        group[last] = _convert(key, kinds[key], text)
    return config_lib.resolve(settings)


def _convert(key: str, kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"'{key}' must be true or false, got '{text}'")
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(f"'{key}' must be {getattr(kind, '__name__', kind)}, got '{text}'") from None
    if kind in (int, float):
        return value
    return value if isinstance(value, tuple) else (value,)


def get_config(name: str, **overrides: Any) -> Config:
    """For notebooks: `get_config("tiny", **{"train.steps": 50})` -> Config."""
    return load(Invocation(name, {key: str(value) for key, value in overrides.items()}, {}, ()))


def read_config(reference: str) -> ConfigDict:
    """Settings of `path_or_name[:argument]`: a config file, a packaged name, or a run's config.json.

    Raises: ConfigError listing the places looked at and the known names; or what the file did wrong.
    """
    name, _, argument = reference.partition(":")
    path = _find(name)
    if path.suffix == ".json":
        try:
            return ConfigDict(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(argument)
    except ConfigError:
        raise
    except (AttributeError, KeyError) as error:
        missing = str(error).strip("\"'").split("'")[0].split("\n")[0]
        raise ConfigError(f"{path.name}: {missing}{config_lib.nearest_key(missing)}") from None
    except Exception as error:
        raise ConfigError(f"{path.name}: {type(error).__name__}: {error}") from None


def _places() -> list[Path]:
    here = Path(__file__).parent
    return [Path("configs"), here / "configs", here.parent / "configs"]


def _find(name: str) -> Path:
    candidates = [Path(name)]
    if not Path(name).is_absolute():
        file = Path(name).name if Path(name).suffix else f"{Path(name).name}.py"
        candidates += [place / file for place in _places()]
    for path in candidates:
        if path.is_file() and path.suffix in (".py", ".json"):
            return path
    looked = ", ".join(str(p.parent) for p in candidates)
    raise ConfigError(f"no config '{name}' (looked in {looked}){config_lib.nearest(name, _configs())}")


def _configs() -> dict[str, str]:
    """Names of the known configs and the first line of each one's docstring."""
    found: dict[str, str] = {}
    for place in reversed(_places()):
        for path in sorted(place.glob("*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.stem] = doc.splitlines()[0] if doc else ""
    return found


def _help(room: str, flags: dict[str, Flag]) -> str:
    lines = [f"usage: python -m nanochat_jax.{room} --config=<config> [--config.group.key=value ...]", ""]
    lines += [f"  --{name:<14} {text}" for name, text in SHARED_FLAGS.items()]
    for name, flag in flags.items():
        shown = f" (default {flag.default})" if flag.default not in ("", False) else ""
        lines.append(f"  --{name:<14} {flag.help}{shown}")
    lines += ["", "configs:"] + [f"  {name:<16} {text}" for name, text in _configs().items()]
    return "\n".join(lines)


def _help_config() -> str:
    """Every key with its type, default and comment, read from the source of config.py."""
    lines = Path(config_lib.__file__ or "").read_text().splitlines()
    comments: dict[tuple[str, str], str] = {}
    owner = ""
    for line in lines:
        if line.startswith("class "):
            owner = line[6:].split("(")[0].rstrip(":")
        elif owner and ":" in line and "#" in line:
            comments[owner, line.split(":")[0].strip()] = line.split("#", 1)[1].strip()
    out = []

    def walk(node: Any, prefix: str) -> None:
        for item in dataclasses.fields(node):
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{item.name}.")
            else:
                text = comments.get((type(node).__name__, item.name), "")
                out.append(f"--config.{prefix}{item.name}={value!r}  {text}")

    walk(Config(), "")
    return "\n".join(out)


def cache_home() -> Path:
    """Directory for tokens and compiled programs: NANOCHAT_JAX_HOME, or ~/.cache/nanochat_jax."""
    if home := os.environ.get("NANOCHAT_JAX_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_jax"


def workdir(cfg: Config, invocation: Invocation) -> Path:
    """The run's directory: the flag, else the config's, else runs/<name>."""
    return Path(invocation.workdir or cfg.workdir or f"runs/{cfg.name}")


def relevant_environment() -> dict[str, str]:
    """Environment variables that can change a run's numbers or speed, for the manifest."""
    prefixes = ("JAX_", "XLA_", "NANOCHAT_JAX_", "NCCL_", "CUDA_VISIBLE", "OMP_NUM", "MALLOC_")
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}


def setup_runtime(cfg: Config) -> None:
    """Prepare the process before jax starts; never overrides what the user set."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    devices = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor
    flag = "xla_force_host_platform_device_count"
    on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu"
    if devices > 1 and on_cpu and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={devices}".strip()
        log.info("pretending that the CPU is %d devices, for the mesh", devices)
    _keep_freed_memory()
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: XLA's CPU backend allocates its buffers anew every step, and
    getting zeroed pages from the kernel each time costs about a tenth of a small model's step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to do


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag, read at step boundaries; the second stops now."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing the step, then saving; again to stop at once", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main() -> None:
    """Console script: `nanochat-jax <room> [flags]`."""
    rooms = ", ".join(ROOMS)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word == "--version":
        print(__version__)
    elif word in ROOMS:
        sys.argv = [f"nanochat-jax {word}", *sys.argv[2:]]
        runpy.run_module(f"nanochat_jax.{word}", run_name="__main__", alter_sys=False)
    else:
        print(f"usage: nanochat-jax <room> [flags]; rooms: {rooms}", file=sys.stderr)
        if word not in ("", "-h", "--help"):
            print(f"no room '{word}'{config_lib.nearest(word, ROOMS)}", file=sys.stderr)
            sys.exit(2)
