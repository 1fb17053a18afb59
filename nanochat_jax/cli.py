"""The one door: flags -> Config, errors in one line, runtime set-up, interrupts.

Every room's `__main__` is `cli.run("room", main, flags)`. Nothing here imports jax before the
configuration is resolved, so `--help` and mistakes are answered at once. Only this file reads
environment variables.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanochat_jax import __version__
from nanochat_jax import config as config_lib
from nanochat_jax.config import Config, ConfigError

# Rooms that can be run are those that have a `__main__`.
ROOMS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/__main__.py")))
SHARED_FLAGS = {
    "config": "path or name of a config, argument behind a colon: configs/tiny.py:preset=portable",
    "workdir": "where outputs go; default runs/<name>",
    "verbosity": "1 (or -v) shows tracebacks",
    "help": "this text",
    "help_config": "list every setting with its type, default and meaning",
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
        flags = self.__dict__.get("flags", {})  # absent while a copy is being made
        if name in flags:
            return flags[name]
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

    Exit status: 0 done, 1 failed, 2 usage or config, 3 environment (a missing package or device),
    4 verification mismatch, 130 interrupted. Errors of this package print one line; --verbosity=1
    adds the traceback.
    """
    argv = sys.argv[1:]
    verbose = "-v" in argv or bool(re.search(r"(^|\s)--verbosity[= ][1-9]", " ".join(argv)))
    try:
        wanted = {"--help_config", "--help=config", "--help", "-h"} & set(argv)
        if wanted:
            print(_help(room, flags or {}) if wanted <= {"--help", "-h"} else config_lib.describe())
            sys.stdout.flush()
            sys.exit(0)
        invocation = parse(argv, flags or {})
        if needs_config and not invocation.config_path:
            known = ", ".join(_configs())
            raise UsageError(f"--config is missing, e.g. --config=configs/tiny.py; known: {known}")
        config = load(invocation) if invocation.config_path else Config()
        status = main(config, invocation)
    except ConfigError as error:
        _fail("usage" if isinstance(error, UsageError) else "config", error, 2, verbose)
    except KeyboardInterrupt:
        _fail("interrupted", "stopped at once; the last checkpoint is intact", 130, verbose)
    except BrokenPipeError:  # `... --help_config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes once more
        sys.exit(1)
    except Exception as error:
        failed = _status(error)
        if failed is None:
            raise
        told = verbose or type(error).__module__.startswith("nanochat_jax")
        sentence = str(error) or f"{type(error).__name__}, JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        _fail("error", f"{sentence}{'' if told else ' (--verbosity=1 shows where)'}", failed, verbose)
    sys.exit(status or 0)


def _status(error: Exception) -> int | None:
    """Exit status of an error that one line explains; None for one that needs its traceback."""
    if type(error).__module__.startswith("nanochat_jax"):
        return getattr(error, "exit_code", 1)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("nanochat_jax"):
        return 3
    raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
    if raised_by.endswith("xla_bridge.py"):  # jax: the platform that was asked for has no device
        return 3
    here = str(Path(__file__).parent)
    plain = isinstance(error, (ValueError, NotImplementedError)) and raised_by.startswith(here)
    return 1 if plain or isinstance(error, OSError) else None


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
        if word == "-v":
            word = "--verbosity=1"
        if not word.startswith("--"):
            raise UsageError(f"unexpected '{word}'; settings are written --config.group.key=value")
        name, equals, text = word[2:].partition("=")
        if not equals and _takes_value(name, known) and rest and not rest[0].startswith("--"):
            text, equals = rest.pop(0), "="
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if not equals and _takes_value(name, known):
                raise UsageError(f"--{name} needs a value: --{name}=...")
            overrides[key] = text if equals else "true"
        elif name.startswith("noconfig.") and not equals:
            overrides[name.removeprefix("noconfig.")] = "false"
        elif name in shared:
            if not text:
                raise UsageError(f"--{name} needs a value: {SHARED_FLAGS[name]}")
            shared[name] = text
        elif name in known:
            values[name] = _value(name, known[name], text, bool(equals))
        else:
            raise UsageError(f"no flag --{name}{_nearest_flag(name, known)}")
    return Invocation(shared["config"], overrides, values, tuple(argv), shared["workdir"])


def _nearest_flag(name: str, known: dict[str, Flag]) -> str:
    if name in config_lib.all_keys():
        return f". Did you mean --config.{name}?"
    close = difflib.get_close_matches(name, [*known, *SHARED_FLAGS], 1)
    return f". Did you mean --{close[0]}?" if close else "; see --help"


