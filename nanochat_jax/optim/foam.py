"""FOAM: optimizer state kept as block means, corrected by what the current gradient loses in them.

Fold a gradient G [m, n]: the mean over blocks of b = 2^level neighbours in a row, [m, n/b]. Unfold:
repeat every mean b times. unfold(fold(G)) is the orthogonal projection onto block-constant matrices,
so that the residual R = G - unfold(fold(G)) has mean zero in every block and |G|^2 = |unfold|^2 +
|R|^2. Moments live in the folded space only (1/b of the memory); R comes from the current gradient
and is never stored: storing it would save nothing.

Over Adam (`scale_by_foam_adam`; the paper's formulas):
    m = unfold(m~) + R,   v = unfold(v~) + R^2,   direction = m / (sqrt(v) + eps), bias-corrected.
Because R enters both, an entry far from its block's mean is bounded by its own R and cannot be blown
up by a small mean. The paper's text averages the square of the mean, its authors' code the mean of
the squares: both are offered. The correction divides the whole m and v, as in the authors' code,
but eps is added after it, as in optax, so that no folding means Adam.

Over anything else whose state is linear in the gradient, above all Muon (`fold_state`): unfold the
state, let the inner transform take its full step, fold the state again. Folding is linear, so the
stored momentum is exactly the average of the folded gradients; within the step R enters with the
weight that the inner transform gives to the current gradient: for Muon, Newton-Schulz acts on
unfold(m~) + (1 - momentum) R. Over Adam the same wrapper would weigh R by 1 - beta1 instead of 1:
that is a different method than the paper's.

A block is the largest power of two up to 2^level that divides the row, so ragged rows need no padding
and every property above holds for every shape; leaves of rank below 2 keep their full state.
Where the last axis is sharded, folding is local if every shard's length is a multiple of b.
Source: arXiv:2512.07112.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# What the second moment averages: wide gradient [..., m, n], level -> [..., m, n/b].
SECOND_MOMENTS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "squared_mean": lambda g, level: jnp.square(fold(g, level)),  # the paper's text
    "mean_square": lambda g, level: fold(jnp.square(g), level),  # the authors' code
}


def folded_shape(shape: tuple[int, ...], level: int) -> tuple[int, ...]:
    """Shape of a folded array: the last axis divided by the largest power of two <= 2^level that divides
    it; unchanged below rank 2."""
    if len(shape) < 2:
        return shape
    return (*shape[:-1], shape[-1] // math.gcd(shape[-1], 2**level))


def fold(x: jax.Array, level: int) -> jax.Array:
    """Mean over each block of 2^level neighbours along the last axis.

    Means are taken pairwise, so that a block of equal numbers is folded without rounding.

    Args:
        x: [..., m, n], floating; of rank below 2 it is returned as it is.
        level: >= 0; 0 returns x.

    Returns: `folded_shape(x.shape, level)`, x's dtype.
    Source: arXiv:2512.07112, the matrix A.

    >>> import jax.numpy as jnp
    >>> fold(jnp.array([[1.0, 3.0, 5.0, 5.0]]), 1).tolist()
    [[2.0, 5.0]]
    """
    shape = folded_shape(x.shape, level)
    if shape == x.shape:
        return x
    y = x.reshape(*shape, x.shape[-1] // shape[-1])
    while y.shape[-1] > 1:
        # Halves first: a sum of two large float16 or bfloat16 numbers could overflow.
        y = 0.5 * y[..., ::2] + 0.5 * y[..., 1::2]
    return y[..., 0]


def unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat each entry along the last axis until x has the given shape.

    Args:
        x: folded array, `folded_shape(shape, level)` for some level.
        shape: the shape before folding.

    Returns: array of that shape, x's dtype.
    Raises: ValueError if x is no folding of such an array.
    Source: arXiv:2512.07112, the matrix E.

    >>> import jax.numpy as jnp
    >>> unfold(jnp.array([[2.0, 5.0]]), (1, 4)).tolist()
    [[2.0, 2.0, 5.0, 5.0]]
    """
    if x.shape == shape:
        return x
    if len(shape) < 2 or x.shape[:-1] != shape[:-1] or shape[-1] % x.shape[-1]:
        raise ValueError(f"an array of shape {x.shape} is no folding of one of shape {shape}")
    block = shape[-1] // x.shape[-1]
    return jnp.broadcast_to(x[..., None], (*x.shape, block)).reshape(shape)


def residual(x: jax.Array, level: int) -> jax.Array:
    """What folding loses, x - unfold(fold(x)): mean zero in every block; x's shape and dtype."""
    return x - unfold(fold(x, level), x.shape)


