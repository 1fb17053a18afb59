"""FIRE: at chosen moments, replace trained matrices by the nearest isometry, and forget their moments.

A network that was trained long on one distribution learns the next one more slowly. FIRE keeps as
much of a weight matrix as an isotropic spectrum allows: among all matrices with orthonormal columns
(or rows, if they are fewer) the polar factor P Q^T of W = P S Q^T has the smallest squared distance
|W - X|_F^2. The singular vectors survive, the singular values become equal.

Computation: Muon's quintic iteration, in float32, lifts the small singular values quickly but leaves
them within some 10% of 1; the cubic X <- 1.5 X - 0.5 X X^T X then squares the error with every step.
(The cubic alone, as in the authors' code, grows a small singular value only 1.5-fold per step: their
5 steps from |W|_F leave most of a large matrix's spectrum far from 1.) Directions whose singular
value is below about 1e-6 of |W|_F are not determined in float32; zeros stay zero.

`fire` wraps a complete transform: its update at such a moment is reinitialized(p) - p, without
learning rate or decay. Rounding makes p + (q - p) differ from q by a unit in the last place of the
larger of p and q.
Source: arXiv:2602.08040.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.optim import muon

POLISH = 3  # cubic steps: an error of 0.15 becomes 4e-2, 2e-3, 6e-6

# Matrix [..., m, n], its isometry -> factor, [..., 1, 1] or number.
SCALES: dict[str, Callable[[jax.Array, jax.Array], jax.Array | float]] = {
    # The paper's gain; here [m, n] = [d_in, d_out].
    "fan": lambda w, x: math.sqrt(w.shape[-1] / w.shape[-2]),
    "norm": lambda w, x: _norm(w) / jnp.maximum(_norm(x), jnp.finfo(x.dtype).tiny),  # keeps |W|_F
    "unit": lambda w, x: 1.0,
}


def isometry(w: jax.Array, scale: str = "fan", iterations: int = 12) -> jax.Array:
    """The nearest (semi-)orthogonal matrix to each matrix, times a gain.

    Args:
        w: [..., m, n] = [..., d_in, d_out], floating; leading axes are independent matrices.
        scale: a name in SCALES.
        iterations: quintic steps, >= 1; 12 resolve singular values down to 3e-6 |w|_F.

    Returns: [..., m, n], w's dtype; computed in float32. A zero matrix stays zero.
    Raises: ValueError for an unknown scale, rank < 2, or fewer than one step.
    Source: arXiv:2602.08040, equation of the closed form W (W^T W)^(-1/2).

    >>> import jax.numpy as jnp
    >>> jnp.round(isometry(jnp.array([[3.0, 0.0], [0.0, -0.1]])), 3).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    if scale not in SCALES:
        raise ValueError(f"no scale '{scale}'; known: {', '.join(SCALES)}")
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    x = muon.newton_schulz(wide, iterations, "polar_express", wide.dtype, span=1)
    for _ in range(POLISH):
        gram = _gram(x)
        x = 1.5 * x - 0.5 * (muon.dot(x, gram) if x.shape[-2] >= x.shape[-1] else muon.dot(gram, x))
    return (SCALES[scale](wide, x) * x).astype(w.dtype)


def reinitialize(tree: Any, mask: Any, scale: str = "fan", iterations: int = 12) -> Any:
    """Replace the chosen matrices of a tree by their isometries.

    Args:
        tree: parameters.
        mask: tree of bools with the same structure, or a function from the tree to one.
        scale, iterations: see `isometry`.

    Returns: tree; leaves not chosen are the same objects.
    Raises: ValueError as `isometry`, and for chosen leaves of rank < 2, naming them.
    Source: arXiv:2602.08040.
    """
    chosen = _chosen(mask, tree)
    return jax.tree.map(lambda p, c: isometry(p, scale, iterations) if c else p, tree, chosen)


class FireState(NamedTuple):
    """count: int32 [], updates so far. inner: state of the wrapped transform."""

    count: jax.Array
    inner: Any


