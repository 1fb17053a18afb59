"""GaLore against float64 SVD, plain Muon on low-rank gradients, optax, and its own byte counts."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
import scipy.linalg
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_transforms import share_left

from nanochat_jax.optim import galore as galore_lib
from nanochat_jax.optim import lion, muon
from nanochat_jax.optim.galore import galore

few = hypothesis.settings(max_examples=25, deadline=None)
small = functools.partial(galore, min_dim=4)
float32_muon = functools.partial(muon.scale_by_muon, scale="rms", dtype=jnp.float32)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_spectrum(shape, values, seed=0):
    """Matrices with given singular values and random singular vectors, float32."""
    rng = np.random.default_rng(seed)
    *lead, m, n = shape
    u, _ = np.linalg.qr(rng.normal(size=(*lead, m, min(m, n))))
    v, _ = np.linalg.qr(rng.normal(size=(*lead, n, min(m, n))))
    return np.asarray((u * np.asarray(values)) @ v.swapaxes(-1, -2), np.float32)


def projection(g, rank):
    """Float64 orthogonal projector onto the leading left singular vectors of g [m, n]."""
    u, _, _ = np.linalg.svd(np.asarray(g, np.float64))
    return u[:, :rank] @ u[:, :rank].T


def energy(p, g):
    """Share of |g|^2 in the span of the columns of p."""
    return np.sum(np.square(np.asarray(p, np.float64).T @ g)) / np.sum(np.square(np.asarray(g, np.float64)))


# --- subspaces ---


@pytest.mark.parametrize("power_iterations", [1, 2])
def test_subspaces_are_those_of_the_float64_svd(key, power_iterations):
    values = 0.8 ** np.arange(48)
    g = with_spectrum((2, 48, 160), values)
    exact = galore_lib.exact_subspace(jnp.asarray(g), 8)
    sketched = galore_lib.randomized_subspace(jnp.asarray(g), 8, key, 8, power_iterations)
    for i in range(2):
        u = np.linalg.svd(g[i].astype(np.float64))[0][:, :8]
        # principal angles; what the sketch misses has (0.8^8)^(2q) of the last wanted value
        assert np.max(scipy.linalg.subspace_angles(u, np.asarray(exact[i], np.float64))) < 1e-5
        bound = 0.8 ** (8 * (2 * power_iterations + 1))
        assert np.max(scipy.linalg.subspace_angles(u, np.asarray(sketched[i], np.float64))) < 3 * bound
        # single vectors, up to sign: ordered by singular value
        np.testing.assert_allclose(np.abs(np.sum(u * np.asarray(exact[i]), axis=0)), 1, atol=1e-5)
        np.testing.assert_allclose(np.abs(np.sum(u * np.asarray(sketched[i]), axis=0))[:4], 1, atol=1e-3)


@pytest.mark.parametrize(("spectrum", "share"), [("decaying", 0.98), ("flat", 0.9)])
def test_sketch_captures_nearly_what_the_svd_captures(key, spectrum, share):
    values = 1 / (1 + np.arange(64)) if spectrum == "decaying" else np.ones(64)
    g = with_spectrum((64, 200), values) if spectrum == "decaying" else normal((64, 200))
    best = energy(galore_lib.exact_subspace(jnp.asarray(g), 16), g)
    got = energy(galore_lib.randomized_subspace(jnp.asarray(g), 16, key), g)
    assert share * best <= got <= best * (1 + 1e-6)
    rank_one_sketch = energy(galore_lib.randomized_subspace(jnp.asarray(g), 16, key, 0, 0), g)
    assert rank_one_sketch < got  # oversampling and power iterations are what they are for


@few
@hypothesis.given(
    st.integers(0, 2**31),
    st.sampled_from([(8, 8), (8, 24), (2, 8, 24)]),
    st.integers(0, 8),
    st.sampled_from([0, -30, 30]),
    st.booleans(),
)
def test_any_gradient_gives_an_orthonormal_basis_that_contains_it(seed, shape, true_rank, exponent, exact):
    g = with_spectrum(shape, np.arange(8) < true_rank, seed) * np.float32(10.0**exponent)
    if exact:
        p = galore_lib.exact_subspace(jnp.asarray(g), 4)
    else:
        p = galore_lib.randomized_subspace(jnp.asarray(g), 4, jax.random.key(seed))
    np.testing.assert_allclose(p.mT @ p, np.broadcast_to(np.eye(4), (*shape[:-2], 4, 4)), atol=1e-5)
    if true_rank <= 4:
        back = galore_lib.project_back(p, galore_lib.project(p, g), True)
        np.testing.assert_allclose(back, g, atol=1e-5 * 10.0**exponent)


@few
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([(6, 6), (5, 12), (12, 5), (2, 3, 6, 9)]))
def test_projection_is_orthogonal_and_never_increases_the_norm(seed, shape):
    g = normal(shape, seed)
    left = shape[-2] <= shape[-1]
    wide = g if left else g.swapaxes(-1, -2)
    p = galore_lib.exact_subspace(jnp.asarray(normal(wide.shape, seed + 1)), 3)  # of another gradient
    low = galore_lib.project(p, jnp.asarray(g))
    assert low.shape == ((*shape[:-2], 3, shape[-1]) if left else (*shape[:-1], 3))
    norms = [np.linalg.norm(np.asarray(x, np.float64), axis=(-2, -1)) for x in (low, g)]
    assert np.all(norms[0] <= norms[1] * (1 + 1e-6))
    p64 = np.asarray(p, np.float64)
    want = p64 @ (p64.swapaxes(-1, -2) @ wide)
    back = np.asarray(galore_lib.project_back(p, low, left))
    np.testing.assert_allclose(back, want if left else want.swapaxes(-1, -2), atol=1e-5)
    again = galore_lib.project_back(p, galore_lib.project(p, back), left)
    np.testing.assert_allclose(again, back, atol=1e-5)


@few
@hypothesis.given(st.integers(0, 2**31))
def test_signs_follow_the_old_basis(seed):
    old = galore_lib.exact_subspace(jnp.asarray(normal((10, 20), seed)), 4)
    flips = np.where(np.random.default_rng(seed).random(4) < 0.5, -1, 1).astype(np.float32)
    order = np.random.default_rng(seed).permutation(4)
    moved = np.linalg.qr(np.asarray(old) + 0.05 * normal((10, 4), seed))[0]
    moved *= np.sign(np.sum(moved * np.asarray(old), axis=0))  # near old, same signs
    got = galore_lib.follow_signs(jnp.asarray((moved * flips)[:, order]), old)
    np.testing.assert_allclose(got, moved[:, order], atol=1e-6)
    first = galore_lib.follow_signs(jnp.asarray(moved * flips), jnp.zeros_like(old))
    np.testing.assert_array_equal(first, galore_lib.follow_signs(jnp.asarray(moved), jnp.zeros_like(old)))


# --- change of subspace: float64 recursions in the full space, which no basis can influence ---


def momentum_in_full_space(policy, grads, rank, decay, gap):
    """Momentum P M of each step, in float64: M sums gradients, refreshes change it by the policy."""
    mean, out = 0.0, []
    for step, g in enumerate(grads):
        if step % gap == 0:
            onto = projection(g, rank)
            mean = {"rotate": onto @ mean, "reset": 0.0}[policy] if step else 0.0
        mean = decay * mean + onto @ g
        out.append(mean)
    return np.stack(out)


@pytest.mark.parametrize("policy", ["rotate", "reset"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_momentum_after_a_refresh_is_the_policys(policy, shape):
    wide = [with_spectrum((12, 20), 0.7 ** np.arange(12), seed) for seed in range(7)]
    want = momentum_in_full_space(policy, [g.astype(np.float64) for g in wide], 5, 0.9, 3)
    tx = small(optax.trace(0.9), 5, 3, 1.0, method="exact", momentum=policy)
    state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
    for g, expected in zip(wide, want, strict=True):
        turned = shape[0] > shape[1]
        updates, state = update(jnp.asarray(g.T if turned else g), state)
        np.testing.assert_allclose(updates.T if turned else updates, expected, atol=1e-5)


def test_transport_turns_the_basis_by_procrustes_and_keeps_the_numbers():
    tx = small(optax.trace(1.0), 5, 1, 1.0, method="exact", momentum="transport")
    state = tx.init(jnp.zeros((12, 20)))
    bases, stored = [], []
    for seed in range(2):
        g = jnp.asarray(with_spectrum((12, 20), 0.7 ** np.arange(12), seed))
        _, state = tx.update(g, state)
        bases.append(np.asarray(state.projector, np.float64))
        stored.append(np.asarray(state.inner.trace) - bases[-1].T @ np.asarray(g))
    np.testing.assert_allclose(
        stored[1], bases[0].T @ with_spectrum((12, 20), 0.7 ** np.arange(12), 0), atol=1e-5
    )
    u = np.linalg.svd(with_spectrum((12, 20), 0.7 ** np.arange(12), 1).astype(np.float64))[0][:, :5]
    turn, _ = scipy.linalg.orthogonal_procrustes(u, bases[0])
    np.testing.assert_allclose(bases[1], u @ turn, atol=1e-5)


@pytest.mark.parametrize(("policy", "same"), [("rotate", True), ("transport", True), ("keep", False)])
@pytest.mark.parametrize(("shape", "method"), [((40, 12), "exact"), ((2, 12, 40), "randomized")])
def test_muon_in_a_fixed_subspace_equals_plain_muon(policy, same, shape, method):
    """Gradients of rank 4 that share one subspace: rank 6 loses nothing, and Muon ignores the basis.

    Only the stored momentum can betray a change of basis, so "keep" must differ.
    """
    *lead, m, n = shape
    short, long = min(m, n), max(m, n)
    space = normal((*lead, short, 4), 99)
    plain = float32_muon()
    tx = small(float32_muon(), 6, 2, 1.0, momentum=policy, method=method)
    a, b = plain.init(jnp.zeros(shape)), tx.init(jnp.zeros(shape))
    want_update, got_update = jax.jit(plain.update), jax.jit(tx.update)
    worst = 0.0
    for seed in range(6):
        g = space @ (0.5 ** np.arange(4)[:, None] * normal((*lead, 4, long), seed)).astype(np.float32)
        g = jnp.asarray(g if m <= n else g.swapaxes(-1, -2))
        want, a = want_update(g, a)
        got, b = got_update(g, b)
        worst = max(worst, float(jnp.max(jnp.abs(got - want))))
    scale = 0.2 * np.sqrt(long)  # largest singular value of the updates
    assert worst < 2e-3 * scale if same else worst > 2e-2 * scale


@few
@hypothesis.given(st.integers(0, 2**31), st.booleans())
def test_second_moments_stay_averages(seed, left):
    rng = np.random.default_rng(seed)
    q = scipy.linalg.orth(rng.normal(size=(9, 9)))[:4, :4].astype(np.float32)  # any contraction
    v = rng.random((4, 7)).astype(np.float32)
    turned = lambda x: jnp.asarray(x if left else x.T)  # noqa: E731
    rotate = lambda q, v: galore_lib._rotate_second(jnp.asarray(q), turned(v), None, left)  # noqa: E731
    got = np.asarray(rotate(q, v) if left else rotate(q, v).T)
    w = np.square(q.astype(np.float64))
    want = w @ v + (1 - w.sum(1, keepdims=True)) * v.mean(0)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.all(got >= v.min(0) - 1e-6) and np.all(got <= v.max(0) + 1e-6)
    signed = np.diag(np.sign(rng.normal(size=4)))[rng.permutation(4)].astype(np.float32)
    np.testing.assert_allclose(turned(np.square(signed) @ v), rotate(signed, v), atol=1e-6)


def test_adam_is_refreshed_by_name():
    tx = small(optax.scale_by_adam(0.5, 0.5), 4, 1, 1.0, method="exact", momentum="rotate")
    g, h = (jnp.asarray(with_spectrum((8, 16), 0.6 ** np.arange(8), seed)) for seed in (0, 1))
    _, old = tx.update({"w": g}, tx.init({"w": g}))
    _, new = tx.update({"w": h}, old)
    q = np.asarray(new.projector["w"].T @ old.projector["w"], np.float64)
    r = np.asarray(new.projector["w"].T @ h)
    mu, nu = np.asarray(old.inner.mu["w"]), np.asarray(old.inner.nu["w"])
    np.testing.assert_allclose(new.inner.mu["w"], 0.5 * (q @ mu) + 0.5 * r, atol=1e-6)
    spread = np.square(q) @ nu + (1 - np.square(q).sum(1, keepdims=True)) * nu.mean(0)
    np.testing.assert_allclose(new.inner.nu["w"], 0.5 * spread + 0.5 * np.square(r), atol=1e-6)


# --- the whole transform against others ---


def test_one_period_of_adam_equals_optax_galore():
    """Square matrices: there both project from the left. Signs cancel while the basis stays."""
    tx = small(optax.scale_by_adam(), 5, 20, 0.5, method="exact")
    theirs = optax.contrib.scale_by_galore(5, 20, 0.5, optax.scale_by_adam())
    a, b = tx.init(jnp.zeros((12, 12))), theirs.init(jnp.zeros((12, 12)))
    ours, theirs = jax.jit(tx.update), jax.jit(theirs.update)
    for seed in range(12):
        g = jnp.asarray(with_spectrum((12, 12), 0.7 ** np.arange(12), seed))
        got, a = ours(g, a)
        want, b = theirs(g, b)
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_gradients_without_memory_equal_optax_galore_across_refreshes():
    tx = small(optax.identity(), 5, 3, 0.5, method="exact", momentum="keep")
    theirs = optax.contrib.scale_by_galore(5, 3, 0.5, optax.identity())
    a, b = tx.init(jnp.zeros((12, 12))), theirs.init(jnp.zeros((12, 12)))
    ours, theirs = jax.jit(tx.update), jax.jit(theirs.update)
    for seed in range(8):
        g = jnp.asarray(with_spectrum((12, 12), 0.7 ** np.arange(12), seed))
        got, a = ours(g, a)
        want, b = theirs(g, b)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "inner", [muon.scale_by_muon(), optax.scale_by_adam(), lion.scale_by_lion()], ids=["muon", "adam", "lion"]
)
@pytest.mark.parametrize(("rank", "min_dim"), [(8, 4), (3, 9)])
def test_leaves_that_are_not_projected_pass_unchanged(inner, rank, min_dim):
    p = {"a": jnp.asarray(normal((2, 8, 20))), "b": jnp.asarray(normal((20, 8)))}
    tx = galore(inner, rank, min_dim=min_dim)
    a, b = inner.init(p), tx.init(p)
    for _ in range(3):
        want, a = inner.update(p, a)
        got, b = tx.update(p, b)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.leaves(b.projector) == []


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_rms_scale_gives_projected_muon_the_rms_of_plain_muon(shape):
    g = jnp.asarray(normal(shape))
    tx = small(float32_muon(), 8, scale="rms", method="exact")
    got, _ = jax.jit(tx.update)(g, tx.init(g))
    assert 0.17 < float(jnp.sqrt(jnp.mean(jnp.square(got)))) < 0.23


# --- refreshes ---


def changed_layers(tx, shapes, steps):
    """For each step, the (leaf, layer) whose projectors changed."""
    state = tx.init({k: jnp.zeros(s) for k, s in shapes.items()})
    update, out = jax.jit(tx.update), []
    for step in range(steps):
        before = jax.device_get(state.projector)
        _, state = update({k: jnp.asarray(normal(s, step)) for k, s in shapes.items()}, state)
        after = jax.device_get(state.projector)
        out.append(
            [(k, i) for k in shapes for i in range(len(before[k])) if np.any(before[k][i] != after[k][i])]
        )
    return out


@pytest.mark.parametrize(("gap", "most"), [(24, 1), (12, 1), (6, 2), (4, 4), (3, 5), (1, 12)])
def test_every_matrix_is_refreshed_once_a_gap_and_the_work_is_spread(gap, most):
    shapes = {"a": (4, 8, 10), "b": (4, 10, 8), "c": (4, 8, 8)}
    tx = small(optax.identity(), 3, gap, method="exact", momentum="keep")
    steps = changed_layers(tx, shapes, 1 + 2 * gap)
    everything = [(k, i) for k in shapes for i in range(4)]
    assert steps[0] == everything
    for period in (steps[1 : 1 + gap], steps[1 + gap :]):
        assert sorted(layer for step in period for layer in step) == everything
        assert max(map(len, period)) <= most


def test_no_projection_changes_between_refreshes():
    steps = changed_layers(small(optax.identity(), 3, 5, momentum="keep"), {"w": (1, 8, 10)}, 12)
    assert [bool(s) for s in steps] == [s % 5 == 0 for s in range(12)]


def test_random_matrices_depend_on_seed_step_and_path_only():
    g = jnp.asarray(normal((2, 16, 40)))
    g = g.at[1].set(g[0])

    def make(seed):
        return small(optax.identity(), 4, 1, momentum="keep", oversampling=0, power_iterations=0, seed=seed)

    transforms = [make(0), make(1)]  # each compiles once per tree

    def first(tree, name, seed=0):
        tx = transforms[seed]
        _, state = tx.update(tree, tx.init(tree))
        _, after = tx.update(tree, state)
        return state.projector[name], after.projector[name]

    p, later = first({"w": g}, "w")
    np.testing.assert_array_equal(p, first({"a": g, "w": g}, "w")[0])
    for other in (later, first({"a": g, "w": g}, "a")[0], first({"w": g}, "w", seed=1)[0]):
        assert np.max(np.abs(p - other)) > 1e-2
    assert np.max(np.abs(p[0] - p[1])) > 1e-2  # layers of a stack draw their own


@pytest.mark.parametrize(
    ("method", "policy"), [("randomized", "rotate"), *(("exact", p) for p in galore_lib.POLICIES)]
)
def test_zero_gradients_give_zero_updates(method, policy):
    tx = small(optax.scale_by_adam(), 3, 2, method=method, momentum=policy, projector_bits=8)
    state, update = tx.init(jnp.zeros((2, 8, 12))), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jnp.zeros((2, 8, 12)), state)
        assert np.all(np.asarray(updates) == 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


# --- storage ---


@pytest.mark.parametrize(("bits", "error"), [(32, 5e-6), (16, 0.02), (8, 0.05)])
def test_stored_projectors_stay_nearly_orthonormal(bits, error):
    g = jnp.asarray(normal((2, 64, 160)))
    tx = small(optax.identity(), 16, scale=1.0, method="exact", projector_bits=bits)
    updates, state = jax.jit(tx.update)({"w": g}, tx.init({"w": g}))
    assert state.projector["w"].dtype == galore_lib.STORAGE[bits]
    p = np.asarray(galore_lib._decode(state.projector["w"], state.projector_scale["w"]), np.float64)
    gram = p.swapaxes(-1, -2) @ p
    assert np.max(np.abs(np.linalg.eigvalsh(gram) - 1)) < error
    if bits == 8:
        np.testing.assert_allclose(np.diagonal(gram, axis1=-2, axis2=-1), 1, atol=1e-6)
    for got, one in zip(updates["w"], g, strict=True):
        want = projection(one, 16) @ np.asarray(one)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < error


@pytest.mark.parametrize("bits", galore_lib.STORAGE)
@pytest.mark.parametrize(
    ("inner", "moments"), [(muon.scale_by_muon(), 1), (optax.scale_by_adam(), 2), (lion.scale_by_lion(), 1)]
)
def test_state_bytes_are_those_of_the_pytree(bits, inner, moments):
    shapes = {"q": (3, 256, 256), "up": (3, 256, 1024), "down": (1024, 256), "gate": (3, 256, 64)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    state = jax.eval_shape(galore(inner, 128, projector_bits=bits).init, params)
    real = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    assert real == sum(galore_lib.state_bytes(s, 128, moments, projector_bits=bits) for s in shapes.values())
    assert state.inner.mu["down"].shape == (1024, 128) and state.inner.mu["gate"].shape == (3, 256, 64)


def test_refresh_flops_are_those_that_xla_counts():
    """XLA counts the products; it leaves out QR and eigenvectors, and adds the random numbers."""
    shape, rank, q = (2, 256, 1024), 24, 1
    find = functools.partial(galore_lib.randomized_subspace, rank=rank, power_iterations=q)
    lowered = jax.jit(find).lower(jnp.zeros(shape), key=jax.random.key(0)).compile()
    k = rank + 8
    factorizations = 2 * ((1 + q) * (4 * 256 * k**2 - 4 * k**3 / 3) + 9 * k**3)
    products = galore_lib.refresh_flops(shape, rank, power_iterations=q) - factorizations
    assert products == pytest.approx(lowered.cost_analysis()["flops"], rel=0.1)


# --- what every transform must do ---

# inner, settings. Random matrices and Newton-Schulz are slow to compile: little of both.
short_muon = functools.partial(float32_muon, steps=2)
ROWS = {
    "muon_transport_8bit": (
        short_muon,
        {"momentum": "transport", "method": "exact", "projector_bits": 8},
    ),
    "adam_rotate": (optax.scale_by_adam, {"momentum": "rotate", "method": "exact"}),
    "lion_reset_16bit": (
        lion.scale_by_lion,
        {"momentum": "reset", "method": "exact", "projector_bits": 16},
    ),
}
RANDOMIZED = {"muon_rotate_randomized": (short_muon, {"momentum": "rotate"})}
rows = pytest.mark.parametrize(("inner", "settings"), ROWS.values(), ids=ROWS)
SHAPES = {
    "attn": {"q": (8, 8, 32)},
    "mlp": {"down": (8, 32, 8), "gate": (8, 4, 2)},
}  # the last is not projected


def make(inner, settings, learning_rate=0.1, gap=3):
    return optax.chain(
        galore(inner(), 4, gap, 1.0, min_dim=4, **settings), optax.scale_by_learning_rate(learning_rate)
    )


def tree(seed):
    """Gradients with well separated singular values: their vectors do not hang on rounding."""
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    draw = lambda s: jnp.asarray(with_spectrum(s, 0.6 ** np.arange(min(s[-2:])), seed))  # noqa: E731
    return {"blocks": jax.tree.map(draw, SHAPES, is_leaf=is_shape)}


def assert_close(a, b, atol=5e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def run(tx, steps=range(5), p=None, state=None, update=None):
    p, update = tree(0) if p is None else p, update or jax.jit(tx.update)
    state = tx.init(p) if state is None else state
    for i in steps:
        updates, state = update(tree(i + 1), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


def kind(x):
    return x.shape, x.dtype, x.weak_type


@pytest.mark.slow
@rows
def test_state_keeps_its_types_and_compiles_once(inner, settings):
    tx, traces = make(inner, settings), []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(g, state, p):
        traces.append(1)
        return tx.update(g, state, p)

    state = jax.jit(tx.init)(tree(0))
    kinds = jax.tree.map(kind, state)
    p, after = run(tx, state=state, update=update)
    assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.ndim)  # donated
    assert len(traces) == 1
    assert kinds == jax.tree.map(kind, after)
    assert jax.tree.map(kind, jax.eval_shape(tx.init, tree(0))) == kinds
    assert_close(p, run(tx, update=tx.update)[0])  # without jit


@pytest.mark.slow
@rows
def test_composes_with_masked_and_partition(inner, settings):
    tx = make(inner, settings, gap=1000)
    mask = {"blocks": {"attn": {"q": True}, "mlp": {"down": False, "gate": True}}}
    labels = jax.tree.map(lambda m: "on" if m else "off", mask)
    want, _ = run(tx, range(2))
    parts, _ = run(optax.partition({"on": tx, "off": optax.set_to_zero()}, labels), range(2))
    masked, _ = run(optax.chain(optax.identity(), optax.masked(tx, mask)), range(2))
    # without further refreshes, whose turns are shared out, no leaf depends on the others
    for got in (parts, masked):
        assert_close(got["blocks"]["attn"], want["blocks"]["attn"], 1e-5)
        np.testing.assert_array_equal(got["blocks"]["mlp"]["gate"], want["blocks"]["mlp"]["gate"])
    np.testing.assert_array_equal(parts["blocks"]["mlp"]["down"], tree(0)["blocks"]["mlp"]["down"])


@pytest.mark.slow
@rows
def test_inside_multi_steps_and_inject_hyperparams(inner, settings):
    tx = make(inner, settings)
    many = optax.MultiSteps(tx, 2)
    p, state, update = tree(0), many.init(tree(0)), jax.jit(many.update)
    for i in range(4):
        updates, state = update(tree(i), state, p)
        if i % 2 == 0:
            assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
        p = optax.apply_updates(p, updates)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, tree(i), tree(i + 1)) for i in (0, 2)]
    q, plain, alone = tree(0), tx.init(tree(0)), jax.jit(tx.update)
    for g in means:
        updates, plain = alone(g, plain, q)
        q = optax.apply_updates(q, updates)
    assert_close(p, q)
    static = set(inspect.signature(galore).parameters) - {"scale"}
    injected = optax.inject_hyperparams(galore, static_args=static)(inner(), 4, 3, 1.0, 4, **settings)
    assert_close(run(optax.chain(injected, optax.scale_by_learning_rate(0.1)))[0], run(tx, update=alone)[0])
    assert float(injected.init(tree(0)).hyperparams["scale"]) == 1.0


@pytest.mark.slow
@rows
def test_resumed_equals_uninterrupted_bit_for_bit(inner, settings, tmp_path):
    tx = make(inner, settings)
    update = jax.jit(tx.update)
    want = run(tx, range(6), update=update)
    p, state = run(tx, range(4), update=update)  # refreshes lie before and behind
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        state = saver.restore(tmp_path / "state", jax.eval_shape(tx.init, p))
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, p)), leaves)
    jax.tree.map(np.testing.assert_array_equal, run(tx, range(4, 6), p, state, update), want)


@pytest.mark.slow
@rows
def test_minimizes_a_matrix_quadratic(inner, settings):
    """The subspace must move: a fixed one of rank 4 in 8 could at best remove what it spans."""
    assert share_left(make(inner, settings), tree(0), tree(7), 200) < 0.02


LAYOUTS = {"layers": ("x",), "rows": (None, "x"), "both": (None, "x", "y")}
CASES = [("muon_rotate_randomized", "both"), ("muon_transport_8bit", "layers"), ("adam_rotate", "rows")]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "layout"), CASES)
def test_sharded_equals_unsharded(row, layout):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS was set before this file was read")
    spec = LAYOUTS[layout]
    sizes, names = ((4, 2), ("x", "y")) if "y" in spec else ((8,), ("x",))
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))

    def on_mesh(x):
        """The layout, on the axes that it divides."""
        parts = [a if a and s % mesh.shape[a] == 0 else None for s, a in zip(x.shape, spec, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*parts))

    tx = make(*(ROWS | RANDOMIZED)[row])
    shardings = jax.tree.map(on_mesh, jax.eval_shape(tx.init, tree(0)))
    put = lambda t: jax.device_put(t, jax.tree.map(on_mesh, t))  # noqa: E731
    p, state = put(tree(0)), jax.jit(tx.init, out_shardings=shardings)(put(tree(0)))
    update = jax.jit(tx.update, out_shardings=(jax.tree.map(on_mesh, tree(0)), shardings))
    for i in range(5):
        updates, state = update(put(tree(i + 1)), state, p)
        p = optax.apply_updates(p, updates)
    assert_close(jax.device_get(p), run(tx)[0])


def test_dtypes_are_kept_and_extra_args_reach_the_inner_transform():
    seen = []

    def update(updates, state, params=None, *, loss):
        seen.append((loss, params, jax.tree.map(lambda x: (x.shape, x.dtype), updates)))
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    g = {"w": jnp.ones((8, 16), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16)}
    tx = small(recorder, 4)
    updates, _ = tx.update(g, tx.init(g), g, loss=2.0)
    assert seen == [(2.0, None, {"w": ((4, 16), jnp.float32), "b": ((8,), jnp.bfloat16)})]
    assert jax.tree.map(lambda x: x.dtype, updates) == {"w": jnp.bfloat16, "b": jnp.bfloat16}


def test_state_that_cannot_be_rotated_is_named():
    codes = optax.GradientTransformation(
        lambda p: {"codes": jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int8), p)},
        lambda u, s, p=None: (u, s),
    )
    params = {"w": jnp.ones((2, 8, 16)), "small": jnp.ones((2, 2, 2))}
    with pytest.raises(ValueError, match=r"codes/w int8\(2, 4, 16\).*transport"):
        small(codes, 4).init(params)
    for policy in ("keep", "reset", "transport"):
        tx = small(codes, 4, 1, momentum=policy, method="exact")
        state = tx.init(params)._replace(
            inner={"codes": {"w": jnp.ones((2, 4, 16), jnp.int8), "small": jnp.ones((2, 2, 2), jnp.int8)}}
        )
        _, state = tx.update(params, state)
        kept = policy != "reset"
        assert np.all(np.asarray(state.inner["codes"]["w"]) == kept)
        assert np.all(np.asarray(state.inner["codes"]["small"]) == 1)  # not projected: never reset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"update_gap": 0}, "update_gap"),
        ({"min_dim": 0}, "min_dim"),
        ({"oversampling": -1}, "oversampling"),
        ({"power_iterations": -1}, "power_iterations"),
        ({"method": "svd"}, "randomized, exact"),
        ({"momentum": "rotated"}, "keep, reset, rotate, transport"),
        ({"projector_bits": 4}, "32, 16, 8"),
        ({"scale": "spectral"}, "rms"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        galore(optax.identity(), **({"rank": 4} | settings))
