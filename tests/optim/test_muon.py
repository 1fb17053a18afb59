"""Muon against the float64 SVD, the float64 recurrence, optax and torch."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import strategies as st

from nanochat_jax.optim import muon

SHAPES = [(16, 16), (16, 64), (64, 16), (3, 24, 32), (2, 3, 20, 8), (1, 7), (7, 1)]
few = hypothesis.settings(max_examples=20, deadline=None)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def polar(x):
    """Float64 polar factor of each matrix."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def recurrence(x, steps, coefficients):
    """The textbook iteration in float64, transposed so that the rows are the short side."""
    x = np.asarray(x, np.float64)
    if x.shape[-2] > x.shape[-1]:
        return recurrence(x.swapaxes(-1, -2), steps, coefficients).swapaxes(-1, -2)
    table = muon.COEFFICIENTS[coefficients]
    y = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True) / muon.SLACK[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        gram = y @ y.swapaxes(-1, -2)
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y


def with_singular_values(m, n, values, seed=0):
    rng = np.random.default_rng(seed)
    r = min(m, n)
    u, _ = np.linalg.qr(rng.normal(size=(m, r)))
    v, _ = np.linalg.qr(rng.normal(size=(n, r)))
    return ((u * values) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", muon.COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_newton_schulz_matches_float64_recurrence(shape, coefficients, steps):
    x = normal(shape)
    got = muon.newton_schulz(jnp.asarray(x), steps, coefficients, jnp.float32)
    # 8 steps of slopes up to 8 amplify float32's 6e-8 to a few 1e-5
    np.testing.assert_allclose(got, recurrence(x, steps, coefficients), atol=2e-4)


@pytest.mark.parametrize("coefficients", muon.COEFFICIENTS)
@pytest.mark.parametrize("decades", [0, 3, 6, 12])
@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
def test_gram_span_is_as_accurate_as_the_textbook(coefficients, decades, steps, transposed):
    x = with_singular_values(64, 256, 10.0 ** -np.linspace(0, decades, 64))
    x = x.T if transposed else x
    want = recurrence(x, steps, coefficients)

    def error(span):
        got = muon.newton_schulz(jnp.asarray(x), steps, coefficients, jnp.float32, span)
        return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)

    assert error(None) == error(muon.SPAN) <= 15 * error(1)
    assert error(None) < 1e-3


@pytest.mark.parametrize(
    ("coefficients", "steps", "alignment", "bounds"),
    # Bounds for singular values within a factor of 20 of the largest, measured in float64.
    [
        ("jordan", 5, 0.95, (0.65, 1.15)),
        ("polar_express", 5, 0.99, (0.8, 1.2)),
        ("polar_express", 8, 0.999, (0.95, 1.1)),
        ("dion", 5, 0.999, (0.95, 1.05)),
    ],
)
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_newton_schulz_approximates_the_polar_factor(coefficients, steps, alignment, bounds, shape):
    values = np.linspace(0.05, 1, 32)
    x = with_singular_values(*shape, values)
    got = np.asarray(muon.newton_schulz(jnp.asarray(x), steps, coefficients, jnp.float32), np.float64)
    singular = np.linalg.svd(got, compute_uv=False)
    assert bounds[0] <= singular.min() and singular.max() <= bounds[1]
    assert np.sum(got * polar(x)) / np.linalg.norm(got) / np.sqrt(32) >= alignment
    # the subspaces are those of x: the product with the polar factor is symmetric
    product = polar(x).T @ got
    np.testing.assert_allclose(product, product.T, atol=1e-3)


@pytest.mark.parametrize("coefficients", muon.COEFFICIENTS)
def test_bfloat16_keeps_the_direction(coefficients):
    x = normal((32, 96))
    want = recurrence(x, 5, coefficients)
    got = np.asarray(muon.newton_schulz(jnp.asarray(x), 5, coefficients, jnp.bfloat16), np.float64)
    # 8 significant bits, amplified by the slope at small singular values (8.2 for Polar Express)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.15
    assert np.sum(got * polar(x)) / np.linalg.norm(got) / np.sqrt(32) > 0.97


def test_zero_and_rank_deficient_matrices():
    zero = muon.newton_schulz(jnp.zeros((2, 8, 32)))
    assert np.all(np.asarray(zero) == 0)
    tx = muon.scale_by_muon()
    updates, _ = tx.update({"w": jnp.zeros((2, 4, 4))}, tx.init({"w": jnp.ones((2, 4, 4))}))
    assert np.all(np.asarray(updates["w"]) == 0)
    for rank in (1, 3):
        x = with_singular_values(16, 64, np.arange(16) < rank)
        got = np.asarray(muon.newton_schulz(jnp.asarray(x), 8, dtype=jnp.float32))
        assert np.all(np.isfinite(got)) and np.linalg.norm(got, 2) < 1.3
        assert np.sum(got * x) / np.linalg.norm(got) / np.sqrt(rank) > 0.97


@few
@hypothesis.given(
    st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 40), st.integers(0, 12), st.booleans()
)
def test_any_rank_stays_finite(seed, m, n, rank, steep):
    values = (np.arange(min(m, n)) < rank) * 10.0 ** -(np.arange(min(m, n)) * (1.5 if steep else 0.0))
    x = jnp.asarray(with_singular_values(m, n, values, seed))
    for name in muon.COEFFICIENTS:
        got = np.asarray(muon.newton_schulz(x, 7, name, jnp.float32))
        assert np.all(np.isfinite(got)) and np.linalg.norm(got, 2) < 1.35


