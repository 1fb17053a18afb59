"""The sentences that several checks share: expected, got, where, and the nearest valid name."""

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting is wrong. The message says what was expected, what was got, and where."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`. Did you mean 'x'?` for the closest known name, or the list of names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f". Did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def choice(path: str, value: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ConfigError(f"'{path}' = '{value}' is unknown{nearest(value, known)}")


def at_least(path: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"'{path}' must be at least {low}, got {value}")


def divides(path: str, value: int, by_path: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"'{path}' = {value} must be a multiple of '{by_path}' = {by}")


def unused(path: str, settings: Any, why: str, keys: Iterable[str]) -> None:
    """A changed setting of a technique that is off is a mistake."""
    for key in keys:
        if getattr(settings, key) != getattr(type(settings)(), key):
            raise ConfigError(f"'{path}.{key}' has no effect because {why}")
