"""8-bit gradients of ternary weights against float64, and how the model reaches them; int8 products on GPUs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import losses, params, validation
from nanochat_jax.config import ConfigError, ModelConfig
from nanochat_jax.kernels import dispatch, integer
from nanochat_jax.model import transformer
from nanochat_jax.quant import int8, ternary
from nanochat_jax.quant.matmul import matmul
from nanochat_jax.quant.project import PRESETS, Precision, Project
from nanochat_jax.train.step import make_train_step, new_state
from nanochat_jax.types import Batch


def test_rows_in_float64():
    """Half a step of error at most, at sizes from 1e-30 to 1e30; zeros stay zeros, NaN stays visible."""
    v = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    v *= 10.0 ** np.array([0, -6, -30, 30, 2, 0, 0, 0], np.float32)[:, None]
    v[5], v[6, 3] = 0, np.nan
    q, scale = (np.asarray(a) for a in jax.jit(int8.rows)(v))
    assert q.dtype == np.int8 and scale.shape == (8, 1)
    fine = [0, 1, 2, 3, 4, 5, 7]
    top = np.abs(v[fine]).max(-1, keepdims=True).astype(np.float64)
    error = np.abs(q[fine].astype(np.float64) * scale[fine] - v[fine])
    assert np.all(error <= (0.5 + 1e-4) * top / 127) and np.all(q[5] == 0)
    assert np.all(np.abs(q[fine]).max(-1)[[0, 1, 2, 3, 4, 6]] == 127) and np.isnan(scale[6]).all()


def gradients(grad, x, ws, dy):
    def run(x, ws, dy):
        y, pullback = jax.vjp(lambda x, ws: matmul(x, ws, "ternary", "int8", 0, grad), x, ws)
        return y, *pullback(dy)

    return jax.jit(run)(x, ws, dy)


def test_forward_and_dw_are_as_before_and_dx_is_within_the_rounding():
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((24, 32), (24, 48)))
    w = jnp.asarray(rng.normal(size=(32, 48)), jnp.float32)
    (y,), dx, (dw,) = gradients("int8", x, (w,), (dy,))
    (want_y,), _, (want_dw,) = gradients("full", x, (w,), (dy,))
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(dw, want_dw)
    t, gamma = (np.asarray(a, np.float64) for a in ternary.quantize_ternary(w))
    scaled = np.asarray(dy, np.float64) * gamma
    exact = scaled @ t.T
    half_step = 0.5 * np.abs(scaled).max(-1, keepdims=True) / 127
    error = np.abs(np.asarray(dx, np.float64) - exact)
    assert np.all(error <= 1.001 * half_step * np.abs(t).sum(1)) and error.max() > 1e-5
    # Exact multiples of a row's step pass unharmed.
    whole = jnp.asarray(rng.integers(-127, 128, (24, 48)), jnp.float32).at[:, 0].set(127.0) / gamma.item()
    _, dx, _ = gradients("int8", x, (w,), (whole,))
    np.testing.assert_allclose(dx, np.round(np.asarray(whole) * gamma) @ t.T, rtol=1e-5, atol=1e-2)


def test_the_preset_reaches_every_block_matrix():
    project = Project(PRESETS["ternary_int8"])
    assert {project.precision(role).grad for role in ("attn/q", "mlp/down")} == {"int8"}
    assert project.precision("head") == Precision() and len(project.ternary_roles()) == 7
    assert project.low_formats() == [] and project.spared() == project


def pull(function, dy, *args):
    def run(dy, *args):
        y, pullback = jax.vjp(function, *args)
        return y, *pullback(dy)

    return jax.jit(run)(dy, *args)


def test_roles_side_by_side_keep_their_own_scales():
    """dx of one wide call is the sum of the roles' own, though one of them has gradients 1e6 times as large."""
    project, roles = Project(PRESETS["ternary_int8"]), ("attn/q", "attn/k", "attn/v")
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    ws = tuple(jnp.asarray(rng.normal(size=(32, n)), jnp.float32) for n in (32, 16, 16))
    ws = ws[0], ws[1].at[:16].set(0), ws[2]
    sizes = (1e-3, 1e3, 1e-3)
    dys = tuple(
        jnp.asarray(rng.normal(size=(4, w.shape[1])) * s, jnp.float32) for w, s in zip(ws, sizes, strict=True)
    )
    own = [
        pull(lambda x, w, role=role: project(role, x, w), dy, x, w)
        for role, dy, w in zip(roles, dys, ws, strict=True)
    ]

    ys, dx, *dws = pull(lambda x, *ws: project.several(roles, x, ws), dys, x, *ws)
    for y, dw, (own_y, _, own_dw) in zip(ys, dws, own, strict=True):
        np.testing.assert_allclose(y, own_y, rtol=1e-6)  # each compiled in its own way
        np.testing.assert_allclose(dw, own_dw, rtol=1e-5, atol=1e-5 * np.abs(own_dw).max())
    parts = [np.asarray(d, np.float64) for _, d, _ in own]
    np.testing.assert_allclose(dx, sum(parts), rtol=1e-5, atol=1e-3)
    # Inputs that the large role does not read: with its scale the others' gradients would all be zero.
    np.testing.assert_allclose(dx[:, :16], (parts[0] + parts[2])[:, :16], rtol=1e-4, atol=1e-7)