def _takes_value(name: str, known: dict[str, Flag]) -> bool:
    """Whether a flag without `=` takes the next word. Unknown settings do: their error comes later."""
    if name.startswith("config."):
        return config_lib.all_keys().get(name.removeprefix("config.")) is not bool
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
        value = kind(text)
    except ValueError:
        raise UsageError(f"--{name} must be {kind.__name__}, got '{text}'") from None
    if kind is float and not math.isfinite(value):
        raise UsageError(f"--{name} must be finite, got '{text}'")
    return value


def load(invocation: Invocation) -> Config:
    """Read the config file, apply the overrides and resolve. Raises: ConfigError."""
    settings = read_config(invocation.config_path)
    for key, text in invocation.overrides.items():
        _override(settings, key, text, Path(invocation.config_path).name)
    try:
        return config_lib.resolve(settings)
    except ConfigError as error:
        raise ConfigError(f"{error} ({Path(invocation.config_path).name})") from None


def _override(settings: ConfigDict, key: str, text: str, source: str) -> None:
    kinds = config_lib.all_keys()
    if any(known.startswith(f"{key}.") for known in kinds):
        raise ConfigError(f"'{key}' is a group of settings; see --help_config for those in it")
    if key not in kinds:
        raise ConfigError(f"no key '{key}'{config_lib.nearest_key(key)} ({source})")
    value = _convert(key, kinds[key], text)
    *path, last = key.split(".")
    group: Any = settings
    try:
        for part in path:
            group = group[part]
        group[last] = value
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{source} has no setting '{key}' of the usual type; start from nanochat_jax.config.defaults()"
        ) from None


def _convert(key: str, kind: Any, text: str) -> Any:
    """The text of an override as the key's type. Raises: ConfigError."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"'{key}' must be true or false, got '{text}'")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f"'{key}' must be {getattr(kind, '__name__', kind)}, got '{text}'") from None
    if kind not in (int, float) and not isinstance(value, (tuple, list)):
        value = (value,)
    return config_lib.typed(kind, value, key)


def get_config(name: str, /, **overrides: Any) -> Config:
    """For notebooks: `get_config("tiny", **{"train.steps": 50})` -> Config."""
    return load(Invocation(name, {key: str(value) for key, value in overrides.items()}, {}, ()))


def read_config(reference: str) -> ConfigDict:
    """Settings of `path_or_name[:argument]`: a config file, a packaged name, or a run's config.json.

    A config file may call it to start from another one: `config = cli.read_config("tiny")`.
    Raises: ConfigError listing the places looked at and the known names; or what the file did wrong.
    """
    path, argument = _locate(reference)
    if path.suffix == ".json":
        if argument:
            raise ConfigError(f"{path.name} takes no argument, got '{argument}'")
        return _read_json(path)
    module = types.ModuleType(f"_config_{path.stem}")
    module.__file__ = str(path)
    try:
        # Not imported: that would leave __pycache__ behind, and a file that changes within a second
        # to another one of the same size (a sweep) would be read from there.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        maker = getattr(module, "get_config", None)
        if maker is None:
            raise ConfigError(f"{path.name} has no function get_config(arg)")
        if argument and not inspect.signature(maker).parameters:
            raise ConfigError(f"config argument '{argument}': {path.name} takes none")
        settings = maker(argument) if inspect.signature(maker).parameters else maker()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_what_is_wrong(path, error)) from error
    if not isinstance(settings, ConfigDict):
        raise ConfigError(
            f"{path.name}: get_config returned {type(settings).__name__}, expected a ConfigDict; "
            "start from nanochat_jax.config.defaults() and return it"
        )
    return settings


def _read_json(path: Path) -> ConfigDict:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold an object of settings, got {type(given).__name__}")
    return config_lib.from_json(given)


def _what_is_wrong(path: Path, error: Exception) -> str:
    """One sentence for an exception that a config file raised, with its line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}, line {error.lineno}: {error.msg}"
    where = f"{path.name}, line {lines[-1]}" if lines else path.name
    if isinstance(error, (KeyError, AttributeError)) and "ml_collections" in frames[-1].filename:
        key = re.search(r"^\W*(?:Key\W+)?(\w+)", str(error))
        if key:
            return f"{where}: no key '{key[1]}'{config_lib.nearest_key(key[1])}"
    sentence = (str(error).splitlines() or [""])[0]
    return f"{where}: {type(error).__name__}: {sentence}"


def _places() -> list[Path]:
    here = Path(__file__).parent
    return [Path("configs"), here / "configs", here.parent / "configs"]