@few
@hypothesis.given(st.integers(0, 2**31), st.integers(-12, 12), st.sampled_from([(8, 8), (4, 20), (20, 4)]))
def test_scale_invariant(seed, exponent, shape):
    tx = muon.scale_by_muon()
    factor = 2.0**exponent  # a power of two scales float32 without rounding
    streams = [[factor**k * normal(shape, seed + i) for i in range(3)] for k in (0, 1)]
    results = []
    for grads in streams:
        state = tx.init(jnp.zeros(shape))
        for g in grads:
            updates, state = tx.update(jnp.asarray(g), state)
        results.append(np.asarray(updates))
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


@few
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([(8, 8), (4, 20), (6, 9), (2, 5, 30)]))
def test_transposition_symmetry(seed, shape):
    x = jnp.asarray(normal(shape, seed))
    got, turned = muon.newton_schulz(x), muon.newton_schulz(x.mT).mT
    # square normal matrices of this size can be ill-conditioned: rounding grows by up to 1e3
    np.testing.assert_allclose(got, turned, atol=5e-4)


@few
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([(3, 6, 6), (2, 2, 5, 15), (4, 16, 4)]))
def test_stacked_equals_loop(seed, shape):
    tx = muon.scale_by_muon()
    x = normal(shape, seed) * (1 + np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1)).astype(
        np.float32
    )
    stacked, _ = tx.update(jnp.asarray(x), tx.init(jnp.zeros(shape)))
    flat = x.reshape(-1, *shape[-2:])
    one = [tx.update(jnp.asarray(m), tx.init(jnp.zeros(m.shape)))[0] for m in flat]
    np.testing.assert_allclose(stacked, np.reshape(one, shape), atol=5e-4)


def test_layers_never_mix():
    tx = muon.scale_by_muon()
    x = normal((3, 6, 12))
    changed = x.copy()
    changed[1] = normal((6, 12), 9) * 100
    state = tx.init(jnp.zeros(x.shape))
    a, b = (np.asarray(tx.update(jnp.asarray(g), state)[0]) for g in (x, changed))
    np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
    assert not np.allclose(a[1], b[1])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("coefficients", ["jordan", "dion"])
@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
def test_twenty_steps_equal_optax(nesterov, coefficients, shape):
    """optax corrects the average's bias, which changes Nesterov's mixture in the first steps; with
    its own average off (beta=0) and `optax.trace` before it, it computes the plain form."""
    lr, beta, table = 0.05, 0.9, np.array(muon.COEFFICIENTS[coefficients])
    table = table if len(table) > 1 else table[0]
    theirs = optax.chain(
        optax.trace(beta, nesterov=nesterov),
        optax.contrib.scale_by_muon(
            ns_coeffs=table,
            ns_steps=5,
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()},
        ),
        optax.scale(np.sqrt(max(1, shape[1] / shape[0]))),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(lr),
    )
    ours = muon.muon(lr, beta, 0.1, 5, coefficients, "original", nesterov, jnp.float32)
    assert_same_path(ours, theirs, shape, rtol=1e-5)


