"""FP4 products in the forward and backward pass against float64, and how the model reaches them.

The quantizer itself is held against ml_dtypes in test_fp4; here it is the oracle.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import losses, params, validation
from nanochat_jax.config import Fp4Config, LoopConfig, MtpConfig
from nanochat_jax.kernels import fp4
from nanochat_jax.model import transformer
from nanochat_jax.quant import fp4_products
from nanochat_jax.quant import project as projections
from nanochat_jax.quant.matmul import matmul
from nanochat_jax.quant.project import Precision, Project
from nanochat_jax.train.step import make_train_step, new_state
from nanochat_jax.types import Batch

PLAIN = Fp4Config(stochastic="none", hadamard=0)


def operands(T=64, m=32, n=64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, m), (m, n), (T, n)))


@functools.partial(jax.jit, static_argnames=("weight", "act", "grad", "how"))
def gradients(x, w, dy, weight="full", act="full", grad="full", how=PLAIN, key=None):
    """(y, dx, dw) of one product."""
    y, pullback = jax.vjp(lambda x, w: matmul(x, (w,), weight, act, 0, grad, how, key)[0], x, w)
    return y, *pullback(dy)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(v, name, tiles):
    return fp4.dequantize(fp4.quantize(v, name, tiles=tiles), name, tiles)


def blocks(v, name, tiles=False):
    return np.asarray(_rounded(v, name, tiles), np.float64)


def error(approximate, exact):
    exact = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(approximate, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("name", "T"), [("nvfp4", 64), ("mxfp4", 64), ("mxfp4", 40)])
def test_blocks_run_along_the_contracted_axes(name, T, key):
    """Nearest, no rotation: dx = Q(dy) Q(w)^T along n, dw = Q(x)^T Q(dy) along T, in float64.

    40 tokens are filled up with zeros behind them.
    """
    x, w, dy = operands(T)
    y, dx, dw = gradients(x, w, dy, grad=name, key=key)
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_allclose(dx, blocks(dy, name) @ blocks(w, name).T, rtol=1e-4, atol=1e-4)
    x_mT, dy_nT = (blocks(jnp.pad(v, ((0, 64 - T), (0, 0))).T, name) for v in (x, dy))
    np.testing.assert_allclose(dw, x_mT @ dy_nT.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_the_rotation_reaches_the_products_it_is_for(name, key):
    x, w, dy = operands()
    how = dataclasses.replace(PLAIN, hadamard=32)
    plain, one, both = (
        gradients(x, w, dy, grad=name, how=h, key=key)
        for h in (PLAIN, how, dataclasses.replace(how, rotated="both"))
    )
    sign = fp4_products.signs("fixed", 32)
    rotated = blocks(fp4_products.rotate(x.T, sign), name) @ blocks(fp4_products.rotate(dy.T, sign), name).T
    np.testing.assert_allclose(one[2], rotated, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(one[1], plain[1])
    np.testing.assert_array_equal(both[2], one[2])
    rotated = blocks(fp4_products.rotate(dy, sign), name) @ blocks(fp4_products.rotate(w, sign), name).T
    np.testing.assert_allclose(both[1], rotated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_forward_in_fp4_keeps_the_weights_codes_in_the_backward_pass(name, key):
    x, w, dy = operands()
    y, dx, dw = gradients(x, w, dy, name, name, name, key=key)
    tiles = blocks(w, name, tiles=True)
    np.testing.assert_allclose(y, blocks(x, name) @ tiles, rtol=1e-4, atol=1e-4)
    # dy is multiplied by the weights' scale before it is rounded, which may move a tie
    assert error(dx, blocks(dy, name) @ tiles.T) < 2e-3
    np.testing.assert_allclose(dw, blocks(x.T, name) @ blocks(dy.T, name).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_straight_through_with_a_full_backward_pass(name):
    x, w, dy = operands()
    _, dx, dw = gradients(x, w, dy, name, name, "full")
    np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ blocks(w, name, True).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.asarray(x, np.float64).T @ np.asarray(dy), rtol=1e-4, atol=1e-4)


def test_ternary_codes_are_exact_in_dx(key):
    """Only dy is rounded: with dy of exact levels, dx and the int8 forward are those of ternary."""
    x, w, _ = operands()
    rng = np.random.default_rng(3)
    dy = jnp.asarray(rng.choice([-6, -3, -1, -0.5, 0, 1, 2, 4], (64, 64)), jnp.float32).at[:, ::16].set(6.0)
    dy = dy.at[::16].set(6.0)
    y, dx, dw = gradients(x, w, dy, "ternary", "int8", "mxfp4", key=key)
    want_y, want_dx, want_dw = gradients(x, w, dy, "ternary", "int8")
    np.testing.assert_array_equal(y, want_y)
    assert 0.5 * error(dw, want_dw) < error(blocks(x.T, "mxfp4"), np.asarray(x).T) < 2 * error(dw, want_dw)
    y, dx, _ = gradients(x, w / jnp.abs(w).mean(), dy, "ternary", "int8", "mxfp4", key=key)
    want_dx = gradients(x, w / jnp.abs(w).mean(), dy, "ternary", "int8")[1]
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-4)  # gamma 1: levels stay levels


@pytest.mark.parametrize("name", fp4.FORMATS)
@pytest.mark.parametrize("how", [PLAIN, dataclasses.replace(PLAIN, stochastic="gradient")])
def test_exact_levels_pass_unharmed(name, how, key):
    """Operands of levels with a 6 in every block give the plain gradients: nothing else is lost."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.choice(fp4.LEVELS, s)) for s in ((64, 32), (32, 64), (64, 64)))
    x, w, dy = (v.at[::16].set(6.0).at[:, ::16].set(6.0) for v in (x, w, dy))
    plain, ours = gradients(x, w, dy), gradients(x, w, dy, grad=name, how=how, key=key)
    if name == "mxfp4" and how.stochastic != "none":  # at 3/4 of the size 6 is no level
        assert not np.allclose(ours[1], plain[1], rtol=1e-6)
    else:
        for got, want in zip(ours, plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)


