"""FP4 numbers: E2M1 codes in blocks that share a scale, two roundings, packing, and the kernels' dispatch.

    value = level * scale of the block * scale of the tensor        level: 0, .5, 1, 1.5, 2, 3, 4, 6, signed

- "nvfp4": blocks of 16, E4M3 scales; the tensor's float32 scale puts the largest block at E4M3's 448.
- "mxfp4": blocks of 32, power-of-two scales (E8M0), 2^(floor(log2 max) - 2) as in the OCP standard.
  The largest entry of a block is then in [4, 8) scales, and what lies above 6 is clipped.

Rounding to nearest (half to even) has the smaller error, stochastic rounding none on average. The
latter holds only if nothing is clipped: there, unlike in the sources' nearest rounding, an E4M3 scale
is rounded up (to nearest it falls up to 1/16 short of the block's maximum), and MXFP4 works at 3/4 of
the size (4/3 is the tensor's scale), as in arXiv:2502.20586.

XLA on CPU takes subnormal float32 for zero, and turns a division by a scalar into a multiplication by
its rounded reciprocal: scales stay normal here, and divisors are arrays.

`reference` states the meaning in plain XLA, which takes two passes over an array, one for the blocks'
maxima. `pallas` takes one (kernels/fp4_pallas.py) and gives the bits that the reference has on CPU, those of the
formats' definition. On GPUs XLA divides with an error of up to two units in the last place (it asks LLVM
for div.full), so there the reference may take the other level where a value lies between two; the
kernel divides exactly. Not yet measured on GPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import dispatch, magnitude, noise
from nanochat_jax.types import Key

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by the lower three bits of a code
TOP = 6.0
E4M3_TOP, E4M3_LEAST = 448.0, 2.0**-9
FORMATS = {"nvfp4": 16, "mxfp4": 32}  # -> elements that share a scale
MAX_ROWS = (
    256  # of the left operand of a packed product; more would unpack the right one ever again. Not measured
)


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


def spacing(a: jax.Array) -> jax.Array:
    """Distance from the level at or below each magnitude (below 6) to the next one."""
    return jnp.where(a < 2, 0.5, jnp.where(a < 4, 1.0, 2.0))


def nearest(z: jax.Array) -> jax.Array:
    """The nearest level, ties to the even code, beyond 6 to 6; float32 [...] to float32 [...].

    Equal to a cast to float4_e2m1fn and back, the sign of zero included; NaN stays NaN.
    """
    a = jnp.abs(z)
    step = spacing(a)
    return jnp.copysign(jnp.minimum(jnp.round(a / step) * step, TOP), z)


def stochastic(z: jax.Array, u: jax.Array) -> jax.Array:
    """One of the two neighbouring levels, z on average if |z| <= 6; beyond, 6.

    Args: z: float32 [...]. u: float32, z's shape, uniform in (0, 1) as `uniform` makes it.
    """
    a = jnp.minimum(jnp.abs(z), TOP)
    step = spacing(a)
    return jnp.copysign(jnp.floor(a / step + u) * step, z)


def uniform(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Odd multiples of 2^-21 in (0, 1), float32 of `shape`; a function of the key and the index alone.

    20 bits, because levels / step + u must be exact in float32: a level then always rounds to itself.
    """
    return ((noise.hashed_bits(key, shape) >> 12).astype(jnp.float32) + 0.5) * 2.0**-20


def encode(levels: jax.Array) -> jax.Array:
    """Codes 0..15 (uint8) of exact levels (float32); NaN, which E2M1 lacks, becomes a 6 of its sign."""
    a = jnp.abs(levels)
    index = jnp.where(a < 2, 2 * a, jnp.where(a < 4, a + 2, a / 2 + 4))
    index = jnp.where(jnp.isnan(a), 7.0, index)
    return index.astype(jnp.uint8) | (jnp.signbit(levels).astype(jnp.uint8) << 3)


def decode(codes: jax.Array) -> jax.Array:
    """Levels (float32) of codes 0..15; code 8 is -0."""
    a = jnp.asarray(LEVELS)[codes & 7]
    return jnp.where(codes >= 8, -a, a)


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


