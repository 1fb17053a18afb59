"""The one door: flags -> Config, errors in one line, runtime set-up, interrupts.

Every room's `__main__` is `cli.run("room", main, flags)`. Nothing here imports jax before the configuration
is resolved, so `--help` and mistakes are answered at once. Only this file reads environment variables.
"""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import faulthandler
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanochat_jax import __version__, cluster
from nanochat_jax import config as config_lib
from nanochat_jax.config import Config, ConfigError
from nanochat_jax.flags import PROCESS_FLAGS as PROCESS_FLAGS
from nanochat_jax.flags import SHARED_FLAGS, Flag, Invocation, UsageError, parse
from nanochat_jax.processes import Interrupt as Interrupt

# Rooms that can be run are those that have a `__main__`.
ROOMS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/__main__.py")))
log = logging.getLogger("nanochat_jax")
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def run(
    room: str,
    main: Callable[[Config, Invocation], int | None],
    flags: dict[str, Flag] | None = None,
    needs_config: bool = True,
) -> None:
    """Parse the command line, resolve the config, call main(config, invocation), exit.

    Exit status: 0 done, 1 failed, 2 usage or config, 3 environment (a missing package or device),
    4 verification mismatch, 70 another process of the run was lost, 71 stalled, 130 interrupted. Errors of this package print one line; --verbosity=1
    adds the traceback.
    """
    argv = sys.argv[1:]
    verbose = _verbose(argv)
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
    except (Exception, KeyboardInterrupt) as error:
        status = explain(error, verbose)
        if status is None:
            raise
    sys.exit(status or 0)


def _verbose(argv: list[str]) -> bool:
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    words = (word if word != "--verbosity" else f"{word}={after}" for word, after in pairs)
    return any(word == "-v" or re.fullmatch(r"--verbosity=[1-9]\d*", word) for word in words)


def explain(error: BaseException, verbose: bool = False, who: str = "") -> int | None:
    """Print one line about an error. Returns the exit status; None, and nothing printed, for one that
    needs its traceback. `who` stands before the line."""
    if isinstance(error, ConfigError):
        kind = "usage error" if isinstance(error, UsageError) else "config error"
        return _tell(who + kind, error, 2, verbose)
    if isinstance(error, KeyboardInterrupt):
        return _tell(who + "interrupted", "stopped at once; the last checkpoint is intact", 130, verbose)
    if isinstance(error, BrokenPipeError):  # `... --help_config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes once more
        return 1
    failed = _status(error) if isinstance(error, Exception) else None
    if failed is None:
        return None
    told = verbose or type(error).__module__.startswith("nanochat_jax")
    sentence = str(error) or f"{type(error).__name__}, JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
    return _tell(
        who + "error", f"{sentence}{'' if told else ' (--verbosity=1 shows where)'}", failed, verbose
    )


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


def _tell(kind: str, error: Any, status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"{kind}: {error}", file=sys.stderr)
    return status


def load(invocation: Invocation) -> Config:
    """Read the config file, apply the overrides and resolve. Raises: ConfigError."""
    settings = read_config(invocation.config_path)
    for key, text in invocation.overrides.items():
        _override(settings, key, text, Path(invocation.config_path).name)
    try:
        return config_lib.resolve(settings)
    except ConfigError as error:
        raise ConfigError(f"{error} ({Path(invocation.config_path).name})") from None


def trained(call: Invocation) -> tuple[Path, Config]:
    """The run in --workdir, and its own settings unless --config is given, with the overrides.

    Raises: UsageError if there is no run; ConfigError.
    """
    if not call.workdir:
        raise UsageError("--workdir is missing: the directory of a trained run, e.g. runs/tiny")
    home = Path(call.workdir)
    if not (home / "config.json").exists():
        raise UsageError(f"--workdir={home} is not a run: it has no config.json")
    return home, load(dataclasses.replace(call, config_path=call.config_path or str(home / "config.json")))


