"""The one custom-VJP matmul behind every projection: quantize both operands, multiply, and treat
the quantizers as the identity in the backward pass (straight-through).

    forward   y  = (x_codes @ w_codes) * x_scale * w_scale
    backward  dx = (dy * w_scale) @ w_codes^T        dw = (x_codes * x_scale)^T @ dy

With FP4, FP8 or 8-bit gradients operands of the backward products are quantized as well (`dgrad` and
`wgrad` of `fp4_products`, `fp8`, `int8`); weights that were in codes in the forward pass keep them. Activations that were in FP4
are kept as they came, for their blocks run along another axis in dw.

Else the residuals are the codes (one byte per element), not x and w. The forward of int8 activations
on ternary weights is an exact integer product (`kernels.integer`), so the training forward, a
packed kernel and an exported model can agree to the last multiply. `v + stop_gradient(q - v)` would
leave a rounding residue; a custom VJP does not.

Several weights that read the same x (queries, keys, values) are one call: x is quantized once, and
the products run as one wide product, which on CPU is much faster than several narrow ones.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import Fp4Config
from nanochat_jax.kernels import fp4, integer, scaled
from nanochat_jax.quant import fp4_products, fp4_rows, fp8, int8, ternary
from nanochat_jax.types import Key


def _tensor_weight(quantize: Callable, w: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    codes, tensor = quantize(w)
    return codes, tensor.reshape(1, 1)


def _tensor_act(quantize: Callable, x: jax.Array, how: Fp4Config) -> tuple[jax.Array, jax.Array]:
    codes, tensor = quantize(x)
    return codes, jnp.broadcast_to(tensor, (*x.shape[:-1], 1))


def _fp4_act(name: str, x: jax.Array, how: Fp4Config) -> tuple[jax.Array, jax.Array]:
    return _tensor_act(functools.partial(fp4.scaled_levels, name=name, impl=how.impl), x, how)


def _dx(dy: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(dy, w.T)


def _dw(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)


def _times(dy: jax.Array, w_scale: jax.Array | None) -> jax.Array:
    return dy if w_scale is None else dy * w_scale


def _plain(dy, w_scale, x, w, exact, how, key, ends) -> tuple[jax.Array, jax.Array]:
    # In float32 the weights take their scale: there are fewer of them than of dy, and on CPU each pass
    # over memory counts. In bfloat16 they would round it, all of them alike.
    if w_scale is not None and dy.dtype == jnp.float32:
        return _dx(dy, w * w_scale), _dw(x, dy)
    return _dx(_times(dy, w_scale).astype(dy.dtype), w), _dw(x, dy)


def _fp4_gradients(name: str, dy, w_scale, x, w, exact, how, key, ends) -> tuple[jax.Array, jax.Array]:
    if key is None:
        raise ValueError(f"gradients in {name} need a key")
    scaled, (dx_key, dw_key) = _times(dy, w_scale), jax.random.split(key)
    return (
        _dx(scaled.astype(dy.dtype), w)
        if how.products == "wgrad"
        else fp4_products.dgrad(scaled, w, name, how, dx_key, exact),
        _dw(x, dy) if how.products == "dgrad" else fp4_products.wgrad(x, dy, name, how, dw_key),
    )


def _fp8_gradients(dy, w_scale, x, w, exact, how, key, ends) -> tuple[jax.Array, jax.Array]:
    return fp8.dgrad(_times(dy, w_scale), w, exact), fp8.wgrad(x, dy)


def _int8_gradients(dy, w_scale, x, w, exact, how, key, ends) -> tuple[jax.Array, jax.Array]:
    # Each weight has its own product, so that rows of its dy keep their own scale; dw is joined.
    parts = (jnp.split(array, ends, axis=-1) for array in (_times(dy, w_scale), w))
    dx = functools.reduce(jnp.add, (int8.dgrad(*pair) for pair in zip(*parts, strict=True)))
    return dx, _dw(x, dy)


# Each slot: operand -> (codes, scale); the operand is close to codes * scale. None = no scale.
WEIGHTS: dict[str, Callable] = {
    "full": lambda w, group: (w, None),
    "ternary": ternary.quantize_ternary,
    "fp8": functools.partial(_tensor_weight, functools.partial(fp8.quantize, name="e4m3")),
    "fp4_rows": lambda w, group: fp4_rows.columns(w),
    **{
        name: functools.partial(_tensor_weight, functools.partial(fp4.scaled_levels, name=name, tiles=True))
        for name in fp4.FORMATS
    },
}
ACTIVATIONS: dict[str, Callable] = {
    "full": lambda x, how: (x, None),
    "int8": lambda x, how: ternary.int8_rows(x),
    "fp8": functools.partial(_tensor_act, functools.partial(fp8.quantize, name="e4m3")),
    "fp4_rows": lambda x, how: fp4_rows.rows(x, how.outliers),
    **{name: functools.partial(_fp4_act, name) for name in fp4.FORMATS},
}
# (dy, w's scale or None, x, w's codes, whether w's codes are in a low-bit format, settings, key, columns at
# which further weights begin) -> (dx, dw)
GRADIENTS: dict[str, Callable] = {
    "full": _plain,
    "fp8": _fp8_gradients,
    "int8": _int8_gradients,  # of ternary weights
    **{name: functools.partial(_fp4_gradients, name) for name in fp4.FORMATS},
}

# (w, settings) -> factor on w's gradient, of formats whose rounding is not straight-through
ESTIMATORS: dict[str, Callable] = {
    "fp4_rows": lambda w, how: fp4_rows.estimate(w, how.estimator),
}

Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def matmul(
    x: jax.Array,
    ws: Arrays,
    weight: str,
    act: str,
    group: int,
    grad: str = "full",
    how: Fp4Config = Fp4Config(),  # noqa: B008 (frozen)
    key: Key | None = None,
) -> Arrays:
    """x @ w for each w, with quantized operands and straight-through gradients.

    Args: x: [..., m], compute dtype. ws: each [m, n_i]. weight, act, grad: names in WEIGHTS, ACTIVATIONS,
    GRADIENTS. group: inputs per ternary scale (0 = one scale per matrix). how, key: for FP4 gradients; the
    key is consumed by the backward pass.
    Returns: one [..., n_i] in x's dtype per weight. With all slots "full" this is the plain product.
    """
    return _forward(x, ws, weight, act, group, grad, how, key)[0]


def _operand(ws: Arrays, weight: str, group: int, dtype) -> tuple[jax.Array, jax.Array | None]:
    """(codes [m, sum n_i], scale per column [1, sum n_i] or None) of all weights side by side."""
    pairs = [WEIGHTS[weight](w, group) for w in ws]
    if pairs[0][1] is None:
        return _beside([codes.astype(dtype) for codes, _ in pairs]), None
    if group:  # a scale per group of inputs is no scale of columns: multiply it in
        return _beside([ternary.dequantize(*pair).astype(dtype) for pair in pairs]), None
    scales = [jnp.broadcast_to(scale, (1, codes.shape[1])) for codes, scale in pairs]
    return _beside([codes for codes, _ in pairs]), _beside(scales)


def _beside(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _ends(ws: Arrays) -> list[int]:
    """Columns at which the second and further weights begin, side by side."""
    return list(itertools.accumulate(w.shape[1] for w in ws[:-1]))


def _apart(wide: jax.Array, ws: Arrays) -> Arrays:
    return (wide,) if len(ws) == 1 else tuple(jnp.split(wide, _ends(ws), axis=-1))


def _rows(array: jax.Array) -> jax.Array:
    """[..., n] -> [tokens, n]."""
    return array.reshape(-1, array.shape[-1])


def _in_units(x: jax.Array, ws: Arrays, name: str, how: Fp4Config) -> jax.Array:
    """x @ w in FP4 units, float32 [tokens, sum n_i]."""
    rows = fp4.quantize(_rows(x), name, impl=how.impl)
    columns = [fp4_products.along_inputs(fp4.quantize(w, name, tiles=True)) for w in ws]
    return _beside([fp4_products.in_units(rows, column) for column in columns])


def product(
    x_codes: jax.Array, x_scale: jax.Array | None, w_codes: jax.Array, w_scale: jax.Array | None, dtype
) -> jax.Array:
    """The forward's product of two operands that are rounded already, before the last cast.

    Args: x_codes: [..., m]. x_scale: [..., 1] or None. w_codes: [m, n]. w_scale: [1, n], [1, 1] or None.
    dtype: of the product of codes, unless both are int8. Returns: floating [tokens, n].
    """
    if w_scale is not None and x_codes.dtype == w_codes.dtype == jnp.int8:  # an exact integer product
        return _rows(integer.integer_matmul(x_codes, w_codes)) * (w_scale * _rows(x_scale))
    y = jnp.matmul(_rows(x_codes.astype(dtype)), w_codes.astype(dtype))
    y = y if w_scale is None else y * w_scale
    return y if x_scale is None else y * _rows(x_scale)


def _forward(x, ws, weight, act, group, grad, how, key):
    x_codes, x_scale = ACTIVATIONS[act](x, how)
    w_codes, w_scale = _operand(ws, weight, group, x.dtype)
    if weight == act and scaled.native(weight):
        y = _in_units(x, ws, weight, how)
    else:
        y = product(x_codes, x_scale, w_codes, w_scale, x.dtype)
    y = y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    witness = jnp.zeros((0,), x.dtype), tuple(jnp.zeros((0, w.shape[1]), w.dtype) for w in ws)
    if act in fp4.FORMATS:  # cut along the tokens for dw, from x itself: rounding twice would add up
        x_codes, x_scale = x, None
    kept = ws if weight in ESTIMATORS else None
    return _apart(y, ws), (x_codes, x_scale, w_codes, w_scale, witness, kept, key)


def _backward(weight, act, group, grad, how, residuals, dys):
    x_codes, x_scale, w_codes, w_scale, (x_witness, w_witnesses), kept, key = residuals
    dtype = x_witness.dtype
    dy = _rows(_beside([d.astype(dtype) for d in dys]))
    rows = _rows(
        x_codes.astype(dtype) if x_scale is None else (x_codes.astype(jnp.float32) * x_scale).astype(dtype)
    )
    codes = w_codes.astype(dtype)
    dx, dw = GRADIENTS[grad](dy, w_scale, rows, codes, weight != "full", how, key, _ends(w_witnesses))
    parts = _apart(dw, w_witnesses)
    if kept is not None:
        parts = tuple(d * ESTIMATORS[weight](w, how) for d, w in zip(parts, kept, strict=True))
    each = tuple(d.astype(w.dtype) for d, w in zip(parts, w_witnesses, strict=True))
    no_gradient = None if key is None else np.zeros(key.shape, jax.dtypes.float0)
    return dx.astype(dtype).reshape(x_codes.shape), each, no_gradient


matmul.defvjp(_forward, _backward)
