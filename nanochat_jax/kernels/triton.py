"""What the Pallas kernels share, in the subset that lowers through Triton and runs in interpret mode.

Two traps of that lowering: its maximum and minimum drop NaN, see `kernels.magnitude`; and its division is
an approximation, so where bits must be those of a definition, `divide` asks for the exact instruction.
"""

import jax
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from nanochat_jax.kernels import noise


def tile(size: int, most: int) -> int:
    """The largest power of two that divides `size`, at most `most` (a power of two)."""
    return min(size & -size, most)


def divide(a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    """a / b in float32, rounded to nearest even; both of one shape."""
    if interpret:
        return a / b
    (quotient,) = plt.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;", args=[a, b], constraints="=f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )  # fmt: skip
    return quotient


def dot4(a: jax.Array, b: jax.Array, total: jax.Array, interpret: bool) -> jax.Array:
    """total + a . b over the four bytes of each word: unsigned ones of a, signed ones of b; all int32, one shape."""
    if interpret:
        for shift in range(0, 32, 8):
            total = total + (a >> shift & 255) * (b << 24 - shift >> 24)
        return total
    (sums,) = plt.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $1, $2, $3;", args=[a, b, total], constraints="=r,r,r,r", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.int32)],
    )  # fmt: skip
    return sums


def along(blocks: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[m, n / b] -> [m, n]: each entry repeated for the b neighbours of its block."""
    repeated = jnp.broadcast_to(blocks[:, :, None], (*blocks.shape, shape[1] // blocks.shape[1]))
    return repeated.reshape(shape)


def down(blocks: jax.Array, rows: int) -> jax.Array:
    """[m / b, n] -> [m, n] for m = `rows`: each entry repeated for the b rows of its block."""
    few, columns = blocks.shape
    if few == rows:
        return blocks
    return jnp.broadcast_to(blocks[:, None, :], (few, rows // few, columns)).reshape(rows, columns)


def random_bits(first_row, first_column, shape: tuple[int, int], width: int, salt_ref) -> jax.Array:
    """`noise.hashed` of the elements of a tile of a matrix of `width` columns; uint32 of `shape`."""
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_row
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first_column
    index = rows.astype(jnp.uint32) * jnp.uint32(width) + columns.astype(jnp.uint32)
    return noise.hashed(index, salt_ref[0], salt_ref[1])
