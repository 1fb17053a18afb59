"""FP8 quantizer against ml_dtypes, and its products in the forward and backward pass against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_jax.quant import fp8
from nanochat_jax.quant.matmul import matmul

THEIRS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
quantize = jax.jit(fp8.quantize, static_argnums=1)


def values(v, name):
    """What the codes stand for, float64."""
    codes, scale = quantize(jnp.asarray(v, jnp.float32), name)
    return np.asarray(codes, np.float64) * float(scale)


@pytest.mark.parametrize("name", fp8.FORMATS)
@given(st.integers(0, 2**31), st.floats(-12, 12))
@example(240, 3.03125)  # a product with the scale's reciprocal would be at a tie
def test_codes_are_those_of_ml_dtypes(name, seed, decades):
    v = (np.random.default_rng(seed).normal(size=257) ** 5 * 10.0**decades).astype(np.float32)
    codes, scale = quantize(jnp.asarray(v), name)
    top = np.float32(ml_dtypes.finfo(THEIRS[name]).max)
    np.testing.assert_allclose(scale, np.abs(v).max() / top, rtol=2e-7)
    np.testing.assert_array_equal(
        np.asarray(codes).view(np.uint8), (v / np.float32(scale)).astype(THEIRS[name]).view(np.uint8)
    )


@pytest.mark.parametrize("name", fp8.FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_largest_entry_is_the_largest_code(name, size):
    codes, _ = quantize(jnp.asarray([0.0, -size, size / 2], jnp.float32), name)
    assert float(codes[1]) == -float(ml_dtypes.finfo(THEIRS[name]).max)
    assert float(codes[0]) == 0.0


@pytest.mark.parametrize("name", fp8.FORMATS)
def test_zeros_stay_and_nan_spreads(name):
    np.testing.assert_array_equal(values(np.zeros(5), name), np.zeros(5))
    assert np.isnan(values([1.0, np.nan, 2.0], name)).all()


@pytest.mark.parametrize(("name", "bound"), [("e4m3", 2.0**-4), ("e5m2", 2.0**-3)])
def test_relative_error_of_normal_codes(name, bound):
    v = np.random.default_rng(0).uniform(0.1, 1, 4096)
    worst = np.abs(values(v, name) / v - 1).max()
    assert 0.8 * bound < worst <= bound * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("forward", ["full", "fp8"])
def test_products_are_those_of_the_codes(forward, dtype):
    """y = Q(x) Q(w), dx = Q(dy) Q(w)^T, dw = Q(x)^T Q(dy), with gradients in E5M2."""
    rng = np.random.default_rng(1)
    x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in ((40, 24), (24, 16), (40, 16)))
    y, pullback = jax.vjp(lambda x, w: matmul(x, (w,), forward, forward, 0, "fp8")[0], x, w)
    dx, dw = pullback(dy)
    qx, qw, qdy = values(x, "e4m3"), values(w, "e4m3"), values(dy, "e5m2")
    forward_x, forward_w = (qx, qw) if forward == "fp8" else (np.float64(x), np.float64(w))
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # sums and results in bfloat16
    for got, wanted in ((y, forward_x @ forward_w), (dx, qdy @ qw.T), (dw, qx.T @ qdy)):
        np.testing.assert_allclose(np.float64(got), wanted, atol=tolerance * np.abs(wanted).max())


def test_several_weights_have_a_scale_each(key):
    x = jax.random.normal(key, (8, 16))
    small, large = 1e-3 * jax.random.normal(key, (16, 4)), jax.random.normal(key, (16, 8))
    together = matmul(x, (small, large), "fp8", "fp8", 0)
    apart = [matmul(x, (w,), "fp8", "fp8", 0)[0] for w in (small, large)]
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
