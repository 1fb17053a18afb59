"""Pallas kernels of FP4 blocks: quantize and pack, dequantize, and a product of packed operands.

`quantize` reads a value once: a program holds whole blocks, takes their maxima, rounds, and writes
packed codes and scales, or the levels times their scales in bfloat16, which is what a product on
hardware without FP4 units multiplies. It gives the bits of the formats' definition: its quotients are exactly
rounded ones (by a corrected reciprocal, once per block), and codes are the least of three straight lines. What
bounds it is the integer unit of the cores, half as wide as the others: so little is compared and selected.

`dot` unpacks tiles of the right operand to bfloat16, exactly, and multiplies on the tensor cores; even and
odd inputs, which share bytes, are multiplied apart, so that nothing is shuffled.

Not yet measured on a GPU: checked in interpret mode, and compiled for cards without one.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from nanochat_jax.kernels import magnitude, triton

BLOCK = {"nvfp4": 16, "mxfp4": 32}  # as in kernels.fp4
LINES = ((2.0, 0.0), (1.0, 2.0), (0.5, 4.0))  # slope, value at 0 of the index of a level in the level
ZERO = 2.0**23  # added to numbers up to 2^23, leaves integers
BLOCKS, LEAST = 256, 32  # of a program of `quantize`, at most and at least
WIDE = 8  # bfloat16 numbers that a thread loads at once
GROUPS = 512  # of WIDE elements, of a program of `dequantize`, at most
DEPTH = 256  # inputs of a step of `dot`, at most
PROGRAMS = 512  # of `dot`, about, where it has fewer tiles: four on each of 132 multiprocessors
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
    of the scales (read for nvfp4), and the tensor's scale (1 for mxfp4 to nearest). name: in BLOCK. salt: None
    rounds to nearest; uint32 [2] of `noise.salt` rounds stochastically, with scales rounded up.
    Returns: packed: [codes uint8 [M, K / 2], the scales' bits uint8 [M, K / block]]; else [bfloat16 [M, K]].
    """
    (M, K), block = v_MK.shape, BLOCK[name]
    blocks = M * K // block
    rows = max(triton.tile(blocks, BLOCKS), LEAST)
    v = v_MK.reshape(blocks, block)
    spare = -blocks % rows
    v = jnp.pad(v, ((0, spare), (0, 0))) if spare else v
    lines = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))  # noqa: E731
    each, few = pl.BlockSpec((rows,), lambda i: (i,)), pl.BlockSpec((2,), lambda i: (0,))
    if packed:
        outs = [((block // 2,), jnp.uint8, lines(block // 2)), ((), jnp.uint8, each)]
    else:
        outs = [((block,), jnp.bfloat16, lines(block))]
    kernel = functools.partial(_quantize, name=name, packed=packed, interpret=interpret)
    made = pl.pallas_call(
        kernel if salt is not None else lambda v, n, *outs: kernel(v, n, None, *outs),
        out_shape=[jax.ShapeDtypeStruct((blocks + spare, *width), dtype) for width, dtype, _ in outs],
        grid=((blocks + spare) // rows,),
        in_specs=[lines(block), few, *([] if salt is None else [few])],
        out_specs=[spec for *_, spec in outs],
        compiler_params=plt.CompilerParams(num_warps=min(4, rows // 32), num_stages=1),
        interpret=interpret,
    )(v, numbers, *([] if salt is None else [salt]))
    return [a[:blocks].reshape(M, -1) for a in made]


def _quantize(v_ref, numbers_ref, salt_ref, *out_refs, name, packed, interpret):
    rows, block = v_ref.shape
    # Read in parts, each of a width that one thread loads at once: a thread then holds whole blocks, and works
    # out their scales once and without the others.
    starts = range(0, block, WIDE)
    parts = [v_ref[:, pl.ds(start, WIDE)].astype(jnp.float32) for start in starts]
    top = magnitude.as_float(jnp.max(functools.reduce(jnp.maximum, map(magnitude.bits, parts)), axis=1))
    noisy = salt_ref is not None
    scale, scale_code = (_e4m3 if name == "nvfp4" else _e8m0)(top, numbers_ref[0], noisy, interpret)
    scale, scale_code = jnp.where(top == 0, 1.0, scale), jnp.where(top == 0, ONE[name], scale_code)
    if packed:
        out_refs[1][...] = scale_code.astype(jnp.uint8)
    # The unit is 2^k m, m in [1, 2). To divide by 2^k is to multiply by 2^-k, exactly unless the quotient is too
    # small to matter; infinite units make it 0.
    unit = scale * numbers_ref[1]
    exponent = magnitude.bits(unit) & 0x7F800000
    shrink = magnitude.as_float(jnp.maximum((254 << 23) - exponent, 0))
    shrink, scale = (jnp.where(unit != unit, jnp.nan, x) for x in (shrink, scale))
    divides = name == "nvfp4" or noisy  # else m is 1
    if divides:
        m = magnitude.as_float((magnitude.bits(unit) - exponent) | 127 << 23)
        inverse = triton.divide(jnp.ones_like(m), m, interpret)
    made = []
    for start, part in zip(starts, parts, strict=True):
        blocks_of = lambda x: jnp.broadcast_to(x[:, None], part.shape)  # noqa: B023, E731
        a = jnp.abs(part) * blocks_of(shrink)
        if divides:
            a = triton.divide_many(a, blocks_of(m), blocks_of(inverse), interpret)
        if noisy:
            bits = triton.random_bits(pl.program_id(0) * rows, start, part.shape, block, salt_ref)
            index = _stochastic(a, bits, interpret)
        else:
            index = _nearest(a, interpret)
        sign = jax.lax.bitcast_convert_type(part, jnp.uint32)
        if packed:
            pairs = [
                [half.reshape(rows, WIDE // 2) for half in jax.lax.split(x.reshape(rows, -1, 2), (1, 1), 2)]
                for x in (jax.lax.bitcast_convert_type(index, jnp.uint32), sign)
            ]
            (low, high), (low_sign, high_sign) = pairs
            codes = low + high * 16 | low_sign >> 28 & 0x08 | high_sign >> 24 & 0x80
            made.append(codes.astype(jnp.uint8))
        else:
            level = _level(magnitude.as_float(index) - ZERO)
            level = jax.lax.bitcast_convert_type(level, jnp.uint32) | sign & jnp.uint32(1 << 31)
            value = jax.lax.bitcast_convert_type(level, jnp.float32) * scale[:, None]
            made.append(value.astype(jnp.bfloat16))
    out_refs[0][...] = triton.beside(made)


def _nearest(a: jax.Array, interpret: bool) -> jax.Array:
    """ZERO + the index of the nearest level, as the bits of a float32 (int32); of NaN 7.

    Over the levels the index is piecewise linear in a, and concave: the least of three straight lines. Rounding
    is monotonic, so each of them may round, and to an even index at ties as ZERO is even.
    """
    lines = [triton.multiply_add(a, slope, ZERO + base, interpret) for slope, base in LINES]
    return _least(lines)


def _stochastic(a: jax.Array, bits: jax.Array, interpret: bool) -> jax.Array:
    """As `_nearest`: the index of the level below or above, by random bits (uint32)."""
    # u of `fp4.uniform`, 1 + u being the float with these bits.
    u = jax.lax.bitcast_convert_type(bits >> 9 & 0x7FFFF8 | 0x3F800004, jnp.float32) - 1.0
    lines = [(triton.multiply_add(a, slope, u, interpret), base) for slope, base in LINES]
    return _least([triton.floor_add(line, ZERO + base, interpret) for line, base in lines])


def _least(lines: list[jax.Array]) -> jax.Array:
    """The least of positive numbers and ZERO + 7, by their bits (int32), which puts NaN above."""
    top = 0x4B000007  # ZERO + 7
    bits = [jax.lax.bitcast_convert_type(line, jnp.int32) for line in lines]
    return jnp.minimum(functools.reduce(jnp.minimum, bits), top)


def _e4m3(top, enlarge, up, interpret):
    """(scale float32, its code) for maxima of blocks; blocks of zeros are the caller's."""
    wanted = triton.divide(top, jnp.where(top == 0, 1.0, 6.0), interpret) * enlarge
    bad = wanted != wanted
    wanted = jnp.minimum(jnp.maximum(jnp.where(bad, 0.0, wanted), 2.0**-9), 448.0)
    exponent = jnp.maximum((magnitude.bits(wanted) >> 23) - 3, 118)  # of the distance of levels
    steps = wanted * magnitude.as_float((254 - exponent) << 23)  # exact: a power of two
    # By the lower bits of a sum with ZERO, which rounds half to even; a compiler may undo sums of numbers.
    number = magnitude.bits(triton.floor_add(steps, ZERO, interpret) if up else steps + ZERO) & 0xFF
    if up:
        number += (number.astype(jnp.float32) < steps).astype(jnp.int32)
    scale = number.astype(jnp.float32) * magnitude.as_float(exponent << 23)
    # Levels are numbered by the code: 8 to a power of two, and subnormal ones before them.
    code = (exponent - 118) * 8 + number
    return jnp.where(bad, jnp.nan, scale), jnp.where(bad, 127, code)


def _e8m0(top, enlarge, up, interpret):
    """As `_e4m3`."""
    del enlarge, up, interpret
    exponent = magnitude.bits(top) >> 23
    code = jnp.maximum(exponent - 2, 1)
    bad = exponent == 255
    return jnp.where(bad, jnp.nan, magnitude.as_float(code << 23)), jnp.where(bad, 255, code)


def _level(index: jax.Array) -> jax.Array:
    """Magnitudes of indices 0..7 (float32): over the indices the level is convex, the greatest of three lines."""
    return jnp.maximum(0.5 * index, jnp.maximum(index - 2, 2 * index - 8))


def _unpacked(codes: jax.Array, plain: bool) -> tuple[jax.Array, ...]:
    """Levels of the even and of the odd elements, exact in bfloat16, of two codes a byte (uint8).

    plain: for XLA and in interpret mode, where subnormal numbers may be taken for zero.
    """
    if plain:
        low, high = (part.astype(jnp.float32) for part in (codes & 15, codes >> 4))
        return tuple(jnp.where(c < 8, _level(c), -_level(c - 8)).astype(jnp.bfloat16) for c in (low, high))
    # The three lower bits of a code, put across the border of a bfloat16's exponent and mantissa, are the level
    # times 2^-126. Two at a time: bytes go to the upper halves of 16 bits, from there bits to where they belong.
    made = []
    for level, sign in ((2, 4), (6, 0)):
        pairs = [
            f"prmt.b32 p, $2, 0, {places}; shr.u32 m, p, {level}; and.b32 m, m, 0x01C001C0; shl.b32 s, p, {sign};"
            f" and.b32 s, s, 0x80008000; or.b32 m, m, s; fma.rn.bf16x2 ${i}, m, top, zero;"
            for i, places in enumerate(("0x1404", "0x3424"))
        ]
        text = "{ .reg .b32 p, m, s, top, zero; mov.b32 top, 0x7E807E80; mov.b32 zero, 0x80008000; "
        (part,) = plt.elementwise_inline_asm(
            text + " ".join(pairs) + " }", args=[codes], constraints="=&r,=&r,r", pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
        )  # fmt: skip
        made.append(part)
    return tuple(made)


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
    M, each = len(codes), BLOCK[name] // WIDE
    codes, scales = codes.reshape(-1, WIDE // 2), scales.reshape(-1)
    size = len(codes)
    rows = max(triton.tile(size, GROUPS), LEAST)
    spare = -size % rows
    if spare:
        codes, scales = jnp.pad(codes, ((0, spare), (0, 0))), jnp.pad(scales, (0, spare // each))
    made = pl.pallas_call(
        functools.partial(_dequantize, name=name, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((size + spare, WIDE), dtype),
        grid=((size + spare) // rows,),
        in_specs=[
            pl.BlockSpec((rows, WIDE // 2), lambda i: (i, 0)),
            pl.BlockSpec((rows // each,), lambda i: (i,)),
            pl.BlockSpec((1,), lambda i: (0,)),
        ],
        out_specs=pl.BlockSpec((rows, WIDE), lambda i: (i, 0)),
        compiler_params=plt.CompilerParams(num_warps=min(4, rows // 32), num_stages=1),
        interpret=interpret,
    )(codes, scales, tensor)
    return made[:size].reshape(M, -1)


def _dequantize(codes_ref, scales_ref, tensor_ref, out_ref, *, name, interpret):
    rows, width = out_ref.shape
    pairs = [half.astype(jnp.float32) for half in _unpacked(codes_ref[...], interpret)]
    levels = jnp.stack(pairs, axis=-1).reshape(rows, width)
    # Each row reads its own scale, so that nothing is sent between threads.
    own = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) // (BLOCK[name] // width)
    scale = _scale(scales_ref[own].astype(jnp.int32), name) * tensor_ref[0]
    out_ref[...] = (levels * scale[:, None]).astype(out_ref.dtype)


def dot(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], name: str, interpret: bool = False
) -> jax.Array:
    """Product of packed operands without the tensors' scales: float32 [M, N].

    Args: a: (codes [M, K / 2], the scales' bits [M, K / block]), uint8. b: the same for [N, K], whose scales may
    be those of square tiles, [N / block, K / block].
    """
    (M, half), N, block = a[0].shape, b[0].shape[0], BLOCK[name]
    bm = 16 if M <= 16 else 64 if M <= 64 else 128
    bn = 64 if N > 16 else 16
    each = N // b[1].shape[0]  # rows of b that share a scale
    # Bytes of a row in a step; fewer for many rows, as three steps of both operands stand in 99 KiB.
    width = max(triton.tile(half, min(DEPTH // 2, 4096 // bm)), 32)
    # Spare rows and inputs have code 0, the level 0.
    (x, x_scales), (codes, scales) = (
        (
            jnp.pad(codes, ((0, -len(codes) % rows), (0, -half % width))),
            jnp.pad(scales, ((0, -len(codes) % rows // own), (0, -half % width * 2 // block))),
        )
        for (codes, scales), rows, own in ((a, bm, 1), (b, bn, each))
    )
    (rows, half), columns = x.shape, len(codes)
    # Every program reads all of the left operand's rows: it is unpacked before, into even and odd inputs.
    x_scales = jnp.repeat(_scale(x_scales.astype(jnp.int32), name), block // 2, 1)
    x = jnp.stack([(levels * x_scales).astype(jnp.bfloat16) for levels in _unpacked(x, plain=True)])
    # Few tiles would leave a device idle: then several programs share the inputs of one.
    tiles = rows // bm * (columns // bn)
    split = triton.tile(half // width, 1 << max(1, PROGRAMS // tiles).bit_length() - 1)
    part = half // split
    made = pl.pallas_call(
        functools.partial(_dot, name=name, width=width, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((split, rows, columns), jnp.float32),
        grid=(rows // bm, columns // bn, split),
        in_specs=[
            pl.BlockSpec((2, bm, part), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((bn, part), lambda i, j, k: (j, k)),
            pl.BlockSpec((bn // each, 2 * part // block), lambda i, j, k: (j, k)),
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda i, j, k: (k, i, j)),
        compiler_params=plt.CompilerParams(num_warps=8 if bm == 128 else 4, num_stages=3),
        interpret=interpret,
    )(x, codes, scales)
    return jnp.sum(made, 0)[:M, :N]


def _dot(x_ref, codes_ref, scales_ref, out_ref, *, name, width, interpret):
    per_step, contract_last = 2 * width // BLOCK[name], (((1,), (1,)), ((), ()))

    def step(i, total):
        columns = pl.ds(i * width, width)
        codes = codes_ref[:, columns]
        scale = _scale(scales_ref[:, pl.ds(i * per_step, per_step)].astype(jnp.int32), name)
        scale = triton.along(triton.down(scale, len(codes)), codes.shape).astype(jnp.bfloat16)
        for half, levels in enumerate(_unpacked(codes, interpret)):
            total += jax.lax.dot_general(
                x_ref[half, :, columns], levels * scale, contract_last, preferred_element_type=jnp.float32
            )
        return total

    steps = codes_ref.shape[1] // width
    out_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(out_ref.shape, jnp.float32))
