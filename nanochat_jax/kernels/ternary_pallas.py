"""Pallas kernels of the packed ternary product, in the subset that lowers through Triton and also
runs in interpret mode (explicit compiler_params: without them jax 0.10 picks another backend).

`gemv` multiplies and adds on the plain cores, a few rows against every byte it unpacks; `gemm` feeds
64 unpacked weights of 16 or more rows to the tensor cores. Either cuts the inputs into `split_k`
parts, summed afterwards in a fixed order, so that few rows still fill the device and results repeat.

Not yet measured on a GPU: the kernels are checked in interpret mode and by lowering for CUDA.
Layout of the codes: `kernels.ternary`.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from nanochat_jax.kernels import tuning
from nanochat_jax.kernels.tuning import Blocks

GROUP, PLANE = 256, 64  # as in kernels.ternary
GEMV_ROWS = 16  # rows whose sums still fit in registers
MIN_OUTPUTS = 16  # the least width of a tensor core's tile


def dot(
    x_MK: jax.Array,
    codes: jax.Array,
    scale: jax.Array | None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product as in `ternary.ternary_dot`, of x [M, K].

    Args: blocks: tile sizes; None looks them up in the table. interpret: run the kernel's code without
    compiling it.
    Raises: NotImplementedError for outputs that are no multiple of 16, groups of inputs that cut planes
    of 64, more rows than a gemv takes, or float32 activations (too few bits are left on tensor cores).
    """
    M, K = x_MK.shape
    N, depth = codes.shape[0], codes.shape[1] * 4
    if N % MIN_OUTPUTS:
        raise NotImplementedError(f"{N} outputs are no multiple of {MIN_OUTPUTS}")
    if scale is not None and (K // scale.shape[0]) % PLANE:
        raise NotImplementedError(f"groups of {K // scale.shape[0]} inputs are no multiple of {PLANE}")
    b = tuning.blocks(x_MK.dtype, M, N, K) if blocks is None else blocks
    if b.form == "gemv" and M > GEMV_ROWS:
        raise NotImplementedError(f"a gemv takes at most {GEMV_ROWS} rows, got {M}")
    if b.form == "gemm" and x_MK.dtype == jnp.float32:
        raise NotImplementedError("tensor cores need int8 or bfloat16 activations, got float32")
    rows = M if b.form == "gemv" else -(-M // b.bm) * b.bm
    x = jnp.pad(x_MK, [(0, rows - M), (0, depth - K)])  # padding meets weights of zero
    planes_per_scale = 0
    if scale is not None:
        planes_per_scale = K // scale.shape[0] // PLANE
        count = -(-(depth // PLANE) // planes_per_scale)
        scale = jnp.pad(scale, [(0, count - scale.shape[0]), (0, 0)])
    y = _call(x, codes, scale, _fit(b, N, depth // GROUP), planes_per_scale, interpret)[:M]
    if scale is None and x_MK.dtype == jnp.int8:
        # The kernel multiplied with codes, t + 1: take the row sums off again, exactly.
        y = y - jnp.sum(x_MK, -1, keepdims=True, dtype=jnp.int32)
    return y.astype(jnp.float32)


def _fit(b: Blocks, outputs: int, groups: int) -> Blocks:
    """With a width that divides the outputs, and no more parts than groups of inputs."""
    width = b.bn
    while outputs % width:
        width //= 2
    return b._replace(bn=width, split_k=min(b.split_k, groups))


def _call(x, codes, scale, b: Blocks, planes_per_scale: int, interpret: bool) -> jax.Array:
    (M, depth), N = x.shape, codes.shape[0]
    groups, bm = depth // GROUP, M if b.form == "gemv" else b.bm
    kernel = functools.partial(
        _gemv if b.form == "gemv" else _gemm,
        groups=groups,
        per_part=-(-groups // b.split_k),
        planes_per_scale=planes_per_scale,
    )
    operands = (x, codes) if scale is None else (x, codes, scale)
    specs = [
        pl.BlockSpec((bm, depth), lambda i, j, s: (i, 0)),
        pl.BlockSpec((b.bn, depth // 4), lambda i, j, s: (j, 0)),
        *([] if scale is None else [pl.BlockSpec((scale.shape[0], b.bn), lambda i, j, s: (0, j))]),
    ]
    parts = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((b.split_k, M, N), _sum_dtype(x.dtype, scale)),
        grid=(M // bm, N // b.bn, b.split_k),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, bm, b.bn), lambda i, j, s: (s, i, j)),
        compiler_params=plt.CompilerParams(num_warps=b.num_warps, num_stages=b.num_stages),
        interpret=interpret,
    )(*operands)
    return parts[0] if b.split_k == 1 else jnp.sum(parts, axis=0)


def _sum_dtype(dtype, scale):
    return jnp.int32 if dtype == jnp.int8 and scale is None else jnp.float32


def _bounds(groups: int, per_part: int) -> tuple[jax.Array, jax.Array]:
    """First and last group of inputs of this program."""
    first = pl.program_id(2) * per_part
    return first, jnp.minimum(first + per_part, groups)


def _gemm(x_ref, codes_ref, *refs, groups: int, per_part: int, planes_per_scale: int):
    """One tile [bm, bn] of one part of the inputs."""
    scale_ref, out_ref = refs if planes_per_scale else (None, refs[0])
    integers = x_ref.dtype == jnp.int8

    def step(i, total):
        packed = codes_ref[:, pl.ds(i * PLANE, PLANE)]
        for j in range(4):
            x = x_ref[:, pl.ds(i * GROUP + j * PLANE, PLANE)]
            code = (packed >> (2 * j)) & 3
            if integers:
                w = code.astype(jnp.int8) if scale_ref is None else code.astype(jnp.int8) - 1
            else:
                # 0x4300 is 128 in bfloat16, whose last two bits count ones: 128 + code, exactly.
                w = jax.lax.bitcast_convert_type(code.astype(jnp.uint16) | 0x4300, jnp.bfloat16) - 129
            product = jax.lax.dot_general(
                x, w, (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32 if integers else jnp.float32,
            )  # fmt: skip
            if scale_ref is not None:
                which = jax.lax.div(i * 4 + j, planes_per_scale)
                product = product.astype(jnp.float32) * scale_ref[pl.ds(which, 1), :]
            total = total + product
        return total

    out_ref[...] = jax.lax.fori_loop(
        *_bounds(groups, per_part), step, jnp.zeros(out_ref.shape, out_ref.dtype)
    )


def _gemv(x_ref, codes_ref, *refs, groups: int, per_part: int, planes_per_scale: int):
    """A few rows times bn outputs of one part of the inputs; each byte is unpacked once for all rows."""
    scale_ref, out_ref = refs if planes_per_scale else (None, refs[0])
    rows, outputs = out_ref.shape
    centered = scale_ref is not None or x_ref.dtype != jnp.int8
    dtype = out_ref.dtype

    def step(i, totals):
        packed = codes_ref[:, pl.ds(i * PLANE, PLANE)]
        for j in range(4):
            w = ((packed >> (2 * j)) & 3).astype(dtype)
            w = w - 1 if centered else w
            if scale_ref is not None:
                w = w * scale_ref[jax.lax.div(i * 4 + j, planes_per_scale), :][:, None]
            totals = tuple(
                total + w * x_ref[m, pl.ds(i * GROUP + j * PLANE, PLANE)].astype(dtype)[None]
                for m, total in enumerate(totals)
            )
        return totals

    zero = jnp.zeros((outputs, PLANE), dtype)
    totals = jax.lax.fori_loop(*_bounds(groups, per_part), step, (zero,) * rows)
    for m, total in enumerate(totals):
        out_ref[m, :] = jnp.sum(total, axis=1)
