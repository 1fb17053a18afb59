"""How much memory an optimizer's state takes, counted on the real state without allocating it."""

import math
from typing import Any

import jax
import optax

from nanochat_jax.params import flatten, owner


def state_bytes(tx: optax.GradientTransformation, params: Any) -> dict[str, int]:
    """Bytes of `tx.init(params)` by parameter.

    Args: params: tree of arrays, `jax.ShapeDtypeStruct` or anything else with shape and dtype.
    Returns: {path of a parameter: bytes of the state whose path ends in it}, in the parameters'
    order, and under "" what belongs to none (counters). Buffers of one byte and more per element,
    without what an allocator adds.

    >>> import jax.numpy as jnp, optax
    >>> state_bytes(optax.adam(0.1), {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)})
    {'b': 64, 'w': 512, '': 4}
    """
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    names = list(flatten(shapes))
    totals = dict.fromkeys(names, 0) | {"": 0}
    for path, leaf in flatten(jax.eval_shape(tx.init, shapes)).items():
        totals[owner(path, names) or ""] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return totals


def by_group(bytes_of: dict[str, int], sizes: dict[str, int], groups: dict[str, str]) -> dict[str, float]:
    """Bytes of state per parameter in each group.

    Args: bytes_of: from `state_bytes`. sizes: path -> elements. groups: path -> group.
    Returns: {group: bytes per parameter}, and under "all" that of the whole tree, counters included.
    """
    result = {}
    for group in dict.fromkeys(groups.values()):
        paths = [path for path, name in groups.items() if name == group]
        result[group] = sum(bytes_of[p] for p in paths) / sum(sizes[p] for p in paths)
    return result | {"all": sum(bytes_of.values()) / sum(sizes.values())}
