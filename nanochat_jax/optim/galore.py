"""GaLore 2: any direction, run inside a slowly changing low-rank subspace of each gradient.

For G [m, n] the shorter side is projected. If m <= n, P [m, r] holds leading left singular vectors
of a recent gradient, the inner transform sees R = P^T G [r, n], and its answer N returns as
scale * P N; if m > n, P [n, r] is taken from the right: R = G P [m, r], scale * N P^T. The inner
state has R's size. P has orthonormal columns, so |R| <= |G|, and projecting and returning is the
orthogonal projection P P^T. Nothing is fed back: what lies outside the subspace is dropped until
the subspace moves.

Subspace. "exact" takes an SVD. "randomized" (Halko et al. 2011) takes Y = G O for a Gaussian
O [n, r + p], improves it by q power iterations Y <- G (G^T orth(Y)), and diagonalizes the small
matrix B B^T, B = orth(Y)^T G. It squares B's condition number, which blurs only directions below
3e-4 of the largest singular value: they carry 1e-7 of the energy, and orth(Y) times eigenvectors
is orthonormal in any case. A zero gradient gives some orthonormal P, never NaN. G is divided by
its largest entry first, so that tiny gradients do not underflow.

Change of subspace. With Q = P_new^T P_old, what was stored in the old basis becomes, by `momentum`:
  "keep"       the same numbers (the reference implementation); signs of new columns follow the old.
  "reset"      the inner transform's initial values; its step count (bias correction) goes on.
  "rotate"     first moments Q M, the projection of the old momentum onto the new subspace; second
               moments (Q * Q) V, what E[r^2] would be if coordinates were uncorrelated (LDAdam).
               The weights of a row sum to the share c of the new direction that the old subspace
               knew; the rest, 1 - c, takes the mean of V over the old directions. Zero would let
               Adam divide by almost nothing, since its bias correction has long ended.
  "transport"  the same numbers, but the new basis is turned to lie nearest to the old one
               (orthogonal Procrustes: P_new polar(Q)). Then Q is symmetric, its eigenvalues are
               the cosines of the principal angles: like "rotate" without the loss of length. It
               never looks at the state, so it suits momenta stored in 8 bits.
Muon commutes with rotations of the basis; for Adam and Lion the basis is part of the method.

Staggering. The layers of a stacked leaf [..., m, n] are refreshed one (if there are more layers
than steps in the gap: a few) at a time, evenly over the gap, and the leaves one after another in
between. A `lax.cond` per layer would become a select under vmap, which computes both sides always,
and one `lax.cond` per leaf would refresh a whole stack in one step. So each leaf has a loop over
refreshes with a traced range: empty in most steps, one turn in some, all layers in the first step,
where every projector comes from the first gradient. A loop's carry is updated in place, and its
body is compiled once.

Sharding: Y, B and R contract or keep sharded axes as usual products do; QR and the eigenvectors
are computed on gathered thin matrices. Sources: arXiv:2403.03507 (GaLore), arXiv:2504.20437
(GaLore 2), arXiv:0909.4061 (randomized SVD), arXiv:2410.16103 (LDAdam), arXiv:2407.08296 (low-bit
projectors).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.optim import muon

METHODS = ("randomized", "exact")
POLICIES = ("keep", "reset", "rotate", "transport")
STORAGE = {32: jnp.float32, 16: jnp.bfloat16, 8: jnp.int8}

# Field names by which inner states call their moments ("rotate" must know which it meets).
FIRST_MOMENTS = ("mu", "trace")
SECOND_MOMENTS = ("nu", "nu_max")


class GaloreState(NamedTuple):
    """count: int32 [], updates so far. Trees like the parameters, MaskedNode where not projected
    (checkpoints refuse empty arrays):
    projector: [..., min(m, n), rank], float32, bfloat16 or int8; zero before the first update.
    projector_scale: float32 [..., 1, rank] of int8 projectors, else MaskedNode everywhere.
    inner: the inner transform's state over the projected tree.
    """

    count: jax.Array
    projector: Any
    projector_scale: Any
    inner: Any


def galore(
    inner: optax.GradientTransformation,
    rank: int,
    update_gap: int = 200,
    scale: float | str = 0.25,
    min_dim: int = 256,
    method: str = "randomized",
    oversampling: int = 8,
    power_iterations: int = 1,
    projector_bits: int = 32,
    momentum: str = "rotate",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Run a direction on low-rank projections of the matrices.

    Leaves [..., m, n] with min(m, n) >= min_dim and min(m, n) > rank are projected, leading axes
    being independent matrices; all others pass through the same `inner` as they are, unscaled.
    `inner` gets no parameters (they have other shapes): weight decay belongs behind this transform.

    Muon inside sees R's shape. Its "rms" scale is then the right one up to sqrt(min(m, n) / rank),
    which scale="rms" supplies; its "original" and "spectral" scales would take the rank for a side
    of the matrix.

    Args:
        inner: direction that maps a tree of updates to one of the same shapes, of any state.
        rank: columns of the projectors, >= 1.
        update_gap: updates between two refreshes of one matrix, >= 1.
        scale: factor on projected directions; "rms" = sqrt(min(m, n) / rank), which gives the
            update the root mean square that the inner direction had.
        min_dim: smallest min(m, n) that is projected.
        method: "randomized" or "exact".
        oversampling, power_iterations: p and q of the randomized method, >= 0.
        projector_bits: 32, 16 (bfloat16) or 8 (int8, one scale per column). Rounding moves the
            eigenvalues of P^T P from 1 by up to 0.3% (bfloat16) or 1.4% (int8), measured.
        momentum: "keep", "reset", "rotate" or "transport", see above. "rotate" needs moments named
            mu, trace, nu or nu_max in R's shape; the others take any state.
        seed: of the random matrices, together with the update count and the leaf's path.

    Returns: transform without learning rate or sign; updates keep the gradient's dtype.
    Raises: ValueError for arguments out of range or unknown names; at init if "rotate" meets state
        that it cannot rotate, naming it.
    Source: arXiv:2504.20437; arXiv:2403.03507, algorithm 2.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(
    ...     galore(optax.scale_by_adam(), rank=4, min_dim=8),
    ...     optax.add_decayed_weights(0.1),
    ...     optax.scale_by_learning_rate(0.01),
    ... )
    >>> params = {"w": jnp.ones((2, 8, 32)), "norm": jnp.ones(8)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> state[0].projector["w"].shape, state[0].inner.mu["w"].shape
    ((2, 8, 4), (2, 4, 32))
    """
    for name, value, low in (
        ("rank", rank, 1),
        ("update_gap", update_gap, 1),
        ("min_dim", min_dim, 1),
        ("oversampling", oversampling, 0),
        ("power_iterations", power_iterations, 0),
    ):
        if value < low:
            raise ValueError(f"GaLore needs {name} >= {low}, got {value}")
    for name, value, known in (
        ("method", method, METHODS),
        ("momentum", momentum, POLICIES),
        ("projector_bits", projector_bits, tuple(STORAGE)),
    ):
        if value not in known:
            raise ValueError(f"no {name} {value!r}; known: {', '.join(map(str, known))}")
    if isinstance(scale, str) and scale != "rms":
        raise ValueError(f"GaLore's scale is a number or 'rms', got {scale!r}")
    inner = optax.with_extra_args_support(inner)

    def find(g: jax.Array, key: jax.Array) -> jax.Array:
        if method == "exact":
            return exact_subspace(g, rank)
        return randomized_subspace(g, rank, key, oversampling, power_iterations)

    def reduced(tree: Any) -> Any:
        """Zeros of the shapes and dtypes that the inner transform sees."""
        return jax.tree.map(
            lambda x: jnp.zeros(_reduced(x.shape, rank), _wide(x)) if projects(x.shape, rank, min_dim) else x,
            tree,
        )

    def init(params):
        def stored(x, part):
            if not projects(x.shape, rank, min_dim):
                return optax.MaskedNode()
            # Behind a barrier: XLA would spend a minute on encoding large constants as it compiles.
            zeros = jax.lax.optimization_barrier(jnp.zeros((*x.shape[:-2], min(x.shape[-2:]), rank)))
            return _encode(zeros, projector_bits)[part]

        state = GaloreState(
            count=jnp.zeros([], jnp.int32),
            projector=jax.tree.map(lambda x: stored(x, 0), params),
            projector_scale=jax.tree.map(lambda x: stored(x, 1), params),
            inner=inner.init(reduced(params)),
        )
        _moments(state.inner, params, rank, min_dim, momentum)
        return state

    # Compiled even if the caller does not: a bare loop would be compiled anew at every call.
    @jax.jit
    def refresh(state, updates):
        """The state in the subspaces of this step; only the turns that are due are computed."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
        projectors = treedef.flatten_up_to(state.projector)
        scales = treedef.flatten_up_to(state.projector_scale)
        moments, inner_treedef = jax.tree.flatten(state.inner)
        owned = _moments(state.inner, updates, rank, min_dim, momentum)
        names = sorted(params_lib.path_name(path) for path in owned)
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        for i, (path, g) in enumerate(flat):
            if path not in owned:
                continue
            name, turns = params_lib.path_name(path), _turns(g.shape, update_gap)

            def turn_over(turn, carry, g=g, name=name, turns=turns, changes=owned[path]):
                pick = lambda x: _split(x, turns, g.ndim - 2)[turn]  # noqa: E731
                put = lambda x, v: (  # noqa: E731
                    _split(x, turns, g.ndim - 2).at[turn].set(v.astype(x.dtype)).reshape(x.shape)
                )
                stored, old_moments = carry
                old = _decode(*jax.tree.map(pick, stored))
                wide = pick(g if _left(g.shape) else g.mT).astype(jnp.float32)
                new = follow_signs(find(wide, params_lib.fold_name(jax.random.fold_in(key, turn), name)), old)
                if momentum == "transport":
                    new = muon.dot(new, polar(muon.dot(new.mT, old)))
                encoded = _encode(new, projector_bits)
                overlap = muon.dot(_decode(*encoded).mT, old)
                # Built here and not outside: it costs nothing in steps without refresh.
                fresh = jax.tree.leaves(inner.init(reduced(updates)))
                changed = [
                    change(overlap, pick(x), pick(fresh[j]), _left(g.shape))
                    for x, (j, change) in zip(old_moments, changes.items(), strict=True)
                ]
                return jax.tree.map(put, carry, (encoded, changed))

            first, stop = _due(state.count, names.index(name), len(names), turns, update_gap)
            carry = (projectors[i], scales[i]), [moments[j] for j in owned[path]]
            (projectors[i], scales[i]), changed = jax.lax.fori_loop(first, stop, turn_over, carry)
            for j, x in zip(owned[path], changed, strict=True):
                moments[j] = x
        return GaloreState(
            state.count,
            treedef.unflatten(projectors),
            treedef.unflatten(scales),
            inner_treedef.unflatten(moments),
        )

    def update(updates, state, params=None, **extra_args):
        del params
        state = refresh(state, updates)

        def down(g, projector, projector_scale):
            if not projects(g.shape, rank, min_dim):
                return g
            return project(_decode(projector, projector_scale), g.astype(_wide(g)))

        def back(g, direction, projector, projector_scale):
            if not projects(g.shape, rank, min_dim):
                return direction
            factor = math.sqrt(min(g.shape[-2:]) / rank) if isinstance(scale, str) else scale
            full = project_back(_decode(projector, projector_scale), direction, _left(g.shape))
            return (factor * full).astype(g.dtype)

        stored = state.projector, state.projector_scale
        directions, inner_state = inner.update(
            jax.tree.map(down, updates, *stored), state.inner, None, **extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(back, updates, directions, *stored), GaloreState(count, *stored, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def projects(shape: tuple[int, ...], rank: int, min_dim: int = 256) -> bool:
    """Whether `galore` projects a leaf of this shape."""
    return len(shape) >= 2 and min(shape[-2:]) >= min_dim and min(shape[-2:]) > rank


def project(projector: jax.Array, g: jax.Array) -> jax.Array:
    """Coordinates of each matrix in its subspace.

    Args: projector: [..., min(m, n), r]. g: [..., m, n], float32 or wider.
    Returns: P^T G [..., r, n] if m <= n, else G P [..., m, r], in g's dtype.
    """
    return muon.dot(projector.mT, g) if _left(g.shape) else muon.dot(g, projector)


def project_back(projector: jax.Array, x: jax.Array, left: bool) -> jax.Array:
    """The matrix of given coordinates: P X if `left` (m <= n), else X P^T, in x's dtype."""
    return muon.dot(projector, x) if left else muon.dot(x, projector.mT)


