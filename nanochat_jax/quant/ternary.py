"""Ternary weights and 8-bit activations (BitNet b1.58).

Weights: one scale per matrix, gamma = mean |w| (or one per group of inputs), and codes
t = clip(round(w / gamma), -1, 1), so w is replaced by gamma * t. Activations: one scale per token,
q = round(127 * x / max |x|). Both quantizers are the identity in the backward pass (straight-through,
see `matmul`); rounding is half to even everywhere, in float32 whatever the compute dtype.
t(c * w) = t(w) for c > 0: only gamma carries the size of w.

Unlike the seed system, groups never cross rows, and the same codes serve training and export.
Source: arXiv:2402.17764, arXiv:2504.12285.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import magnitude
from nanochat_jax.params import flatten
from nanochat_jax.types import Metrics, Params

STACKS = ("blocks", "before", "after", "mtp")  # parts of the parameter tree that hold layers
FLOOR = 1e-8  # keeps an all-zero matrix at codes 0 instead of 0/0; small enough for zero init


def scale(w: jax.Array, group: int = 0) -> jax.Array:
    """Absmean scale, float32.

    Args: w: [..., m, n]. group: inputs that share a scale, dividing m; 0 = all.
    Returns: [..., 1, 1], or [..., m/group, 1, n] for the view [..., m/group, group, n].
    The per-matrix scale is rounded to float16 precision, as stored formats carry it.
    """
    size = jnp.abs(w.astype(jnp.float32))
    if group:
        grouped = size.reshape(*w.shape[:-2], w.shape[-2] // group, group, w.shape[-1])
        return jnp.maximum(grouped.mean(-2, keepdims=True), FLOOR)
    mean = size.mean((-2, -1), keepdims=True)
    # reduce_precision, not a cast to float16 and back, which XLA may remove; 5 exponent bits
    # would flush tiny scales to zero, so only the mantissa is rounded.
    return jnp.maximum(jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=10), FLOOR)


def codes(w: jax.Array, gamma: jax.Array) -> jax.Array:
    """clip(round(w / gamma), -1, 1) as int8, in the shape of w."""
    view = w.astype(jnp.float32)
    if gamma.ndim > w.ndim:
        groups = gamma.shape[-3]
        view = view.reshape(*w.shape[:-2], groups, w.shape[-2] // groups, w.shape[-1])
    return jnp.clip(jnp.round(view / gamma), -1, 1).astype(jnp.int8).reshape(w.shape)


def quantize_ternary(w: jax.Array, group: int = 0) -> tuple[jax.Array, jax.Array]:
    """(codes int8 in the shape of w, scale as in `scale`). No gradient."""
    gamma = scale(w, group)
    return codes(w, gamma), gamma


def dequantize(t: jax.Array, gamma: jax.Array) -> jax.Array:
    """gamma * t, float32, in the shape of t."""
    view = t.astype(jnp.float32)
    if gamma.ndim > t.ndim:
        groups = gamma.shape[-3]
        view = view.reshape(*t.shape[:-2], groups, t.shape[-2] // groups, t.shape[-1])
    return (gamma * view).reshape(t.shape)


def int8_rows(x: jax.Array, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantize each row of the last axis to 8 bits.

    Args: axis: inside shard_map, the mesh axis over which rows are split: all parts share one scale.
    Returns: (q int8 in [-127, 127], inverse scale float32 [..., 1]) with x close to q * inverse. A row
    with NaN has the inverse NaN.
    """
    x = x.astype(jnp.float32)
    largest = magnitude.row_largest(x)
    if axis is not None:  # as integers, which do not lose a NaN either
        largest = magnitude.as_float(jax.lax.pmax(magnitude.bits(largest), axis))
    inverse = jnp.where(largest < 1e-5, 1e-5, largest) / 127
    return jnp.round(x * (1 / inverse)).astype(jnp.int8), inverse


def select(params: Params, roles: tuple[str, ...]) -> dict[str, jax.Array]:
    """The stacked matrices of `params` that the roles name, by path."""
    wanted = {f"{stack}/{role}" for stack in STACKS for role in roles}
    return {path: w for path, w in flatten(params).items() if path in wanted}


def rescaled(y: jax.Array, gamma: jax.Array | None, inverse: jax.Array | None, dtype) -> jax.Array:
    """A product of codes times the scales of both operands (None = 1), in the order of the training forward,
    acc * (gamma * inverse), whose bits served weights must give."""
    factor = gamma if inverse is None else inverse if gamma is None else gamma * inverse
    return (y if factor is None else y * factor).astype(dtype)


def all_codes(params: Params, roles: tuple[str, ...], group: int = 0) -> dict[str, jax.Array]:
    """Codes of every ternary matrix, by path: the input of `health`."""
    return {path: quantize_ternary(w, group)[0] for path, w in select(params, roles).items()}


def health(now: dict[str, jax.Array], before: dict[str, jax.Array] | None = None) -> Metrics:
    """Shares of -1, 0 and +1 over all ternary weights, and the share that changed since `before`.

    Healthy models keep 25-45% zeros; 100% is a collapse, 0% is sign-only.
    """
    total = sum(t.size for t in now.values())
    zero = jnp.zeros((), jnp.float32)

    def share(value: int) -> jax.Array:
        return sum((jnp.sum(t == value, dtype=jnp.float32) for t in now.values()), zero) / total

    metrics = {
        "quant/minus_fraction": share(-1),
        "quant/zero_fraction": share(0),
        "quant/plus_fraction": share(1),
    }
    if before is not None:
        changed = sum((jnp.sum(now[p] != before[p], dtype=jnp.float32) for p in now), zero)
        metrics["quant/flip_rate"] = changed / total
    return metrics