def check_base(cfg: Config, home: Path) -> None:
    """Before anything is read: is there a run in ckpt.init_from, which a run that begins in `home` starts from?

    Raises: ConfigError with the command that makes it.
    """
    base = cfg.ckpt.init_from
    if base and not any(found for place in (home, Path(base)) for found in (place / "ckpt").glob("[0-9]*")):
        name = Path(base).name if Path(base).name in _configs() else "<its config>"
        raise ConfigError(
            f"'ckpt.init_from' = '{base}' is no run with a checkpoint; make it with: "
            f"python -m nanochat_jax.train --config={name} --workdir={base}"
        )


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
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes) and not k.endswith("_KEY")}


def api_key() -> str:
    """The key that clients of the server must send; "" = none."""
    return os.environ.get("NANOCHAT_JAX_API_KEY", "")


@contextlib.contextmanager
def joined(cfg: Config, call: Invocation) -> Iterator[bool]:
    """Prepare the process before jax starts, and meet the others of a run of several processes.

    Yields: are there several? Then an error inside ends the process here: the ordinary way out would
    wait for the others, and they for this one.
    """
    place = cluster.detect(os.environ, call.flags, call.distributed)
    setup_runtime(cfg, place.count if place else 1)
    if place is None:
        yield False
        return
    if place.index:  # process 0 speaks for all
        logging.getLogger().setLevel(logging.ERROR)
    try:
        print(place, file=sys.stderr, flush=True)
        cluster.join(place)
        yield True
    except (Exception, KeyboardInterrupt) as error:
        who = f"process {place.index} of {place.count}: "
        status = explain(error, _verbose(list(call.argv)), who)
        if status is None:
            print(who + traceback.format_exc(), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if status is None else status)


def setup_runtime(cfg: Config, processes: int = 1, keep_freed: bool = True) -> None:
    """Prepare the process before jax starts; never overrides what the user set.

    keep_freed: memory once used stays with the process: right for large steps of the same sizes. Not for short
    ones: an answer's tokens take a third longer when all threads share one arena (experiments/inference).
    Raises: ConfigError if the mesh cannot be shared equally by so many processes (0: unknown).
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.unraisablehook = _past_ended_loops(sys.unraisablehook)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    devices = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor
    if processes and devices % processes:
        raise ConfigError(
            f"'mesh.data * mesh.fsdp * mesh.tensor' = {devices} must be a multiple of the number of processes, "
            f"{processes}"
        )
    several, devices = devices > 1, devices // (processes or devices)
    if devices > 1 and _only_cpu() and _add_xla_flag("xla_force_host_platform_device_count", devices):
        log.info("pretending that the CPU is %d devices, for the mesh", devices)
    if several and _maybe_gpus():
        _add_xla_flag("xla_gpu_enable_latency_hiding_scheduler", "true")  # exchange beside products
    if keep_freed:
        _keep_freed_memory()
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr is closed, or no file
            faulthandler.enable()  # a crash below Python says where
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _add_xla_flag(name: str, value: object) -> bool:
    """Set a flag of XLA's; False where the user has set it."""
    given = os.environ.get("XLA_FLAGS", "")
    if name in given:
        return False
    os.environ["XLA_FLAGS"] = f"{given} --{name}={value}".strip()
    return True


def _past_ended_loops(hook: Callable[..., None]) -> Callable[..., None]:
    """An unraisablehook without what threads of Orbax's say after a save has failed, as often as there are writes
    left: that the event loop, to which they report, has ended. The failure itself is told in a sentence."""

    def told(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" or unraisable.exc_type is not RuntimeError:
            hook(unraisable)

    return told


def _only_cpu() -> bool:
    """Whether jax will find nothing but the CPU, judged without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in (*GPU_PLUGINS, "libtpu"))


def _maybe_gpus() -> bool:
    """Whether jax may find GPUs, judged likewise."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return any(name in platforms for name in ("cuda", "gpu", "rocm"))
    return any(importlib.util.find_spec(name) for name in GPU_PLUGINS)


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: zeroed pages anew in every step cost a tenth of a small model's step.

    In one arena: the others' parts are too small for a step's arrays, which then are taken from it anyway.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return  # the user has chosen
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # arena_max, mmap_max, trim_threshold
            libc.mallopt(option, value)


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
