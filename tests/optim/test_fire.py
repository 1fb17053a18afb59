"""FIRE against the float64 SVD, and what the wrapper changes and leaves alone."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_transforms as conformance
from hypothesis import strategies as st

from nanochat_jax import optim
from nanochat_jax.config import OptConfig
from nanochat_jax.optim import fire, skip

# The same isometry in two programs: rounding of small singular values, amplified by up to 1e3.
CLOSE = 5e-5
isometry = jax.jit(fire.isometry, static_argnums=(1, 2))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def polar(x):
    """Float64 polar factor of each matrix."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def decaying(m, n, decades, seed=0):
    """Singular values from 1 down to 10^-decades."""
    rng, r = np.random.default_rng(seed), min(m, n)
    u, _ = np.linalg.qr(rng.normal(size=(m, r)))
    v, _ = np.linalg.qr(rng.normal(size=(n, r)))
    return ((u * 10.0 ** -np.linspace(0, decades, r)) @ v.T).astype(np.float32)


def cubic(x, count):
    """The authors' iteration in float64: X <- 1.5 X - 0.5 X X^T X from X / |X|_F."""
    x = np.float64(x) / np.linalg.norm(x)
    for _ in range(count):
        x = 1.5 * x - 0.5 * x @ (x.T @ x)
    return x


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (2, 3, 16, 20), (1, 7), (128, 128)])
def test_equals_the_polar_factor(shape):
    x = normal(shape)
    got = np.asarray(isometry(jnp.asarray(x), "unit"))
    # float32 determines a singular direction to 6e-8 |x| / sigma; sigma is 1e-3 |x| or larger here
    np.testing.assert_allclose(got, polar(x), atol=5e-4)
    identity = np.swapaxes(got, -1, -2) @ got if shape[-2] >= shape[-1] else got @ np.swapaxes(got, -1, -2)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(min(shape[-2:])), identity.shape), atol=1e-5)


@pytest.mark.parametrize("decades", [1, 4])
def test_resolves_wide_spectra_where_the_cubic_does_not(decades):
    x = decaying(64, 160, decades)
    got = np.asarray(isometry(jnp.asarray(x), "unit"), np.float64)
    deviation = lambda y: np.linalg.norm(y @ y.T - np.eye(64)) / 8  # noqa: E731
    assert deviation(got) < 1e-3
    assert np.linalg.norm(got - polar(x)) / 8 < 1e-3
    assert deviation(cubic(x, 5)) > 0.3


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([(12, 12), (8, 20)]), st.integers(-10, 10))
def test_nearest_isometry_idempotent_and_scale_free(seed, shape, exponent):
    x = normal(shape, seed)
    got = np.asarray(isometry(jnp.asarray(x), "unit"), np.float64)
    rivals = polar(np.random.default_rng(seed).normal(size=(200, *shape)))
    nearby = polar(got + 0.1 * np.random.default_rng(seed).normal(size=(50, *shape)))
    distances = np.sum((np.concatenate([rivals, nearby]) - x) ** 2, axis=(-2, -1))
    assert np.sum((got - x) ** 2) <= distances.min() + 1e-4
    np.testing.assert_allclose(isometry(jnp.asarray(got, jnp.float32), "unit"), got, atol=2e-5)
    scaled = isometry(jnp.asarray(x * np.float32(2.0**exponent)), "unit")
    np.testing.assert_allclose(scaled, got, atol=1e-3)
    turned = isometry(jnp.asarray(x.T), "unit").T
    np.testing.assert_allclose(turned, got, atol=1e-3)


def test_scales():
    x = 3 * normal((2, 8, 24))
    got = {name: np.asarray(isometry(jnp.asarray(x), name)) for name in fire.SCALES}
    np.testing.assert_allclose(got["unit"], polar(x), atol=1e-4)
    np.testing.assert_allclose(got["fan"], np.sqrt(3) * polar(x), atol=2e-4)  # d_out / d_in = 24 / 8
    norms = np.linalg.norm(x, axis=(-2, -1))
    np.testing.assert_allclose(np.linalg.norm(got["norm"], axis=(-2, -1)), norms, rtol=1e-5)
    np.testing.assert_allclose(got["norm"], norms[:, None, None] / np.sqrt(8) * polar(x), atol=5e-4)


