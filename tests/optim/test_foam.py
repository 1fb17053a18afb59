"""FOAM against the paper's formulas in float64, with the fold and unfold matrices written out."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_transforms as conformance
from hypothesis import strategies as st

from nanochat_jax.optim import foam, lion, muon

few = hypothesis.settings(max_examples=8, deadline=None)
# Rows of 12 have blocks of at most 4, rows of 7 none. Few cases: every new shape compiles.
cases = st.sampled_from([((2, 4, 16), 1), ((5, 12), 3), ((4, 7), 2), ((2, 2, 3, 32), 5)])


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrices(n, level):
    """The paper's A [n, n/b] and E [n/b, n] in float64, for the largest block that divides n."""
    block = max(2**k for k in range(level + 1) if n % 2**k == 0)
    ones = np.eye(n // block)
    return np.repeat(ones, block, 0) / block, np.repeat(ones, block, 1)


def block_constant(shape, level, seed=0):
    return foam.unfold(jnp.asarray(normal(foam.folded_shape(shape, level), seed)), shape)


@few
@hypothesis.given(st.integers(0, 2**31), cases)
def test_fold_and_unfold_are_the_papers_matrices(seed, case):
    shape, level = case
    x = normal(shape, seed)
    a, e = matrices(shape[-1], level)
    folded = foam.fold(jnp.asarray(x), level)
    assert folded.shape == foam.folded_shape(shape, level) == (x @ a).shape
    np.testing.assert_allclose(folded, x @ a, atol=2e-6)
    y = normal(folded.shape, seed + 1)
    np.testing.assert_array_equal(foam.unfold(jnp.asarray(y), shape), (y @ e).astype(np.float32))
    # adjoint up to the block's size: <fold(x), y> b = <x, unfold(y)>
    block = shape[-1] // folded.shape[-1]
    np.testing.assert_allclose(np.sum(folded * y) * block, np.sum(x * (y @ e)), rtol=1e-4, atol=1e-4)


@few
@hypothesis.given(st.integers(0, 2**31), cases, st.sampled_from(["float32", "bfloat16"]))
def test_folding_a_block_constant_array_is_exact(seed, case, dtype):
    shape, level = case
    y = jnp.asarray(normal(foam.folded_shape(shape, level), seed), dtype)
    x = foam.unfold(y, shape)
    np.testing.assert_array_equal(foam.fold(x, level), y)
    assert not np.any(foam.residual(x, level)) and foam.fold(x, level).dtype == dtype


@few
@hypothesis.given(st.integers(0, 2**31), cases)
def test_residual_is_the_orthogonal_complement(seed, case):
    shape, level = case
    x = jnp.asarray(normal(shape, seed))
    projection, rest = foam.unfold(foam.fold(x, level), shape), foam.residual(x, level)
    np.testing.assert_allclose(foam.fold(rest, level), 0, atol=1e-6)
    square = lambda z: float(np.sum(np.float64(z) ** 2))  # noqa: E731
    np.testing.assert_allclose(square(projection) + square(rest), square(x), rtol=1e-5)
    assert square(projection) <= square(x) * (1 + 1e-6)


def test_shapes():
    assert foam.folded_shape((3, 4, 768), 8) == (3, 4, 3)
    assert foam.folded_shape((4, 768), 20) == (4, 3)  # 768 = 3 * 2^8
    assert foam.folded_shape((768,), 8) == (768,) and foam.folded_shape((), 1) == ()
    vector = jnp.arange(8.0)
    assert foam.fold(vector, 3) is vector and foam.unfold(vector, (8,)) is vector
    for x, shape in [((2, 3), (2, 8)), ((2, 4), (3, 8)), ((4,), (8,))]:
        with pytest.raises(ValueError, match="no folding"):
            foam.unfold(jnp.zeros(x), shape)
    big = jnp.full((1, 2), 3e38)
    assert np.isfinite(foam.fold(big, 1)).all()


@pytest.mark.parametrize("second_moment", foam.SECOND_MOMENTS)
@pytest.mark.parametrize("level", [1, 5])
def test_twenty_steps_of_foam_adam_equal_float64(second_moment, level):
    b1, b2, eps = 0.9, 0.95, 1e-8
    shape = (2, 3, 16)
    a, e = matrices(16, level)
    m = v = np.zeros((2, 3, a.shape[1]))
    tx = foam.scale_by_foam_adam(level, b1, b2, eps, second_moment)
    state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
    for t in range(1, 21):
        g = normal(shape, t) * 10.0 ** (t % 5 - 2)
        got, state = update(jnp.asarray(g), state)
        g = np.float64(g)
        m = b1 * m + (1 - b1) * (g @ a)
        v = b2 * v + (1 - b2) * ((g @ a) ** 2 if second_moment == "squared_mean" else (g**2) @ a)
        rest = g - g @ a @ e
        first, second = (m @ e + rest) / (1 - b1**t), (v @ e + rest**2) / (1 - b2**t)
        np.testing.assert_allclose(got, first / (np.sqrt(second) + eps), rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state.mu, m, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.nu, v, rtol=1e-4, atol=1e-6)
    assert int(state.count) == 20


@pytest.mark.parametrize(("shape", "level", "nesterov"), [((2, 6, 16), 1, True), ((16, 8), 3, False)])
def test_twenty_steps_of_folded_muon_equal_float64(nesterov, shape, level):
    beta, steps = 0.9, 3
    a, e = matrices(shape[-1], level)
    m = np.zeros((*shape[:-1], a.shape[1]))
    tx = foam.fold_state(muon.scale_by_muon(beta, steps, "jordan", "original", nesterov), level)
    state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
    for t in range(20):
        g = normal(shape, t)
        got, state = update(jnp.asarray(g), state)
        m = beta * m + (1 - beta) * (g @ a)
        u = m @ e + (1 - beta) * (g - g @ a @ e)
        u = beta * u + (1 - beta) * g if nesterov else u
        x = u / np.linalg.norm(u, axis=(-2, -1), keepdims=True)
        for _ in range(steps):
            gram = x @ x.swapaxes(-1, -2)
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        factor = np.sqrt(max(1, shape[-1] / shape[-2]))
        np.testing.assert_allclose(got, factor * x, atol=2e-4)
        np.testing.assert_allclose(state.mu, m, atol=1e-5)


def test_folded_momentum_is_the_full_momentum_folded():
    """For a state that is linear in the gradient nothing but the block's detail is lost."""
    plain, folded = optax.trace(0.9), foam.fold_state(optax.trace(0.9), 2)
    a, b = plain.init(jnp.zeros((3, 8))), folded.init(jnp.zeros((3, 8)))
    for t in range(10):
        g = jnp.asarray(normal((3, 8), t))
        _, a = plain.update(g, a)
        _, b = folded.update(g, b)
    np.testing.assert_allclose(b.trace, foam.fold(a.trace, 2), atol=1e-5)


WRAPPED = {
    "adam": (optax.scale_by_adam(0.9, 0.95), lambda level: foam.scale_by_foam_adam(level, 0.9, 0.95)),
    "adam_mean_square": (
        optax.scale_by_adam(0.9, 0.95),
        lambda level: foam.scale_by_foam_adam(level, 0.9, 0.95, second_moment="mean_square"),
    ),
    "muon": (muon.scale_by_muon(), lambda level: foam.fold_state(muon.scale_by_muon(), level)),
    "lion": (lion.scale_by_lion(), lambda level: foam.fold_state(lion.scale_by_lion(), level)),
}
wrapped = pytest.mark.parametrize(("plain", "folded"), WRAPPED.values(), ids=WRAPPED)


@wrapped
def test_level_zero_is_the_inner_transform(plain, folded):
    tx, p = folded(0), {"w": jnp.asarray(normal((4, 8)))}
    a, b = plain.init(p), tx.init(p)
    for t in range(3):
        g = {"w": jnp.asarray(normal((4, 8), t))}
        u, a = plain.update(g, a, p)
        v, b = tx.update(g, b, p, loss=0.0)
        assert jax.tree.structure((u, a)) == jax.tree.structure((v, b))
        for x, y in zip(jax.tree.leaves((u, a)), jax.tree.leaves((v, b)), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@wrapped
def test_block_constant_gradients_lose_nothing(plain, folded):
    shape, level = (4, 16), 2
    tx = folded(level)
    a, b = plain.init(jnp.zeros(shape)), tx.init(jnp.zeros(shape))
    for t in range(5):
        g = block_constant(shape, level, t)
        u, a = plain.update(g, a)
        v, b = tx.update(g, b)
        np.testing.assert_array_equal(u, v)


@wrapped
def test_ragged_rows_and_vectors_keep_their_full_state(plain, folded):
    p = {"ragged": jnp.zeros((4, 7))} | ({} if "Muon" in str(plain.init({})) else {"vector": jnp.zeros(8)})
    tx = folded(3)
    a, b = plain.init(p), tx.init(p)
    for t in range(5):
        g = jax.tree.map(lambda x, t=t: jnp.asarray(normal(x.shape, t)), p)
        u, a = plain.update(g, a)
        v, b = tx.update(g, b, loss=0.0, unknown="x")
        conformance.assert_close(u, v, 1e-6)
    assert optax.tree.size(a) == optax.tree.size(b)


@few
@hypothesis.given(
    st.integers(0, 2**31),
    st.sampled_from([1, 4]),
    st.sampled_from(sorted(foam.SECOND_MOMENTS)),
    st.integers(-6, 6),
)
def test_foam_adam_is_bounded(seed, level, second_moment, decades):
    """|m| / sqrt(v) <= sqrt(1 + k^2): Cauchy-Schwarz for (unfolded m~) / sqrt(v~) <= k and R / |R| = 1."""
    b1, b2 = 0.9, 0.95
    k = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    tx = foam.scale_by_foam_adam(level, b1, b2, second_moment=second_moment)
    state, update = tx.init(jnp.zeros((2, 16))), jax.jit(tx.update)
    for t in range(1, 6):
        u, state = update(jnp.asarray(normal((2, 16), seed + t) * 10.0 ** (decades * (t % 2))), state)
        bound = np.sqrt(1 + k**2) * np.sqrt(1 - b2**t) / (1 - b1**t)
        assert np.all(np.isfinite(u)) and np.abs(u).max() <= bound * 1.001


def test_zero_gradients_give_zero_updates():
    for name in ("adam", "muon"):
        tx = WRAPPED[name][1](2)
        u, _ = tx.update(jnp.zeros((2, 8)), tx.init(jnp.zeros((2, 8))))
        assert not np.any(u)


@pytest.mark.parametrize("level", [0, 3, 8])
def test_state_bytes(level):
    p = {
        "a": jnp.zeros((2, 4, 256)),
        "b": jnp.zeros((4, 12)),
        "c": jnp.zeros((3, 5)),
        "vector": jnp.zeros(64),
    }
    size = lambda tx: sum(x.nbytes for x in jax.tree.leaves(jax.jit(tx.init)(p)))  # noqa: E731
    assert size(foam.scale_by_foam_adam(level)) == foam.state_bytes(p, level, 2) + 4
    assert size(foam.fold_state(lion.scale_by_lion(), level)) == foam.state_bytes(p, level, 1) + 4
    columns = {0: (256, 12, 5, 64), 1: (128, 6, 5, 64), 3: (32, 3, 5, 64), 8: (1, 3, 5, 64)}[level]
    assert foam.state_bytes(p, level, 2) == 8 * sum(np.multiply((8, 4, 3, 1), columns))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    assert foam.state_bytes(half, level, 1, 2) == foam.state_bytes(p, level, 2) // 4


def eight_bits(inner):
    """A wrapper as another file could have it: matrices of state are stored as int8 with row scales."""
    inner = optax.with_extra_args_support(inner)

    def pack(x):
        if x.ndim < 2:
            return x
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale

    def init(params):
        return jax.tree.map(pack, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        is_pair = lambda x: type(x) is tuple and len(x) == 2  # noqa: E731
        unpacked = jax.tree.map(lambda x: x[0] * x[1] if is_pair(x) else x, state, is_leaf=is_pair)
        updates, new = inner.update(updates, unpacked, params, **extra_args)
        return updates, jax.tree.map(pack, new)

    return optax.GradientTransformationExtraArgs(init, update)


def test_wrappers_that_store_state_in_fewer_bits_go_around():
    plain = foam.fold_state(muon.scale_by_muon(), 2)
    packed = eight_bits(plain)
    p = {"w": jnp.zeros((8, 32))}
    a, b = plain.init(p), packed.init(p)
    plain_update, packed_update = jax.jit(plain.update), jax.jit(packed.update)
    for t in range(10):
        g = {"w": jnp.asarray(normal((8, 32), t))}
        u, a = plain_update(g, a, p)
        v, b = packed_update(g, b, p)
    assert b.mu["w"][0].dtype == jnp.int8 and b.mu["w"][0].shape == (8, 8)
    x, y = np.ravel(u["w"]), np.ravel(v["w"])
    assert x @ y / np.linalg.norm(x) / np.linalg.norm(y) > 0.99
    with pytest.raises(ValueError, match="go around fold_state"):
        foam.fold_state(optax.scale_by_factored_rms(min_dim_size_to_factor=2), 1).init(p)


def test_bfloat16_gradients_keep_float32_state():
    for _, folded in WRAPPED.values():
        tx, p = folded(1), jnp.zeros((4, 8), jnp.bfloat16)
        u, state = jax.jit(tx.update)(jnp.asarray(normal((4, 8)), jnp.bfloat16), tx.init(p), p)
        assert u.dtype == jnp.bfloat16
        if not isinstance(state, optax.ScaleByLionState):  # optax keeps Lion's in the parameters' dtype
            assert state.mu.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: foam.scale_by_foam_adam(-1), "fold level"),
        (lambda: foam.fold_state(optax.trace(0.9), 1.5), "fold level"),
        (lambda: foam.scale_by_foam_adam(1, b1=1.0), "b1 must be"),
        (lambda: foam.scale_by_foam_adam(1, b2=-0.1), "b2 must be"),
        (lambda: foam.scale_by_foam_adam(1, eps=-1.0), "eps must"),
        (lambda: foam.scale_by_foam_adam(1, second_moment="x"), "no second moment 'x'"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def complete(direction):
    return lambda learning_rate: optax.chain(
        direction(), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(learning_rate)
    )


ROWS = {
    "foam_adam": complete(lambda: foam.scale_by_foam_adam(1)),
    "foam_muon": complete(lambda: foam.fold_state(muon.scale_by_muon(steps=2), 1)),
}
CHECKS = (
    conformance.test_state_keeps_its_types_and_compiles_once,
    conformance.test_jit_equals_no_jit,
    conformance.test_minimizes_a_matrix_quadratic,
    conformance.test_inside_masked_and_partition,
    conformance.test_inside_multi_steps,
    conformance.test_inside_inject_hyperparams,
)
rows = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)


@pytest.mark.slow
@rows
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, make):
    check(make)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_sharded_equals_unsharded(row, monkeypatch):
    monkeypatch.setitem(conformance.ROWS, row, ROWS[row])
    conformance.test_sharded_equals_unsharded(row, "both")


@pytest.mark.slow
@rows
def test_donation_and_resumption(make):
    conformance.check_donation_and_resumption(make(0.1), 2)
