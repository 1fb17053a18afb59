"""Pallas kernel of a symmetric product: tiles on and above the diagonal, mirrored.

The grid counts pairs of tiles (i, j), i <= j, and matrices of the stack: T (T + 1) / 2 programs for T x T
tiles. A program multiplies tile i of the rows of x with tile j of the rows of y, which stand for y's
columns, and writes the result and its transpose.

Not yet measured on a GPU: checked in interpret mode, and compiled for cards without one.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

TILE, DEPTH = 128, 64  # rows of a tile, inputs of a step; smaller for small matrices


def dot(x: jax.Array, y: jax.Array, interpret: bool = False) -> jax.Array:
    """x y^T, known to be symmetric.

    Args: x, y: [B, m, k], one dtype. Rows and inputs are filled up with zeros to whole tiles.
    Returns: [B, m, m], exactly symmetric, in that dtype; accumulated in float32.
    """
    B, m, k = x.shape
    side = min(TILE, max(16, 1 << (m - 1).bit_length()))
    depth = min(DEPTH, max(16, 1 << (k - 1).bit_length()))
    spare = ((0, 0), (0, -m % side), (0, -k % depth))
    same = y is x
    x = jnp.pad(x, spare)
    y = x if same else jnp.pad(y, spare)
    tiles, inputs = x.shape[1] // side, x.shape[2]
    made = pl.pallas_call(
        functools.partial(_dot, side=side, depth=depth),
        out_shape=jax.ShapeDtypeStruct((B, x.shape[1], x.shape[1]), x.dtype),
        grid=(tiles * (tiles + 1) // 2, B),
        in_specs=[pl.BlockSpec((None, x.shape[1], inputs), lambda p, b: (b, 0, 0))] * 2,
        out_specs=pl.BlockSpec((None, x.shape[1], x.shape[1]), lambda p, b: (b, 0, 0)),
        compiler_params=plt.CompilerParams(num_warps=8 if side == TILE else 4, num_stages=3),
        interpret=interpret,
    )(x, y)
    return made[:, :m, :m]


def pair(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(i, j), 0 <= i <= j, of the pair with number p (int32): column j starts at j (j + 1) / 2."""
    j = jnp.floor((jnp.sqrt(8.0 * p.astype(jnp.float32) + 1.0) - 1.0) * 0.5).astype(jnp.int32)
    # A square root that is a rounding error off may be one column off.
    j = j - ((j * (j + 1) >> 1) > p).astype(jnp.int32)
    j = j + (((j + 1) * (j + 2) >> 1) <= p).astype(jnp.int32)
    return p - (j * (j + 1) >> 1), j


def _dot(x_ref, y_ref, out_ref, *, side: int, depth: int):
    i, j = pair(pl.program_id(0))
    rows, columns = pl.ds(i * side, side), pl.ds(j * side, side)
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(s, total):
        inputs = pl.ds(s * depth, depth)
        contract_last = (((1,), (1,)), ((), ()))
        return total + jax.lax.dot_general(
            x_ref[rows, inputs], y_ref[columns, inputs], contract_last,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    total = jax.lax.fori_loop(0, x_ref.shape[1] // depth, step, jnp.zeros((side, side), jnp.float32))
    tile = total.astype(out_ref.dtype)
    # On the diagonal both stores meet the same place, and the sums of (a, b) and (b, a) may differ in the
    # last bit: made equal, so that the order of the stores does not matter.
    a, b = (jax.lax.broadcasted_iota(jnp.int32, (side, side), axis) for axis in (0, 1))
    tile = jnp.where((i == j) & (a > b), tile.T, tile)
    out_ref[rows, columns] = tile
    out_ref[columns, rows] = tile.T