def test_equals_optax_muon_without_nesterov():
    """Bias correction only rescales the average, to which Newton-Schulz is blind."""
    ours = muon.muon(0.05, 0.9, 0.1, 5, "jordan", "rms", nesterov=False, dtype=jnp.float32)
    theirs = optax.contrib.muon(0.05, beta=0.9, weight_decay=0.1, nesterov=False, consistent_rms=0.2)
    assert_same_path(ours, theirs, (12, 30), rtol=1e-5)


def assert_same_path(ours, theirs, shape, rtol):
    paths = []
    for tx in (ours, theirs):
        p = {"w": jnp.asarray(normal(shape, 1))}
        state, trail, update = tx.init(p), [], jax.jit(tx.update)
        for i in range(20):
            updates, state = update({"w": jnp.asarray(normal(shape, 10 + i))}, state, p)
            p = optax.apply_updates(p, updates)
            trail.append(np.asarray(p["w"]))
        paths.append(trail)
    for a, b in zip(*paths, strict=True):
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


@pytest.mark.interop
@pytest.mark.parametrize(("scale", "adjust"), [("original", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [False, True])
def test_twenty_steps_equal_torch(scale, adjust, nesterov):
    torch = pytest.importorskip("torch")
    shape, lr, decay = (24, 60), 0.02, 0.1
    start = normal(shape, 1)
    weight = torch.nn.Parameter(torch.tensor(start.T.copy()))  # torch stores [out, in]
    theirs = torch.optim.Muon(
        [weight], lr=lr, weight_decay=decay, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust
    )
    ours = muon.muon(lr, 0.95, decay, 5, "jordan", scale, nesterov, jnp.float32)
    p = jnp.asarray(start)
    state = ours.init(p)
    for i in range(20):
        g = normal(shape, 10 + i)
        weight.grad = torch.tensor(g.T.copy())
        theirs.step()
        updates, state = ours.update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, updates)
    got, want = np.asarray(p) - start, weight.detach().numpy().T - start
    # torch multiplies in bfloat16
    assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_scales(shape):
    g = jnp.asarray(normal(shape))
    m, n = shape

    def rms(scale):
        tx = muon.scale_by_muon(scale=scale, steps=8, dtype=jnp.float32)
        return float(jnp.sqrt(jnp.mean(tx.update(g, tx.init(g))[0] ** 2)))

    one = 1 / np.sqrt(max(m, n))  # RMS of a polar factor
    np.testing.assert_allclose(rms("original"), one * np.sqrt(max(1, n / m)), rtol=0.1)
    np.testing.assert_allclose(rms("spectral"), one * np.sqrt(n / m), rtol=0.1)
    assert 0.15 < rms("rms") < 0.25


def test_dtypes():
    g = jnp.ones((2, 4, 8), jnp.bfloat16)
    tx = muon.scale_by_muon()
    updates, state = tx.update(g, tx.init(g))
    assert updates.dtype == jnp.bfloat16 and state.mu.dtype == jnp.float32


def test_errors_name_what_is_wrong():
    tx = muon.scale_by_muon()
    with pytest.raises(ValueError, match=r"blocks/norm \(4,\)"):
        tx.init({"blocks": {"norm": jnp.ones(4), "q": jnp.ones((4, 4))}})
    with pytest.raises(ValueError, match="rank"):
        tx.update(jnp.ones(4), muon.MuonState(jnp.zeros([], jnp.int32), jnp.ones(4)))
    with pytest.raises(ValueError, match="polar_express"):
        muon.scale_by_muon(coefficients="polar")
    with pytest.raises(ValueError, match="spectral"):
        muon.scale_by_muon(scale="none")
    with pytest.raises(ValueError, match="momentum"):
        muon.scale_by_muon(momentum=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        muon.newton_schulz(jnp.ones((2, 2)), 0)
    with pytest.raises(ValueError, match="jordan"):
        muon.newton_schulz(jnp.ones((2, 2)), 5, "none")
    with pytest.raises(ValueError, match="shape"):
        muon.newton_schulz(jnp.ones(2))