def test_stacks_zeros_ranks_and_dtypes():
    x = normal((3, 6, 10))
    x[1] = 0
    x[2] = np.outer(np.arange(6), np.arange(10))  # rank 1
    got = np.asarray(isometry(jnp.asarray(x), "unit"))
    alone = np.asarray(isometry(jnp.asarray(x[0]), "unit"))
    np.testing.assert_allclose(got[0], alone, atol=1e-5)
    for scale in fire.SCALES:
        assert not np.any(isometry(jnp.zeros((2, 4, 4)), scale))
    assert not np.any(got[1]) and np.all(np.isfinite(got))
    assert np.linalg.norm(got[2], 2) < 1.001
    np.testing.assert_allclose(np.sum(got[2] * x[2]), np.linalg.norm(x[2]), rtol=1e-4)
    half = isometry(jnp.asarray(x[0], jnp.bfloat16), "unit")
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(half), polar(np.float32(jnp.asarray(x[0], jnp.bfloat16))), atol=4e-3
    )


def test_measures_equal_numpy():
    w, old = normal((2, 6, 9), 1), normal((2, 6, 9), 2)
    np.testing.assert_allclose(
        fire.squared_frobenius_error(jnp.asarray(w), jnp.asarray(old)),
        np.linalg.norm(np.float64(w) - old, axis=(-2, -1)) ** 2,
        rtol=1e-5,
    )
    wide = np.linalg.norm(np.float64(w) @ w.swapaxes(-1, -2) - np.eye(6), axis=(-2, -1)) ** 2
    np.testing.assert_allclose(fire.deviation_from_isometry(jnp.asarray(w)), wide, rtol=1e-4)
    np.testing.assert_allclose(fire.deviation_from_isometry(jnp.asarray(w).mT), wide, rtol=1e-4)
    large = np.linalg.norm(np.float64(w).swapaxes(-1, -2) @ w - np.eye(9), axis=(-2, -1)) ** 2
    np.testing.assert_allclose(wide + 3, large, rtol=1e-6)  # as the docstring says
    values = np.linalg.svd(np.float64(w), compute_uv=False)
    shares = values / values.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        fire.effective_rank(jnp.asarray(w)), np.exp(-(shares * np.log(shares)).sum(-1)), rtol=1e-4
    )
    flat = jnp.stack([jnp.eye(6), jnp.diag(jnp.array([1.0, 1, 1, 0, 0, 0])), jnp.zeros((6, 6))])
    np.testing.assert_allclose(fire.effective_rank(flat), [6, 3, 0], rtol=1e-5)
    reborn = isometry(jnp.asarray(w), "unit")
    assert np.all(fire.deviation_from_isometry(reborn) < 1e-9)
    np.testing.assert_allclose(fire.effective_rank(reborn), 6, rtol=1e-5)
    hidden = np.maximum(normal((50, 4, 8)), 0)
    hidden[..., 1] = 0
    hidden[..., 2] = 0
    hidden[0, 0, 2] = 1  # 199 of 200 zeros
    hidden[:, :2, 5] = 0  # half zeros, and some
    assert float(fire.dormant_share(jnp.asarray(hidden))) == 2 / 8
    assert float(fire.dormant_share(jnp.asarray(hidden), 0.999)) == 1 / 8


P = {
    "attn": {"q": normal((2, 4, 4)), "o": normal((2, 4, 4), 1)},
    "up": normal((2, 4, 8), 2),
    "gain": normal((4,), 3),
}
P = jax.tree.map(jnp.asarray, P)
MASK = {"attn": {"q": True, "o": False}, "up": True, "gain": False}
ALL = {"attn": {"q": True, "o": True}, "up": True, "gain": False}


def grads(seed):
    return jax.tree.map(lambda x: jnp.asarray(normal(x.shape, seed)), P)


def steps_of(tx, count, p=P, start=0, state=None, **extra_args):
    """[(parameters, updates, state)] after each of some updates."""
    state, update, out = tx.init(p) if state is None else state, jax.jit(tx.update), []
    for i in range(start, start + count):
        updates, state = update(grads(100 + i), state, p, **{k: v[i] for k, v in extra_args.items()})
        p = optax.apply_updates(p, updates)
        out.append((p, updates, state))
    return out


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def test_reinitialize_touches_the_chosen_leaves_only():
    for mask in (MASK, lambda tree: MASK):
        got = fire.reinitialize(P, mask, "norm")
        assert got["gain"] is P["gain"] and got["attn"]["o"] is P["attn"]["o"]
        np.testing.assert_array_equal(got["up"], fire.isometry(P["up"], "norm"))
        np.testing.assert_array_equal(got["attn"]["q"], fire.isometry(P["attn"]["q"], "norm"))


