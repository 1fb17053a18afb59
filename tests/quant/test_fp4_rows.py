"""FP4 by rows and columns: levels against ml_dtypes, outliers and estimator against float64."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.config import Fp4Config
from nanochat_jax.quant import fp4_rows
from nanochat_jax.quant.matmul import matmul


def e2m1(v):
    return np.asarray(v, np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


@given(st.integers(0, 2**31))
def test_weights_have_a_scale_per_output(seed):
    w = np.random.default_rng(seed).normal(size=(33, 7)).astype(np.float32) * np.float32(2.0) ** np.arange(7)
    levels, scale = fp4_rows.columns(jnp.asarray(w))
    wanted = np.abs(w).max(0, keepdims=True) / np.float32(6)
    np.testing.assert_allclose(scale, wanted, rtol=2e-7)
    np.testing.assert_array_equal(levels, e2m1(w / np.asarray(scale)))


def test_activations_have_a_scale_per_token():
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    levels, scale = fp4_rows.rows(jnp.asarray(x), 0.0)
    np.testing.assert_array_equal(levels, e2m1(x / np.asarray(scale)))
    np.testing.assert_allclose(scale[..., 0], np.abs(x).max(-1) / 6, rtol=2e-7)


def test_outliers_keep_full_precision():
    """2 of 32 entries: the clamp is the third largest magnitude, what it cuts off is not rounded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 32)).astype(np.float32)
    x[np.arange(20), rng.integers(0, 32, 20)] *= 50
    both, scale = fp4_rows.rows(jnp.asarray(x), 0.05)
    assert scale is None
    limit = np.sort(np.abs(x), -1)[:, -3:-2]
    inside = np.clip(x, -limit, limit)
    step = limit / np.float32(6)
    np.testing.assert_allclose(both, e2m1(inside / step) * step + (x - inside), rtol=1e-5, atol=1e-6)
    plain = np.prod(np.broadcast_arrays(*fp4_rows.rows(jnp.asarray(x), 0.0)), axis=0)
    errors = [np.linalg.norm(a - x) for a in (np.asarray(both), plain)]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.99])
def test_zeros_and_two_inputs(outliers):
    for x in (np.zeros((3, 2), np.float32), np.float32([[1.0, -3.0]])):
        codes, scale = fp4_rows.rows(jnp.asarray(x), outliers)
        restored = np.asarray(codes) if scale is None else np.asarray(codes) * np.asarray(scale)
        assert np.abs(restored - x).max() <= np.abs(x).max() / 6


def soft(v, power):
    """The paper's function whose derivative estimates that of rounding, for |v| <= 6."""
    a = jnp.abs(v)
    low, step = jnp.where(a < 2, jnp.floor(2 * a) / 2, jnp.where(a < 4, jnp.floor(a), 4.0)), 0.5
    step = jnp.where(a < 2, 0.5, jnp.where(a < 4, 1.0, 2.0))
    t = 2 * (a - low) / step - 1
    return jnp.sign(v) * (low + step / 2 * (1 + jnp.sign(t) * jnp.abs(t) ** (1 / power)))


@pytest.mark.parametrize("power", [2.0, 5.0])
def test_the_estimator_is_the_derivative_of_its_function(power):
    with jax.enable_x64(True):
        v = np.linspace(-5.999, 5.999, 1200)  # without 0, where |v| has no derivative
        wanted = np.minimum(jax.vmap(jax.grad(lambda v: soft(v, power)))(jnp.asarray(v)), 3.0)
    column = np.append(v, 6.0).astype(np.float32)[:, None]  # scale 1
    got = np.asarray(fp4_rows.estimate(jnp.asarray(column), power))[:-1, 0]
    np.testing.assert_allclose(got, wanted, rtol=2e-3)
    assert got.max() == 3.0


def test_estimator_at_published_points():
    """k = 5 in the first interval (0, 0.5); at 0.2 and 0.3, 0.6^(-0.8)... by hand."""
    column = jnp.asarray([[0.05], [0.1], [0.2], [6.0]])
    np.testing.assert_allclose(
        fp4_rows.estimate(column, 5.0)[:3, 0], [0.8**-0.8 / 5, 0.6**-0.8 / 5, 0.2**-0.8 / 5], rtol=1e-5
    )


def test_gradients_of_a_product():
    """dx by the codes; dw by the activations that were multiplied, times the estimator."""
    rng = np.random.default_rng(2)
    x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 8), (8, 6), (12, 6)))
    how = Fp4Config(outliers=0.2, estimator=5.0)
    y, pullback = jax.vjp(lambda x, w: matmul(x, (w,), "fp4_rows", "fp4_rows", 0, "full", how)[0], x, w)
    dx, dw = pullback(dy)
    levels, scale = (np.float64(a) for a in fp4_rows.columns(w))
    used = np.float64(fp4_rows.rows(x, 0.2)[0])
    np.testing.assert_allclose(y, used @ (levels * scale), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, np.float64(dy) @ (levels * scale).T, rtol=1e-4, atol=1e-5)
    factor = np.float64(fp4_rows.estimate(w, 5.0))
    assert math.isclose(float(fp4_rows.estimate(w, 1.0).min()), 1.0)
    np.testing.assert_allclose(dw, used.T @ np.float64(dy) * factor, rtol=1e-4, atol=1e-5)
