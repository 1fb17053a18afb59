"""The key/value cache: allocation and rollback. Writing happens in the model's forward pass."""

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import loop, transformer
from nanochat_jax.types import KVCache


def allocate(cfg: ModelConfig, batch: int, capacity: int, loops: str = "all") -> KVCache:
    """An empty cache of `capacity` slots for `batch` rows, zero-filled.

    loops: whose keys and values are kept: "all", or the "last" one's only, which takes 1 / R of the memory
    and changes what tokens after the prompt see (arXiv:2510.25741 measured it to be harmless).
    Zeros and not garbage: masked slots still enter a product with probability 0, and 0 * NaN is NaN.
    """
    dtype = transformer.compute_dtype(cfg)

    def pair(*layers: int) -> tuple[jax.Array, jax.Array]:
        shape = (*layers, batch, capacity, cfg.kv_heads, cfg.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    outside = {name: pair(own.layers) for name, own in loop.outside(cfg).items()}
    kept = cfg.loop.count if loops == "all" else 1
    return KVCache(*pair(kept, cfg.layers), jnp.zeros((batch,), jnp.int32), outside)


def roll_back(cache: KVCache, length: jax.Array) -> KVCache:
    """Forget everything behind `length` [B]; later tokens overwrite it."""
    return cache.replace(length=length)