def test_replaces_the_updates_of_the_chosen_leaves_only():
    inner = optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    plain, fired = steps_of(inner, 6), steps_of(fire.fire(inner, MASK, [3]), 6)
    for i in range(3):
        assert same_bits(plain[i][:2], fired[i][:2]) and same_bits(plain[i][2], fired[i][2].inner)
    for i in range(3, 6):
        for path in (lambda t: t["gain"], lambda t: t["attn"]["o"]):  # the others never notice
            assert same_bits(path(plain[i][0]), path(fired[i][0]))
        assert not same_bits(plain[i][0]["up"], fired[i][0]["up"])
    before, after = fired[2][0], fired[3][0]
    for path in (lambda t: t["up"], lambda t: t["attn"]["q"]):
        np.testing.assert_allclose(path(after), isometry(path(before)), atol=CLOSE)
    adam = fired[3][2].inner[0]
    for moment, kept in ((adam.mu, plain[3][2][0].mu), (adam.nu, plain[3][2][0].nu)):
        assert not np.any(moment["up"]) and not np.any(moment["attn"]["q"])
        assert same_bits(moment["gain"], kept["gain"]) and same_bits(moment["attn"]["o"], kept["attn"]["o"])
    # Adam's counter is shared with leaves that keep their moments: it goes on, as the schedule's does.
    assert [int(x) for x in jax.tree.leaves(fired[5][2]) if x.dtype == jnp.int32] == [6, 6, 6]


def test_counters_restart_with_all_their_moments_but_schedules_go_on():
    rate = optax.linear_schedule(0.1, 0.0, 10)
    matrices = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    labels = {"attn": {"q": "m", "o": "m"}, "up": "m", "gain": "g"}
    inner = optax.partition({"m": matrices, "g": optax.adam(rate)}, labels)
    fired = steps_of(fire.fire(inner, ALL, [3]), 6)
    state = fired[3][2].inner.inner_states
    assert int(state["m"].inner_state[0].count) == 0 and int(state["m"].inner_state[1].count) == 4
    assert int(state["g"].inner_state[0].count) == 4 and int(state["g"].inner_state[1].count) == 4
    # A fresh Adam whose learning rate starts where the schedule is
    fresh = optax.adam(lambda count: rate(count + 4))
    expected = steps_of(fresh, 2, fired[3][0], start=4)
    for (p, *_), (q, *_) in zip(fired[4:], expected, strict=True):
        conformance.assert_close({**p, "gain": 0}, {**q, "gain": 0}, 1e-6)


def test_counter_of_injected_hyperparameters_goes_on():
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    every = fire.fire(inner, lambda p: jax.tree.map(lambda _: True, p), [1])
    p = {"w": P["up"]}
    state, update = every.init(p), jax.jit(every.update)
    for _ in range(2):
        _, state = update({"w": P["up"]}, state, p)
    assert int(state.inner.count) == 2 and int(state.inner.inner_state[0].count) == 0


def test_trigger_reads_extra_args():
    tx = fire.fire(optax.sgd(0.1, 0.9), MASK, trigger=lambda dormant, **_: dormant > 0.3, scale="unit")
    dormant, unused = jnp.array([0.1, 0.5, 0.2, 0.4]), jnp.zeros(4)
    deviations = [
        float(fire.deviation_from_isometry(p["up"]).max())
        for p, *_ in steps_of(tx, 4, dormant=dormant, loss=unused)
    ]
    assert [d < 1e-8 for d in deviations] == [False, True, False, True]
    with pytest.raises(TypeError, match="dormant"):
        tx.update(grads(0), tx.init(P), P)
    both = fire.fire(optax.sgd(0.1), MASK, (0, 2), lambda dormant: dormant > 0.3, "unit")
    deviations = [
        float(fire.deviation_from_isometry(p["up"]).max()) for p, *_ in steps_of(both, 4, dormant=dormant)
    ]
    assert [d < 1e-8 for d in deviations] == [True, True, True, True]


def test_no_steps_and_no_trigger_is_the_inner_transform():
    inner = optax.adamw(0.1)
    for plain, wrapped in zip(steps_of(inner, 3), steps_of(fire.fire(inner, MASK), 3), strict=True):
        assert same_bits(plain, wrapped)


def test_around_and_inside_the_built_optimizer():
    matrices = lambda p: jax.tree.map(lambda name: name == "matrix", optim.labels(p))  # noqa: E731
    p = conformance.tree(0) | {"embed": jnp.asarray(normal((4, 8)))}
    g = conformance.tree(1) | {"embed": jnp.asarray(normal((4, 8), 1))}
    built = optim.build(OptConfig(), 100)[0]  # itself skip(clip -> partition)
    fired = fire.fire(built, matrices, [0], iterations=3)
    tx = skip.skip_nonfinite(fired)
    updates, state = jax.jit(tx.update)(g, jax.jit(tx.init)(p), p)
    after = optax.apply_updates(p, updates)
    want = jax.jit(lambda p: fire.reinitialize(p, matrices, iterations=3))(p)
    conformance.assert_close(after["blocks"], want["blocks"], CLOSE)
    moments = optax.tree.get_all_with_path(state, "mu")
    reset = [float(optax.tree.norm(mu)) for _, mu in moments]
    assert sorted(value > 0 for value in reset) == [False, False, False, True]  # embed's alone


