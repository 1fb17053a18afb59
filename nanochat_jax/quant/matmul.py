"""The one custom-VJP matmul behind every projection: quantize both operands, multiply, and treat
the quantizers as the identity in the backward pass (straight-through).

    forward   y  = (x_codes @ w_codes) * x_scale * w_scale
    backward  dx = (dy * w_scale) @ w_codes^T        dw = (x_codes * x_scale)^T @ dy

The residuals are the codes (one byte per element), not x and w. The forward of int8 activations
on ternary weights is an exact integer product (`kernels.integer`), so the training forward, a
packed kernel and an exported model can agree to the last multiply. `v + stop_gradient(q - v)` would
leave a rounding residue; a custom VJP does not.

Several weights that read the same x (queries, keys, values) are one call: x is quantized once, and
the products run as one wide product, which on CPU is much faster than several narrow ones.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import integer
from nanochat_jax.quant import ternary

# Each slot: operand -> (codes, scale); the operand is close to codes * scale. None = no scale.
WEIGHTS = {
    "full": lambda w, group: (w, None),
    "ternary": ternary.quantize_ternary,
}
ACTIVATIONS = {
    "full": lambda x: (x, None),
    "int8": ternary.int8_rows,
}

Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x: jax.Array, ws: Arrays, weight: str, act: str, group: int) -> Arrays:
    """x @ w for each w, with quantized operands and straight-through gradients.

    Args: x: [..., m], compute dtype. ws: each [m, n_i]. weight, act: names in WEIGHTS, ACTIVATIONS.
    group: inputs per ternary scale (0 = one scale per matrix).
    Returns: one [..., n_i] in x's dtype per weight. With both slots "full" this is the plain product.
    """
    return _forward(x, ws, weight, act, group)[0]


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


def _apart(wide: jax.Array, ws: Arrays) -> Arrays:
    if len(ws) == 1:
        return (wide,)
    ends, end = [], 0
    for w in ws[:-1]:
        end += w.shape[1]
        ends.append(end)
    return tuple(jnp.split(wide, ends, axis=-1))


def _rows(array: jax.Array) -> jax.Array:
    """[..., n] -> [tokens, n]."""
    return array.reshape(-1, array.shape[-1])


def _forward(x, ws, weight, act, group):
    x_codes, x_scale = ACTIVATIONS[act](x)
    w_codes, w_scale = _operand(ws, weight, group, x.dtype)
    if x_scale is not None and w_scale is not None:  # codes on both sides: an exact integer product
        y = _rows(integer.integer_matmul(x_codes, w_codes)) * (w_scale * _rows(x_scale))
    else:
        y = jnp.matmul(_rows(x_codes.astype(x.dtype)), w_codes.astype(x.dtype))
        y = y if w_scale is None else y * w_scale
        y = y if x_scale is None else y * _rows(x_scale)
    y = y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    witness = jnp.zeros((0,), x.dtype), tuple(jnp.zeros((0, w.shape[1]), w.dtype) for w in ws)
    return _apart(y, ws), (x_codes, x_scale, w_codes, w_scale, witness)


def _backward(weight, act, group, residuals, dys):
    x_codes, x_scale, w_codes, w_scale, (x_witness, w_witnesses) = residuals
    dtype = x_witness.dtype
    dy = _rows(_beside([d.astype(dtype) for d in dys]))
    scaled = dy if w_scale is None else (dy * w_scale).astype(dtype)
    dx = jnp.matmul(scaled, w_codes.astype(dtype).T)
    rows = _rows(x_codes.astype(dtype) if x_scale is None else (x_codes * x_scale).astype(dtype))
    dw = jnp.matmul(rows.T, dy, preferred_element_type=jnp.float32)
    each = tuple(d.astype(w.dtype) for d, w in zip(_apart(dw, w_witnesses), w_witnesses, strict=True))
    return dx.astype(dtype).reshape(x_codes.shape), each


matmul.defvjp(_forward, _backward)
