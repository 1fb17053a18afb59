"""Muon: momentum whose singular values are replaced by (nearly) ones.

For a momentum U = P S Q^T, steepest descent under the spectral norm moves along the polar factor
P Q^T: every direction that the gradient has moves equally far. Newton-Schulz computes it without
an SVD. With A = X X^T, one step is X <- (a I + b A + c A^2) X: an odd polynomial applied to each
singular value, since X and A share singular vectors. Starting from U / |U|_F all singular values
lie in (0, 1]; coefficients with a large `a` lift the small ones quickly, at the price of leaving
them near 1 instead of at 1 ("jordan": about 0.68 to 1.13). The iteration is scale invariant, so
the exponential average needs no bias correction; a zero gradient gives a zero update.

Cost. A matrix p x q, p <= q, costs 4 p^2 q + 2 p^3 FLOPs a step. All the polynomials commute, so
several steps can be carried out on the small A alone, A <- P A P, and their product be applied
to X once: for q = 4 p that saves a third of the FLOPs. A rounding error in A grows by a^2 per
step, and A of a tiny singular value drowns in it; we therefore return to X after at most SPAN
steps, which bounds the growth (66 x 16 for the steepest coefficients): for singular values over 0
to 12 decades the error stays within 10 times that of step-by-step float32, where 5 steps at once
have up to 75 times it, and 8 are useless. In bfloat16 even that growth would be too much: there, and
for nearly square matrices, where nothing is gained, every step acts on X (a span of 1).

Matrices are [..., d_in, d_out]; leading axes are independent matrices and are never mixed.
Sources: Jordan et al. 2024 (Muon), arXiv:2502.16982 (shape scale), arXiv:2505.16932 (Polar
Express), arXiv:2504.05295 (Dion's coefficients).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.kernels import dispatch, symmetric

Triple = tuple[float, float, float]

# (a, b, c) per step. Steps beyond a table repeat its last row.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156555, -22.483293, 15.878770),
        (4.042930, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.464490),
        (2.346541, -1.709783, 0.423236),
    ),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}

# The start is U / (slack |U|_F). Polar Express is steep: a singular value above 1 by a rounding
# error would leave its interval.
SLACK = {"jordan": 1.0, "polar_express": 1.01, "dion": 1.0}

# Factor on the orthogonal update of a [m, n] = [d_in, d_out] matrix.
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, n / m)),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # update RMS near 0.2, as AdamW's
    "spectral": lambda m, n: math.sqrt(n / m),
    "unit": lambda m, n: 1.0,
}

SPAN = 3  # steps taken on the Gram matrix before returning to X (float32, long matrices)


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    coefficients: str = "polar_express",
    dtype: Any = None,
    span: int | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Approximate polar factor of each matrix.

    Args:
        x: [..., m, n], floating. Entries beyond about 1e19 overflow the norm and give zeros.
        steps: iterations, >= 1.
        coefficients: a name in COEFFICIENTS.
        dtype: dtype of the products; None = bfloat16 on GPU and TPU, float32 on CPU. The norm is
            always float32.
        span: steps between returns to x; None = SPAN for float32 matrices at least twice as long
            as wide, else 1 (the textbook iteration).
        impl: of the symmetric products, see `kernels.symmetric`: "auto", "pallas" or "reference".

    Returns: [..., m, n] in x's dtype; singular values near 1, zero where x is a zero matrix.
    Raises: ValueError for rank < 2, an unknown name, or fewer than one step.
    Source: arXiv:2505.16932, algorithm 1; coefficients as named above.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"no coefficients '{coefficients}'; known: {', '.join(COEFFICIENTS)}")
    if steps < 1:
        raise ValueError(f"Newton-Schulz needs at least 1 step, got {steps}")
    if x.ndim < 2:
        raise ValueError(f"Newton-Schulz needs matrices [..., m, n], got shape {x.shape}")
    m, n = x.shape[-2:]
    dtype = jnp.dtype(dtype or (jnp.float32 if dispatch.backend() == "cpu" else jnp.bfloat16))
    if span is None:
        span = SPAN if dtype == jnp.float32 and max(m, n) >= 2 * min(m, n) else 1
    table = COEFFICIENTS[coefficients]
    table = table[:steps] + table[-1:] * (steps - len(table))

    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True)) * SLACK[coefficients]
    y = (wide / jnp.where(norm > 0, norm, 1.0)).astype(dtype)
    for start in range(0, steps, span):
        gram = symmetric.gram(y.mT if m > n else y, impl)
        identity, rest = _compose(gram, table[start : start + span], impl)
        y = identity * y + (dot(y, rest) if m > n else dot(rest, y))
    return y.astype(x.dtype)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Batched product; float32 means float32 (GPUs would otherwise round it to TF32)."""
    return symmetric.product(x, y)


def _compose(gram: jax.Array, table: tuple[Triple, ...], impl: str) -> tuple[float, jax.Array]:
    """(s, R) such that s I + R is the product of the steps' polynomials of the Gram matrix.

    The multiple of the identity is kept apart so that low precision does not swallow R.
    """
    dot = functools.partial(symmetric.commuting, impl=impl)  # all are polynomials of the Gram matrix
    identity, rest = 1.0, None
    for i, (a, b, c) in enumerate(table):
        step = b * gram + c * dot(gram, gram)  # the step's polynomial is a I + step
        rest = step if rest is None else a * rest + identity * step + dot(step, rest)
        identity *= a
        if i + 1 < len(table):
            half = a * gram + dot(gram, step)
            gram = a * half + dot(half, step)
    assert rest is not None
    return identity, rest