def biases(name, how, draws=600):
    """Largest distance of each mean gradient from the exact one, in standard errors."""
    x, w, dy = operands(48, 32, 32)  # 48 tokens are filled up to a multiple of 32
    keys = jax.random.split(jax.random.key(5), draws)
    many = jax.jit(jax.vmap(lambda key: gradients(x, w, dy, grad=name, how=how, key=key)[1:]))(keys)
    exact = (np.asarray(dy, np.float64) @ np.asarray(w).T, np.asarray(x, np.float64).T @ np.asarray(dy))
    for got, want in zip(many, exact, strict=True):
        got = np.asarray(got, np.float64)
        yield np.max(np.abs(got.mean(0) - want) / (got.std(0) / np.sqrt(draws) + 1e-6))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("nvfp4", Fp4Config(operands="gradient")),
        ("mxfp4", Fp4Config(operands="gradient", hadamard=0)),
        ("nvfp4", Fp4Config(stochastic="both", hadamard=32, rotated="both", signs="random")),
        ("mxfp4", Fp4Config(stochastic="both", hadamard=32)),
    ],
)
def test_gradients_are_right_on_average(name, how):
    assert all(distance < 5 for distance in biases(name, how))  # 2560 entries: 4 happens


def test_nearest_rounding_is_not_right_on_average():
    """The same check sees the bias of nearest rounding, under signs that vary."""
    how = Fp4Config(stochastic="none", hadamard=32, rotated="both", signs="random")
    assert all(distance > 7 for distance in biases("mxfp4", how))


def test_errors_of_gradients_are_those_of_their_operands(key):
    """Independent errors add up in squares: nearest 0.095 for x and w, stochastic 0.149 for dy: 0.177."""
    x, w, dy = operands(256, 64, 64)
    _, dx, dw = gradients(x, w, dy, grad="nvfp4", how=Fp4Config(), key=key)
    assert abs(error(dw, np.asarray(x, np.float64).T @ np.asarray(dy)) - 0.177) < 0.01
    assert abs(error(dx, np.asarray(dy, np.float64) @ np.asarray(w).T) - 0.177) < 0.01


