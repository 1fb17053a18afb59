"""The key/value cache: allocation and rollback. Writing happens in the model's forward pass."""

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import loop, transformer
from nanochat_jax.types import KVCache


def allocate(cfg: ModelConfig, batch: int, capacity: int) -> KVCache:
    """An empty cache of `capacity` slots for `batch` rows, zero-filled.

    Zeros and not garbage: masked slots still enter a product with probability 0, and 0 * NaN is NaN.
    """
    dtype = transformer.compute_dtype(cfg)

    def pair(*layers: int) -> tuple[jax.Array, jax.Array]:
        shape = (*layers, batch, capacity, cfg.kv_heads, cfg.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    outside = {name: pair(own.layers) for name, own in loop.outside(cfg).items()}
    return KVCache(*pair(cfg.loop.count, cfg.layers), jnp.zeros((batch,), jnp.int32), outside)


def roll_back(cache: KVCache, length: jax.Array) -> KVCache:
    """Forget everything behind `length` [B]; later tokens overwrite it."""
    return cache.replace(length=length)