class MuonState(NamedTuple):
    """count: int32 [], updates so far. mu: float32 momentum, shaped like the parameters."""

    count: jax.Array
    mu: Any


def scale_by_muon(
    momentum: float = 0.95,
    steps: int = 5,
    coefficients: str = "polar_express",
    scale: str = "original",
    nesterov: bool = True,
    dtype: Any = None,
    constrain: Callable[..., jax.Array] | None = None,
    impl: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Replace each matrix update by an approximately orthogonal one.

    Works on leaves [..., m, n]; leading axes are independent matrices. Every matrix is
    orthogonalized as a whole: a parameter sharded inside its last two axes is gathered or
    all-reduced by the partitioner, one sharded on its leading axes is not communicated. Without
    `constrain`, devices that hold copies all repeat the same work.

    Args:
        momentum: decay of the exponential average, in [0, 1).
        steps: Newton-Schulz iterations, >= 1.
        coefficients: a name in COEFFICIENTS.
        scale: a name in SCALES, the factor by shape.
        nesterov: orthogonalize momentum * mu + (1 - momentum) * gradient instead of mu.
        dtype: dtype of Newton-Schulz products, see `newton_schulz`.
        constrain: lays the momentum of a leaf out before Newton-Schulz, and with back=True the
            result again, for example `parallel.over_layers(mesh)`, which gives each device its own
            whole matrices.
        impl: of Newton-Schulz's symmetric products, see `newton_schulz`.

    Returns: transform without learning rate or sign; updates keep the gradient's dtype.
    Raises: ValueError for unknown names; at init and update for leaves of rank < 2, naming them.
    Source: arXiv:2502.16982, section 2.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_muon()
    >>> params = {"w": jnp.zeros((2, 4))}
    >>> updates, state = tx.update({"w": jnp.eye(2, 4)}, tx.init(params))
    >>> bool(jnp.allclose(updates["w"], 2**0.5 * jnp.eye(2, 4), atol=0.2))
    True
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"no coefficients '{coefficients}'; known: {', '.join(COEFFICIENTS)}")
    if scale not in SCALES:
        raise ValueError(f"no scale '{scale}'; known: {', '.join(SCALES)}")
    orthogonalize = orthogonalizer(steps, coefficients, scale, dtype, constrain, impl)

    def init(params):
        _check_matrices(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params)
        return MuonState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        _check_matrices(updates)

        def average(g, m):
            return momentum * m + (1 - momentum) * g.astype(m.dtype)

        mu = jax.tree.map(average, updates, state.mu)
        ahead = jax.tree.map(average, updates, mu) if nesterov else mu

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(orthogonalize, updates, ahead), MuonState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalizer(
    steps: int,
    coefficients: str,
    scale: str,
    dtype: Any,
    constrain: Callable[..., jax.Array] | None,
    impl: str,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """From (gradient, momentum to follow) to the update, in the gradient's dtype; args of `scale_by_muon`."""

    def orthogonalize(g, u):
        factor = SCALES[scale](*u.shape[-2:])
        if constrain is None:
            return (factor * newton_schulz(u, steps, coefficients, dtype, impl=impl)).astype(g.dtype)
        u = newton_schulz(constrain(u), steps, coefficients, dtype, impl=impl)
        return (factor * constrain(u, back=True)).astype(g.dtype)

    return orthogonalize


def scale_by_shape(scale: str) -> optax.GradientTransformation:
    """Multiply each matrix [..., m, n] by its factor in SCALES.

    For Muon inside a wrapper that shows it other shapes: scale_by_muon(scale="unit") there, this behind.
    Raises: ValueError for an unknown name.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale '{scale}'; known: {', '.join(SCALES)}")
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u: SCALES[scale](*u.shape[-2:]) * u, updates)
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    steps: int = 5,
    coefficients: str = "polar_express",
    scale: str = "original",
    nesterov: bool = True,
    dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Complete Muon for trees of matrices: direction, decoupled decay, learning rate.

    Other parameters need another transform beside it, for example through `optax.partition`.

    Args:
        learning_rate: float or schedule of the update count.
        weight_decay: decoupled; multiplied by the learning rate.
        momentum, steps, coefficients, scale, nesterov, dtype: see `scale_by_muon`.

    Returns: transform whose updates are added to the parameters.
    Raises: ValueError as `scale_by_muon`.
    Source: arXiv:2502.16982.

    >>> import jax.numpy as jnp
    >>> tx = muon(0.02)
    >>> params = {"w": jnp.ones((4, 4))}
    >>> updates, state = tx.update({"w": jnp.eye(4)}, tx.init(params), params)
    """
    return optax.chain(
        scale_by_muon(momentum, steps, coefficients, scale, nesterov, dtype),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check_matrices(tree: Any) -> None:
    """Raise for the leaves that are not (stacks of) matrices."""
    bad = [f"{path} {x.shape}" for path, x in params_lib.flatten(tree).items() if jnp.ndim(x) < 2]
    if bad:
        raise ValueError(f"Muon needs leaves of rank >= 2 [..., d_in, d_out], got {', '.join(bad)}")
