"""Random bits for rounding: a hash of the element's index, cheap enough to run inside the rounding loop.

Rounding needs numbers that are uniform and unrelated between elements and steps, nothing more; the
library's generator would cost several times the rest of an encoding.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.types import Key


def hashed_bits(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: a function of the key (consumed) and of each element's index alone.

    So the bits do not depend on how the array is split over devices. Indices wrap beyond 2^32 elements.
    """
    salt = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(_mix(index ^ salt[0]) ^ salt[1])


def _mix(x: jax.Array) -> jax.Array:
    """Permutation of uint32 in which every bit of the input moves every bit of the output."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