def _enlarge(top: jax.Array) -> jax.Array:
    """Factor that brings a tensor's greatest magnitude to that of levels times scales."""
    # At most 2^116, so that neither the inverse nor its product with the least scale is subnormal.
    return jnp.minimum(TOP * E4M3_TOP / top, 2.0**116)


def _e4m3_scales(top: jax.Array, up: bool) -> tuple[jax.Array, jax.Array]:
    enlarge = _enlarge(magnitude.largest(top))
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
SCALE_TYPES = {"nvfp4": jnp.float8_e4m3fn, "mxfp4": jnp.float8_e8m0fnu}


def _levels(view: jax.Array, axes: tuple[int, ...], name: str, key: Key | None):
    """(levels, block scales, tensor scale) of a view whose blocks extend over `axes`."""
    view = view.astype(jnp.float32)
    top = magnitude.largest(view, axes, keepdims=True)
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


# --- implementations: v [..., n] -> Blocks, or (level * block scale, tensor scale) if `result` is "levels"


def _reference(v: jax.Array, name: str, key: Key | None, tiles: bool, result: str) -> Any:
    shape, axes = _view(v.shape, name, tiles)
    levels, scales, tensor = _levels(v.reshape(shape), axes, name, key)
    if result == "levels":
        return (levels * scales.astype(jnp.float32)).astype(jnp.bfloat16).reshape(v.shape), tensor
    codes = encode(levels).reshape(v.shape)
    return Blocks(pack(codes) if result == "packed" else codes, scales.squeeze(axes), tensor)


def _pallas(v: jax.Array, name: str, key: Key | None, tiles: bool, result: str, interpret: bool = False):
    if tiles:
        raise NotImplementedError("square tiles are left to plain XLA")
    _view(v.shape, name, tiles)
    kernel = dispatch.pallas("fp4_pallas", interpret)
    tensor = jnp.float32(1.0 if key is None else 4 / 3)
    enlarge = jnp.float32(1.0)
    if name == "nvfp4":
        enlarge = _enlarge(magnitude.largest(v.astype(jnp.float32)))
        tensor = 1 / enlarge
    numbers, salt = jnp.stack([enlarge, tensor]), None if key is None else noise.salt(key)
    made = kernel.quantize(_rows(v), numbers, name, salt, result != "levels", interpret)
    if result == "levels":
        return made[0].reshape(v.shape), tensor
    codes, scales = (a.reshape(*v.shape[:-1], -1) for a in made)
    scales = jax.lax.bitcast_convert_type(scales, SCALE_TYPES[name])
    return Blocks(codes if result == "packed" else unpack(codes), scales, tensor)


def _rows(v: jax.Array) -> jax.Array:
    return v.reshape(-1, v.shape[-1])


