"""Pallas kernels of FP4 blocks: quantize and pack, dequantize, and a product of packed operands.

`quantize` reads a value once: a program holds whole blocks, takes their maxima, rounds, and writes
packed codes and scales, or the levels times their scales in bfloat16, which is what a product on
hardware without FP4 units multiplies. It gives the bits of the formats' definition: it divides exactly (and
does not multiply by a reciprocal), and rounds to nearest by comparing with the middles between levels.

`dot` unpacks tiles of both operands to bfloat16, exactly, and multiplies on the tensor cores; even and
odd inputs, which share bytes, are multiplied apart, so that nothing is shuffled.

Not yet measured on a GPU: checked in interpret mode and by lowering for CUDA.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from nanochat_jax.kernels import magnitude, triton

BLOCK = {"nvfp4": 16, "mxfp4": 32}  # as in kernels.fp4
MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
ROWS, COLUMNS = 32, 256  # of a tile of `quantize` and `dequantize`, at most
DEPTH = 64  # inputs of a step of `dot`
ONE = {"nvfp4": 7 << 3, "mxfp4": 127}  # codes of the scale 1


def quantize(
    v_MK: jax.Array,
    numbers: jax.Array,
    name: str,
    salt: jax.Array | None,
    packed: bool,
    interpret: bool = False,
) -> list[jax.Array]:
    """Quantize along the last axis, whose length is a multiple of the block.

    Args: v: [M, K], floating. numbers: float32 [2], the factor that brings the tensor's maximum to that
    of the scales (read for nvfp4), and the tensor's scale. name: in BLOCK. salt: None rounds to nearest;
    uint32 [2] of `noise.salt` rounds stochastically, with scales rounded up.
    Returns: packed: [codes uint8 [M, K / 2], the scales' bits uint8 [M, K / block]]; else [bfloat16 [M, K]].
    """
    rows, (_, K) = v_MK.shape[0], v_MK.shape
    spare = -rows % 8  # few programs of one row each would leave a device idle
    v_MK = jnp.pad(v_MK, ((0, spare), (0, 0))) if spare else v_MK
    M, block = v_MK.shape[0], BLOCK[name]
    bm, bk = triton.tile(M, ROWS), triton.tile(K, COLUMNS)
    whole = lambda i, j: (i, j)  # noqa: E731
    if packed:
        shapes = [((M, K // 2), (bm, bk // 2), jnp.uint8), ((M, K // block), (bm, bk // block), jnp.uint8)]
    else:
        shapes = [((M, K), (bm, bk), jnp.bfloat16)]
    kernel = functools.partial(_quantize, name=name, width=K, packed=packed, interpret=interpret)
    few = [pl.BlockSpec((2,), lambda i, j: (0,))]
    made = pl.pallas_call(
        kernel if salt is not None else lambda v, n, *outs: kernel(v, n, None, *outs),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, _, dtype in shapes],
        grid=(M // bm, K // bk),
        in_specs=[pl.BlockSpec((bm, bk), whole), *few, *(few if salt is not None else [])],
        out_specs=[pl.BlockSpec(part, whole) for _, part, _ in shapes],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(v_MK, numbers, *([] if salt is None else [salt]))
    return [a[:rows] for a in made] if spare else list(made)


def _quantize(v_ref, numbers_ref, salt_ref, *out_refs, name, width, packed, interpret):
    v = v_ref[...].astype(jnp.float32)
    bm, bk = v.shape
    magnitudes = magnitude.bits(v)
    top = magnitude.as_float(jnp.max(magnitudes.reshape(bm, bk // BLOCK[name], BLOCK[name]), axis=2))
    up = salt_ref is not None
    scale, scale_code = (_e4m3 if name == "nvfp4" else _e8m0)(top, numbers_ref[0], up, interpret)
    scale, scale_code = jnp.where(top == 0, 1.0, scale), jnp.where(top == 0, ONE[name], scale_code)
    a = triton.divide(
        magnitude.as_float(magnitudes), triton.along(scale * numbers_ref[1], v.shape), interpret
    )
    if salt_ref is None:
        index = sum(((a >= middle) if even else (a > middle)).astype(jnp.int32) for middle, even in MIDDLES)
    else:
        bits = triton.random_bits(pl.program_id(0) * bm, pl.program_id(1) * bk, v.shape, width, salt_ref)
        u = ((bits >> 12).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-20
        inverse_step = jnp.where(a < 2, 2.0, jnp.where(a < 4, 1.0, 0.5))
        base = jnp.where(a < 2, 0, jnp.where(a < 4, 2, 4))
        index = jnp.floor(jnp.minimum(a, 6.0) * inverse_step + u).astype(jnp.int32) + base
    index = jnp.where(a != a, 7, index)
    sign = jax.lax.bitcast_convert_type(v, jnp.int32)
    if packed:
        codes_ref, scales_ref = out_refs
        pairs = (index | ((sign >> 28) & 8)).reshape(bm, bk // 2, 2)
        low, high = (part.reshape(bm, bk // 2) for part in jax.lax.split(pairs, (1, 1), 2))
        codes_ref[...] = (low | (high << 4)).astype(jnp.uint8)
        scales_ref[...] = scale_code.astype(jnp.uint8)
    else:
        value = level(index) * triton.along(scale, v.shape) * jnp.where(sign < 0, -1.0, 1.0)
        out_refs[0][...] = jnp.where(a != a, jnp.nan, value).astype(jnp.bfloat16)


def _e4m3(top, enlarge, up, interpret):
    """(scale float32, its code) for maxima of blocks; blocks of zeros are the caller's."""
    wanted = triton.divide(top, jnp.where(top == 0, 1.0, 6.0), interpret) * enlarge
    bad = wanted != wanted
    wanted = jnp.minimum(jnp.maximum(jnp.where(bad, 0.0, wanted), 2.0**-9), 448.0)
    exponent = jnp.maximum((magnitude.bits(wanted) >> 23) - 3, 118)  # of the distance of levels
    steps = wanted * magnitude.as_float((254 - exponent) << 23)  # exact: a power of two
    low = jnp.floor(steps)
    rest = steps - low
    if up:
        more = rest > 0
    else:
        more = (rest > 0.5) | ((rest == 0.5) & (low - 2 * jnp.floor(low * 0.5) == 1))
    scale = (low + more.astype(jnp.float32)) * magnitude.as_float(exponent << 23)
    bits = magnitude.bits(scale) >> 20
    subnormal = (scale * 2.0**9).astype(jnp.int32)
    code = jnp.where(scale < 2.0**-6, subnormal, bits - ((127 - 7) << 3))
    return jnp.where(bad, jnp.nan, scale), jnp.where(bad, 127, code)


def _e8m0(top, enlarge, up, interpret):
    """As `_e4m3`."""
    del enlarge, up, interpret
    exponent = magnitude.bits(top) >> 23
    code = jnp.maximum(exponent - 2, 1)
    bad = exponent == 255
    return jnp.where(bad, jnp.nan, magnitude.as_float(code << 23)), jnp.where(bad, 255, code)


def level(code: jax.Array) -> jax.Array:
    """Magnitudes (float32) of codes 0..7 (int32)."""
    c = code.astype(jnp.float32)
    return jnp.where(code < 4, 0.5 * c, jnp.where(code < 6, c - 2, 2 * c - 8))


def _signed_level(code: jax.Array) -> jax.Array:
    return level(code & 7) * jnp.where(code >= 8, -1.0, 1.0)


def _scale(code: jax.Array, name: str) -> jax.Array:
    """Scales (float32) of their bits (int32)."""
    if name == "mxfp4":
        return jnp.where(code == 255, jnp.nan, magnitude.as_float(code << 23))
    normal = magnitude.as_float(((code >> 3) + 120 << 23) | ((code & 7) << 20))
    scale = jnp.where(code < 8, code.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(code == 127, jnp.nan, scale)


def dequantize(
    codes: jax.Array, scales: jax.Array, tensor: jax.Array, name: str, dtype, interpret: bool = False
) -> jax.Array:
    """The inverse of a packed `quantize`: [M, K] in `dtype`; tensor: float32 [1]."""
    rows, half = codes.shape
    spare = -rows % 8
    codes, scales = (jnp.pad(a, ((0, spare), (0, 0))) if spare else a for a in (codes, scales))
    M, K, block = codes.shape[0], 2 * half, BLOCK[name]
    bm, bk = triton.tile(M, ROWS), triton.tile(K, COLUMNS)
    whole = lambda i, j: (i, j)  # noqa: E731
    made = pl.pallas_call(
        functools.partial(_dequantize, name=name),
        out_shape=jax.ShapeDtypeStruct((M, K), dtype),
        grid=(M // bm, K // bk),
        in_specs=[
            pl.BlockSpec((bm, bk // 2), whole), pl.BlockSpec((bm, bk // block), whole),
            pl.BlockSpec((1,), lambda i, j: (0,)),
        ],
        out_specs=pl.BlockSpec((bm, bk), whole),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(codes, scales, tensor)  # fmt: skip
    return made[:rows] if spare else made


def _dequantize(codes_ref, scales_ref, tensor_ref, out_ref, *, name):
    codes = codes_ref[...].astype(jnp.int32)
    levels = jnp.stack([_signed_level(codes & 15), _signed_level(codes >> 4)], axis=-1).reshape(out_ref.shape)
    scale = _scale(scales_ref[...].astype(jnp.int32), name) * tensor_ref[0]
    out_ref[...] = (levels * triton.along(scale, out_ref.shape)).astype(out_ref.dtype)


def dot(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], name: str, interpret: bool = False
) -> jax.Array:
    """Product of packed operands without the tensors' scales: float32 [M, N].

    Args: a: (codes [M, K / 2], the scales' bits [M, K / block]), uint8. b: the same for [N, K], whose scales may
    be those of square tiles, [N / block, K / block].
    """
    (M, half), N, block = a[0].shape, b[0].shape[0], BLOCK[name]
    bm = 16 if M <= 16 else 64
    bn = 64 if N > 16 else 16
    each = N // b[1].shape[0]  # rows of b that share a scale
    # Spare rows and inputs have code 0, the level 0.
    a, b = (
        (
            jnp.pad(codes, ((0, -len(codes) % rows), (0, -half % (DEPTH // 2)))),
            jnp.pad(scales, ((0, -len(codes) % rows // own), (0, -half % (DEPTH // 2) * 2 // block))),
        )
        for (codes, scales), rows, own in ((a, bm, 1), (b, bn, each))
    )
    depth = 2 * a[0].shape[1]
    shape = a[0].shape[0], b[0].shape[0]
    specs = [
        pl.BlockSpec((rows, columns), (lambda i, j: (i, 0)) if left else (lambda i, j: (j, 0)))
        for left, size, own in ((True, bm, 1), (False, bn, each))
        for rows, columns in ((size, depth // 2), (size // own, depth // block))
    ]
    made = pl.pallas_call(
        functools.partial(_dot, name=name, steps=depth // DEPTH),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(shape[0] // bm, shape[1] // bn),
        in_specs=specs,
        out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(*a, *b)
    return made[:M, :N]


def _dot(a_ref, a_scale_ref, b_ref, b_scale_ref, out_ref, *, name, steps):
    def halves(codes_ref, scales_ref, i):
        """Even and odd inputs of one step, each [rows, DEPTH / 2], exact in bfloat16."""
        codes = codes_ref[:, pl.ds(i * (DEPTH // 2), DEPTH // 2)].astype(jnp.int32)
        per_step = DEPTH // BLOCK[name]
        scale = _scale(scales_ref[:, pl.ds(i * per_step, per_step)].astype(jnp.int32), name)
        scale = triton.along(triton.down(scale, codes.shape[0]), codes.shape)
        return [(_signed_level(part) * scale).astype(jnp.bfloat16) for part in (codes & 15, codes >> 4)]

    def step(i, total):
        pairs = zip(halves(a_ref, a_scale_ref, i), halves(b_ref, b_scale_ref, i), strict=True)
        for x, y in pairs:
            contract_last = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(x, y, contract_last, preferred_element_type=jnp.float32)
        return total

    out_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(out_ref.shape, jnp.float32))