def state_bytes(tree: Any, level: int, moments: int, itemsize: int = 4) -> int:
    """Bytes of the folded moments of a tree (without the 4 bytes of the step counter).

    Args:
        tree: parameters, or anything else with shapes (`jax.ShapeDtypeStruct`, `ParamSpec`).
        level: fold level.
        moments: moments per parameter: 2 for Adam, 1 for Muon and Lion.
        itemsize: bytes per number.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    return moments * itemsize * sum(math.prod(folded_shape(shape, level)) for shape in shapes)


class FoamAdamState(NamedTuple):
    """count: int32 [], updates so far. mu, nu: float32 moments, trees like the parameters whose leaves
    have `folded_shape`."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_foam_adam(
    level: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, second_moment: str = "squared_mean"
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments are kept as block means and corrected by the gradient's residual.

    The paper multiplies the learning rate of folded matrices by 0.25; here that is the learning
    rate's own business.

    Args:
        level: blocks of 2^level; 0 is `optax.scale_by_adam` itself.
        b1, b2: decays of the moments, in [0, 1).
        eps: added to the square root, >= 0.
        second_moment: a name in SECOND_MOMENTS.

    Returns: transform without learning rate or sign; updates keep the gradient's dtype. State
        FoamAdamState (at level 0 optax's).
    Raises: ValueError for arguments out of range or an unknown name.
    Source: arXiv:2512.07112, algorithm 1.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_foam_adam(level=2)
    >>> state = tx.init({"w": jnp.zeros((2, 8))})
    >>> state.mu["w"].shape
    (2, 2)
    """
    _check_level(level)
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if second_moment not in SECOND_MOMENTS:
        raise ValueError(f"no second moment '{second_moment}'; known: {', '.join(SECOND_MOMENTS)}")
    if level == 0:
        return optax.with_extra_args_support(optax.scale_by_adam(b1, b2, eps))
    squares = SECOND_MOMENTS[second_moment]

    def init(params):
        def zeros(p):
            return jnp.zeros_like(
                p, jnp.promote_types(p.dtype, jnp.float32), shape=folded_shape(p.shape, level)
            )

        return FoamAdamState(
            jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        wide = jax.tree.map(lambda g, m: g.astype(m.dtype), updates, state.mu)
        means = jax.tree.map(lambda g: fold(g, level), wide)
        mu = optax.tree.update_moment(means, state.mu, b1, 1)
        nu = optax.tree.update_moment(jax.tree.map(lambda g: squares(g, level), wide), state.nu, b2, 1)

        rest = jax.tree.map(lambda g: residual(g, level), wide)
        first = jax.tree.map(lambda m, r: unfold(m, r.shape) + r, mu, rest)
        second = jax.tree.map(lambda v, r: unfold(v, r.shape) + jnp.square(r), nu, rest)
        first = optax.tree.bias_correction(first, b1, count)
        second = optax.tree.bias_correction(second, b2, count)
        directions = jax.tree.map(
            lambda g, m, v: (m / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, first, second
        )
        return directions, FoamAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def fold_state(inner: optax.GradientTransformation, level: int) -> optax.GradientTransformationExtraArgs:
    """Keep the parameter-shaped state of any direction as block means between its updates.

    During the update the inner transform sees its state unfolded, and the whole gradient. Meant for
    directions whose state averages gradients (Muon, Lion, momentum); for Adam see
    `scale_by_foam_adam`. Wrappers that store the state in fewer bits go around this one.

    Args:
        inner: direction whose state has parameter-shaped floating leaves (others, such as counters,
            are left alone). `init` gets the folded parameters.
        level: blocks of 2^level; 0 is `inner` itself.

    Returns: transform with the inner state's structure, leaves of `folded_shape`.
    Raises: ValueError for a negative level; at init for an inner state that cannot be folded.
    Source: arXiv:2512.07112.

    >>> import jax.numpy as jnp
    >>> from nanochat_jax.optim import muon
    >>> tx = fold_state(muon.scale_by_muon(), level=1)
    >>> tx.init({"w": jnp.zeros((4, 8))}).mu["w"].shape
    (4, 4)
    """
    _check_level(level)
    inner = optax.with_extra_args_support(inner)
    if level == 0:
        return inner

    def init(params):
        folded = jax.tree.map(lambda p: fold(p, level), params)
        state = inner.init(folded)

        def check(leaf, p):
            if not _is_masked(leaf) and not (
                leaf.shape == p.shape and jnp.issubdtype(leaf.dtype, jnp.floating)
            ):
                raise ValueError(
                    f"state {leaf.dtype} {leaf.shape} of a folded parameter {p.shape} cannot be unfolded; "
                    "wrappers that change how state is stored go around fold_state"
                )
            return leaf

        return optax.tree.map_params(inner, check, state, folded, is_leaf=_is_masked)

    def update(updates, state, params=None, **extra_args):
        def lift(leaf, g):
            return leaf if _is_masked(leaf) else unfold(leaf, g.shape)

        whole = optax.tree.map_params(inner, lift, state, updates, is_leaf=_is_masked)
        updates, whole = inner.update(updates, whole, params, **extra_args)
        return updates, optax.tree.map_params(inner, lambda leaf: fold(leaf, level), whole)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_masked(node: Any) -> bool:
    """Whether a node stands for a parameter that another transform owns."""
    return isinstance(node, optax.MaskedNode)


def _check_level(level: int) -> None:
    """Raise for a level that is no natural number."""
    if level < 0 or level != int(level):
        raise ValueError(f"the fold level must be an integer >= 0, got {level}")
