"""Optimizer state in 8 bits: a wrapper that stores moments as codes and scales.

A moment changes little from step to step, so what matters is its storage, not its arithmetic: each
update decodes to float32, runs the wrapped transform, and encodes what it left behind. Gradients,
Newton-Schulz and everything else in between see float32 only. On a GPU that can, the three are one
kernel for transforms with an elementwise form (`fused`).

The codes and their rounding are in `kernels.int8`.

Rounding to nearest freezes an average whose change per step, (1 - beta) times the difference to the
gradient, is below half the distance of two levels. Stochastic rounding does not: it is right on
average. Scales in bfloat16 are rounded to nearest, within 2^-8, and freeze in the same way when
1 - beta is below that: they suit a momentum with beta <= 0.95, not a second moment.

Sources: arXiv:2110.02861 (8-bit optimizers, dynamic code), arXiv:2509.23106 (8-bit Muon).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.kernels import int8
from nanochat_jax.kernels.int8 import dequantize, quantize
from nanochat_jax.optim import fused

ROUNDINGS = ("nearest", "stochastic")
ADAM: Mapping[str, str] = MappingProxyType({"mu": "linear", "nu": "dynamic_unsigned"})


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
    form: fused.Form | None = None,
    impl: str = "auto",
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
        form: the elementwise form of `inner`, whose state then is one NamedTuple with its fields, or that and the
            state of `form.behind`; None if it has none.
        impl: of the update by its form: "auto" (in one kernel on a GPU on which a probe found it right,
            else as without a form), "pallas" or "reference".

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
        int8.check(block, code)
    if rounding not in ROUNDINGS:
        raise ValueError(f"no rounding '{rounding}'; known: {', '.join(ROUNDINGS)}")
    if jnp.dtype(scale_dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"scales are float32 or bfloat16, got {jnp.dtype(scale_dtype).name}")
    inner = optax.with_extra_args_support(inner)

    def key_of(count):
        """Of stochastic rounding, from the name of a moment; None for nearest."""
        if rounding == "nearest":
            return lambda name: None
        key = jax.random.fold_in(jax.random.key(seed), count)
        return lambda name: params_lib.fold_name(key, name)

    def encode(tree, like, count):
        """Codes in place of the moments, and the tree of scales."""
        fields = _find(tree, like, codes, min_size)
        keys = key_of(count)

        def store(path, x, code):
            if code is None:
                return x, optax.MaskedNode()
            return quantize(x, block, code, keys(params_lib.path_name(path)), scale_dtype)

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
        if form is not None and int8.served(impl) and _all_float32(updates):
            count = jnp.asarray(optax.safe_increment(state.count))
            keys = key_of(count)
            new_updates, tree, scales = fused.update(
                form, updates, state.inner, state.scales, tuple(codes[field] for field in form.fields), block,
                keys, impl,
            )  # fmt: skip
            return new_updates, QuantizedState(count, tree, scales)
        new_updates, tree = inner.update(updates, decode(state, updates), params, **extra_args)
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = jax.tree.map(lambda u, g: u.astype(g.dtype), new_updates, updates)
        return new_updates, QuantizedState(count, *encode(tree, updates, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _all_float32(tree: Any) -> bool:
    return all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))


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
