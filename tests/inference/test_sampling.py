"""Controls of the draw against plain NumPy, against each other, and by frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nanochat_jax.inference import sample

V = 600  # more than sample.FEW: both the quick way and the full sort are taken


def controls(rng, rows, wide):
    """Random controls; wide: some rows need more than the FEW likeliest ids."""
    pick = lambda *values: jnp.asarray(rng.choice(values, rows), jnp.float32)  # noqa: E731
    return sample.Controls(
        pick(0.0, 0.5, 1.0, 2.0), jnp.asarray(rng.choice([0, 1, 7, 200, *[400] * wide], rows), jnp.int32),
        pick(1.0, 0.3, 0.6, *[0.999] * wide), pick(0.0, 0.05, 0.3), pick(1.0), pick(0.0), pick(0.0),
    )  # fmt: skip


def expected(z, c, i):
    """Ids that may be drawn, by float64; ties in favor of the lower id."""
    if c.temperature[i] == 0:
        return {int(np.argmax(z))}, set()
    z = z.astype(np.float64) / float(c.temperature[i])
    order = np.argsort(-z, kind="stable")
    order = order[: int(c.top_k[i])] if c.top_k[i] > 0 else order
    p = np.exp(z[order] - z.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    all_p = float(c.top_p[i]) == 1
    kept = (all_p | (before < float(c.top_p[i]))) & (p / p[0] >= float(c.min_p[i]))
    kept[0] = True
    near = ((np.abs(before - float(c.top_p[i])) < 1e-5) & (not all_p)) | (
        np.abs(p / p[0] - float(c.min_p[i])) < 1e-6
    )
    return set(order[kept].tolist()), set(order[near].tolist())


NARROW, DRAW = jax.jit(sample.narrow), jax.jit(sample.draw)


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.booleans(), st.booleans())
def test_every_way_draws_the_same_from_the_same_set(seed, wide, ties):
    rng, rows = np.random.default_rng(seed), 8
    z = (rng.integers(0, 9, (rows, V)) if ties else 3 * rng.normal(size=(rows, V))).astype(np.float32)
    c, noise = controls(rng, rows, wide), rng.gumbel(size=(rows, V)).astype(np.float32)
    finite = np.isfinite(np.asarray(NARROW(jnp.asarray(z), c)))
    drawn = np.asarray(DRAW(jnp.asarray(z), jnp.asarray(noise), c))
    for i in range(rows):
        kept, near = expected(z[i], c, i)
        if c.temperature[i] == 0:
            assert {int(drawn[i])} == kept
            continue
        got = set(np.flatnonzero(finite[i]).tolist())
        assert got - near == kept - near
        best = max(
            sorted(got), key=lambda t: np.float32(z[i, t] / np.float32(c.temperature[i])) + noise[i, t]
        )
        assert drawn[i] == best or drawn[i] in near


def test_a_row_does_not_depend_on_what_others_ask_for():
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(2, V)).astype(np.float32), rng.gumbel(size=(2, V)).astype(np.float32)
    plain = sample.neutral(2)
    first = plain._replace(top_k=jnp.array([5, 0]))
    full = plain._replace(top_k=jnp.array([5, 400]), top_p=jnp.array([1.0, 0.999]))
    one, two = (np.asarray(DRAW(jnp.asarray(z), jnp.asarray(noise), c))[0] for c in (first, full))
    assert one == two


@given(st.integers(0, 2**31 - 1))
def test_penalties(seed):
    rng = np.random.default_rng(seed)
    z, bias = rng.normal(size=(2, 2, 9)).astype(np.float32)
    seen, times = rng.random((2, 9)) < 0.5, rng.integers(0, 4, (2, 9))
    theta, presence, frequency = rng.uniform(0.5, 2, (3, 2)).astype(np.float32)
    c = sample.neutral(2)._replace(
        repetition=jnp.asarray(theta), presence=jnp.asarray(presence), frequency=jnp.asarray(frequency)
    )
    got = sample.penalize(
        jnp.asarray(z), c, jnp.asarray(seen), jnp.asarray(times, jnp.int32), jnp.asarray(bias)
    )
    by = theta[:, None]
    want = np.where(seen, np.where(z > 0, z / by, z * by), z)
    want = want - presence[:, None] * (times > 0) - frequency[:, None] * times + bias
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5)
    same = sample.penalize(
        jnp.asarray(z), sample.neutral(2), jnp.asarray(seen), jnp.asarray(times, jnp.int32), jnp.zeros((2, 9))
    )
    np.testing.assert_array_equal(np.asarray(same), z)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str
)
def test_frequencies(changes):
    """Chi-square of 200,000 draws."""
    z = np.linspace(-2, 1.5, 8).astype(np.float32)[np.random.default_rng(1).permutation(8)]
    rows, n = 20_000, 10
    c = sample.neutral(rows)
    c = c._replace(**{k: jnp.full((rows,), v, getattr(c, k).dtype) for k, v in changes.items()})

    @jax.jit
    def draws(key):
        return sample.draw(jnp.broadcast_to(z, (rows, 8)), jax.random.gumbel(key, (rows, 8)), c)

    counts = sum(np.bincount(np.asarray(draws(jax.random.key(i))), minlength=8) for i in range(n))
    kept, _ = expected(z, jax.tree.map(np.asarray, c), 0)
    p = np.where(
        np.isin(np.arange(8), list(kept)), np.exp(z.astype(np.float64) / changes.get("temperature", 1.0)), 0
    )
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], (p / p.sum() * rows * n)[p > 0]).pvalue > 1e-4


@pytest.mark.interop
def test_hugging_face_keeps_the_same_ids():
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(5)
    z = 2 * rng.normal(size=(16, 50)).astype(np.float32)
    said = rng.integers(0, 50, (16, 6))
    warpers = {
        "top_k": (hf.TopKLogitsWarper, 7), "top_p": (hf.TopPLogitsWarper, 0.7), "min_p": (hf.MinPLogitsWarper, 0.1),
        "temperature": (hf.TemperatureLogitsWarper, 0.6),
    }  # fmt: skip
    for name, (warper, value) in warpers.items():
        want = warper(value)(torch.tensor(said), torch.tensor(z)).numpy()
        own = sample.neutral(16)
        own = own._replace(**{name: jnp.full((16,), value, getattr(own, name).dtype)})
        got = np.asarray(sample.narrow(jnp.asarray(z), own))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_allclose(got[np.isfinite(got)], want[np.isfinite(want)], rtol=1e-5)
    want = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(said), torch.tensor(z)).numpy()
    seen = np.zeros((16, 50), bool)
    seen[np.arange(16)[:, None], said] = True
    zero = jnp.zeros((16, 50))
    own = sample.neutral(16)._replace(repetition=jnp.full((16,), 1.7))
    got = functools.partial(sample.penalize, jnp.asarray(z), own, jnp.asarray(seen))(
        jnp.zeros((16, 50), jnp.int32), zero
    )
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5)
