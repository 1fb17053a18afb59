"""Optimizer state in 8 bits: a wrapper that stores moments as codes and scales.

A moment changes little from step to step, so what matters is its storage, not its arithmetic: each
update decodes to float32, runs the wrapped transform, and encodes what it left behind. Gradients,
Newton-Schulz and everything else in between see float32 only.

A block is `block` consecutive elements of the last axis with one scale. Three codes:

- "linear": multiples -127..127 of absmax / 127. Enough for a momentum whose use is linear (Muon) or
  a sign (Lion). Small entries of a block become 0.
- "dynamic": 256 levels times absmax, 2^k of them evenly spaced in the decade 10^(k-7) to 10^(k-6), of
  either sign. Precise where entries are small. As in its source, -1 is not a level: a block led by a
  negative entry stores 0.993 of it, a loss at every step that the linear code does not have.
- "dynamic_unsigned": the same for entries >= 0, with twice as many levels. For Adam's second moment:
  an entry that a linear code rounds to 0 would be divided by.

Encoding is not a search. Over the levels of a dynamic code, the position (level number, fractions
in between) is piecewise linear in the entry, and concave up to the last level below 1: it is the
minimum of a dozen straight lines, which vectorizes on every device (7 times faster on CPU than an
unrolled binary search). Rounding to the nearest level is then floor(position + 1/2), and stochastic
rounding is floor(position + u), for all codes alike.

Rounding to nearest freezes an average whose change per step, (1 - beta) times the difference to the
gradient, is below half the distance of two levels. Stochastic rounding does not: it is right on
average. Scales in bfloat16 are rounded to nearest, within 2^-8, and freeze in the same way when
1 - beta is below that: they suit a momentum with beta <= 0.95, not a second moment.

Sources: arXiv:2110.02861 (8-bit optimizers, dynamic code), arXiv:2509.23106 (8-bit Muon).
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.kernels.noise import hashed_bits
from nanochat_jax.types import Key


def _magnitudes(first: int) -> np.ndarray:
    """Levels >= 0 of a dynamic code whose lowest decade has `first` of them, float64, ascending."""
    decades = [10.0 ** (k - 7) * (1 + 9 * (np.arange(first * 2**k) + 0.5) / (first * 2**k)) for k in range(7)]
    return np.concatenate([[0.0], *decades, [1.0]])


def _lines(levels: np.ndarray) -> list[tuple[np.float32, np.float32]]:
    """(slope, intercept) of every straight piece of the map from an entry to its position."""
    slopes = 1 / np.diff(levels)
    starts = np.arange(len(slopes)) - slopes * levels[:-1]
    first = np.append(True, ~np.isclose(slopes[1:], slopes[:-1], rtol=1e-6))  # the others repeat it
    return [(np.float32(a), np.float32(b)) for a, b in zip(slopes[first], starts[first], strict=True)]


_SIGNED, _UNSIGNED = _magnitudes(1), _magnitudes(2)

# Code -> its 256 levels as multiples of absmax, float32, ascending; the code is the index.
LEVELS: dict[str, np.ndarray] = {
    "dynamic": np.concatenate([-_SIGNED[-2:0:-1], _SIGNED]).astype(np.float32),  # -1 is not a level
    "dynamic_unsigned": _UNSIGNED.astype(np.float32),
}
_ZERO = 127  # code of 0 in "dynamic"
_LINES = {"dynamic": _lines(_SIGNED), "dynamic_unsigned": _lines(_UNSIGNED)}
CODES = ("linear", *LEVELS)
ROUNDINGS = ("nearest", "stochastic")
ADAM: Mapping[str, str] = MappingProxyType({"mu": "linear", "nu": "dynamic_unsigned"})


def quantize(
    x: jax.Array, block: int, code: str, key: Key | None = None, scale_dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Encode an array in 8 bits, block by block.

    Args:
        x: [..., n], floating. A block with a NaN or an infinity decodes to NaNs and infinities.
        block: elements per scale, >= 1; the last block of a row may be shorter.
        code: a name in CODES. "dynamic_unsigned" takes negative entries for 0.
        key: None rounds to nearest; a key (consumed) rounds stochastically between the two
            neighbouring levels, without bias if scale_dtype is float32.
        scale_dtype: floating dtype of the scales.

    Returns: codes [..., n], int8 for "linear", else uint8; scales [..., ceil(n / block)].
    Raises: ValueError for an unknown code, a scalar, or a block below 1.
    Source: arXiv:2110.02861, section 2.

    >>> import jax.numpy as jnp
    >>> codes, scales = quantize(jnp.array([1.0, -0.5, 0.0, 0.25]), 4, "linear")
    >>> codes.tolist()
    [127, -63, 0, 32]
    """
    _check(block, code)
    if x.ndim < 1:
        raise ValueError("quantize needs an axis to take blocks from, got a scalar")
    blocks = _to_blocks(x.astype(jnp.float32), block)
    top = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scales = (top / 127 if code == "linear" else top).astype(scale_dtype)
    # A dynamic code takes its position from the exact maximum, which then is always the last level;
    # from a rounded scale it could fall below it, and a stored moment would shrink at every step.
    unit = scales.astype(jnp.float32) if code == "linear" else top
    # Reciprocals of subnormal scales overflow: such a block, below 1.5e-36, is all zeros. NaNs stay.
    multiples = blocks * jnp.where(unit < jnp.finfo(jnp.float32).tiny, 0.0, 1 / unit)
    offset = 0.5 if key is None else _to_blocks(_uniform(key, x.shape), block)
    return _from_blocks(_round(multiples, code, offset), x.shape), scales[..., 0]


