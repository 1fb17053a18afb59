"""Block-wise 8-bit numbers, and the moments' update of an optimizer in one pass over memory.

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

`update` decodes moments, applies an optimizer's elementwise formulas and encodes what they leave. Its
`reference` is plain XLA, which reads gradients and moments twice: a block's maximum must be known
before its first element can be rounded. `pallas` holds whole blocks and reads them once
(kernels/int8_pallas.py). Not yet measured on GPU.

Source: arXiv:2110.02861 (8-bit optimizers, dynamic code).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import dispatch, magnitude, noise
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
LINES = {"dynamic": _lines(_SIGNED), "dynamic_unsigned": _lines(_UNSIGNED)}
PER_LEVEL = np.float32(1 / 127)
CODES = ("linear", *LEVELS)
ROUNDINGS = ("nearest", "stochastic")


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
    check(block, code)
    if x.ndim < 1:
        raise ValueError("quantize needs an axis to take blocks from, got a scalar")
    blocks = _to_blocks(x.astype(jnp.float32), block)
    top = magnitude.largest(blocks, -1, keepdims=True)
    scales = (top * PER_LEVEL if code == "linear" else top).astype(scale_dtype)
    # A dynamic code takes its position from the exact maximum, which then is always the last level;
    # from a rounded scale it could fall below it, and a stored moment would shrink at every step.
    unit = scales.astype(jnp.float32) if code == "linear" else top
    # Reciprocals of subnormal scales overflow: such a block, below 1.5e-36, is all zeros. NaNs stay.
    multiples = blocks * jnp.where(unit < jnp.finfo(jnp.float32).tiny, 0.0, 1 / unit)
    offset = 0.5 if key is None else _to_blocks(_uniform(key, x.shape), block)
    return _from_blocks(to_codes(multiples, code, offset), x.shape), scales[..., 0]


def dequantize(codes: jax.Array, scales: jax.Array, block: int, code: str) -> jax.Array:
    """Decode what `quantize` returned with the same block and code.

    Args: codes: [..., n], int8 or uint8. scales: [..., ceil(n / block)], floating.
    Returns: float32 [..., n]; exactly 0 where the block was all zeros.
    Raises: ValueError for an unknown code or a block below 1.

    >>> import jax.numpy as jnp
    >>> dequantize(*quantize(jnp.array([0.0, 0.5, 1.0]), 2, "dynamic"), 2, "dynamic").tolist()[2]
    1.0
    """
    check(block, code)
    values = codes.astype(jnp.float32) if code == "linear" else jnp.asarray(LEVELS[code])[codes]
    return _from_blocks(_to_blocks(values, block) * scales.astype(jnp.float32)[..., None], codes.shape)


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
    return (noise.hashed_bits(key, shape) >> 8).astype(jnp.float32) * 2.0**-24


def position(size: jax.Array, code: str) -> jax.Array:
    """Number of the level, with fractions in between, of entries in units of the scale.

    Args: size: float32, any shape; magnitudes for "dynamic", values for "dynamic_unsigned". code: in LEVELS.
    """
    *concave, last = [a * size + b for a, b in LINES[code]]
    # Only the gap before the last level, 1, is narrower than the one before it.
    return jnp.maximum(functools.reduce(jnp.minimum, concave), last)


def to_codes(
    multiples: jax.Array,
    code: str,
    offset: jax.typing.ArrayLike,
    place: Callable[[jax.Array, str], jax.Array] = position,
) -> jax.Array:
    """Codes of entries in units of the scale; offset 1/2 rounds to nearest, uniform in [0, 1) at random.

    place: `position`, or a kernel's form of it.
    """
    if code == "linear":
        return jnp.clip(jnp.floor(multiples + offset), -127, 127).astype(jnp.int8)
    level = jnp.floor(place(jnp.abs(multiples) if code == "dynamic" else multiples, code) + offset)
    if code == "dynamic":
        level = _ZERO + jnp.sign(multiples) * level
    return jnp.clip(level, 0, 255).astype(jnp.uint8)


def check(block: int, code: str) -> None:
    """Raise for arguments that no function here takes."""
    if code not in CODES:
        raise ValueError(f"no code '{code}'; known: {', '.join(CODES)}")
    if block < 1:
        raise ValueError(f"a block has at least 1 element, got {block}")


# --- the update of moments: one function, three implementations of the same numbers

# (gradient, moments, numbers) -> (direction, new moments); elementwise, float32. `numbers` are scalars of
# the step. Kernels trace it as it stands, so it must not capture arrays.
Rule = Callable[[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]], tuple[jax.Array, tuple]]
Stored = tuple[jax.Array, jax.Array]  # codes [..., n], scales [..., ceil(n / block)]


def _reference(rule, grad, stored, codes, numbers, block, keys):
    pairs = zip(stored, codes, strict=True)
    moments = tuple(dequantize(values, scales, block, code) for (values, scales), code in pairs)
    direction, moments = rule(grad.astype(jnp.float32), moments, tuple(numbers))
    return direction, tuple(
        quantize(moment, block, code, key, scales.dtype)
        for moment, (_, scales), code, key in zip(moments, stored, codes, keys, strict=True)
    )


def _pallas(rule, grad, stored, codes, numbers, block, keys, interpret=False):
    kernel = dispatch.pallas("int8_pallas", interpret)
    block = min(block, grad.shape[-1])
    if block & (block - 1) or not kernel.LEAST <= block <= kernel.MOST:
        raise NotImplementedError(
            f"blocks of {block} are no power of two from {kernel.LEAST} to {kernel.MOST}"
        )
    if grad.shape[-1] % block:
        raise NotImplementedError(f"blocks of {block} do not divide rows of {grad.shape[-1]}")
    lines = lambda a: a.reshape(-1, block)  # noqa: E731
    salts = [None if key is None else noise.salt(key) for key in keys]
    direction, made = kernel.update(
        rule, lines(grad), [(lines(c), s.reshape(-1)) for c, s in stored], codes, numbers, salts, interpret
    )
    made = (
        (c.reshape(grad.shape), s.reshape(old.shape)) for (c, s), (_, old) in zip(made, stored, strict=True)
    )
    return direction.reshape(grad.shape), tuple(made)


def _probed(*arguments):
    dispatch.refuse("nanochat_jax.kernels.int8:check_on_device")
    return _pallas(*arguments)


# "interpret" runs the kernel's own code on any device, slowly: for tests.
IMPLS: dict[str, Callable[..., Any]] = {
    "pallas": _pallas,
    "reference": _reference,
    "interpret": functools.partial(_pallas, interpret=True),
}


def update(
    rule: Rule,
    grad: jax.Array,
    stored: tuple[Stored, ...],
    codes: tuple[str, ...],
    numbers: tuple[jax.Array, ...] = (),
    block: int = 128,
    keys: tuple[Key | None, ...] | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, tuple[Stored, ...]]:
    """One step of an optimizer's moments in 8 bits.

    Args:
        rule: the optimizer's formulas, see `Rule`.
        grad: [..., n], floating; taken to float32 first.
        stored: of each moment what `quantize` returned; scales keep their dtype.
        codes: of each moment, a name in CODES.
        numbers: float32 [] each, for the rule.
        block: elements per scale.
        keys: of each moment, None (nearest) or a key (consumed) for stochastic rounding; default all None.
        impl: "auto" (the Pallas kernel on a GPU on which a probe found it right, else plain XLA), or a
            name in IMPLS. The kernel needs blocks of a power of two, at least 16, that divide the rows.

    Returns: direction float32 [..., n]; the new `stored`.
    Raises: ExceptionGroup with the reason if the named implementation refuses.
    """
    keys = (None,) * len(codes) if keys is None else keys
    impls = {**IMPLS, "pallas": _probed} if impl == "auto" else IMPLS
    return dispatch.first(impls, impl, rule, grad, stored, codes, tuple(numbers), block, keys)


def served(impl: str) -> bool:
    """Whether `impl` asks for the kernel and gets it here: then `update` is worth its way round."""
    if impl != "auto":
        return impl != "reference"
    try:
        dispatch.refuse("nanochat_jax.kernels.int8:check_on_device")
    except NotImplementedError:
        return False
    return True


def check_on_device() -> None:
    """Compile the kernel on the default device and compare it with plain XLA.

    Raises: whatever the compiler says, or ValueError naming the case that came out wrong.
    """

    def rule(grad, moments, numbers):
        first, second = moments
        first, second = 0.5 * first + 0.5 * grad, 0.75 * second + 0.25 * grad * grad
        return first * numbers[0], (first, second)

    rng = np.random.default_rng(0)
    grad, old = (jnp.asarray(rng.normal(size=(48, 512)), jnp.float32) for _ in range(2))
    for first in ("linear", "dynamic"):
        codes = (first, "dynamic_unsigned")
        for keys in ((None, None), (jax.random.key(0), jax.random.key(1))):
            stored = tuple(quantize(x, 128, code) for x, code in zip((old, old * old), codes, strict=True))
            results = []
            for run in (_pallas, _reference):
                step = jax.jit(lambda g, s, n, run=run: run(rule, g, s, codes, n, 128, keys))  # noqa: B023
                results.append(step(grad, stored, (jnp.float32(3.0),)))
            (got, made), (want, kept) = results
            close = np.allclose(got, want, rtol=1e-5, atol=1e-6)
            for (c, s), (c0, s0) in zip(made, kept, strict=True):
                # Fused multiplications and additions differ in the last bit, which may move a tie.
                apart = np.abs(np.asarray(c, np.int32) - np.asarray(c0, np.int32))
                close &= np.allclose(s, s0, rtol=1e-5) and apart.max() <= 1 and apart.mean() < 1e-3
            if not close:
                raise ValueError(f"wrong moments in {first}, {'nearest' if keys[0] is None else 'random'}")
