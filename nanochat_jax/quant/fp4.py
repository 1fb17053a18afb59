"""FP4 for training: E2M1 codes in blocks that share a scale, two roundings, Hadamard rotations, and
the two products of the backward pass on quantized operands. The forward's slots are in `matmul`.

    value = level * scale of the block * scale of the tensor        level: 0, .5, 1, 1.5, 2, 3, 4, 6, signed

- "nvfp4": blocks of 16, E4M3 scales; the tensor's float32 scale puts the largest block at E4M3's 448.
- "mxfp4": blocks of 32, power-of-two scales (E8M0), 2^(floor(log2 max) - 2) as in the OCP standard.
  The largest entry of a block is then in [4, 8) scales, and what lies above 6 is clipped.

Blocks run along the axis that a product contracts, so x, w and dy are each cut one way for one product
and another way for the next. Weights that run in FP4 in the forward pass are cut into square tiles
instead: w and its transpose then have the same values, and the function that is differentiated is the
one that was computed (arXiv:2509.25149).

Rounding to nearest (half to even) has the smaller error, stochastic rounding none on average. The
latter holds only if nothing is clipped: there, unlike in the sources' nearest rounding, an E4M3 scale
is rounded up (to nearest it falls up to 1/16 short of the block's maximum), and MXFP4 works at 3/4 of
the size (4/3 is the tensor's scale), as in arXiv:2502.20586.

A Hadamard rotation of both operands along the contracted axis leaves their product as it is and
spreads an outlier over its tile, which then has a smaller maximum for the same norm.

On GPUs with FP4 units NVFP4 products run in them, where both operands have just been quantized (`in_units`,
kernels/scaled.py; not verified on hardware). Everything else is emulated: level * block scale has at most 6 significant bits, exact in bfloat16, so one
ordinary product of these and one multiplication by the tensors' scales give what FP4 units would, up
to the order of summation. It is slower than no FP4 at all; it shows what FP4 does to training.
A tensor's scale sees all tokens of the batch: NVFP4 activations of a token depend, in their last
bits, on tokens after it.

XLA on CPU takes subnormal float32 for zero, and turns a division by a scalar into a multiplication by
its rounded reciprocal: scales stay normal here, and divisors are arrays.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import Fp4Config
from nanochat_jax.kernels import scaled
from nanochat_jax.kernels.noise import hashed_bits
from nanochat_jax.types import Key

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by the lower three bits of a code
TOP = 6.0
E4M3_TOP, E4M3_LEAST = 448.0, 2.0**-9
FORMATS = {"nvfp4": 16, "mxfp4": 32}  # -> elements that share a scale


class Blocks(NamedTuple):
    """A quantized array. Close to level(codes) * scales * tensor.

    codes: uint8, the array's shape: bit 3 the sign, bits 0-2 the index in LEVELS.
    scales: float8_e4m3fn or float8_e8m0fnu, one per block.
    tensor: float32 [].
    """

    codes: jax.Array
    scales: jax.Array
    tensor: jax.Array


# --- levels


def spacing(magnitude: jax.Array) -> jax.Array:
    """Distance from the level at or below each magnitude (below 6) to the next one."""
    return jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))


def nearest(z: jax.Array) -> jax.Array:
    """The nearest level, ties to the even code, beyond 6 to 6; float32 [...] to float32 [...].

    Equal to a cast to float4_e2m1fn and back, the sign of zero included; NaN stays NaN.
    """
    magnitude = jnp.abs(z)
    step = spacing(magnitude)
    return jnp.copysign(jnp.minimum(jnp.round(magnitude / step) * step, TOP), z)


def stochastic(z: jax.Array, u: jax.Array) -> jax.Array:
    """One of the two neighbouring levels, z on average if |z| <= 6; beyond, 6.

    Args: z: float32 [...]. u: float32, z's shape, uniform in (0, 1) as `uniform` makes it.
    """
    magnitude = jnp.minimum(jnp.abs(z), TOP)
    step = spacing(magnitude)
    return jnp.copysign(jnp.floor(magnitude / step + u) * step, z)


def uniform(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Odd multiples of 2^-21 in (0, 1), float32 of `shape`; a function of the key and the index alone.

    20 bits, because levels / step + u must be exact in float32: a level then always rounds to itself.
    """
    return ((hashed_bits(key, shape) >> 12).astype(jnp.float32) + 0.5) * 2.0**-20


def encode(levels: jax.Array) -> jax.Array:
    """Codes 0..15 (uint8) of exact levels (float32); NaN, which E2M1 lacks, becomes a 6 of its sign."""
    a = jnp.abs(levels)
    index = jnp.where(a < 2, 2 * a, jnp.where(a < 4, a + 2, a / 2 + 4))
    index = jnp.where(jnp.isnan(a), 7.0, index)
    return index.astype(jnp.uint8) | (jnp.signbit(levels).astype(jnp.uint8) << 3)


def decode(codes: jax.Array) -> jax.Array:
    """Levels (float32) of codes 0..15; code 8 is -0."""
    magnitude = jnp.asarray(LEVELS)[codes & 7]
    return jnp.where(codes >= 8, -magnitude, magnitude)


