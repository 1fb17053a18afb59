"""Declare every weight once: shape, logical axes, initial value.

Initialization, sharding, optimizer labels, counts and checkpoint names all derive from one tree
of `ParamSpec`. Paths are the keys joined by "/", e.g. "blocks/attn/q".
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.types import Key, Params

Init = Callable[[Key, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """One weight. Static: never enters jit.

    shape: full shape, leading stacked axes included.
    axes: one logical axis name (or None) per dimension; `parallel.RULES` maps them to the mesh.
    init: function (key, shape) -> float32 array.
    matmul: the weight multiplies token activations (it costs 2 FLOPs per element and token).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    matmul: bool = False

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.shape)} dimensions but {len(self.axes)} axes: {self}")


def zeros(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Initial value 0."""
    return jnp.zeros(shape, jnp.float32)


def constant(value: float | tuple[float, ...]) -> Init:
    """Initial value `value`, or one value per entry of the first axis."""

    def init(key: Key, shape: tuple[int, ...]) -> jax.Array:
        filled = jnp.asarray(value, jnp.float32)
        return jnp.broadcast_to(filled.reshape(filled.shape + (1,) * (len(shape) - filled.ndim)), shape)

    return init


def normal(std: float) -> Init:
    """Normal with standard deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(std: float) -> Init:
    """Uniform with standard deviation `std`: no outliers."""
    bound = math.sqrt(3) * std
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def path_name(path: Iterable[Any]) -> str:
    """Join a jax key path: (DictKey('blocks'), DictKey('q')) -> 'blocks/q'."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(part) for part in parts)


def flatten(tree: Any) -> dict[str, Any]:
    """Map each leaf's path to the leaf, in tree order. ParamSpec and arrays are leaves."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def owner(path: str, names: Iterable[str]) -> str | None:
    """The weight whose state a leaf is: the longest name that the leaf's path ends in, or None.

    >>> owner("0/mu/attn/norm", ["norm", "attn/norm"])
    'attn/norm'
    """
    return max((n for n in names if path == n or path.endswith("/" + n)), key=len, default=None)


def fold_name(key: Key, name: str) -> Key:
    """Fold a key with a stable hash of `name` (Python's own hash is salted per process)."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def init_params(specs: Mapping[str, Any], key: Key) -> Params:
    """Initial parameters. Each key depends on the weight's path alone, so that adding a weight
    never changes another's initial value."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: spec.init(fold_name(key, path_name(path)), spec.shape), specs
    )


def count(specs: Mapping[str, Any], pattern: str = "") -> int:
    """Number of parameters whose path contains a match of `pattern`."""
    return sum(math.prod(s.shape) for p, s in flatten(specs).items() if re.search(pattern, p))


def label(tree: Any, rules: Iterable[tuple[str, str]]) -> Any:
    """Label each leaf by the first rule (regex, label) that matches its whole path.

    Raises: ValueError listing the paths that no rule matches.
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]

    def find(path: str) -> str | None:
        return next((name for regex, name in compiled if regex.fullmatch(path)), None)

    missing = [path for path in flatten(tree) if find(path) is None]
    if missing:
        raise ValueError(f"no label rule matches {', '.join(missing)}; rules: {list(rules)}")
    return jax.tree_util.tree_map_with_path(lambda path, _: find(path_name(path)), tree)
