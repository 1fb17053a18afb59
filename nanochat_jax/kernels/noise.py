"""Random bits for rounding: a hash of the element's index, cheap enough to run inside the rounding loop.

Rounding needs numbers that are uniform and unrelated between elements and steps, nothing more; the
library's generator would cost several times the rest of an encoding. Kernels hash the same indices with
the same words, so they draw the same bits.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.types import Key


def hashed_bits(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: a function of the key (consumed) and of each element's index alone.

    So the bits do not depend on how the array is split over devices. Indices wrap beyond 2^32 elements.
    """
    words = salt(key)
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return hashed(index, words[0], words[1])


def salt(key: Key) -> jax.Array:
    """The two words, uint32 [2], that stand for a key (consumed) in `hashed`."""
    return jax.random.bits(key, (2,), jnp.uint32)


def hashed(index: jax.Array, first: jax.Array, second: jax.Array, offset: jax.Array | int = 0) -> jax.Array:
    """uint32 bits of elements by their index (uint32, in the order of rows) and the two words of `salt`.

    offset: uint32 below 2^16, added to indices whose bits it leaves as they are: neighbours share the first step.
    """
    x = index ^ first
    x = _multiplied((x ^ (x >> 16)) ^ offset)
    # Of two such mixings with words in between the last step of the first, x ^ x >> 16, and the first step of the
    # second undo each other, but for what the word leaves.
    x = _multiplied(x ^ (second ^ (second >> 16)))
    return x ^ (x >> 16)


def _multiplied(x: jax.Array) -> jax.Array:
    """Between a shift by 16 before and one after, a permutation in which every bit moves every bit."""
    x = x * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
