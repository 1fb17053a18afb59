"""Pallas kernels of the packed ternary product, in the subset that lowers through Triton and also
runs in interpret mode (explicit compiler_params: without them jax 0.10 picks another backend).

What limits few rows is how many instructions a weight costs, not only its two bits: an H200 reads
four weights a byte faster than it could take them apart one by one. So weights are taken apart as
words of 32 bits. `gemv` masks 16 codes out of a word and multiplies four at a time with four
activations (dp4a): about 0.6 instructions a weight. `gemm` turns words into the operands of tensor
cores, int8 or bfloat16, without a conversion: 0.8 to 1.6 and 1.9 to 2.7. Both multiply with codes,
t + 1, and take the sum of the activations off again. Either cuts the inputs into `split_k` parts, summed
afterwards in a fixed order, so that few rows still fill the device and results repeat.

Not yet measured on a GPU: checked in interpret mode, and compiled for cards without one; the counts
are of the machine code (experiments/kernels). Layout of the codes: `kernels.ternary`.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from nanochat_jax.kernels import triton, tuning
from nanochat_jax.kernels.tuning import Blocks

GROUP, PLANE = 256, 64  # as in kernels.ternary
WORD = 16  # codes of a word
MASK = 0x03030303  # the lowest code of each byte of a word
GEMV_ROWS = 2  # rows whose four sums per output still fit in registers
MIN_OUTPUTS = 16  # the least width of a tensor core's tile
# A code in the lowest bits of bfloat16's exponent is code * 2^-126; activations come times RAISED, so that
# their products stay within float32's range.
RAISED, LOWERED = 2.0**64, 2.0**62


def dot(
    x_MK: jax.Array,
    codes: jax.Array,
    scale: jax.Array | None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product as in `ternary.ternary_dot`, of x [M, K]; floating x below 2^63.

    Args: blocks: tile sizes; None looks them up in the table. interpret: run the kernel's code without
    compiling it.
    Raises: NotImplementedError for outputs that are no multiple of 16, groups of inputs that cut planes
    of 64, and what a gemv does not take: more than 2 rows, other activations than int8, scales of groups.
    """
    M, K = x_MK.shape
    N, depth = codes.shape[0], codes.shape[1] * 4
    if N % MIN_OUTPUTS:
        raise NotImplementedError(f"{N} outputs are no multiple of {MIN_OUTPUTS}")
    if scale is not None and (K // scale.shape[0]) % PLANE:
        raise NotImplementedError(f"groups of {K // scale.shape[0]} inputs are no multiple of {PLANE}")
    if x_MK.dtype == jnp.float32:
        parts = jnp.concatenate(_bfloat16_parts(x_MK))
        return jnp.sum(dot(parts, codes, scale, blocks, interpret).reshape(3, M, N), axis=0)
    b = tuning.blocks(x_MK.dtype, M, N, K, grouped=scale is not None) if blocks is None else blocks
    if b.form == "gemv" and (M > GEMV_ROWS or x_MK.dtype != jnp.int8 or scale is not None):
        got = f"{M} of {x_MK.dtype}" + ("" if scale is None else ", scales of groups")
        raise NotImplementedError(f"a gemv takes at most {GEMV_ROWS} rows of int8 and one scale, got {got}")
    x = jnp.pad(x_MK, [(0, 0), (0, depth - K)])  # padding meets weights of zero
    b = _fit(b, N, depth // GROUP)
    if b.form == "gemv":
        y = _gemv_call(x, codes, b, interpret)
    else:
        y = _gemm_call(x, codes, scale, b, K, interpret)
    if scale is None:  # off again what codes, t + 1, have added
        y = y - jnp.sum(x_MK, -1, keepdims=True, dtype=y.dtype)
    return y.astype(jnp.float32)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is x, float32."""
    parts = []
    for _ in range(3):
        # The compiler may otherwise take a rounding there and back for nothing.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def _fit(b: Blocks, outputs: int, groups: int) -> Blocks:
    """With a width that divides the outputs, and no more parts than groups of inputs."""
    width = b.bn
    while outputs % width:
        width //= 2
    return b._replace(bn=width, split_k=min(b.split_k, groups))


def _bounds(steps: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """First and last step of this program, whose part is the grid's last axis."""
    each = -(-steps // parts)
    first = pl.program_id(2) * each
    return first, jnp.minimum(first + each, steps)


# --- a few rows


def _gemv_call(x, codes, b: Blocks, interpret: bool) -> jax.Array:
    (M, depth), N = x.shape, codes.shape[0]
    groups = depth // GROUP
    # Words of activations by planes, as the codes' words meet them: [M, 4, K / 16].
    x = jax.lax.bitcast_convert_type(x.reshape(M, groups, 4, WORD, 4), jnp.int32)
    x = x.swapaxes(1, 2).reshape(M, 4, groups * WORD)
    codes = jax.lax.bitcast_convert_type(codes.reshape(N, groups * WORD, 4), jnp.int32)
    words = triton.tile(groups, b.bm // WORD) * WORD
    steps = groups * WORD // words
    parts = min(b.split_k, steps)
    made = pl.pallas_call(
        functools.partial(_gemv, words=words, steps=steps, parts=parts, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((parts, M, N), jnp.int32),
        grid=(1, N // b.bn, parts),
        in_specs=[
            pl.BlockSpec((M, 4, groups * WORD), lambda i, j, s: (0, 0, 0)),
            pl.BlockSpec((b.bn, groups * WORD), lambda i, j, s: (j, 0)),
        ],
        out_specs=pl.BlockSpec((None, M, b.bn), lambda i, j, s: (s, 0, j)),
        compiler_params=plt.CompilerParams(num_warps=b.num_warps, num_stages=b.num_stages),
        interpret=interpret,
    )(x, codes)
    return made[0] if parts == 1 else jnp.sum(made, axis=0)


def _gemv(x_ref, codes_ref, out_ref, *, words: int, steps: int, parts: int, interpret: bool):
    """bn outputs of one part of the inputs; each word is masked once for all rows."""
    rows, outputs = out_ref.shape

    def step(i, totals):
        here = pl.ds(i * words, words)
        packed, totals = codes_ref[:, here], list(totals)
        for j in range(4):
            four = packed & (MASK << 2 * j if j < 3 else (MASK << 6) - (1 << 32))  # codes times 4^j
            for m in range(rows):
                x = jnp.broadcast_to(x_ref[m, j, here][None], four.shape)
                totals[4 * m + j] = triton.dot4(four, x, totals[4 * m + j], interpret)
        return tuple(totals)

    zero = jnp.zeros((outputs, words), jnp.int32)
    totals = jax.lax.fori_loop(*_bounds(steps, parts), step, (zero,) * (4 * rows))
    for m in range(rows):
        out_ref[m, :] = jnp.sum(sum(totals[4 * m + j] >> 2 * j for j in range(4)), axis=1)


# --- tensor cores


def _gemm_call(x, codes, scale, b: Blocks, inputs: int, interpret: bool) -> jax.Array:
    (M, depth), N = x.shape, codes.shape[0]
    tiles = -(-M // b.bm)
    x = jnp.pad(x, [(0, tiles * b.bm - M), (0, 0)])  # spare rows are multiplied, and not stored
    integers = x.dtype == jnp.int8
    operands = [x if integers else x * RAISED, codes]
    specs = [
        pl.BlockSpec((b.bm, depth), lambda i, j, s: (i, 0)),
        pl.BlockSpec((b.bn, depth // 4), lambda i, j, s: (j, 0)),
    ]
    planes_per_scale = 0
    if scale is not None:
        planes_per_scale = inputs // scale.shape[0] // PLANE
        count = -(-(depth // PLANE) // planes_per_scale)
        sums = jnp.sum(x.reshape(len(x), -1, PLANE), -1, dtype=jnp.int32 if integers else jnp.float32)
        scale = jnp.pad(scale, [(0, count - scale.shape[0]), (0, 0)])
        operands += [sums, scale] if integers else [sums / LOWERED, scale * LOWERED]
        specs += [
            pl.BlockSpec((b.bm, depth // PLANE), lambda i, j, s: (i, 0)),
            pl.BlockSpec((count, b.bn), lambda i, j, s: (0, j)),
        ]
    dtype = jnp.int32 if integers and scale is None else jnp.float32
    made = pl.pallas_call(
        functools.partial(
            _gemm, rows=M, groups=depth // GROUP, parts=b.split_k, planes_per_scale=planes_per_scale,
            interpret=interpret,
        ),
        out_shape=jax.ShapeDtypeStruct((b.split_k, M, N), dtype),
        grid=(tiles, N // b.bn, b.split_k),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, b.bm, b.bn), lambda i, j, s: (s, i, j)),
        compiler_params=plt.CompilerParams(num_warps=b.num_warps, num_stages=b.num_stages),
        interpret=interpret,
    )(*operands)  # fmt: skip
    y = made[0] if b.split_k == 1 else jnp.sum(made, axis=0)
    return y if integers or scale is not None else y * LOWERED


def _gemm(
    x_ref, codes_ref, *refs, rows: int, groups: int, parts: int, planes_per_scale: int, interpret: bool
):
    """One tile [bm, bn] of one part of the inputs."""
    *grouped, out_ref = refs
    sum_dtype = jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32

    def step(i, total):
        packed = codes_ref[:, pl.ds(i * PLANE, PLANE)]
        for j in range(4):
            x = x_ref[:, pl.ds(i * GROUP + j * PLANE, PLANE)]
            codes = _operand(packed, j, x.dtype, interpret)
            product = jax.lax.dot_general(
                x, codes, (((1,), (1,)), ((), ())), preferred_element_type=sum_dtype
            )
            if grouped:
                (sums_ref, scale_ref), plane = grouped, i * 4 + j
                product = (product - sums_ref[:, pl.ds(plane, 1)]).astype(jnp.float32)
                product *= scale_ref[pl.ds(jax.lax.div(plane, planes_per_scale), 1), :]
            total = total + product
        return total

    total = jax.lax.fori_loop(*_bounds(groups, parts), step, jnp.zeros(out_ref.shape, out_ref.dtype))
    real = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0) + pl.program_id(0) * len(total) < rows
    plt.store(out_ref.at[...], total, mask=real if rows % len(total) else None)


def _operand(packed: jax.Array, j: int, dtype, interpret: bool) -> jax.Array:
    """The codes of plane j of bytes: int8, or bfloat16 times 2^-126; of packed's shape.

    Four bytes are taken apart at a time, in a word: as int8 by a shift and a mask, as bfloat16 by spreading
    them over two words first, whose codes are then shifted to the lowest bits of the exponents.
    """
    if interpret:
        codes = (packed >> (2 * j)) & 3
        if dtype == jnp.int8:
            return codes.astype(jnp.int8)
        return jax.lax.bitcast_convert_type(codes.astype(jnp.uint16) << 7, dtype)
    if dtype == jnp.int8:
        lines = [f"shr.b32 $0, $1, {2 * j};", f"and.b32 $0, $0, {MASK};"]
    else:
        lines = [".reg .b32 two;"]
        for half, bytes_ in ((0, 0x4140), (1, 0x4342)):
            lines.append(f"prmt.b32 two, $2, 0, {bytes_}; shl.b32 two, two, {7 - 2 * j};")
            lines.append(f"and.b32 ${half}, two, 0x01800180;")
    (made,) = plt.elementwise_inline_asm(
        "{ " + " ".join(lines) + " }",
        args=[packed],
        constraints="=&r,r" if dtype == jnp.int8 else "=&r,=&r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, dtype)],
    )
    return made