def test_the_two_products_round_independently(key):
    """With x = w = 1 both are Q(dy): their errors are unrelated, and each repeats with its key."""
    one, dy = jnp.eye(64), operands(64, 64, 64)[2]
    dy = dy + dy.T  # so that equal bits would show although dw takes dy transposed
    how = Fp4Config(operands="gradient", hadamard=0)
    _, dx, dw = gradients(one, one, dy, grad="nvfp4", how=how, key=key)
    a, b = np.asarray(dx - dy), np.asarray(dw - dy)
    assert a.std() > 0.1 and b.std() > 0.1
    assert all(
        abs(np.corrcoef(a.ravel(), v.ravel())[0, 1]) < 7 / 64 for v in (b, b.T)
    )  # 1.65 / 64 is one sigma
    for got, want in zip(gradients(one, one, dy, grad="nvfp4", how=how, key=key)[1:], (dx, dw), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("product", ["dgrad", "wgrad"])
def test_one_product_alone(product, key):
    x, w, dy = operands()
    how = Fp4Config(products=product)
    plain, both = gradients(x, w, dy), gradients(x, w, dy, grad="nvfp4", how=Fp4Config(), key=key)
    got = gradients(x, w, dy, grad="nvfp4", how=how, key=key)
    for i, name in ((1, "dgrad"), (2, "wgrad")):
        np.testing.assert_array_equal(got[i], (both if name == product else plain)[i])


def test_bfloat16_operands(key):
    x, w, dy = (v.astype(jnp.bfloat16) for v in operands())
    y, dx, dw = gradients(x, w.astype(jnp.float32), dy, "nvfp4", "nvfp4", "nvfp4", key=key)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, w, dy = (v.astype(jnp.float32) for v in (x, w, dy))
    want = gradients(x, w, dy, "nvfp4", "nvfp4", "nvfp4", key=key)
    assert all(error(a, b) < 0.004 for a, b in zip((y, dx, dw), want, strict=True))


def test_a_key_is_asked_for():
    x, w, dy = operands()
    with pytest.raises(ValueError, match="gradients in nvfp4 need a key"):
        gradients(x, w, dy, grad="nvfp4")


# --- projections


def test_presets_are_those_of_the_settings():
    assert tuple(projections.PRESETS) == validation.QUANT_PRESETS


def test_sizes_that_blocks_do_not_divide_name_the_role():
    x = jnp.ones((4, 24))
    for slot in ("weight", "act"):
        project = Project(((".*", Precision(**{slot: "nvfp4"})),))
        with pytest.raises(
            ValueError, match="'mlp/up' has a weight of 24 x 16, and nvfp4 needs multiples of 16"
        ):
            project("mlp/up", x, jnp.ones((24, 16)))
    with pytest.raises(ValueError, match="'attn/k' has a weight of 24 x 48, and mxfp4 needs multiples of 32"):
        Project(((".*", Precision(grad="mxfp4")),)).several(("attn/k",), x, (jnp.ones((24, 48)),))
    with pytest.raises(
        ValueError, match="precision slot 'grad': unknown format 'fp4'; known: full, fp8, int8, nvfp4, mxfp4"
    ):
        Precision(grad="fp4")


@pytest.mark.parametrize("name", ["full", "ternary", "fp8", "fp4_rows"])
def test_presets_that_draw_nothing_take_no_key(name, key):
    project = Project(projections.PRESETS[name])
    assert project.keyed(key) is project and project.at(3) is project


def test_spared_layers_keep_ternary_and_lose_fp4_and_fp8():
    for name, rules in projections.PRESETS.items():
        slots = {slot for _, p in Project(rules).spared().rules for slot in (p.weight, p.act, p.grad)}
        assert slots == ({"full", "ternary", "int8"} if "ternary" in name else {"full"})


def test_settings_of_rows_reach_their_products():
    """The share of outliers, and the estimator in the weight's gradient, through a role."""
    x, w, dy = operands(16, 32, 32)

    def run(**settings):
        project = Project(projections.PRESETS["fp4_rows"], how=Fp4Config(**settings))
        y, pullback = jax.vjp(lambda w: project("mlp/up", x, w), w)
        return np.asarray(y), np.asarray(pullback(dy)[0])

    (y, dw), (plain, _), (_, through) = run(), run(outliers=0.0), run(estimator=1.0)
    assert np.any(y != plain) and np.any(dw != through)


def test_the_policy_by_module():
    assert Project(projections.PRESETS["fp8_nvfp4"]).low_formats() == ["nvfp4", "fp8"]
    assert not Project(projections.PRESETS["ternary"]).low_formats()
    project = Project(projections.PRESETS["fp8_nvfp4"])
    assert project.precision("attn/o") == Precision("fp8", "fp8", "fp8")
    assert project.precision("mlp/down") == Precision("nvfp4", "nvfp4", "nvfp4")
    assert project.precision("mtp/join") == Precision()


def test_every_role_layer_and_step_draws_its_own_noise():
    x, w, dy = operands(32, 32, 32)
    project = Project(projections.PRESETS["nvfp4_grad"])

    @functools.partial(jax.jit, static_argnames="role")
    def gradient(project, layer, role="mlp/up"):
        return jax.vjp(lambda x: project.at(layer)(role, x, w), x)[1](dy)[0]

    first, second = (project.keyed(jax.random.key(k)) for k in (0, 1))
    draws = [gradient(first, 0), gradient(first, 1), gradient(second, 0), gradient(first, 0, role="mlp/down")]
    for a, b in itertools.combinations(draws, 2):
        assert np.any(np.asarray(a) != np.asarray(b))
    np.testing.assert_array_equal(gradient(first, 0), draws[0])
    assert np.all(np.isfinite(gradient(project, 0)))  # without a key too


def test_roles_that_share_their_input_have_their_own_scales(key):
    """A large dy of one role changes nothing in the gradient of another."""
    x, w, dy = operands(32, 32, 32)
    project = Project(projections.PRESETS["nvfp4"]).keyed(key)
    roles = ("attn/q", "attn/k")
    pullback = jax.jit(lambda dys: jax.vjp(lambda ws: project.several(roles, x, ws), (w, 2 * w))[1](dys)[0])
    (one, _), (other, _) = pullback((dy, dy)), pullback((dy, 1000 * dy))
    np.testing.assert_array_equal(one, other)
    alone = jax.jit(lambda: jax.vjp(lambda w: project("attn/q", x, w), w)[1](dy)[0])()
    np.testing.assert_array_equal(one, alone)


# --- the model


def batch_of(cfg, B=2, L=16):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (B, L + 1)), jnp.int32)
    ones = jnp.ones((B, L), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((B, L)), ones, positions)


