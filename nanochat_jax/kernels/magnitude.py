"""Maxima of magnitudes that do not lose a NaN.

The bits of non-negative floats, read as integers, are ordered as the floats are, with infinity above all
numbers and NaN above infinity. Float maxima drop NaN: XLA's on CPU (its fast form, jax 0.10.2) depending
on where it stands, Triton's always. XLA's CPU backend vectorizes maxima of floats along a row but not of
integers (five times slower, jax 0.10.2 and 0.12), so there `row_largest` folds rows element by element.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import dispatch

SHORT = 32  # numbers of a row that are not worth folding


def bits(x: jax.Array) -> jax.Array:
    """int32 bits of |x|; x: float32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def as_float(bits: jax.Array) -> jax.Array:
    """float32 of int32 bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest(x: jax.Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> jax.Array:
    """max |x| over axes, NaN if one of them is; x: float32."""
    return as_float(jnp.max(bits(x), axis, keepdims=keepdims))


def row_largest(x: jax.Array) -> jax.Array:
    """`largest` of each row, [..., 1]; x: float32 [..., n]. The same numbers, quicker on CPU.

    Not of rows that may be split over devices: folding would send them, where a maximum sends one number.
    """
    left, folds = bits(x), dispatch.backend() == "cpu" and dispatch.whole()
    while folds and left.shape[-1] > SHORT and left.shape[-1] % 2 == 0:
        half = left.shape[-1] // 2
        left = jnp.maximum(left[..., :half], left[..., half:])
    return as_float(jnp.max(left, -1, keepdims=True))
