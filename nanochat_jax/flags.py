"""The words of a command line: flags with types, settings, and what is wrong with them."""

import dataclasses
import difflib
import math
from typing import Any

from nanochat_jax import config as config_lib
from nanochat_jax.config import ConfigError

SHARED_FLAGS = {
    "config": "path or name of a config, argument behind a colon: configs/tiny.py:preset=portable",
    "workdir": "where outputs go; default runs/<name>",
    "verbosity": "1 (or -v) shows tracebacks",
    "help": "this text",
    "help_config": "list every setting with its type, default and meaning",
}


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


# Flags of a room whose command may run as several processes; `cli.joined` reads them.
PROCESS_FLAGS = {
    "distributed": Flag("auto", "join the processes that a launcher has started", ("auto", "off", "on")),
    "coordinator": Flag("", "host:port of process 0; default: as the launcher says"),
    "num_processes": Flag(0, "processes of the run; 0: as the launcher says"),
    "process_id": Flag(-1, "this process's number, from 0; -1: as the launcher says"),
    "join_timeout": Flag(300, "seconds to wait for the other processes at the start"),
    "heartbeat_timeout": Flag(60, "seconds after which a silent process counts as lost"),
}


class UsageError(ConfigError):
    """The command line is wrong."""


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
