"""Ternary quantizers against float64 NumPy, and the straight-through matmul against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from nanochat_jax.kernels import dispatch, integer
from nanochat_jax.quant import pack, ternary
from nanochat_jax.quant import project as projections
from nanochat_jax.quant.matmul import matmul


def oracle(w, group=0):
    """Codes and dequantized weights, in float64 (scale rounded to 11 significant bits per matrix)."""
    w = np.asarray(w, np.float64)
    view = w.reshape(-1, group, w.shape[-1]) if group else w[None]
    gamma = np.abs(view).mean((1,) if group else (1, 2), keepdims=True)
    if not group:
        exponent = np.floor(np.log2(gamma))
        gamma = np.round(gamma * 2.0 ** (10 - exponent)) / 2.0 ** (10 - exponent)
    t = np.clip(np.round(view / gamma), -1, 1)
    return t.reshape(w.shape), (gamma * t).reshape(w.shape)


@pytest.mark.parametrize("group", [0, 8, 32])
def test_codes_and_values_equal_the_oracle(key, group):
    w = jax.random.normal(key, (32, 24)) * 0.3
    t, gamma = ternary.quantize_ternary(w, group)
    codes, values = oracle(w, group)
    np.testing.assert_array_equal(t, codes)
    np.testing.assert_allclose(ternary.dequantize(t, gamma), values, rtol=1e-6)


def test_special_rows():
    zero, _ = ternary.quantize_ternary(jnp.zeros((8, 8)))
    assert not np.any(zero)
    constant, gamma = ternary.quantize_ternary(jnp.full((8, 8), -3.0))
    assert np.all(constant == -1) and float(gamma.reshape(())) == 3.0
    tie = jnp.array([[2.0, 1.0], [-1.0, 0.0]])  # gamma 1: half of it is no tie; 0.5 / 1 below is one
    assert np.array_equal(ternary.codes(tie * 0.5, jnp.ones((1, 1))), [[1, 0], [0, 0]])


def test_gaussian_constants():
    w = jax.random.normal(jax.random.key(1), (1024, 1024))
    t, gamma = ternary.quantize_ternary(w)
    assert abs(float(gamma.reshape(())) - np.sqrt(2 / np.pi)) < 3e-3
    assert abs(float(jnp.mean(t == 0)) - 0.3100) < 3e-3
    error = jnp.linalg.norm(ternary.dequantize(t, gamma) - w) / jnp.linalg.norm(w)
    assert abs(float(error) - 0.513) < 3e-3


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**31 - 1))
def test_scaling_a_matrix_keeps_its_codes(c, seed):
    w = jax.random.normal(jax.random.key(seed), (16, 16))
    fresh = ternary.codes(w, ternary.scale(w, 16))
    scaled = ternary.codes(c * w, ternary.scale(c * w, 16))
    assert np.mean(fresh != scaled) < 0.02  # rounding of c * w may move a tie
    np.testing.assert_array_equal(ternary.codes(-w, ternary.scale(w)), -ternary.codes(w, ternary.scale(w)))


def test_stacked_layers_have_their_own_scales(key):
    w = jax.random.normal(key, (3, 16, 8)) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    t, gamma = ternary.quantize_ternary(w)
    assert gamma.shape == (3, 1, 1)
    for i in range(3):
        np.testing.assert_array_equal(t[i], ternary.quantize_ternary(w[i])[0])


def test_int8_rows(key):
    x = jax.random.normal(key, (64, 1024))
    q, inverse = ternary.int8_rows(x)
    assert q.dtype == jnp.int8 and int(jnp.abs(q).max()) == 127
    relative = jnp.linalg.norm(q * inverse - x) / jnp.linalg.norm(x)
    assert abs(float(relative) - 0.0078) < 1e-3
    assert not np.any(ternary.int8_rows(jnp.zeros((2, 4)))[0])


@pytest.mark.parametrize("width", [40, 256])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_of_an_activation_reaches_its_whole_row(width, bad):
    """Wherever it stands; and no other row, in training and from packed weights."""
    x = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    np.fill_diagonal(x[: width // 2], bad)
    w = jax.random.normal(jax.random.key(1), (width, 16))
    packed = pack.pack(*ternary.quantize_ternary(w))
    for run in (lambda x: matmul(x, (w,), "ternary", "int8", 0)[0], lambda x: pack.matmul(x, packed)):
        lost = ~np.isfinite(jax.jit(run)(jnp.asarray(x)))
        assert lost[: width // 2].all() and not lost[width // 2 :].any()


def test_nan_reaches_the_parts_of_a_split_row():
    x = jnp.ones((2, 8)).at[0, 5].set(jnp.nan)
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = functools.partial(ternary.int8_rows, axis="t")
    out = (P(None, "t"), P())
    inverse = jax.shard_map(rows, mesh=mesh, in_specs=P(None, "t"), out_specs=out)(x)[1]
    np.testing.assert_array_equal(np.isnan(inverse), [[True], [False]])


@pytest.mark.parametrize("impl", integer.IMPLS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 8192, 4), (3, 4, 256, 32)])
def test_every_carrier_gives_the_exact_integers(monkeypatch, impl, shape):
    monkeypatch.setattr(dispatch, "whole", lambda: True)  # these arrays are
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, shape[:-1]).astype(np.int8)
    t = rng.integers(-1, 2, shape[-2:]).astype(np.int8)
    exact = q.astype(np.int64) @ t.astype(np.int64)
    np.testing.assert_array_equal(integer.integer_matmul(jnp.asarray(q), jnp.asarray(t), impl=impl), exact)
    turned = jnp.asarray(t.T.copy())
    np.testing.assert_array_equal(
        integer.integer_matmul(jnp.asarray(q), turned, impl=impl, transposed=True), exact
    )


def test_int8_products_on_cpu_are_not_widened(monkeypatch):
    """Of a transposed operand, too, where the compiler takes int32 if left alone."""

    def widened(product):
        q, t = (jax.ShapeDtypeStruct(s, jnp.int8) for s in ((48, 64), (32, 64)))
        return "s32[48,64]" in jax.jit(product).lower(q, t).compile().as_text()

    monkeypatch.setattr(dispatch, "whole", lambda: True)
    assert not widened(lambda q, t: integer.integer_matmul(q, t, impl="int8", transposed=True))
    assert widened(lambda q, t: integer.integer_matmul(q, t.T, impl="int8"))


def test_transposed_products_of_split_arrays(monkeypatch):
    """No layout is asked of what may be split: another carrier multiplies. Inside a shard_map it is."""
    monkeypatch.setattr(integer, "preferred", lambda: "int8")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.integers(-127, 128, (16, 32)), jnp.int8)
    t = jnp.asarray(rng.integers(-1, 2, (24, 32)), jnp.int8)
    exact = np.asarray(q, np.int64) @ np.asarray(t, np.int64).T
    with pytest.raises(ExceptionGroup, match="no implementation accepts"):
        integer.integer_matmul(q, t, impl="int8", transposed=True)
    np.testing.assert_array_equal(integer.integer_matmul(q, t, transposed=True), exact)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = functools.partial(integer.integer_matmul, impl="int8", transposed=True)
    run = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(run)(q, t), exact)


def test_inexact_depth_is_refused_and_auto_finds_another():
    q = jnp.ones((1, integer.MAX_DEPTH + 1), jnp.int8)
    t = jnp.ones((integer.MAX_DEPTH + 1, 1), jnp.int8)
    with pytest.raises(ExceptionGroup, match="no implementation accepts"):
        integer.integer_matmul(q, t, impl="float32")
    assert float(integer.integer_matmul(q, t)[0, 0]) == integer.MAX_DEPTH + 1


@pytest.mark.parametrize("group", [0, 8])
def test_straight_through_gradients(key, group):
    """dx = dy w_q^T and dw = x_q^T dy, in float64."""
    x = jax.random.normal(key, (4, 6, 32))
    w = jax.random.normal(jax.random.key(1), (32, 24))
    dy = jax.random.normal(jax.random.key(2), (4, 6, 24))
    y, pullback = jax.vjp(lambda x, w: matmul(x, (w,), "ternary", "int8", group)[0], x, w)
    dx, dw = pullback(dy)
    _, wq = oracle(w, group)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    scale = 127 / np.abs(x64).max(-1, keepdims=True)
    xq = np.round(x64 * scale) / scale
    np.testing.assert_allclose(y, xq @ wq, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy64 @ wq.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.einsum("abm,abn->mn", xq, dy64), rtol=1e-4, atol=1e-4)


def test_full_precision_is_the_plain_product(key):
    x, w = jax.random.normal(key, (4, 16)), jax.random.normal(key, (16, 8))
    np.testing.assert_array_equal(matmul(x, (w,), "full", "full", 0)[0], x @ w)
    ours = jax.grad(lambda w: jnp.sum(matmul(x, (w,), "full", "full", 0)[0] ** 2))(w)
    np.testing.assert_allclose(ours, jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), rtol=1e-5)


@pytest.mark.parametrize(
    "weight,act,group", [("ternary", "int8", 0), ("ternary", "int8", 8), ("full", "full", 0)]
)
def test_weights_side_by_side_equal_separate_products(key, weight, act, group):
    x = jax.random.normal(key, (3, 5, 16))
    ws = tuple(jax.random.normal(jax.random.key(i), (16, n)) * (i + 1) for i, n in enumerate((8, 4, 12)))

    def loss(x, ws, join):
        if join:
            ys = matmul(x, ws, weight, act, group)
        else:
            ys = [matmul(x, (w,), weight, act, group)[0] for w in ws]
        return sum(jnp.sum(jnp.sin(y)) for y in ys)

    for a, b in zip(
        jax.tree.leaves(jax.value_and_grad(lambda x, ws: loss(x, ws, True), (0, 1))(x, ws)),
        jax.tree.leaves(jax.value_and_grad(lambda x, ws: loss(x, ws, False), (0, 1))(x, ws)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rules_choose_by_role_and_complain():
    project = projections.Project(projections.PRESETS["ternary"])
    assert project.ternary_roles() == projections.BLOCK_ROLES
    assert project.precision("head") == projections.Precision()
    with pytest.raises(ValueError, match="no precision rule matches role 'head'"):
        projections.Project(((r"attn/.*", projections.Precision()),)).precision("head")
    with pytest.raises(ValueError, match="unknown format 'ternery'; known: full, ternary"):
        projections.Precision(weight="ternery")


def test_health_counts_codes():
    now = {"a": jnp.array([[-1, 0], [1, 1]], jnp.int8)}
    before = {"a": jnp.array([[-1, 1], [1, 0]], jnp.int8)}
    metrics = {k: float(v) for k, v in ternary.health(now, before).items()}
    assert metrics == {
        "quant/minus_fraction": 0.25, "quant/zero_fraction": 0.25, "quant/plus_fraction": 0.5,
        "quant/flip_rate": 0.5,
    }  # fmt: skip
