"""FP8 for training: one float32 scale per tensor, E4M3 for weights and activations, E5M2 for gradients.

    value = code * scale,    scale = max |v| / (largest code)

The largest entry of the tensor becomes the largest code; the rest is rounded to nearest, half to even.
Codes have at most 4 significant bits, exact in bfloat16, so an ordinary product of them is what FP8
units would give, up to the order of summation: emulated, like `quant.fp4_products`. The scale is that of the
present tensor (no history of past steps), so it sees all tokens of the batch.
Source: arXiv:2209.05433 (formats).
"""

import jax
import jax.numpy as jnp

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def scaled(v: jax.Array, limit: float, axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """(v / scale, scale) such that the largest entry along the axis (None: of all) becomes +-limit.

    Args: v: float32. Returns: float32 in v's shape, and with the axis kept. Zeros have the scale 1.
    """
    top = jnp.max(jnp.abs(v), axis, keepdims=True)
    # A tiny array would make the scale subnormal, which is 0 on CPU.
    scale = jnp.where(top == 0, 1.0, jnp.maximum(top / limit, jnp.finfo(jnp.float32).tiny))
    # A divisor that is no broadcast scalar: XLA on CPU multiplies by the rounded reciprocal of one.
    return v / jnp.where(jnp.isnan(v), v, scale), scale


def quantize(v: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """(codes in v's shape, scale float32 []) with v close to codes * scale.

    Args: name: in FORMATS. A tensor of zeros has scale 1; one with a NaN has it everywhere.
    """
    dtype = FORMATS[name]
    limit = float(jnp.finfo(dtype).max)
    ratio, scale = scaled(v.astype(jnp.float32), limit)
    return jnp.clip(ratio, -limit, limit).astype(dtype), scale.reshape(())


def dgrad(dy_Tn: jax.Array, w_mn: jax.Array, exact: bool) -> jax.Array:
    """dx = Q(dy) @ Q(w)^T, float32 [T, m]. exact: w holds codes already."""
    dtype = w_mn.dtype  # dy may come in float32, not yet rounded to it
    dy, scale = quantize(dy_Tn, "e5m2")
    if not exact:
        w_mn, w_scale = quantize(w_mn, "e4m3")
        scale = scale * w_scale
    return jnp.matmul(dy.astype(dtype), w_mn.astype(dtype).T, preferred_element_type=jnp.float32) * scale


def wgrad(x_Tm: jax.Array, dy_Tn: jax.Array) -> jax.Array:
    """dw = Q(x)^T @ Q(dy), float32 [m, n].

    Activations that were in E4M3 before keep their codes: a tensor's scale does not depend on the axis.
    """
    (x, x_scale), (dy, dy_scale) = quantize(x_Tm, "e4m3"), quantize(dy_Tn, "e5m2")
    dtype = dy_Tn.dtype
    product = jnp.matmul(x.astype(dtype).T, dy.astype(dtype), preferred_element_type=jnp.float32)
    return product * (x_scale * dy_scale)
