"""From logits to a token: greedy, temperature, top-k, top-p, in that order of narrowing."""

import jax
import jax.numpy as jnp

from nanochat_jax.types import Key


def narrow(logits_BV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Log-probabilities (unnormalized) with the tokens that may not be drawn at -inf.

    Args: logits: float32 [B, V]. temperature > 0. top_k: keep the k likeliest; 0 = all. top_p: keep
    the smallest set whose probability reaches top_p (at least one token).
    All three are traced scalars: changing them compiles nothing.
    """
    scaled = logits_BV / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
    V = ordered.shape[-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, V), V) - 1
    by_rank = jax.lax.dynamic_slice_in_dim(ordered, last, 1, axis=-1)
    shares = jax.nn.softmax(jnp.where(ordered >= by_rank, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # probability of all likelier tokens
    by_share = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= jnp.maximum(by_rank, by_share), scaled, -jnp.inf)


def sample(
    logits_BV: jax.Array, key: Key, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Draw one token per row, int32 [B]; temperature 0 takes the likeliest."""
    drawn = jax.random.categorical(key, narrow(logits_BV, temperature, top_k, top_p), axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