def exact_subspace(g: jax.Array, rank: int) -> jax.Array:
    """Leading left singular vectors by SVD.

    Args: g: float32 [..., m, n], m <= n.
    Returns: float32 [..., m, rank], orthonormal columns, largest singular value first.
    """
    u, _, _ = jnp.linalg.svd(_unit(g), full_matrices=False)
    return u[..., :rank]


def randomized_subspace(
    g: jax.Array, rank: int, key: jax.Array, oversampling: int = 8, power_iterations: int = 1
) -> jax.Array:
    """Leading left singular vectors from a random sketch, approximately.

    Args:
        g: float32 [..., m, n], m <= n.
        rank: columns wanted.
        key: typed key, consumed.
        oversampling: further columns of the sketch, cut off at m.
        power_iterations: products with G G^T; each shrinks what is left of the small singular
            values by the square of their ratio to the large ones.

    Returns: float32 [..., m, rank], orthonormal columns, largest singular value first.
    Source: arXiv:0909.4061, algorithms 4.4 and 5.1 (the latter by eigenvectors of B B^T).
    """
    m, n = g.shape[-2:]
    g = _unit(g)
    y = muon.dot(g, jax.random.normal(key, (*g.shape[:-2], n, min(rank + oversampling, m)), g.dtype))
    for _ in range(power_iterations):
        y = muon.dot(g, muon.dot(g.mT, jnp.linalg.qr(y)[0]))
    basis = jnp.linalg.qr(y)[0]
    b = muon.dot(basis.mT, g)
    _, vectors = jnp.linalg.eigh(muon.dot(b, b.mT))  # ascending eigenvalues
    return muon.dot(basis, vectors[..., ::-1][..., :rank])


