"""The one custom-VJP matmul behind every projection: quantize both operands, multiply, and treat
the quantizers as the identity in the backward pass (straight-through).

    forward   y  = (x_codes @ w_codes) * x_scale * w_scale
    backward  dx = (dy * w_scale) @ w_codes^T        dw = (x_codes * x_scale)^T @ dy

The residuals are the codes (one byte per element), not x and w. The forward of int8 activations
on ternary weights is an exact integer product (`kernels.integer`), so the training forward, a
packed kernel and an exported model can agree to the last multiply. `v + stop_gradient(q - v)` would
leave a rounding residue; a custom VJP does not.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x: jax.Array, w: jax.Array, weight: str, act: str, group: int) -> jax.Array:
    """x @ w with quantized operands and straight-through gradients.

    Args: x: [..., m], compute dtype. w: [m, n]. weight, act: names in WEIGHTS, ACTIVATIONS.
    group: inputs per ternary scale (0 = one scale per matrix).
    Returns: [..., n] in x's dtype. With both slots "full" this is `x @ w` bit for bit.
    """
    return _forward(x, w, weight, act, group)[0]


def _product(x_codes, x_scale, w_codes, w_scale, dtype):
    if x_codes.dtype == jnp.int8 and w_codes.dtype == jnp.int8 and w_scale.ndim == w_codes.ndim:
        y = integer.integer_matmul(x_codes, w_codes)
        return (y * (w_scale.reshape(()) * x_scale)).astype(dtype)
    y = jnp.matmul(x_codes.astype(dtype), _values(w_codes, w_scale, dtype))
    return y if x_scale is None else (y * x_scale).astype(dtype)


def _values(codes, scale, dtype):
    return codes.astype(dtype) if scale is None else ternary.dequantize(codes, scale).astype(dtype)


def _forward(x, w, weight, act, group):
    x_codes, x_scale = ACTIVATIONS[act](x)
    w_codes, w_scale = WEIGHTS[weight](w, group)
    y = _product(x_codes, x_scale, w_codes, w_scale, x.dtype)
    witness = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)  # dtypes of the cotangents
    return y, (x_codes, x_scale, w_codes, w_scale, witness)


def _backward(weight, act, group, residuals, dy):
    x_codes, x_scale, w_codes, w_scale, (x_witness, w_witness) = residuals
    dtype = dy.dtype
    if w_scale is not None and w_scale.ndim == w_codes.ndim:  # one scale: move it to the small side
        dx = jnp.matmul(dy * w_scale.reshape(()).astype(dtype), w_codes.astype(dtype).T)
    else:
        dx = jnp.matmul(dy, _values(w_codes, w_scale, dtype).T)
    rows = x_codes.astype(dtype) if x_scale is None else (x_codes * x_scale).astype(dtype)
    dw = jnp.matmul(
        rows.reshape(-1, rows.shape[-1]).T, dy.reshape(-1, dy.shape[-1]), preferred_element_type=jnp.float32
    )
    return dx.astype(x_witness.dtype), dw.astype(w_witness.dtype)


matmul.defvjp(_forward, _backward)
