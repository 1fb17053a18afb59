"""Non-finite gradients never reach parameters or state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.optim import skip


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])  # 1e30: the squared norm overflows
def test_params_and_inner_state_stay_bit_identical(bad):
    tx = skip.skip_nonfinite(optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1))
    p = {"a": jnp.array([1.0, -0.0, 0.0, 1e-40]), "b": jnp.ones((2, 2), jnp.bfloat16)}
    step = jax.jit(tx.update)
    good = jax.tree.map(jnp.ones_like, p)
    updates, state = step(good, tx.init(p), p)
    p = optax.apply_updates(p, updates)
    p["a"] = p["a"].at[1].set(-0.0)
    before = bits(p), bits(state.inner)
    for count in (1, 2, 3):
        updates, state = step({**good, "a": good["a"].at[0].set(bad)}, state, p)
        p = optax.apply_updates(p, updates)
        assert (bits(p), bits(state.inner)) == before
        assert (int(state.total), int(state.consecutive)) == (count, count)
    updates, state = step(good, state, p)
    assert (int(state.total), int(state.consecutive)) == (3, 0)
    assert bits(optax.apply_updates(p, updates)) != before[0]


def test_finite_updates_are_untouched():
    plain, wrapped = optax.adam(0.1), skip.skip_nonfinite(optax.adam(0.1))
    p = jnp.arange(4.0)
    a, b = plain.init(p), wrapped.init(p)
    for i in range(5):
        u, a = plain.update(jnp.sin(p + i), a)
        v, b = wrapped.update(jnp.sin(p + i), b)
        np.testing.assert_array_equal(u, v)


def test_optax_lets_the_nan_through_and_this_does_not():
    p, nan = jnp.ones(2), jnp.full(2, jnp.nan)
    theirs, ours = optax.apply_if_finite(optax.sgd(0.1), 3), skip.skip_nonfinite(optax.sgd(0.1))
    a, b = theirs.init(p), ours.init(p)
    for i in range(6):
        u, a = theirs.update(nan, a, p)
        v, b = ours.update(nan, b, p)
        assert np.all(np.asarray(v) == 0)
        if i >= 3:
            assert np.all(np.isnan(np.asarray(u)))


def test_metrics_are_found_anywhere():
    p = {"w": jnp.ones(2)}
    tx = optax.chain(optax.clip(1.0), optax.masked(skip.skip_nonfinite(optax.adam(0.1)), {"w": True}))
    _, state = tx.update({"w": jnp.full(2, jnp.nan)}, tx.init(p), p)
    got = skip.metrics(state)
    assert {k: float(v) for k, v in got.items()} == {"opt/skipped": 1.0, "opt/skipped_in_a_row": 1.0}
    assert all(v.dtype == jnp.float32 and v.shape == () for v in got.values())
    assert skip.metrics(optax.adam(0.1).init(p)) == {}
    assert set(jax.jit(skip.metrics)(state)) == set(got)


# --- spikes


def fed(norms, sigmas=6.0, window=16):
    """Steps that were skipped when gradients of these norms arrive, and the last state."""
    tx = skip.skip_spikes(optax.sgd(1.0, momentum=0.9), sigmas, window)
    p = {"w": jnp.zeros((2, 2))}
    state, update, skipped = tx.init(p), jax.jit(tx.update), []
    for i, norm in enumerate(norms):
        before, total = bits(state.inner), int(state.total)
        updates, state = update({"w": jnp.full((2, 2), norm / 2, jnp.float32)}, state, p)
        if int(state.total) > total:
            skipped.append(i)
            assert bits(state.inner) == before and np.all(np.asarray(updates["w"]) == 0)
    return skipped, state


def noise(count, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=count))


def test_noise_and_slow_growth_are_no_spikes():
    assert fed(noise(300))[0] == []
    assert fed(noise(300) * np.exp(np.arange(300) / 50))[0] == []


def test_a_spike_is_skipped_and_does_not_move_the_median():
    norms = noise(60)
    norms[[30, 31, 50]] *= 40
    skipped, state = fed(norms)
    assert skipped == [30, 31, 50]
    assert float(skip.metrics(state)["opt/skipped_spikes"]) == 3.0


def test_nothing_is_skipped_before_half_a_window():
    norms = noise(20)
    norms[5] *= 100
    assert fed(norms)[0] == []


def test_less_than_a_doubling_is_no_spike():
    assert fed([1.0] * 20 + [1.99, 2.01])[0] == [21]


def test_a_new_level_is_accepted_after_a_window():
    skipped, _ = fed([1.0] * 20 + [100.0] * 60, window=16)
    assert skipped == [*range(20, 36)]  # as many as the window is long, then it learns
    again, _ = fed([1.0] * 20 + [100.0] * 60 + [1e5], window=16)
    assert again[-1] == 80


def test_the_median_is_numpys_lower_median():
    rng = np.random.default_rng(3)
    for count in (1, 2, 5, 8):
        values = np.full(8, np.inf, np.float32)
        values[:count] = rng.normal(size=count)
        want = np.percentile(values[:count], 50, method="lower")
        assert float(skip._median(jnp.asarray(values), jnp.asarray(count))) == want


@pytest.mark.parametrize(("sigmas", "window"), [(0.0, 16), (-1.0, 16), (6.0, 1)])
def test_impossible_guards(sigmas, window):
    with pytest.raises(ValueError, match="expected sigmas > 0 and window >= 2"):
        skip.skip_spikes(optax.sgd(0.1), sigmas, window)
