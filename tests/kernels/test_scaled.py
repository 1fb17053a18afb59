"""The path through FP4 units, which no machine here has: what it hands to `jax.nn.scaled_matmul`, the CUDA
program it becomes, and its numbers against the emulation, with `jax.lax.scaled_dot` in the units' place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import Fp4Config
from nanochat_jax.kernels import dispatch, fp4, scaled
from nanochat_jax.quant import fp4_products
from nanochat_jax.quant import project as projections
from nanochat_jax.quant.matmul import matmul

CHOSEN = (dispatch, "backend", lambda: "gpu"), (scaled, "_capability", lambda: 12.0)


def units(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type):
    """What the documentation of `jax.nn.scaled_matmul` asks of NVFP4 operands, and the product it states."""
    (B, M, K), (_, N, _) = lhs.shape, rhs.shape
    assert lhs.dtype == rhs.dtype == jnp.float4_e2m1fn
    assert lhs_scales.dtype == rhs_scales.dtype == jnp.float8_e4m3fn
    assert (lhs_scales.shape, rhs_scales.shape) == ((B, M, K // 16), (B, N, K // 16)) and rhs.shape[2] == K
    wanted = jax.eval_shape(jax.nn.scaled_matmul.__wrapped__, lhs, rhs, lhs_scales, rhs_scales)  # type: ignore[attr-defined]
    made = jax.lax.scaled_dot(
        lhs, rhs, lhs_scale=lhs_scales, rhs_scale=rhs_scales,
        dimension_numbers=(((2,), (2,)), ((0,), (0,))), preferred_element_type=preferred_element_type,
    )  # fmt: skip
    assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype) == ((B, M, N), preferred_element_type)
    return made


@pytest.fixture
def on_blackwell(monkeypatch):
    """A device whose probe passes. Returns the calls of the units so far."""
    calls, real = [], jax.nn.scaled_matmul

    @functools.wraps(real)
    def counted(*args):
        calls.append([a.shape for a in args[:4]])
        return units(*args)

    counted.__wrapped__ = real
    monkeypatch.setattr(jax.nn, "scaled_matmul", counted)
    for where, name, value in CHOSEN:
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(dispatch, "probe", lambda check: "")
    return calls


def gradients(weight, act, how, key, T=48, m=32, n=64):
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, m), (m, n), (T, n)))

    @jax.jit  # here, so that each call traces anew
    def all_three(x, w, dy, key):
        y, pullback = jax.vjp(lambda x, w: matmul(x, (w,), weight, act, 0, "nvfp4", how, key)[0], x, w)
        return y, *pullback(dy)

    return all_three(x, w, dy, key)


@pytest.mark.parametrize(
    ("weight", "how", "calls"),
    [
        ("full", Fp4Config(), 2),  # both backward products
        ("full", Fp4Config(stochastic="both", signs="random", rotated="both"), 2),
        ("full", Fp4Config(operands="gradient"), 0),  # one operand in full precision
        ("nvfp4", Fp4Config(), 2),  # forward and dw; in dx the weights keep their tiles
    ],
)
def test_units_give_the_numbers_of_the_emulation(weight, how, calls, key, on_blackwell, monkeypatch):
    got = gradients(weight, weight, how, key)
    assert len(on_blackwell) == calls
    with monkeypatch.context() as patch:
        patch.setattr(scaled, "native", lambda name: False)
        want = gradients(weight, weight, how, key)
    assert len(on_blackwell) == calls
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_tiles_turned_are_blocks_along_the_inputs():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(32, 48)), jnp.float32)

    @jax.jit
    def both(w):
        tiles = fp4.quantize(w, "nvfp4", tiles=True)
        turned = fp4_products.along_inputs(tiles)
        return turned.scales, fp4.dequantize(turned, "nvfp4"), fp4.dequantize(tiles, "nvfp4", True).T

    scales, turned, tiles = both(w)
    assert scales.shape == (48, 2)
    np.testing.assert_array_equal(turned, tiles)


def test_the_cuda_program_calls_the_scaled_product():
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (
        ((128, 64), jnp.float32), ((128, 4), jnp.float8_e4m3fn), ((32, 64), jnp.float32), ((32, 4), jnp.float8_e4m3fn),
    )]  # fmt: skip
    text = jax.jit(scaled.scaled_dot).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "block_scaled_dot" in text and "128x64xf4E2M1FN" in text and "32x4xf8E4M3FN" in text


def test_the_probe_wants_cudnn_and_the_right_product(on_blackwell):
    with pytest.raises(ValueError, match="instead of calling cuDNN"):  # the stand-in is plain XLA
        scaled.check_on_device()
    right = scaled.scaled_dot(*scaled._operands())
    scaled.check(right)
    for wrong in (right * 1.001, right.at[3, 4].add(jnp.abs(right).max())):
        with pytest.raises(ValueError, match="wrong product"):
            scaled.check(wrong)


@pytest.mark.parametrize(
    ("capability", "reason", "name", "native"),
    [
        (12.0, "", "nvfp4", True), (10.0, "", "nvfp4", True), (9.0, "", "nvfp4", False),
        (12.0, "wrong product", "nvfp4", False), (12.0, "", "mxfp4", False), (12.0, "", "fp8", False),
    ],
)  # fmt: skip
def test_where_it_is_chosen_and_said(capability, reason, name, native, monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(scaled, "_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "probe", lambda check: asked.append(check) or reason)
    assert scaled.native(name) is native
    assert bool(asked) is (capability >= 10 and name == "nvfp4")  # no child process where it cannot pass
    said = projections.Project(projections.PRESETS[name]).low_text()
    assert ("scaled_matmul, not verified on hardware" in said) is native
    assert ("emulated: right numbers, no gain in speed" in said) is not native
    monkeypatch.setattr(dispatch, "backend", lambda: "cpu")
    assert not scaled.native(name)
