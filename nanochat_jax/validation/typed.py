"""The types of settings."""

import math
import types
import typing
from typing import Any

from nanochat_jax.validation.checks import ConfigError


def typed(kind: Any, value: Any, path: str) -> Any:
    """The value as `kind`: int is accepted for float, lists become tuples. Raises: ConfigError.

    Of a union of a number and a tuple the value's own form decides.
    """
    if isinstance(kind, types.UnionType):
        several = isinstance(value, (list, tuple))
        kind = next(k for k in typing.get_args(kind) if (typing.get_origin(k) is tuple) == several)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"'{path}' must be a tuple, got {value!r}")
        items = typing.get_args(kind)
        inner = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
        if len(inner) != len(value):
            raise ConfigError(f"'{path}' must have {len(inner)} entries, got {value!r}")
        return tuple(typed(k, v, path) for k, v in zip(inner, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"'{path}' must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"'{path}' must be finite, got {value}")
    return value