def test_state_is_fresh_for_the_new_parameters():
    """A state that copies parameters starts from the reinitialized ones."""
    inner = optax.chain(
        optax.sgd(0.1), optax.GradientTransformation(lambda p: {"copy": p}, lambda u, s, p: (u, s))
    )
    (p, _, state), *_ = steps_of(fire.fire(inner, MASK, [0]), 1)
    np.testing.assert_allclose(state.inner[1]["copy"]["up"], p["up"], atol=CLOSE)
    assert same_bits(state.inner[1]["copy"]["gain"], P["gain"])


def test_work_is_done_on_its_steps_only():
    """The products of the isometry stand inside a conditional, none outside."""
    tx = fire.fire(optax.adam(0.1), MASK, [3])
    jaxpr = jax.make_jaxpr(tx.update)(P, tx.init(P), P)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    inside = str(next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"))
    assert names.count("cond") == 1 and "dot_general" in inside
    assert "dot_general" not in "".join(str(eqn) for eqn in jaxpr.eqns if eqn.primitive.name != "cond")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fire.fire(optax.sgd(0.1), MASK, [-1]), "steps must not be negative"),
        (lambda: fire.fire(optax.sgd(0.1), MASK, [1], scale="x"), "no scale 'x'"),
        (lambda: fire.fire(optax.sgd(0.1), MASK, [1], iterations=0), "at least 1 iteration"),
        (lambda: fire.fire(optax.sgd(0.1), MASK | {"gain": True}, [1]).init(P), r"gain \(4,\)"),
        (lambda: fire.reinitialize(P, MASK | {"gain": True}), r"gain \(4,\)"),
        (lambda: fire.isometry(P["up"], "x"), "no scale 'x'"),
        (lambda: fire.isometry(P["gain"]), "matrices"),
        (lambda: fire.isometry(P["up"], iterations=0), "at least 1 step"),
        (
            lambda: fire.fire(optax.sgd(0.1), MASK, [1]).update(P, fire.FireState(0, ())),
            "call update with params",
        ),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def everything(p):
    return jax.tree.map(lambda _: True, p)


def adam(learning_rate):
    # Few iterations compile fast; what they leave undone makes no difference here.
    return fire.fire(optax.adamw(learning_rate), everything, [1], iterations=3)


CHECKS = (
    conformance.test_state_keeps_its_types_and_compiles_once,
    conformance.test_minimizes_a_matrix_quadratic,
    conformance.test_inside_masked_and_partition,
    conformance.test_inside_multi_steps,
    conformance.test_inside_inject_hyperparams,
)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    check(adam)


@pytest.mark.slow
def test_sharded_equals_unsharded(monkeypatch):
    monkeypatch.setitem(conformance.ROWS, "fire", adam)
    conformance.test_sharded_equals_unsharded("fire", "both")


def test_jit_equals_no_jit():
    tx = fire.fire(optax.adamw(0.1), MASK, [0], iterations=3)
    (_, updates, state), *_ = steps_of(tx, 1)
    eager, eager_state = tx.update(grads(100), tx.init(P), P)
    conformance.assert_close(eager, updates)
    conformance.assert_close(eager_state, state)


def test_inside_chain_it_is_scaled():
    """Why it goes around the complete transform: what follows in a chain scales the jump as well."""
    tx = optax.chain(fire.fire(optax.sgd(0.1), MASK, [0]), optax.scale(0.5))
    (p, *_), *_ = steps_of(tx, 1)
    np.testing.assert_allclose(p["up"], (P["up"] + fire.isometry(P["up"])) / 2, atol=CLOSE)


def test_a_tree_mask_may_name_leaves_that_another_transform_owns():
    tx = optax.partition(
        {"m": fire.fire(optax.adam(0.1), MASK, [0]), "g": optax.sgd(0.1)},
        {"attn": {"q": "m", "o": "g"}, "up": "m", "gain": "g"},
    )
    (p, *_), *_ = steps_of(tx, 1)
    np.testing.assert_allclose(p["up"], isometry(P["up"]), atol=CLOSE)


@pytest.mark.slow
def test_donation_and_resumption():
    tx = fire.fire(optax.adamw(0.1), everything, [1, 4], iterations=3)
    conformance.check_donation_and_resumption(tx, 3)