def _locate(reference: str) -> tuple[Path, str]:
    """The file of `path_or_name[:argument]`, and the argument. Raises: ConfigError."""
    name, argument = reference, ""
    if not Path(reference).expanduser().is_file():
        name, _, argument = reference.partition(":")
    path = Path(name).expanduser()
    candidates = [path if path.suffix in (".py", ".json") else Path(f"{path}.py")]
    if name and not path.is_absolute():
        inner = candidates[0].relative_to("configs") if path.parts[0] == "configs" else candidates[0]
        candidates += [place / inner for place in _places()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate, argument
    known = _configs()
    close = difflib.get_close_matches(path.stem, known, 1, 0.5)
    looked = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise ConfigError(
        f"no config '{name}' (looked for {looked}); known: {', '.join(known)}"
        + (f". Did you mean '{close[0]}'?" if close else "")
    )


def _configs() -> dict[str, str]:
    """Names of the known configs and the first line of each one's docstring."""
    found: dict[str, str] = {}
    for place in reversed(_places()):
        for path in sorted(place.glob("*.py")):
            found[path.stem] = _first_line(path)
    return found


def _first_line(path: Path) -> str:
    """First line of a Python file's docstring; the file is parsed, not imported."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return "(cannot be read as Python)"
    return doc.splitlines()[0] if doc else ""


def _help(room: str, flags: dict[str, Flag]) -> str:
    lines = [f"usage: python -m nanochat_jax.{room} --config=<config> [--config.group.key=value ...]", ""]
    lines += [f"  --{name:<14} {text}" for name, text in SHARED_FLAGS.items()]
    for name, flag in flags.items():
        choices = f" ({', '.join(flag.choices)})" * bool(flag.choices)
        shown = f" (default {flag.default})" if flag.default not in ("", False) else ""
        lines.append(f"  --{name:<14} {flag.help}{choices}{shown}")
    lines += ["", "configs (looked for in ./configs, then in the package):"]
    lines += [f"  {name:<16} {text}" for name, text in _configs().items()]
    return "\n".join(lines)


def cache_home() -> Path:
    """Directory for tokens and compiled programs: NANOCHAT_JAX_HOME, or ~/.cache/nanochat_jax."""
    if home := os.environ.get("NANOCHAT_JAX_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_jax"


def workdir(cfg: Config, invocation: Invocation) -> Path:
    """The run's directory: the flag, else the config's, else runs/<name>."""
    return Path(invocation.workdir or cfg.workdir or f"runs/{cfg.name}").expanduser()


def record(room: str, invocation: Invocation) -> dict[str, Any]:
    """What was asked for, for the manifest: command, config file and its hash, overrides, environment."""
    digest = None
    if invocation.config_path:
        digest = hashlib.sha256(_locate(invocation.config_path)[0].read_bytes()).hexdigest()
    return {
        "command": ["python", "-m", f"nanochat_jax.{room}", *invocation.argv],
        "config_file": invocation.config_path,
        "config_file_sha256": digest,
        "overrides": invocation.overrides,
        "environment": relevant_environment(),
    }


def relevant_environment() -> dict[str, str]:
    """Environment variables that can change a run's numbers or speed, for the manifest."""
    prefixes = ("JAX_", "XLA_", "NANOCHAT_JAX_", "NCCL_", "CUDA_VISIBLE", "OMP_NUM", "MALLOC_", "TRACEPARENT")
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
    if devices > 1 and _only_cpu() and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={devices}".strip()
        log.info("pretending that the CPU is %d devices, for the mesh", devices)
    _keep_freed_memory()
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _only_cpu() -> bool:
    """Whether jax will find nothing but the CPU, judged without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
    return not any(importlib.util.find_spec(name) for name in plugins)


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: XLA's CPU backend allocates its buffers anew every step, and
    getting zeroed pages from the kernel each time costs about a tenth of a small model's step."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return  # the user has chosen
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


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
        # Not print: a handler may interrupt a print, whose buffer must not be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving; again to stop at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main() -> None:
    """Console script: `nanochat-jax <room> [flags]`."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word == "--version":
        print(__version__)
    elif word in ("-h", "--help"):
        print(_rooms())
    elif word in ROOMS:
        sys.argv = [f"nanochat-jax {word}", *sys.argv[2:]]
        runpy.run_module(f"nanochat_jax.{word}", run_name="__main__", alter_sys=False)
    else:
        wrong = f"usage error: no room '{word}'{config_lib.nearest(word, ROOMS)}"
        print(wrong if word else _rooms(), file=sys.stderr)
        sys.exit(2)


def _rooms() -> str:
    lines = ["usage: nanochat-jax <room> [flags]", ""]
    package = Path(__file__).parent
    lines += [f"  {room:<12} {_first_line(package / room / '__main__.py')}" for room in ROOMS]
    return "\n".join([*lines, "", "nanochat-jax <room> --help lists a room's flags; --version"])
