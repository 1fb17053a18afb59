"""Maxima of magnitudes that do not lose a NaN.

The bits of non-negative floats, read as integers, are ordered as the floats are, with infinity above all
numbers and NaN above infinity. Float maxima drop NaN: XLA's on CPU (its fast form, jax 0.10.2) depending
on where it stands, Triton's always.
"""

import jax
import jax.numpy as jnp


def bits(x: jax.Array) -> jax.Array:
    """int32 bits of |x|; x: float32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def as_float(bits: jax.Array) -> jax.Array:
    """float32 of int32 bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest(x: jax.Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> jax.Array:
    """max |x| over axes, NaN if one of them is; x: float32."""
    return as_float(jnp.max(bits(x), axis, keepdims=keepdims))