def test_mistakes():
    with pytest.raises(ValueError, match="gradients in int8 need ternary weights, got 'full'"):
        Precision("full", "int8", "int8")
    with pytest.raises(ConfigError, match=r"'model.quant_group' must be 0 with model.quant = 'ternary_int8'"):
        validation.model.validate_model(ModelConfig(quant="ternary_int8", quant_group=16))


# --- int8 products on GPUs: none is here, so what is asked of one


def test_on_gpus_int8_is_probed_and_wants_whole_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "probe", lambda check: asked.append(check) or "")
    monkeypatch.setattr(integer, "preferred", lambda: "int8")
    used = []
    for name in integer.IMPLS:
        run = integer.IMPLS[name]
        monkeypatch.setitem(
            integer.IMPLS, name, lambda *args, name=name, run=run: (run(*args), used.append(name))[0]
        )
    rng = np.random.default_rng(0)
    for (M, K, N), carrier in (((16, 32, 48), "int8"), ((5, 32, 48), "bfloat16"), ((16, 32, 41), "bfloat16")):
        q = rng.integers(-127, 128, (M, K)).astype(np.int8)
        t = rng.integers(-1, 2, (K, N)).astype(np.int8)
        used.clear()
        np.testing.assert_array_equal(integer.integer_matmul(q, t), q.astype(np.int64) @ t)
        assert used == [carrier]
    assert set(asked) == {"nanochat_jax.kernels.integer:check_on_device"}
    monkeypatch.setattr(dispatch, "probe", lambda check: "wrong integers")
    used.clear()
    integer.integer_matmul(jnp.ones((16, 32), jnp.int8), jnp.ones((32, 48), jnp.int8))
    assert used == ["bfloat16"]


def test_the_check_of_the_probe(monkeypatch):
    integer.check_on_device()
    right = integer._int8_product
    monkeypatch.setattr(integer, "_int8_product", lambda q, t: right(q, t).at[0, 0].add(1))
    with pytest.raises(ValueError, match="wrong integers of 16 x 256 with 64 outputs"):
        integer.check_on_device()


@pytest.mark.slow
def test_a_tiny_model_learns_with_8_bit_gradients(tiny, key):
    """The loss on one batch falls as with gradients in full."""
    tokens = jax.random.randint(key, (4, 17), 0, 8)
    shape = (4, 16)
    positions = jnp.broadcast_to(jnp.arange(16), shape)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones(shape), jnp.ones(shape, jnp.int32), positions)
    last = []
    for quant in ("ternary", "ternary_int8"):
        cfg, tx = dataclasses.replace(tiny, quant=quant), optax.adam(1e-2)
        state = new_state(params.init_params(transformer.param_specs(cfg), key), tx)
        step = jax.jit(make_train_step(losses.make_loss(cfg, (("next_token", 1.0),)), tx, seed=0))
        for _ in range(30):
            state, metrics = step(state, batch)
        last.append(float(metrics["loss/total"]))
    assert last[1] < 1.1 * last[0] < 2