def _probed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where `dispatch.refuse` has nothing against it."""

    def run(*arguments: Any) -> Any:
        dispatch.refuse("nanochat_jax.kernels.fp4:check_on_device")
        return kernel(*arguments)

    return run


def _run(impls: dict[str, Callable[..., Any]], impl: str, *arguments: Any) -> Any:
    chosen = {**impls, "pallas": _probed(impls["pallas"])} if impl == "auto" else impls
    return dispatch.first(chosen, impl, *arguments)


# "interpret" runs the kernel's own code on any device, slowly: for tests.
QUANTIZE: dict[str, Callable[..., Any]] = {
    "pallas": _pallas,
    "reference": _reference,
    "interpret": functools.partial(_pallas, interpret=True),
}


def quantize(
    v: jax.Array, name: str, key: Key | None = None, tiles: bool = False, impl: str = "auto"
) -> Blocks:
    """Quantize along the last axis, or in square tiles of the last two.

    Args: v: [..., n], floating. name: in FORMATS. key: None rounds to nearest; a key (consumed) rounds
    stochastically, without bias. tiles: a block is block x block elements of the last two axes.
    impl: "auto" (the Pallas kernel on a GPU on which a probe found it right, else plain XLA), or a name
    in QUANTIZE. All give the same bits where XLA divides exactly, see the header.
    Returns: Blocks with scales [..., n / block], or [..., m / block, n / block]. A block with NaN or
    infinity has the scale NaN (NVFP4: all blocks). A block of zeros has the scale 1.
    Raises: ValueError if blocks do not divide an axis; ExceptionGroup if the named implementation refuses.
    Source: arXiv:2509.25149 (NVFP4), OCP Microscaling Formats 1.0 (MXFP4).
    """
    return _run(QUANTIZE, impl, v, name, key, tiles, "codes")


def quantize_packed(v: jax.Array, name: str, key: Key | None = None, impl: str = "auto") -> Blocks:
    """`quantize` along the last axis with two codes a byte, as in `pack`: codes uint8 [..., n / 2]."""
    return _run(QUANTIZE, impl, v, name, key, False, "packed")


def scaled_levels(
    v: jax.Array, name: str, key: Key | None = None, tiles: bool = False, impl: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """(level * block scale in bfloat16, exactly, v's shape; the tensor's scale, float32 []).

    The same numbers as `quantize` holds, ready for a product. Args and errors as there.
    """
    return _run(QUANTIZE, impl, v, name, key, tiles, "levels")


def dequantize(blocks: Blocks, name: str, tiles: bool = False) -> jax.Array:
    """float32 values, in the shape of the codes, of what `quantize` made with the same name and tiles."""
    shape, axes = _view(blocks.codes.shape, name, tiles)
    scales = jnp.expand_dims(blocks.scales.astype(jnp.float32), axes) * blocks.tensor
    return (decode(blocks.codes).reshape(shape) * scales).reshape(blocks.codes.shape)


def _dequantize_reference(packed: Blocks, name: str, dtype: Any, tiles: bool = False) -> jax.Array:
    return dequantize(packed._replace(codes=unpack(packed.codes)), name, tiles).astype(dtype)


def _dequantize_pallas(packed: Blocks, name: str, dtype: Any, interpret: bool = False) -> jax.Array:
    kernel, bits = (
        dispatch.pallas("fp4_pallas", interpret),
        jax.lax.bitcast_convert_type(packed.scales, jnp.uint8),
    )
    made = kernel.dequantize(
        _rows(packed.codes), _rows(bits), packed.tensor.reshape(1), name, dtype, interpret
    )
    return made.reshape(*packed.codes.shape[:-1], -1)


DEQUANTIZE: dict[str, Callable[..., Any]] = {
    "pallas": _dequantize_pallas,
    "reference": _dequantize_reference,
    "interpret": functools.partial(_dequantize_pallas, interpret=True),
}


def dequantize_packed(packed: Blocks, name: str, dtype: Any = jnp.float32, impl: str = "auto") -> jax.Array:
    """Values [..., n] in `dtype` of what `quantize_packed` made; rounded once, from float32.

    Args: impl: as for `quantize`, a name in DEQUANTIZE.
    """
    return _run(DEQUANTIZE, impl, packed, name, dtype)


# --- products of packed operands, emulated: bfloat16 holds level * block scale exactly


def _dot_reference(a: Blocks, b: Blocks, name: str) -> jax.Array:
    one = jnp.ones((), jnp.float32)
    x, y = (
        _dequantize_reference(v._replace(tensor=one), name, jnp.bfloat16, len(v.scales) < len(v.codes))
        for v in (a, b)
    )
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, y, contract_last, preferred_element_type=jnp.float32)


def _dot_pallas(a: Blocks, b: Blocks, name: str, interpret: bool = False) -> jax.Array:
    kernel = dispatch.pallas("fp4_pallas", interpret)
    x, y = ((o.codes, jax.lax.bitcast_convert_type(o.scales, jnp.uint8)) for o in (a, b))
    return kernel.dot(x, y, name, interpret)


def _dot_probed(a: Blocks, b: Blocks, name: str) -> jax.Array:
    """The kernel if it works on this device and pays. Packed weights are what inference holds, on one device: see
    `kernels.ternary`, where the same holds."""
    dispatch.need_gpu()
    if len(a.codes) > MAX_ROWS:
        raise NotImplementedError(f"{len(a.codes)} rows: left to plain XLA above {MAX_ROWS}")
    dispatch.refuse("nanochat_jax.kernels.fp4:check_on_device", placed=True)
    return _dot_pallas(a, b, name)


DOT: dict[str, Callable[..., Any]] = {
    "pallas": _dot_pallas,
    "reference": _dot_reference,
    "interpret": functools.partial(_dot_pallas, interpret=True),
}


def packed_dot(a: Blocks, b: Blocks, name: str, impl: str = "auto") -> jax.Array:
    """a @ b^T of packed operands, float32 [M, N].

    Args: a, b: of `quantize_packed`, codes [M, K / 2] and [N, K / 2]; scales of b may be those of square tiles,
    [N / block, K / block]. impl: as for `quantize`, in DOT; "auto" leaves many rows to plain XLA.
    Raises: ValueError if the inputs differ.
    """
    if a.codes.shape[-1] != b.codes.shape[-1]:
        raise ValueError(f"operands have {2 * a.codes.shape[-1]} and {2 * b.codes.shape[-1]} inputs")
    impls = {**DOT, "pallas": _dot_probed} if impl == "auto" else DOT
    return dispatch.first(impls, impl, a, b, name) * (a.tensor * b.tensor)


def check_on_device() -> None:
    """Compile the kernels on the default device and compare them with plain XLA and with NumPy.

    Few entries may differ from plain XLA by a level, see the header.

    Raises: whatever the compiler says, or ValueError naming the case that came out wrong.
    """
    rng = np.random.default_rng(0)
    v = rng.normal(size=(40, 512)).astype(np.float32) * np.exp(rng.normal(size=(40, 1))).astype(np.float32)
    v[3, :32], v[4, 7] = 0, 100.0
    for name in FORMATS:
        for key in (None, jax.random.key(1)):
            for result in ("packed", "levels"):
                for given in (v, np.where(v == 100, np.nan, v).astype(np.float32)):
                    got, want = (
                        jax.jit(_shown, static_argnums=(0, 2, 4))(run, jnp.asarray(given), name, key, result)
                        for run in (_pallas, _reference)
                    )
                    if not all(_near(x, y) for x, y in zip(got, want, strict=True)):
                        raise ValueError(
                            f"wrong {result} in {name}, {'nearest' if key is None else 'random'}"
                        )
        packed = jax.jit(quantize_packed, static_argnums=(1, 3))(jnp.asarray(v), name, None, "reference")
        values = [jax.jit(f, static_argnums=(1, 2))(packed, name, jnp.float32) for f in (
            _dequantize_pallas, _dequantize_reference
        )]  # fmt: skip
        if not _near(*values):
            raise ValueError(f"wrong values of {name}")
        exact = np.asarray(values[1], np.float64) / np.float64(packed.tensor)
        block = FORMATS[name]
        square = packed._replace(codes=packed.codes[:block], scales=packed.scales[:1])
        tile = np.asarray(decode(unpack(square.codes)), np.float64) * np.repeat(
            np.asarray(square.scales, np.float64), block, 1
        )
        for other, wide in ((packed, exact), (square, tile)):
            got = jax.jit(_dot_pallas, static_argnums=2)(packed, other, name)
            if not np.all(np.abs(got - exact @ wide.T) <= 1e-5 * (np.abs(exact) @ np.abs(wide).T)):
                raise ValueError(f"wrong product in {name}")


def _shown(run: Callable[..., Any], v: jax.Array, name: str, key: Key | None, result: str) -> tuple:
    """What an implementation makes of v, with the values its codes stand for: codes of NaN may differ."""
    made = run(v, name, key, False, result)
    if result == "levels":
        return made
    return made.scales, made.tensor, _dequantize_reference(made, name, jnp.float32)


def _near(x: jax.Array, y: jax.Array) -> bool:
    """Equal, NaN included, but for a few entries that rounded to the neighbouring level."""
    one, other = np.asarray(x).astype(np.float32), np.asarray(y).astype(np.float32)
    lost = np.isnan(one) != np.isnan(other)
    one, other = np.nan_to_num(one), np.nan_to_num(other)
    apart = np.abs(one - other)
    few = np.mean(one != other) < 5e-3
    return bool(not lost.any() and few and np.all(apart <= np.maximum(np.abs(one), np.abs(other))))
