"""FP4 in the forward pass with one scale per token and per output (arXiv:2501.17116).

    weights      w = level * scale of the column (all inputs of one output)
    activations  x = level * scale of the row (all inputs of one token)

So few scales cannot follow outliers, hence two corrections of the paper:

- outlier clamping with compensation: in each token the largest entries in magnitude are clamped to the
  next smaller one before rounding, and what was cut off is multiplied in full precision. Here both parts
  are added before one product, which gives the same sum. The paper takes quantiles of the whole
  tensor; a fixed number per token has a static shape and does not look at other tokens.
- a differentiable estimator: straight-through says that a rounded weight follows the weight one to one.
  The estimator replaces the step between two levels a < b by an odd root, steep in its middle:
  with t = 2 (v - a) / (b - a) - 1, f(v) = a + (b - a) / 2 (1 + sign(t) |t|^(1/k)), and the weight's
  gradient is multiplied by f'(v) = |t|^(1/k - 1) / k, at most 3.

The backward products are in full precision. Emulated, see `quant.fp4_products`.
"""

import math

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import fp4
from nanochat_jax.quant import fp8

ESTIMATE_TOP = 3.0


def columns(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(levels float32 [m, n], scale float32 [1, n]) of a weight."""
    ratio, scale = fp8.scaled(w.astype(jnp.float32), fp4.TOP, 0)
    return fp4.nearest(ratio), scale


def rows(x: jax.Array, outliers: float) -> tuple[jax.Array, jax.Array | None]:
    """(levels, scale [..., 1]) of activations [..., m]; with outliers (sum of both parts, None), float32.

    Args: outliers: share of each token's entries that are clamped, rounded up to a whole number; 0 = none.
    """
    x = x.astype(jnp.float32)
    if not outliers:
        ratio, scale = fp8.scaled(x, fp4.TOP, -1)
        return fp4.nearest(ratio), scale
    count = min(math.ceil(outliers * x.shape[-1]), x.shape[-1] - 1)
    limit = jax.lax.top_k(jnp.abs(x), count + 1)[0][..., -1:]
    inside = jnp.clip(x, -limit, limit)
    ratio, scale = fp8.scaled(inside, fp4.TOP, -1)
    return fp4.nearest(ratio) * scale + (x - inside), None


def estimate(w: jax.Array, power: float) -> jax.Array:
    """f' of each weight [m, n], float32 in (0, 3]; 1 everywhere for power 1 (straight-through)."""
    ratio, _ = fp8.scaled(w.astype(jnp.float32), fp4.TOP, 0)
    magnitude = jnp.minimum(jnp.abs(ratio), fp4.TOP)
    step = fp4.spacing(magnitude)
    distance = jnp.abs(2 * (magnitude / step - jnp.floor(magnitude / step)) - 1)
    # The power of 0 is infinite; below the smallest normal number the minimum decides anyway.
    root = jnp.maximum(distance, jnp.finfo(jnp.float32).tiny) ** (1 / power - 1)
    return jnp.minimum(root / power, ESTIMATE_TOP)