def fire(
    inner: optax.GradientTransformation,
    mask: Any,
    steps: Sequence[int] = (),
    trigger: Callable[..., jax.typing.ArrayLike] | None = None,
    scale: str = "fan",
    iterations: int = 12,
) -> optax.GradientTransformationExtraArgs:
    """At given steps, or when a trigger says so, reinitialize the chosen matrices and their moments.

    On such a step the gradient of the chosen leaves is not used: their update is the difference to
    their isometry, and the parts of the inner state that belong to them become what `inner.init`
    gives for the new parameters. All other leaves get their ordinary update, and schedules go on.
    A state's `count` restarts if all parameters of that state are chosen: Adam's bias correction and
    the like count the age of the moments beside it. With only some of them chosen it goes on; Adam's
    next updates of those are then up to max_t (1 - b1^t) / sqrt(1 - b2^t) times too large (1.1 for
    0.9 and 0.95, 6.6 for 0.9 and 0.999), so choose whole groups there. Muon does not mind.
    On other steps the work is not done (`lax.cond`; under vmap it would be).

    Args:
        inner: complete transform.
        mask: tree of bools with the parameters' structure, or a function from the parameters to
            one: which leaves. Hidden matrices; not embeddings, head or norms.
        steps: numbers of preceding updates; 100 = after 100 ordinary updates the next one is replaced.
        trigger: function of update's extra arguments, given by keyword, to bool []; for example
            `lambda dormant, **_: dormant > 0.3`. None = no trigger.
        scale, iterations: see `isometry`.

    Returns: transform that needs `params`; state FireState. Without steps and trigger it is `inner`
        itself.
    Raises: ValueError for a negative step, an unknown scale, or fewer than one iteration; from
        init and update for chosen leaves of rank < 2, naming them; from update without params.
    Source: arXiv:2602.08040; there too the optimizer's state is dropped.

    >>> import jax.numpy as jnp, optax
    >>> tx = fire(optax.adam(0.1), mask={"w": True}, steps=[0])
    >>> params = {"w": jnp.diag(jnp.array([2.0, 0.5]))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> jnp.round(optax.apply_updates(params, updates)["w"], 3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    inner = optax.with_extra_args_support(inner)
    if any(step < 0 for step in steps):
        raise ValueError(f"steps must not be negative, got {tuple(steps)}")
    if scale not in SCALES:
        raise ValueError(f"no scale '{scale}'; known: {', '.join(SCALES)}")
    if iterations < 1:
        raise ValueError(f"the isometry needs at least 1 iteration, got {iterations}")
    if not steps and trigger is None:
        return inner

    def init(params):
        _chosen(mask, params)
        return FireState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("fire replaces parameters: call update with params")
        chosen = _chosen(mask, params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)

        # Only what changes goes through the conditional: the rest is not copied.
        leaves, structure = jax.tree.flatten(updates)
        picked = [i for i, c in enumerate(jax.tree.leaves(chosen)) if c]
        moments, state_structure = jax.tree.flatten(inner_state)
        fates = jax.tree.leaves(_fates(inner, inner_state, chosen))
        dropped = [i for i, fate in enumerate(fates) if fate == "drop"]

        def fresh(params, update_leaves, moment_leaves):
            new = reinitialize(params, chosen, scale, iterations)
            steps_to = jax.tree.leaves(jax.tree.map(lambda q, p: q - p, new, params))
            start = jax.tree.leaves(inner.init(new))
            return (
                [steps_to[i].astype(old.dtype) for i, old in zip(picked, update_leaves, strict=True)],
                [start[i].astype(old.dtype) for i, old in zip(dropped, moment_leaves, strict=True)],
            )

        def kept(params, update_leaves, moment_leaves):
            del params
            return update_leaves, moment_leaves

        due = jnp.isin(state.count, jnp.asarray(steps, jnp.int32))
        if trigger is not None:
            due |= jnp.asarray(trigger(**extra_args), bool)
        some_updates, some_moments = jax.lax.cond(
            due, fresh, kept, params, [leaves[i] for i in picked], [moments[i] for i in dropped]
        )
        for i, leaf in zip(picked, some_updates, strict=True):
            leaves[i] = leaf
        for i, leaf in zip(dropped, some_moments, strict=True):
            moments[i] = leaf
        count = jnp.asarray(optax.safe_increment(state.count))
        new_state = FireState(count, jax.tree.unflatten(state_structure, moments))
        return jax.tree.unflatten(structure, leaves), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def squared_frobenius_error(w: jax.Array, old: jax.Array) -> jax.Array:
    """What was forgotten: |w - old|_F^2 of each matrix.

    Args: w, old: [..., m, n].
    Returns: float32 [...].
    Source: arXiv:2602.08040 (SFE).
    """
    return jnp.sum(jnp.square(w.astype(jnp.float32) - old.astype(jnp.float32)), axis=(-2, -1))


def deviation_from_isometry(w: jax.Array) -> jax.Array:
    """How far each matrix is from an isometry: |W^T W - I|_F^2, with W W^T where m < n.

    (The larger Gram matrix cannot be the identity; its deviation is this one plus |m - n|.)

    Args: w: [..., m, n].
    Returns: float32 [...].
    Source: arXiv:2602.08040 (DfI).
    """
    gram = _gram(w.astype(jnp.float32))
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return squared_frobenius_error(gram, identity)


def effective_rank(w: jax.Array) -> jax.Array:
    """Exponential of the entropy of the normalized singular values: min(m, n) for an isometry, the rank
    for equal ones, 0 for a zero matrix.

    Args: w: [..., m, n].
    Returns: float32 [...].
    Source: Roy and Vetterli 2007.
    """
    values = jnp.linalg.svd(w.astype(jnp.float32), compute_uv=False)
    total = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def dormant_share(hidden: jax.Array, threshold: float = 0.99) -> jax.Array:
    """Share of neurons whose activation is zero for more than `threshold` of the tokens.

    Args:
        hidden: [..., neurons], activations after ReLU or ReLU^2; leading axes are tokens.
        threshold: in [0, 1].

    Returns: float32 [].
    """
    zeros = jnp.mean((hidden == 0).astype(jnp.float32), axis=tuple(range(hidden.ndim - 1)))
    return jnp.mean((zeros > threshold).astype(jnp.float32))


def _chosen(mask: Any, tree: Any) -> Any:
    """The mask as a tree of bools like `tree`, whose leaves it must not choose below rank 2."""
    chosen = mask(tree) if callable(mask) else mask
    # Parameters that another transform owns are not there, though a constant mask names them.
    chosen = jax.tree.map(lambda p, c: p if _is_masked(p) else bool(c), tree, chosen, is_leaf=_is_masked)
    pairs = zip(params_lib.flatten(tree).items(), jax.tree.leaves(chosen), strict=True)
    bad = [f"{path} {jnp.shape(p)}" for (path, p), c in pairs if c and jnp.ndim(p) < 2]
    if bad:
        raise ValueError(f"FIRE needs matrices [..., d_in, d_out], the mask chooses {', '.join(bad)}")
    return chosen


def _fates(inner: optax.GradientTransformation, state: Any, chosen: Any) -> Any:
    """What happens to each leaf of a state: "drop" or "keep" where it belongs to a parameter, "count"
    (keep) elsewhere, except that a counter is dropped with all the moments beside it."""
    fates = optax.tree.map_params(
        inner,
        lambda leaf, c: leaf if _is_masked(leaf) else "drop" if c else "keep",
        state,
        chosen,
        transform_non_params=lambda _: "count",
        is_leaf=_is_masked,
    )
    structure = jax.tree.structure(chosen, is_leaf=_is_masked)

    def visit(node):
        if isinstance(node, str):
            return node
        fields = node._asdict() if hasattr(node, "_asdict") else {}
        if fields.pop("count", None) == "count":
            trees = [t for t in fields.values() if jax.tree.structure(t, is_leaf=_is_masked) == structure]
            beside = {fate for t in trees for fate in jax.tree.leaves(t)} - {"count"}
            if beside == {"drop"}:
                node = node._replace(count="drop")
        return jax.tree.map(visit, node, is_leaf=lambda child: child is not node)

    return visit(fates)


def _is_masked(node: Any) -> bool:
    """Whether a node stands for a parameter that another transform owns."""
    return isinstance(node, optax.MaskedNode)


def _norm(x: jax.Array) -> jax.Array:
    """Frobenius norm, [..., 1, 1]."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))


def _gram(x: jax.Array) -> jax.Array:
    """The smaller of the two Gram matrices."""
    return muon.dot(x.mT, x) if x.shape[-2] >= x.shape[-1] else muon.dot(x, x.mT)