@pytest.mark.slow
def test_training_in_nvfp4_lowers_the_loss(tiny, key):
    cfg = dataclasses.replace(tiny, layers=1, mlp="relu2", quant="nvfp4")
    loss_fn = losses.make_loss(cfg, (("next_token", 1.0),))
    tx = optax.adam(1e-2)
    state = new_state(params.init_params(transformer.param_specs(cfg), key), tx)
    step, batch, seen = jax.jit(make_train_step(loss_fn, tx, seed=0)), batch_of(cfg), []
    for _ in range(20):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss/total"]))
    assert seen[-1] < 0.5 * seen[0], seen


@pytest.mark.parametrize("quant", ["fp8", "fp4_rows", "fp8_nvfp4"])
def test_other_low_precision_stays_near_full_precision(tiny, key, quant):
    """Loss within 2 % of full precision at the start, gradients in its direction."""
    cfg = dataclasses.replace(tiny, layers=1, mlp="relu2")
    weights, batch = params.init_params(transformer.param_specs(cfg), key), batch_of(cfg)
    weights = {**weights, "head": weights["head"] * 100} if "head" in weights else weights

    def run(name):
        loss_fn = losses.make_loss(dataclasses.replace(cfg, quant=name), (("next_token", 1.0),))
        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(weights, batch, key)
        return float(loss), params.flatten(grads["blocks"])

    (loss, grads), (exact, wanted) = run(quant), run("full")
    assert loss != exact and abs(loss / exact - 1) < 0.02
    for path, g in grads.items():
        if g.ndim == 3:
            cosine = jnp.vdot(g, wanted[path]) / (jnp.linalg.norm(g) * jnp.linalg.norm(wanted[path]))
            assert 0.5 < float(cosine) < 1 - 1e-7, (path, float(cosine))


def test_further_tokens_are_predicted_in_full_precision(tiny, key):
    """The layers of multi-token prediction are last layers: FP4 leaves them alone."""
    terms = (("next_token", 1.0), ("mtp", 0.2))
    full = dataclasses.replace(tiny, layers=1, mtp=MtpConfig(1))
    weights, batch = params.init_params(transformer.param_specs(full), key), batch_of(full)

    def traced(quant):
        loss_fn = losses.make_loss(dataclasses.replace(full, quant=quant), terms)
        return str(jax.make_jaxpr(jax.grad(loss_fn, has_aux=True))(weights, batch, key)).count("f8_e4m3fn")

    depth_0 = dataclasses.replace(full, mtp=MtpConfig(), quant="nvfp4")
    plain = jax.make_jaxpr(jax.grad(losses.make_loss(depth_0, terms[:1]), has_aux=True))
    assert traced("nvfp4") == str(plain(weights, batch, key)).count("f8_e4m3fn") > 0
    assert traced("full") == 0


@pytest.mark.parametrize(("outside", "ratio"), [("full", 2), ("same", 4)])
def test_first_and_last_layers_are_spared(tiny, key, outside, ratio):
    """Two layers of four, or all four: counted by their rounded operands."""

    def traced(**changes):
        cfg = dataclasses.replace(tiny, quant="fp8", unroll=0, **changes)
        weights, batch = params.init_params(transformer.param_specs(cfg), key), batch_of(cfg)
        run = lambda p: transformer.forward(cfg, projections.from_config(cfg), p, batch).hidden  # noqa: E731
        return str(jax.make_jaxpr(run)(weights)).count("f8_e4m3fn")

    one = traced(layers=1)
    assert traced(layers=2, loop=LoopConfig(before=1, after=1), fp4=Fp4Config(outside=outside)) == ratio * one


def test_the_key_of_the_step_reaches_the_rounding(tiny, key):
    cfg = dataclasses.replace(tiny, layers=1, quant="nvfp4_grad")
    loss_fn = losses.make_loss(cfg, (("next_token", 1.0),))
    weights = params.init_params(transformer.param_specs(cfg), key)
    traced = jax.make_jaxpr(jax.grad(loss_fn, has_aux=True))(weights, batch_of(cfg), key)
    (key_variable,) = traced.jaxpr.invars[-1:]
    assert any(key_variable in equation.invars for equation in traced.jaxpr.eqns)
