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


def _instructions(text: str, *args: jax.typing.ArrayLike) -> jax.Array:
    """Result ($0) of PTX on float32 arguments ($1 ...), element by element; all of the first one's shape."""
    shape = args[0].shape
    (result,) = plt.elementwise_inline_asm(
        text, args=[jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in args], pack=1,
        constraints=",".join(["=f", *("f" for _ in args)]),
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )  # fmt: skip
    return result


def divide(a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    """a / b in float32, rounded to nearest even."""
    return a / b if interpret else _instructions("div.rn.f32 $0, $1, $2;", a, b)


def divide_many(a: jax.Array, b: jax.Array, inverse: jax.Array, interpret: bool) -> jax.Array:
    """`divide` by b in [1, 2), inverse = divide(1, b), in three instructions; for a = 0 or at least 2^-100.

    The product with a correctly rounded inverse is about an ulp off, its remainder is exact, and correcting by
    that gives the correctly rounded quotient (P. Markstein, IBM J. Res. Dev. 34, 1990; the tests compare).
    Smaller a may be an ulp off.
    """
    if interpret:
        return a / b
    near = "mul.rn.f32 q, $1, $3; neg.f32 n, q; fma.rn.f32 r, n, $2, $1; fma.rn.f32 $0, r, $3, q;"
    return _instructions("{ .reg .f32 q, n, r; " + near + " }", a, b, inverse)


def multiply_add(a: jax.Array, b: float, c: jax.typing.ArrayLike, interpret: bool) -> jax.Array:
    """a b + c in float32, rounded once; in interpret mode only if a b is exact."""
    return a * b + c if interpret else _instructions("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def floor_add(a: jax.Array, c: float, interpret: bool) -> jax.Array:
    """floor(a) + c in float32, c an integer of at least 2^23: an addition that rounds down. a >= 0."""
    return jnp.floor(a) + c if interpret else _instructions("add.rm.f32 $0, $1, $2;", a, c)


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


def beside(parts: list[jax.Array]) -> jax.Array:
    """[m, n] each, 2^k of them -> [m, 2^k n]: one behind the other along the second axis."""
    if len(parts) == 1:
        return parts[0]
    left, right = (beside(half) for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]))
    return jnp.stack([left, right], -1).swapaxes(1, 2).reshape(len(left), -1)


def down(blocks: jax.Array, rows: int) -> jax.Array:
    """[m / b, n] -> [m, n] for m = `rows`: each entry repeated for the b rows of its block."""
    few, columns = blocks.shape
    if few == rows:
        return blocks
    return jnp.broadcast_to(blocks[:, None, :], (few, rows // few, columns)).reshape(rows, columns)


def random_bits(first_row, first_column: int, shape: tuple[int, int], width: int, salt_ref) -> jax.Array:
    """`noise.hashed` of the elements of a tile of a matrix; uint32 of `shape`.

    `width`: columns of the matrix, a power of two up to 2^16. What a row's elements share is hashed once.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) + first_row
    columns = jax.lax.broadcasted_iota(jnp.uint32, (1, shape[1]), 1) + jnp.uint32(first_column)
    return noise.hashed(rows.astype(jnp.uint32) * jnp.uint32(width), salt_ref[0], salt_ref[1], columns)