def follow_signs(new: jax.Array, old: jax.Array) -> jax.Array:
    """Flip columns so that each has a positive product with the old column it overlaps most.

    Singular vectors have no sign of their own. Where `old` is zero (no projector yet), the largest
    entry of the new column becomes positive, so that results are the same everywhere.

    Args: new, old: [..., m, r].
    Returns: [..., m, r].
    """

    def largest(x):
        return jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=-2, keepdims=True), axis=-2)

    known = largest(muon.dot(old.mT, new))
    return jnp.where(jnp.where(known == 0, largest(new), known) < 0, -new, new)


def polar(x: jax.Array) -> jax.Array:
    """Nearest orthogonal matrix of each [..., r, r], by SVD: exact also where x is singular."""
    u, _, vt = jnp.linalg.svd(x)
    return muon.dot(u, vt)


def refresh_flops(shape: tuple[int, ...], rank: int, oversampling: int = 8, power_iterations: int = 1) -> int:
    """FLOPs of one randomized refresh of every matrix of a leaf; divide by the gap for a step's share.

    With a = min(m, n), b = max(m, n), k = rank + oversampling (at most a) and q power iterations:
    (4 + 4q) abk for products with G, (1 + q) (4 a k^2 - 4 k^3 / 3) for QR with its factor formed,
    2 b k^2 + 9 k^3 for B B^T and its eigenvectors, 2 a k rank for the basis. A step without
    refresh costs 4 a b rank for projecting and returning.

    Args: as `galore`; shape: [..., m, n].
    """
    a, b = sorted(shape[-2:])
    k, q = min(rank + oversampling, a), power_iterations
    products = (4 + 4 * q) * a * b * k + 2 * b * k**2 + 2 * a * k * rank
    factorizations = (1 + q) * (4 * a * k**2 - 4 * k**3 // 3) + 9 * k**3
    return math.prod(shape[:-2]) * (products + factorizations)


def state_bytes(
    shape: tuple[int, ...],
    rank: int,
    moments: int = 1,
    moment_bytes: float = 4,
    projector_bits: int = 32,
    min_dim: int = 256,
) -> float:
    """Bytes of a leaf's state: projector and inner moments, without counters.

    Args:
        shape: [..., m, n] or anything else, which is not projected.
        moments: per element, 1 for Muon and Lion, 2 for Adam; `moment_bytes` each.
        rank, projector_bits, min_dim: as `galore`.
    """
    if not projects(shape, rank, min_dim):
        return moments * moment_bytes * math.prod(shape)
    short, long = sorted(shape[-2:])
    scales = 4 * rank if projector_bits == 8 else 0
    projector = projector_bits // 8 * short * rank + scales
    return math.prod(shape[:-2]) * (projector + moments * moment_bytes * rank * long)


Change = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]  # (overlap, old, fresh, left) -> new


