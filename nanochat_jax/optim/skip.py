"""Skip updates whose gradient is not finite, or much larger than usual.

`optax.apply_if_finite` lets the non-finite update through once its limit of consecutive errors
is exceeded, which turns a bad batch into a lost run. This wrapper never does: it counts, and the
training loop decides, from the counters in the metrics, when to stop.

A spike is judged by the logarithm of the gradient's norm against the median of the last accepted
ones, in units of 1.4826 * MAD: the standard deviation of normal noise, blind to outliers.
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


class SpikeState(NamedTuple):
    """logs: float32 [window], log norms of accepted updates, +inf where none was yet. seen: int32 [],
    accepted updates. total, consecutive: int32 [], skipped ones. inner: the wrapped state."""

    logs: jax.Array
    seen: jax.Array
    total: jax.Array
    consecutive: jax.Array
    inner: Any


def skip_spikes(
    inner: optax.GradientTransformation, sigmas: float, window: int = 64
) -> optax.GradientTransformationExtraArgs:
    """Do nothing when the gradient's norm is far above what it was lately.

    A step is skipped if log norm > median + max(sigmas * 1.4826 * MAD, log 2) over the last `window`
    accepted steps: never before half a window was seen, never for less than a doubling, and never
    more than `window` times in a row: that is no spike but a new level, and the old one is forgotten.

    Args: inner: complete transform. sigmas: > 0; 6 is cautious. window: steps remembered, >= 2.
    Returns: transform with state SpikeState; a skipped step leaves the inner state as it is.
    Raises: ValueError for impossible arguments.

    >>> import jax.numpy as jnp, optax
    >>> tx = skip_spikes(optax.sgd(1.0), sigmas=6.0, window=4)
    >>> state = tx.init(jnp.ones(1))
    >>> for size in (1.0, 1.1, 0.9, 50.0):
    ...     updates, state = tx.update(jnp.array([size]), state)
    >>> int(state.total), bool(updates[0] == 0)
    (1, True)
    """
    if sigmas <= 0 or window < 2:
        raise ValueError(f"expected sigmas > 0 and window >= 2, got {sigmas} and {window}")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return SpikeState(
            logs=jnp.full([window], jnp.inf, jnp.float32),
            seen=jnp.zeros([], jnp.int32),
            total=jnp.zeros([], jnp.int32),
            consecutive=jnp.zeros([], jnp.int32),
            inner=inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        log = jnp.log(jnp.maximum(optax.tree.norm(updates).astype(jnp.float32), 1e-30))
        known = jnp.minimum(state.seen, window)
        median = _median(state.logs, known)
        # The unseen places hold +inf, and inf - median stays +inf: they stay last.
        spread = 1.4826 * _median(jnp.abs(state.logs - median), known)
        high = log > median + jnp.maximum(sigmas * spread, jnp.log(2.0))
        skip = high & (known >= (window + 1) // 2)
        forget = skip & (state.consecutive >= window)
        skip &= ~forget
        new_updates, new_inner = inner.update(updates, state.inner, params, **extra_args)
        skipped = skip.astype(jnp.int32)
        old, seen = jnp.where(forget, jnp.inf, state.logs), jnp.where(forget, 0, state.seen)
        logs = old.at[seen % window].set(log)
        new_state = SpikeState(
            logs=jnp.where(skip, state.logs, logs),
            seen=seen + 1 - skipped,
            total=state.total + skipped,
            consecutive=(state.consecutive + skipped) * skipped,
            inner=jax.tree.map(lambda new, old: jnp.where(skip, old, new), new_inner, state.inner),
        )
        kept = jax.tree.map(lambda u: jnp.where(skip, jnp.asarray(-0.0, u.dtype), u), new_updates)
        return kept, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _median(values: jax.Array, count: jax.Array) -> jax.Array:
    """Lower median of the `count` smallest entries; 0 if there are none."""
    middle = jnp.sort(values)[jnp.maximum(count - 1, 0) // 2]
    return jnp.where(count > 0, middle, 0.0)


def metrics(opt_state: optax.OptState) -> Metrics:
    """Counters of the wrappers of this file, wherever they sit in an optimizer state.

    Returns: "opt/skipped" (in all) and "opt/skipped_in_a_row" of `skip_nonfinite`, "opt/skipped_spikes"
    (in all) of `skip_spikes`, float32 []; none of a wrapper that is absent.
    """
    found: Metrics = {}
    if nonfinite := _find(opt_state, SkipState):
        found["opt/skipped"] = nonfinite.total.astype(jnp.float32)
        found["opt/skipped_in_a_row"] = nonfinite.consecutive.astype(jnp.float32)
    if spikes := _find(opt_state, SpikeState):
        found["opt/skipped_spikes"] = spikes.total.astype(jnp.float32)
    return found


def _find(state: Any, kind: type) -> Any:
    """The outermost node of a type in a state, or None."""
    if isinstance(state, kind):
        return state
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)
