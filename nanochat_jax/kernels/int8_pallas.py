"""Pallas kernel of the 8-bit moments' update: one pass over codes, scales and gradients.

A program holds whole blocks: decode, the optimizer's formulas, the blocks' new maxima, encode. It
gives the numbers of `kernels.int8`'s reference, whose rounding it shares; a compiler may fuse a
multiplication and an addition of the optimizer's formulas in one of them and not in the other, which
moves the last bit.

Not yet measured on a GPU: checked in interpret mode, and compiled for cards without one.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import int8, magnitude, triton

LEAST, MOST = 16, 1 << 16  # elements of a block; `triton.random_bits` hashes rows of no more
ELEMENTS = 2048  # of a program, at most, but for blocks that are larger


def update(rule, grad, stored, codes, numbers, salts, interpret: bool = False):
    """As `int8.update`, on blocks as rows.

    Args: grad: [B, block]. stored: of each moment codes [B, block] and scales [B]. salts: of each moment
    None, or uint32 [2] of `noise.salt`. Returns: direction float32 [B, block]; the new stored.
    """
    B, block = grad.shape
    rows = triton.tile(B, max(1, ELEMENTS // block))
    lines = pl.BlockSpec((rows, block), lambda i: (i, 0))
    each = pl.BlockSpec((rows,), lambda i: (i,))
    whole = lambda size: pl.BlockSpec((size,), lambda i: (0,))  # noqa: E731
    operands, specs = [grad], [lines]
    if numbers:
        operands, specs = [*operands, jnp.stack(numbers).astype(jnp.float32)], [*specs, whole(len(numbers))]
    # The new codes may take the place of the old ones: a program reads its blocks before it writes them.
    places: dict[int, int] = {}
    for (values, scales), code, salt in zip(stored, codes, salts, strict=True):
        places |= {len(operands) + i: 1 + len(places) + i for i in range(2)}
        operands, specs = [*operands, values, scales], [*specs, lines, each]
        if code != "linear":
            operands, specs = [*operands, jnp.asarray(int8.LEVELS[code])], [*specs, whole(256)]
        if salt is not None:
            operands, specs = [*operands, salt], [*specs, whole(2)]
    made = pl.pallas_call(
        functools.partial(
            _update, rule=rule, codes=codes, noisy=tuple(salt is not None for salt in salts),
            numbers=len(numbers), interpret=interpret,
        ),
        out_shape=[jax.ShapeDtypeStruct((B, block), jnp.float32)]
        + [jax.ShapeDtypeStruct(a.shape, a.dtype) for pair in stored for a in pair],
        grid=(B // rows,),
        in_specs=specs,
        out_specs=[lines] + [lines, each] * len(codes),
        input_output_aliases=places,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*operands)  # fmt: skip
    return made[0], list(zip(made[1::2], made[2::2], strict=True))


def _update(*refs, rule, codes, noisy, numbers, interpret):
    refs = iter(refs)
    grad = next(refs)[...].astype(jnp.float32)
    numbers_ref = next(refs) if numbers else []
    moments, salts, dtypes = [], [], []
    for code, noise in zip(codes, noisy, strict=True):
        values, scales_ref = next(refs)[...], next(refs)
        # The table's entries are read one by one: a kernel cannot index a value.
        values = values.astype(jnp.float32) if code == "linear" else next(refs)[values.astype(jnp.int32)]
        moments.append(values * scales_ref[...].astype(jnp.float32)[:, None])
        dtypes.append(scales_ref.dtype)
        salts.append(next(refs) if noise else None)
    direction, moments = rule(grad, tuple(moments), tuple(numbers_ref[i] for i in range(numbers)))
    next(refs)[...] = direction
    for x, code, salt_ref, dtype in zip(moments, codes, salts, dtypes, strict=True):
        next(refs)[...], next(refs)[...] = _encode(x, code, salt_ref, dtype, interpret)


def _encode(x, code, salt_ref, dtype, interpret):
    """(codes [rows, block], scales [rows]) as `int8.quantize`."""
    top = magnitude.largest(x, 1)
    scales = (top * int8.PER_LEVEL if code == "linear" else top).astype(dtype)
    unit = scales.astype(jnp.float32) if code == "linear" else top
    inverse = triton.divide(jnp.ones_like(unit), unit, interpret)
    inverse = jnp.where(unit < float(np.finfo(np.float32).tiny), 0.0, inverse)
    offset = 0.5
    if salt_ref is not None:
        bits = triton.random_bits(pl.program_id(0) * x.shape[0], 0, x.shape, x.shape[1], salt_ref)
        offset = (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    position = functools.partial(_position, interpret=interpret)
    return int8.to_codes(x * inverse[:, None], code, offset, position), scales


def _position(size, code, interpret):
    """`int8.position`, with one rounding a line, and the least by the lines' bits: half the instructions.

    Bits order numbers that are not negative; where a line is negative, so is what is found: its code is 0.
    """
    *concave, last = [triton.multiply_add(size, float(a), float(b), interpret) for a, b in int8.LINES[code]]
    bits = [jax.lax.bitcast_convert_type(line, jnp.int32) for line in concave]
    return jnp.maximum(magnitude.as_float(functools.reduce(jnp.minimum, bits)), last)