def _rotate_first(q: jax.Array, x: jax.Array, fresh: jax.Array, left: bool) -> jax.Array:
    del fresh
    return muon.dot(q, x) if left else muon.dot(x, q.mT)


def _rotate_second(q: jax.Array, x: jax.Array, fresh: jax.Array, left: bool) -> jax.Array:
    del fresh
    weights = jnp.square(q)
    unknown = jnp.maximum(0, 1 - jnp.sum(weights, axis=-1, keepdims=True))
    x = x if left else x.mT
    new = muon.dot(weights, x) + unknown * jnp.mean(x, axis=-2, keepdims=True)
    return new if left else new.mT


def _reset(q: jax.Array, x: jax.Array, fresh: jax.Array, left: bool) -> jax.Array:
    del q, x, left
    return fresh


ROTATIONS: dict[str, Change] = {
    **dict.fromkeys(FIRST_MOMENTS, _rotate_first),
    **dict.fromkeys(SECOND_MOMENTS, _rotate_second),
}


def _moments(
    inner_state: Any, params: Any, rank: int, min_dim: int, momentum: str
) -> dict[tuple, dict[int, Change]]:
    """Path of each projected leaf -> {index of a leaf of the inner state: what a refresh does to it}.

    As everywhere, state belongs to a parameter if its path ends in the parameter's path.
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    owned: dict[tuple, dict[int, Change]] = {p: {} for p, s in shapes.items() if projects(s, rank, min_dim)}
    if momentum in ("keep", "transport"):
        return owned
    for j, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state)):
        owner = max((p for p in shapes if path[len(path) - len(p) :] == p), key=len, default=None)
        lead = len(shapes[owner]) - 2 if owner in owned else 0
        if owner not in owned or x.ndim <= lead or x.shape[:lead] != shapes[owner][:lead]:
            continue
        if momentum == "reset":
            owned[owner][j] = _reset
            continue
        name = params_lib.path_name(path[len(path) - len(owner) - 1 : len(path) - len(owner)])
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        if name not in ROTATIONS or not floating or x.shape != _reduced(shapes[owner], rank):
            raise ValueError(
                f"GaLore cannot rotate the inner state {params_lib.path_name(path)} {x.dtype}{x.shape}: it "
                f"knows floating {', '.join(ROTATIONS)} of the projected shape; use momentum='transport'"
            )
        owned[owner][j] = ROTATIONS[name]
    return owned


def _turns(shape: tuple[int, ...], gap: int) -> int:
    """Refreshes that one period needs, each of layers / turns layers: at most one a step."""
    layers = math.prod(shape[:-2])
    return max(t for t in range(1, layers + 1) if layers % t == 0 and t <= gap)


def _due(count: jax.Array, index: int, leaves: int, turns: int, gap: int) -> tuple[jax.Array, jax.Array]:
    """Range of the turns of leaf `index` of `leaves` that belong to this step: all at step 0."""
    phases = np.array([(turn * leaves + index) * gap // (turns * leaves) for turn in range(turns)], np.int32)
    hits = phases == count % gap
    first = jnp.argmax(hits).astype(jnp.int32)
    stop = first + jnp.any(hits)
    return jnp.where(count == 0, 0, first), jnp.where(count == 0, turns, stop)


def _split(x: jax.Array, turns: int, lead: int) -> jax.Array:
    """[leading axes, ...] -> [turns, layers per turn, ...]."""
    return x.reshape(turns, -1, *x.shape[lead:]) if lead else x[None, None]


def _encode(p: jax.Array, bits: int) -> tuple[jax.Array, Any]:
    """Projector as stored, and its scales. Codes of a column get the scale that makes its norm 1."""
    if bits != 8:
        return p.astype(STORAGE[bits]), optax.MaskedNode()
    largest = jnp.max(jnp.abs(p), axis=-2, keepdims=True)
    codes = jnp.round(p / jnp.where(largest > 0, largest, 1) * 127)
    norm = jnp.sqrt(jnp.sum(jnp.square(codes), axis=-2, keepdims=True))
    return codes.astype(jnp.int8), jnp.where(norm > 0, 1 / jnp.maximum(norm, 1), 0).astype(jnp.float32)


def _decode(stored: jax.Array, scale: Any) -> jax.Array:
    """Projector in float32."""
    p = stored.astype(jnp.float32)
    return p if isinstance(scale, optax.MaskedNode) else p * scale


def _left(shape: tuple[int, ...]) -> bool:
    return shape[-2] <= shape[-1]


def _reduced(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    m, n = shape[-2:]
    return (*shape[:-2], rank, n) if _left(shape) else (*shape[:-2], m, rank)


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _unit(g: jax.Array) -> jax.Array:
    """Largest entry 1, zero stays zero."""
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    return g / jnp.where(largest > 0, largest, 1)
