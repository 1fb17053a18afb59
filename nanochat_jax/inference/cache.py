"""The key/value cache: allocation and rollback. Writing happens in the model's forward pass."""

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import transformer
from nanochat_jax.types import KVCache


def allocate(cfg: ModelConfig, batch: int, capacity: int) -> KVCache:
    """An empty cache of `capacity` slots for `batch` rows, zero-filled.

    Zeros and not garbage: masked slots still enter a product with probability 0, and 0 * NaN is NaN.
    """
    shape = (cfg.loop.count, cfg.layers, batch, capacity, cfg.kv_heads, cfg.head_dim)
    dtype = transformer.compute_dtype(cfg)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def roll_back(cache: KVCache, length: jax.Array) -> KVCache:
    """Forget everything behind `length` [B]; later tokens overwrite it."""
    return cache.replace(length=length)
