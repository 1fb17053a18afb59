"""The key/value cache: allocation, rollback, and copies of single rows. Writing happens in the model's
forward pass.

Whatever a cache holds has the axes [.., B, G, T, K]; the functions here know no more of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from nanochat_jax.config import ModelConfig
from nanochat_jax.kernels import dispatch
from nanochat_jax.model import loop, transformer
from nanochat_jax.types import KVCache


def allocate(
    cfg: ModelConfig, batch: int, capacity: int, loops: str = "all", future: bool = False
) -> KVCache:
    """An empty cache of `capacity` slots for `batch` rows, zero-filled.

    loops: whose keys and values are kept: "all", or the "last" one's only, which takes 1 / R of the memory
    and changes what tokens after the prompt see (arXiv:2510.25741 measured it to be harmless). future: room
    for the layers of multi-token prediction, which draft.
    Zeros and not garbage: masked slots still enter a product with probability 0, and 0 * NaN is NaN.
    """
    dtype = transformer.compute_dtype(cfg)

    def pair(*layers: int) -> tuple[jax.Array, jax.Array]:
        shape = (*layers, batch, cfg.kv_heads, capacity, cfg.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    outside = {name: pair(own.layers) for name, own in loop.outside(cfg).items()}
    if future:
        outside["mtp"] = pair(cfg.mtp.depth)
    kept = cfg.loop.count if loops == "all" else 1
    return KVCache(*pair(kept, cfg.layers), jnp.zeros((batch,), jnp.int32), outside)


def in_order(state: Any) -> Any:
    """The same, with the caches in it laid out in memory as their axes say.

    XLA for GPUs would lay them out otherwise within a loop, and turn them around, whole, before and after it.
    """
    if dispatch.backend() != "gpu":
        return state
    pin = lambda a: with_layout_constraint(a, Layout(major_to_minor=tuple(range(a.ndim))))  # noqa: E731
    is_cache = lambda x: isinstance(x, KVCache)  # noqa: E731
    return jax.tree.map(lambda x: jax.tree.map(pin, x) if is_cache(x) else x, state, is_leaf=is_cache)


def roll_back(cache: KVCache, length: jax.Array) -> KVCache:
    """Forget everything behind `length` [B]; later tokens overwrite it."""
    return cache.replace(length=length)


def take(cache: KVCache, row: jax.Array, length: jax.Array) -> KVCache:
    """The first `length` tokens of one row, as a cache of one row with as many slots.

    What stands behind them is zero in the copy, so that an earlier request that met a NaN leaves nothing.
    Args: row, length: int32 [].
    """

    def copy(a: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(a, row, 1, axis=a.ndim - 4)
        kept = (jnp.arange(a.shape[-2]) < length).reshape(*(1,) * (a.ndim - 2), -1, 1)
        return jnp.where(kept, one, jnp.zeros((), a.dtype))

    copied = jax.tree.map(copy, cache.replace(length=None))
    return copied.replace(length=jnp.reshape(length, (1,)).astype(jnp.int32))


def insert(cache: KVCache, prefix: KVCache, row: jax.Array) -> KVCache:
    """Replace row `row` (int32 []) by the only row of `prefix`, which has as many slots."""

    def put(a: jax.Array, one: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(a, one, row, axis=a.ndim - 4)

    written = jax.tree.map(put, cache.replace(length=None), prefix.replace(length=None))
    return written.replace(length=cache.length.at[row].set(prefix.length[0]))
