"""NorMuon: after Muon has made all directions equal, make all neurons equal too (arXiv:2510.05491).

The rows of an orthogonal update have unequal norms, so some neurons move further than others at every
step. A running mean of each neuron's squared update, one number per output, evens that out; the
Frobenius norm of the update is kept, so that Muon's learning rate carries over.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class NeuronNormState(NamedTuple):
    """nu: float32 running mean of the squared update of each output, [..., 1, n] per leaf [..., m, n]."""

    nu: Any


def scale_by_neuron_norm(beta2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Divide each output's part of an update by its running root mean square, keeping the whole norm.

    Args: beta2: decay of the running mean, in [0, 1). eps: added to the root. Leaves are
    [..., d_in, d_out]; leading axes are independent matrices.
    Returns: transform to stand behind `scale_by_muon`.
    Raises: ValueError for beta2 outside [0, 1).
    Source: arXiv:2510.05491, algorithm 1; no bias correction, because the norm is restored anyway.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_neuron_norm()
    >>> uneven = jnp.array([[3.0, 1.0], [0.0, 0.0]])
    >>> even, _ = tx.update(uneven, tx.init(uneven))
    >>> [round(float(x), 3) for x in even[0]]  # both outputs move equally far
    [2.236, 2.236]
    """
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 must be in [0, 1), got {beta2}")

    def init(params):
        return NeuronNormState(
            jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, p.shape[-1]), jnp.float32), params)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        wide = jax.tree.map(lambda u: u.astype(jnp.float32), updates)
        nu = jax.tree.map(
            lambda v, u: beta2 * v + (1 - beta2) * jnp.mean(u * u, -2, keepdims=True), state.nu, wide
        )

        def even(u, v, g):
            scaled = u / (jnp.sqrt(v) + eps)
            kept = _norm(u) / jnp.maximum(_norm(scaled), 1e-30)  # 0 / tiny = 0 for a zero update
            return (scaled * kept).astype(g.dtype)

        return jax.tree.map(even, wide, nu, updates), NeuronNormState(nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
