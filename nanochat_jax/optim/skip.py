"""Skip updates whose gradient is not finite.

`optax.apply_if_finite` lets the non-finite update through once its limit of consecutive errors
is exceeded, which turns a bad batch into a lost run. This wrapper never does: it counts, and the
training loop decides, from the counters in the metrics, when to stop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.types import Metrics


class SkipState(NamedTuple):
    """Counters int32 [] of skipped updates, and the wrapped transform's state."""

    total: jax.Array
    consecutive: jax.Array
    inner: Any


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Do nothing, and count it, when the global norm of the gradient is not finite.

    On such a step the parameters and the inner state (momenta, schedule counts) stay as they
    are, bit for bit. Finite gradients whose norm overflows float32 are skipped too.

    Args: inner: complete transform.
    Returns: transform with state SkipState.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_nonfinite(optax.sgd(0.1))
    >>> state = tx.init(jnp.ones(2))
    >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), state)
    >>> int(state.consecutive), bool(jnp.all(updates == 0))
    (1, True)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        # Two arrays, not one twice: a buffer must not be donated twice.
        return SkipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(updates)]
        finite = jnp.isfinite(sum(squares, jnp.float32(0)))
        new_updates, new_inner = inner.update(updates, state.inner, params, **extra_args)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = SkipState(
            total=state.total + skipped,
            consecutive=(state.consecutive + skipped) * skipped,
            inner=jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_inner, state.inner),
        )
        # Minus zero: x + -0.0 is x for every x, while -0.0 + 0.0 would flip a sign bit.
        kept = jax.tree.map(lambda u: jnp.where(finite, u, jnp.asarray(-0.0, u.dtype)), new_updates)
        return kept, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def metrics(opt_state: optax.OptState) -> Metrics:
    """Counters of `skip_nonfinite`, wherever it sits in an optimizer state.

    Returns: "opt/skipped" (in all) and "opt/skipped_in_a_row", float32 []; {} without the wrapper.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SkipState))
    found = [node for node in nodes if isinstance(node, SkipState)]
    if not found:
        return {}
    return {
        "opt/skipped": found[0].total.astype(jnp.float32),
        "opt/skipped_in_a_row": found[0].consecutive.astype(jnp.float32),
    }