def pack(codes: jax.Array) -> jax.Array:
    """Two codes a byte: element 2i in the low nibble, 2i + 1 in the high one. uint8 [..., n] -> [..., n/2].

    Raises: ValueError for an odd n.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte, got an odd number of them: {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack`: uint8 [..., n/2] -> codes uint8 [..., n]."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


# --- scales


def _e4m3_scales(top: jax.Array, up: bool) -> tuple[jax.Array, jax.Array]:
    # At most 2^116, so that neither the inverse nor its product with the least scale is subnormal.
    enlarge = jnp.minimum(TOP * E4M3_TOP / jnp.max(top), 2.0**116)
    six = jnp.where(top == 0, 1.0, TOP)  # an array, see the header
    wanted = jnp.clip(top / six * enlarge, E4M3_LEAST, E4M3_TOP)
    # By hand, so that the bits do not depend on how a backend casts to E4M3.
    exponent = jax.lax.bitcast_convert_type(wanted, jnp.uint32) >> 23  # biased by 127
    step = jax.lax.bitcast_convert_type(jnp.maximum(exponent - 3, 118) << 23, jnp.float32)
    scale = ((jnp.ceil if up else jnp.round)(wanted / step) * step).astype(jnp.float8_e4m3fn)
    return jnp.where(top == 0, jnp.ones((), scale.dtype), scale), 1 / enlarge


def _e8m0_scales(top: jax.Array, up: bool) -> tuple[jax.Array, jax.Array]:
    exponent = (jax.lax.bitcast_convert_type(top, jnp.uint32) >> 23).astype(jnp.int32)  # biased by 127
    code = jnp.where(top == 0, 127, jnp.maximum(exponent - 2, 1))  # 2^-126 at least: normal
    code = jnp.where(jnp.isfinite(top), code, 255).astype(jnp.uint8)  # 255 is NaN
    scale = jax.lax.bitcast_convert_type(code, jnp.float8_e8m0fnu)
    return scale, jnp.float32(4 / 3 if up else 1.0)


SCALES = {"nvfp4": _e4m3_scales, "mxfp4": _e8m0_scales}


def _levels(view: jax.Array, axes: tuple[int, ...], name: str, key: Key | None):
    """(levels, block scales, tensor scale) of a view whose blocks extend over `axes`."""
    view = view.astype(jnp.float32)
    top = jnp.max(jnp.abs(view), axes, keepdims=True)
    scales, tensor = SCALES[name](top, key is not None)
    z = view / (scales.astype(jnp.float32) * tensor)
    return (nearest(z) if key is None else stochastic(z, uniform(key, z.shape))), scales, tensor


def _view(shape: tuple[int, ...], name: str, tiles: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(Shape that gives blocks axes of their own, those axes)."""
    block, cut = FORMATS[name], shape[-2:] if tiles else shape[-1:]
    for size in cut:
        if size % block:
            raise ValueError(f"{name} needs a multiple of {block}, got an axis of {size} in shape {shape}")
    split = [part for size in cut for part in (size // block, block)]
    return (*shape[: len(shape) - len(cut)], *split), (-3, -1) if tiles else (-1,)


def quantize(v: jax.Array, name: str, key: Key | None = None, tiles: bool = False) -> Blocks:
    """Quantize along the last axis, or in square tiles of the last two.

    Args: v: [..., n], floating. name: in FORMATS. key: None rounds to nearest; a key (consumed) rounds
    stochastically, without bias. tiles: a block is block x block elements of the last two axes.
    Returns: Blocks with scales [..., n / block], or [..., m / block, n / block]. A block with NaN or
    infinity has the scale NaN (NVFP4: all blocks). A block of zeros has the scale 1.
    Raises: ValueError if blocks do not divide an axis.
    Source: arXiv:2509.25149 (NVFP4), OCP Microscaling Formats 1.0 (MXFP4).
    """
    shape, axes = _view(v.shape, name, tiles)
    levels, scales, tensor = _levels(v.reshape(shape), axes, name, key)
    return Blocks(encode(levels).reshape(v.shape), scales.squeeze(axes), tensor)


def dequantize(blocks: Blocks, name: str, tiles: bool = False) -> jax.Array:
    """float32 values, in the shape of the codes, of what `quantize` made with the same name and tiles."""
    shape, axes = _view(blocks.codes.shape, name, tiles)
    scales = jnp.expand_dims(blocks.scales.astype(jnp.float32), axes) * blocks.tensor
    return (decode(blocks.codes).reshape(shape) * scales).reshape(blocks.codes.shape)


def scaled_levels(
    v: jax.Array, name: str, key: Key | None = None, tiles: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(level * block scale in bfloat16, exactly, v's shape; the tensor's scale, float32 []).

    The same numbers as `quantize` holds, ready for a product. Args and errors as there.
    """
    shape, axes = _view(v.shape, name, tiles)
    levels, scales, tensor = _levels(v.reshape(shape), axes, name, key)
    return (levels * scales.astype(jnp.float32)).astype(jnp.bfloat16).reshape(v.shape), tensor


# --- rotation


def hadamard(width: int) -> np.ndarray:
    """Orthogonal symmetric matrix of entries +-1/sqrt(width), float32; width: a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(width)).astype(np.float32)


def signs(kind: str, width: int, key: Key | None = None) -> jax.Array:
    """float32 [width] of +-1: all 1 ("none"), always the same draw ("fixed"), or the key's ("random")."""
    if kind == "none":
        return jnp.ones((width,), jnp.float32)
    key = jax.random.key(0) if kind == "fixed" else key
    if key is None:
        raise ValueError("random signs need a key")
    return jnp.where(uniform(key, (width,)) < 0.5, -1.0, 1.0)


def rotate(v: jax.Array, sign: jax.Array) -> jax.Array:
    """Multiply every tile of the last axis by diag(sign) and the Hadamard matrix; float32.

    Args: v: [..., n]. sign: [width], width dividing n.
    """
    tiles = v.astype(jnp.float32).reshape(*v.shape[:-1], -1, sign.shape[0])
    factor = sign[:, None] * jnp.asarray(hadamard(sign.shape[0]))
    return jnp.matmul(tiles, factor, precision=jax.lax.Precision.HIGHEST).reshape(v.shape)


def unrotate(v: jax.Array, sign: jax.Array) -> jax.Array:
    """The inverse of `rotate`."""
    tiles = v.astype(jnp.float32).reshape(*v.shape[:-1], -1, sign.shape[0])
    factor = jnp.asarray(hadamard(sign.shape[0])) * sign[None, :]
    return jnp.matmul(tiles, factor, precision=jax.lax.Precision.HIGHEST).reshape(v.shape)


# --- products


def in_units(a: Blocks, b: Blocks) -> jax.Array:
    """a @ b^T in FP4 units, float32 [p, q]; blocks [p, c] and [q, c] along c. Only where `scaled.native`."""
    made = scaled.scaled_dot(decode(a.codes), a.scales, decode(b.codes), b.scales)
    return made * (a.tensor * b.tensor)


def along_inputs(tiles: Blocks) -> Blocks:
    """A weight's tiles [m, n] as blocks along m of its transpose [n, m]: each tile's scale for its columns."""
    block = tiles.codes.shape[0] // tiles.scales.shape[0]
    return Blocks(tiles.codes.T, jnp.repeat(tiles.scales.T, block, 0), tiles.tensor)


def _product(
    dy_pc: jax.Array, other_qc: jax.Array, name: str, how: Fp4Config, key: Key, rotated: bool, exact: bool
) -> jax.Array:
    """dy @ other^T [p, q], float32, quantized along c. exact: `other` is multiplied as it is."""
    dtype = other_qc.dtype
    dy_key, other_key, sign_key = jax.random.split(key, 3)
    if rotated:
        sign = signs(how.signs, how.hadamard, sign_key)
        dy_pc, other_qc = rotate(dy_pc, sign), rotate(other_qc, sign)
    drawn = None if how.stochastic == "none" else dy_key, other_key if how.stochastic == "both" else None
    both = not exact and how.operands == "both"
    if both and scaled.native(name):
        return in_units(quantize(dy_pc, name, drawn[0]), quantize(other_qc, name, drawn[1]))
    dy, scale = scaled_levels(dy_pc, name, drawn[0])
    other = other_qc
    if both:
        other, other_scale = scaled_levels(other_qc, name, drawn[1])
        scale = scale * other_scale
    contract_last = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        dy.astype(dtype), other.astype(dtype), contract_last, preferred_element_type=jnp.float32
    )
    return product * scale


def dgrad(dy_Tn: jax.Array, w_mn: jax.Array, name: str, how: Fp4Config, key: Key, exact: bool) -> jax.Array:
    """dx = Q(dy) @ Q(w)^T, float32 [T, m], with blocks along n.

    Args: name: in FORMATS. key: consumed. exact: w holds codes already (ternary, FP4 tiles): it is
    neither rounded nor rotated. Blocks, and Hadamard tiles if how.rotated is "both", must divide n.
    """
    rotated = how.hadamard > 0 and how.rotated == "both" and not exact
    return _product(dy_Tn, w_mn, name, how, key, rotated, exact)


def wgrad(x_Tm: jax.Array, dy_Tn: jax.Array, name: str, how: Fp4Config, key: Key) -> jax.Array:
    """dw = Q(x)^T @ Q(dy), float32 [m, n], with blocks along the tokens T.

    Args as for `dgrad`. Tokens are filled up with zeros to a whole number of blocks and tiles, which
    changes no value.
    """
    spare = -x_Tm.shape[0] % max(FORMATS[name], how.hadamard)
    x_mT, dy_nT = (jnp.pad(v, ((0, spare), (0, 0))).T for v in (x_Tm, dy_Tn))
    return _product(dy_nT, x_mT, name, how, key, how.hadamard > 0, exact=False).T
