"""NorMuon against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.optim import muon, normuon


def oracle(updates, beta2, eps=1e-8):
    """The algorithm of arXiv:2510.05491 for one matrix [out, in], in float64, over several steps."""
    v, results = 0.0, []
    for o in updates:
        v = beta2 * v + (1 - beta2) * np.mean(o**2, axis=1)
        scaled = o / (np.sqrt(v) + eps)[:, None]
        results.append(scaled * np.linalg.norm(o) / np.linalg.norm(scaled))
    return results


def test_trajectory_of_stacked_matrices():
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(5, 3, 6, 4)) * np.exp(rng.normal(size=(5, 3, 1, 4)))
    tx = normuon.scale_by_neuron_norm(0.9)
    state = tx.init(jnp.zeros((3, 6, 4)))
    got = []
    for u in updates:
        out, state = tx.update(jnp.asarray(u, jnp.float32), state)
        got.append(out)
    for i in range(3):  # theirs are [out, in]
        want = [w.T for w in oracle([u[i].T for u in updates], 0.9)]
        np.testing.assert_allclose(np.stack(got)[:, i], want, rtol=2e-5)
    assert state.nu.shape == (3, 1, 4)


def test_norms_are_kept_and_evened_out():
    rng = np.random.default_rng(1)
    u = jnp.asarray(rng.normal(size=(8, 16)) * np.exp(rng.normal(size=16)), jnp.float32)
    tx = normuon.scale_by_neuron_norm()
    out, _ = tx.update(u, tx.init(u))
    np.testing.assert_allclose(jnp.linalg.norm(out), jnp.linalg.norm(u), rtol=1e-5)
    columns = np.linalg.norm(out, axis=0)
    np.testing.assert_allclose(columns, columns[0], rtol=1e-4)


def test_a_zero_update_stays_zero():
    tx = normuon.scale_by_neuron_norm()
    zero = jnp.zeros((4, 4))
    out, state = tx.update(zero, tx.init(zero))
    assert np.all(np.asarray(out) == 0) and np.all(np.asarray(state.nu) == 0)


def test_behind_muon_the_scale_of_gradients_does_not_matter():
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(3, 8, 8))

    def run(factor):
        tx = optax.chain(muon.scale_by_muon(), normuon.scale_by_neuron_norm())
        state, out = tx.init(jnp.zeros((8, 8))), None
        for g in gradients:
            out, state = tx.update(jnp.asarray(factor * g, jnp.float32), state)
        return out

    np.testing.assert_allclose(run(1.0), run(1e3), atol=2e-4)


def test_impossible_decay():
    with pytest.raises(ValueError, match=r"beta2 must be in \[0, 1\), got 1"):
        normuon.scale_by_neuron_norm(1.0)