def dequantize(codes: jax.Array, scales: jax.Array, block: int, code: str) -> jax.Array:
    """Decode what `quantize` returned with the same block and code.

    Args: codes: [..., n], int8 or uint8. scales: [..., ceil(n / block)], floating.
    Returns: float32 [..., n]; exactly 0 where the block was all zeros.
    Raises: ValueError for an unknown code or a block below 1.

    >>> import jax.numpy as jnp
    >>> dequantize(*quantize(jnp.array([0.0, 0.5, 1.0]), 2, "dynamic"), 2, "dynamic").tolist()[2]
    1.0
    """
    _check(block, code)
    values = codes.astype(jnp.float32) if code == "linear" else jnp.asarray(LEVELS[code])[codes]
    return _from_blocks(_to_blocks(values, block) * scales.astype(jnp.float32)[..., None], codes.shape)


def bytes_per_parameter(moments: int, block: int, scale_bytes: int = 4) -> float:
    """Bytes of 8-bit state per parameter, for rows that `block` divides.

    Args: moments: 1 for Muon and Lion, 2 for AdamW. scale_bytes: 4 for float32, 2 for bfloat16.

    >>> bytes_per_parameter(1, 128)
    1.03125
    """
    return moments * (1 + scale_bytes / block)


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    count: int32 [], updates so far.
    inner: the wrapped transform's state; each quantized moment is its codes, int8 or uint8, with the
        parameter's own shape.
    scales: the same tree, with scales [..., m, ceil(n / block)] in the place of quantized moments
        and `optax.MaskedNode` (no leaf) elsewhere.
    So the path of a moment's codes and that of its scales both end in the parameter's path.
    """

    count: jax.Array
    inner: Any
    scales: Any


def quantize_state(
    inner: optax.GradientTransformation,
    codes: Mapping[str, str] = ADAM,
    block: int = 128,
    rounding: str = "nearest",
    seed: int = 0,
    scale_dtype: Any = jnp.float32,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Store moments of a transform in 8 bits.

    A moment is a field of a NamedTuple anywhere in inner's state that is named in `codes` and holds
    a tree with the parameters' paths and shapes (rows may be folded, see `foam`): mu of `optax.scale_by_adam`, `scale_by_lion` or
    `scale_by_muon`, also inside `optax.chain` and the like. Moments of parameters with fewer than
    min_size elements or of rank < 2 stay as inner made them, as does every other field.

    A parameter split along its last axis into k parts should have (n / k) divisible by block: the
    result never depends on it, but other blocks span devices and are communicated.

    Args:
        inner: transform whose state to store.
        codes: field name -> name in CODES. A field that inner does not have is ignored.
        block: elements per scale, along the last axis, >= 1.
        rounding: "nearest", or "stochastic" with keys from the seed, the count of updates and the
            path of the moment alone.
        seed: of stochastic rounding.
        scale_dtype: float32, or bfloat16 (for a momentum with beta <= 0.95).
        min_size: smallest parameter whose moments are quantized.

    Returns: transform with state QuantizedState. Updates have the gradient's dtype.
    Raises: ValueError for bad arguments; at init if inner's state has none of the fields.
    Source: arXiv:2110.02861; for Muon, arXiv:2509.23106.

    >>> import jax.numpy as jnp, optax
    >>> tx = quantize_state(optax.scale_by_adam())
    >>> state = tx.init({"w": jnp.zeros((64, 128))})
    >>> state.inner.mu["w"].dtype, state.scales.nu["w"].shape
    (dtype('int8'), (64, 1))
    """
    for code in codes.values():
        _check(block, code)
    if rounding not in ROUNDINGS:
        raise ValueError(f"no rounding '{rounding}'; known: {', '.join(ROUNDINGS)}")
    if jnp.dtype(scale_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"scales are float32 or bfloat16, got {jnp.dtype(scale_dtype).name}")
    inner = optax.with_extra_args_support(inner)

    def encode(tree, like, count):
        """Codes in place of the moments, and the tree of scales."""
        fields = _find(tree, like, codes, min_size)
        key = jax.random.fold_in(jax.random.key(seed), count) if rounding == "stochastic" else None

        def store(path, x, code):
            if code is None:
                return x, optax.MaskedNode()
            own = None if key is None else params_lib.fold_name(key, params_lib.path_name(path))
            return quantize(x, block, code, own, scale_dtype)

        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        pairs = [store(path, x, code) for (path, x), code in zip(leaves, fields, strict=True)]
        return treedef.unflatten([c for c, _ in pairs]), treedef.unflatten([s for _, s in pairs])

    def decode(state, like):
        """The inner state in float32."""
        leaves, treedef = jax.tree.flatten(state.inner)
        stored = zip(
            leaves,
            treedef.flatten_up_to(state.scales),
            _find(state.inner, like, codes, min_size),
            strict=True,
        )
        return treedef.unflatten(
            [x if code is None else dequantize(x, s, block, code) for x, s, code in stored]
        )

    def init(params):
        # Moments start as constants, and XLA would spend minutes on encoding large constants as it compiles.
        count, tree = jnp.zeros([], jnp.int32), jax.lax.optimization_barrier(inner.init(params))
        return QuantizedState(count, *encode(tree, params, count))

    def update(updates, state, params=None, **extra_args):
        new_updates, tree = inner.update(updates, decode(state, updates), params, **extra_args)
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = jax.tree.map(lambda u, g: u.astype(g.dtype), new_updates, updates)
        return new_updates, QuantizedState(count, *encode(tree, updates, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _find(tree: Any, like: Any, codes: Mapping[str, str], min_size: int) -> list[str | None]:
    """For every leaf of a state, the code to store it with, or None to leave it alone.

    The answer is the same for moments and for their codes, which have the same paths and shapes.
    """
    shapes = {path: jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(like)}

    def code_of(path: tuple, x: Any) -> str | None:
        names = (getattr(key, "name", None) for key in path)  # only fields have one
        fields = (
            codes[n] for i, n in enumerate(names) if n in codes and _is_like(x, shapes.get(path[i + 1 :]))
        )
        return next(fields, None)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = [code_of(path, x) for path, x in leaves]
    if shapes and not any(found):
        raise ValueError(f"the inner state has no field {' or '.join(codes)} shaped like the parameters")
    large = [x.ndim >= 2 and x.size >= min_size for _, x in leaves]
    return [code if fits else None for code, fits in zip(found, large, strict=True)]


def _is_like(x: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether a leaf has a parameter's shape, or that with its rows folded (`foam.fold_state`)."""
    return shape is not None and (
        x.shape == shape or (x.shape[:-1] == shape[:-1] and x.ndim > 1 and shape[-1] % x.shape[-1] == 0)
    )


def _to_blocks(x: jax.Array, block: int) -> jax.Array:
    """[..., n] -> [..., blocks, block], zeros after the end of the last block."""
    n = x.shape[-1]
    block = min(block, n)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)])
    return padded.reshape(*x.shape[:-1], -1, block)


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[..., blocks, block] -> [..., n], the inverse of `_to_blocks`."""
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _uniform(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Uniform multiples of 2^-24 in [0, 1), float32 of `shape`; equal keys give equal numbers."""
    return (hashed_bits(key, shape) >> 8).astype(jnp.float32) * 2.0**-24


def _round(multiples: jax.Array, code: str, offset: jax.typing.ArrayLike) -> jax.Array:
    """Codes of entries in units of the scale; offset 1/2 rounds to nearest, uniform in [0, 1) at random."""
    if code == "linear":
        return jnp.clip(jnp.floor(multiples + offset), -127, 127).astype(jnp.int8)
    size = jnp.abs(multiples) if code == "dynamic" else multiples
    *concave, last = [a * size + b for a, b in _LINES[code]]
    # Only the gap before the last level, 1, is narrower than the one before it.
    level = jnp.floor(jnp.maximum(functools.reduce(jnp.minimum, concave), last) + offset)
    if code == "dynamic":
        level = _ZERO + jnp.sign(multiples) * level
    return jnp.clip(level, 0, 255).astype(jnp.uint8)


def _check(block: int, code: str) -> None:
    """Raise for arguments that no function here takes."""
    if code not in CODES:
        raise ValueError(f"no code '{code}'; known: {', '.join(CODES)}")
    if block < 1:
        raise ValueError(f"a block has at least 1 element, got {block}")
