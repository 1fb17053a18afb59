"""Gradients of activations in 8 bits, for ternary weights (after SwitchBack, arXiv:2304.13013).

    dx = Q(dy * w's scale) @ t^T      Q: each token's row in 8 bits, nearest;  t: the codes -1, 0, +1

The weights are exact integers already, so the product is the forward's kind, int8 times int8 with exact
sums (`kernels.integer`), and only dy is rounded. dw stays in the compute dtype: its sum runs over all
tokens, where the source found 8 bits to fail. Forward and dx are then two of three products in 8 bits.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import integer, magnitude


def rows(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(q int8 in [-127, 127], scale float32 [..., 1]) of each row of v [..., n], close to q * scale.

    Without the floor of `ternary.int8_rows`: gradients are as small as they are. NaN and infinity make
    their row's scale so.
    """
    v = v.astype(jnp.float32)
    top = magnitude.row_largest(v)
    # The reciprocal of a smaller maximum would overflow; such a row is all zeros.
    ratio = jnp.where(top < 127 * jnp.finfo(jnp.float32).tiny, 0.0, 127 / top)
    return jnp.clip(jnp.round(v * ratio), -127, 127).astype(jnp.int8), top * (1 / 127)


def dgrad(dy_Tn: jax.Array, t_mn: jax.Array) -> jax.Array:
    """dx = Q(dy) @ t^T, float32 [T, m]; t: ternary codes, any dtype that holds them."""
    q, scale = rows(dy_Tn)
    return integer.integer_matmul(q, t_mn.astype(jnp.int8), transposed=True) * scale
