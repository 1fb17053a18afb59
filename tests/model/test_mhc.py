"""Residual streams: the mixing matrices against float64, and what the whole model keeps of its properties."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from nanochat_jax import config as config_lib
from nanochat_jax import losses, optim, parallel
from nanochat_jax import params as params_lib
from nanochat_jax.config import LoopConfig, MhcConfig, ModelConfig
from nanochat_jax.model import block, mhc, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

TINY = ModelConfig(vocab_size=32, dim=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_dim=32)
FORMS = {
    "sinkhorn": MhcConfig(4, iterations=20),
    "permutation": MhcConfig(4, "permutation"),
    "unconstrained": MhcConfig(4, "unconstrained"),
    "static": MhcConfig(3, iterations=5, dynamic=False),
}
ALIKE = hypothesis.settings(max_examples=25, deadline=None)


def streams(form, **changes):
    return dataclasses.replace(TINY, mhc=FORMS[form], **changes)


def rows(length=12, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, 32, (batch, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    ones = jnp.ones_like(tokens)
    return Batch(tokens, jnp.roll(tokens, -1, 1), ones / tokens.size, ones, positions)


def initial(cfg, noise=0.0):
    """Initial parameters; with noise on all, which makes mixing coefficients of every kind."""
    specs = transformer.param_specs(cfg)
    random = jax.tree.map(lambda s: dataclasses.replace(s, init=params_lib.normal(noise)), specs)
    made = (params_lib.init_params(t, jax.random.key(i)) for i, t in enumerate((specs, random)))
    return jax.tree.map(jnp.add, *made)


@functools.partial(jax.jit, static_argnums=0)
def output(cfg, params, batch):
    return transformer.forward(cfg, projections.from_config(cfg), params, batch)


@functools.partial(jax.jit, static_argnums=0)
def gradient(cfg, params, batch):
    loss_fn = losses.make_loss(cfg, (("next_token", 1.0),))
    return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, jax.random.key(0))


def one_layer(cfg, scale, seed=0):
    """Random parameters of one connection (no layer axis) with logits of about `scale`."""
    rng = np.random.default_rng(seed)
    S, Q = cfg.streams, mhc.coefficient_count(cfg)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"phi": draw(S * 8, Q) / np.sqrt(8 * S), "bias": scale * draw(Q), "alpha": scale * (0.5 + draw(3))}


# --- Sinkhorn


def oracle(logits, iterations):
    """The definition, in float64, without logarithms (the largest entry is 1, so nothing overflows)."""
    m = np.exp(np.asarray(logits, np.float64) - np.max(logits, (-2, -1), keepdims=True))
    for _ in range(iterations):
        m = m / m.sum(-2, keepdims=True)
        m = m / m.sum(-1, keepdims=True)
    return m


matrices = st.builds(
    lambda size, std, seed: std * np.random.default_rng(seed).normal(size=(3, size, size)).astype(np.float32),
    st.sampled_from((2, 4)), st.sampled_from((0.01, 1.0, 3.0, 10.0)), st.integers(0, 2**31),
)  # fmt: skip
sinkhorn = jax.jit(mhc.sinkhorn, static_argnums=1)


@ALIKE
@hypothesis.given(matrices, st.sampled_from((1, 5, 20)))
def test_sinkhorn_is_its_definition(logits, iterations):
    got = np.asarray(sinkhorn(logits, iterations), np.float64)
    np.testing.assert_allclose(got, oracle(logits, iterations), atol=2e-5)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


def test_sinkhorn_reaches_its_limit_unless_logits_spread():
    """The limit is known from 2000 float64 iterations; 20 reach it near the start, not at spread logits."""
    errors = []
    for std in (0.01, 1.0, 6.0):
        logits = std * np.random.default_rng(0).normal(size=(2000, 4, 4)).astype(np.float32)
        got = np.asarray(sinkhorn(logits, 20))
        errors.append(np.abs(got.sum(-2) - 1).max())
        if std < 2:
            assert np.abs(got - oracle(logits, 2000)).max() < 1e-3
    assert errors[0] < 1e-6 and errors[1] < 1e-3 and 1e-2 < errors[2] < 0.5


@ALIKE
@hypothesis.given(matrices, st.randoms(use_true_random=False))
def test_sinkhorn_commutes_with_permutations(logits, random):
    size = logits.shape[-1]
    i, j = (random.sample(range(size), size) for _ in range(2))
    moved = sinkhorn(logits[:, i][:, :, j], 20)
    np.testing.assert_allclose(moved, sinkhorn(logits, 20)[:, jnp.array(i)][:, :, jnp.array(j)], atol=1e-6)


@pytest.mark.parametrize(("std", "iterations"), [(1.0, 20), (3.0, 20), (1.0, 3)])
def test_gradient_of_sinkhorn_is_that_of_its_definition(std, iterations):
    rng = np.random.default_rng(1)
    logits, weight = std * rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 4))
    want = np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        bump = np.zeros_like(logits)
        bump[index] = 1e-5
        sides = [np.sum(weight * oracle(logits + sign * bump, iterations)) for sign in (1, -1)]
        want[index] = (sides[0] - sides[1]) / 2e-5
    got = jax.grad(lambda a: jnp.sum(weight * mhc.sinkhorn(a, iterations)))(logits.astype(np.float32))
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[80.0, -80, 80], [-80, -80, -80], [0, -80, 80]])
    value, slope = jax.value_and_grad(lambda a: jnp.sum(mhc.sinkhorn(a, 20)[0] ** 2))(logits)
    assert np.isfinite(value) and np.all(np.isfinite(slope))
    np.testing.assert_allclose(mhc.sinkhorn(logits, 20).sum(-1), 1, atol=1e-6)


# --- permutation mixture


@ALIKE
@hypothesis.given(st.sampled_from((2, 3, 4)), st.sampled_from((0.1, 3.0, 30.0)), st.integers(0, 2**31))
def test_permutation_mixture_is_doubly_stochastic(size, std, seed):
    count = len(list(itertools.permutations(range(size))))
    theta = std * np.random.default_rng(seed).normal(size=(5, count))
    got = np.asarray(mhc.permutation_mixture(jnp.asarray(theta, jnp.float32)))
    assert np.all(got >= 0)
    for axis in (-1, -2):
        np.testing.assert_allclose(got.sum(axis), 1, atol=6e-7)
    share = np.exp(theta - theta.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    want = np.zeros((5, size, size))
    for k, order in enumerate(itertools.permutations(range(size))):
        for row, column in enumerate(order):
            want[:, row, column] += share[:, k]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_every_permutation_is_reached_and_the_first_is_the_identity():
    chosen = mhc.permutation_mixture(200 * jnp.eye(24))
    np.testing.assert_array_equal(chosen[0], np.eye(4))
    assert len({np.asarray(p).tobytes() for p in chosen}) == 24
    assert np.all(np.sort(chosen, -1)[..., -1] == 1) and np.all(chosen.sum(1) == 1)
    with pytest.raises(ValueError, match=r"expected S! logits for S in 2..6, got 5"):
        mhc.permutation_mixture(jnp.zeros(5))


def test_two_streams_mix_by_one_sigmoid():
    logits = jnp.array([[0.3, -1.2], [4.0, 9.0]])
    a = jax.nn.sigmoid(logits[:, 0] - logits[:, 1])
    want = jnp.stack([jnp.stack([a, 1 - a], -1), jnp.stack([1 - a, a], -1)], -2)
    np.testing.assert_allclose(mhc.permutation_mixture(logits), want, atol=1e-6)


# --- one sublayer


@pytest.mark.parametrize("form", ["sinkhorn", "permutation", "unconstrained"])
def test_coefficients_read_and_write_are_the_equations(form):
    """Against float64, token by token, with one formula a line."""
    cfg, S = FORMS[form], 4
    p = one_layer(cfg, 0.7)
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 3, S, 8)).astype(np.float32), rng.normal(size=(2, 3, 8)).astype(np.float32)
    mix = mhc.coefficients(cfg, p, x)
    h, out = mhc.read(mix, x), mhc.write(mix, x, y)
    phi, bias, alpha = (np.asarray(p[name], np.float64) for name in ("phi", "bias", "alpha"))
    for b, t in itertools.product(range(2), range(3)):
        v = np.concatenate([x[b, t, s] for s in range(S)]).astype(np.float64)
        a = v / np.sqrt(np.mean(v**2) + 1e-6) @ phi
        a = np.tanh(a) if form == "unconstrained" else a
        pre = alpha[0] * a[:S] + bias[:S]
        post = alpha[1] * a[S : 2 * S] + bias[S : 2 * S]
        res = alpha[2] * a[2 * S :] + bias[2 * S :]
        if form != "unconstrained":
            pre, post = 1 / (1 + np.exp(-pre)), 2 / (1 + np.exp(-post))
        if form == "permutation":
            weight = np.exp(res) / np.exp(res).sum()
            orders = list(itertools.permutations(range(S)))
            R = sum(w * np.eye(S)[list(order)] for w, order in zip(weight, orders, strict=True))
        else:
            R = res.reshape(S, S)
            R = oracle(R, 20) if form == "sinkhorn" else R
        np.testing.assert_allclose(mix.res[b, t], R, atol=2e-5)
        np.testing.assert_allclose(h[b, t], pre @ x[b, t], atol=2e-5)
        np.testing.assert_allclose(out[b, t], R @ x[b, t] + np.outer(post, y[b, t]), atol=5e-5)


@pytest.mark.parametrize("form", ["sinkhorn", "permutation"])
def test_constrained_mixing_keeps_the_mean_and_amplifies_nothing(form):
    cfg = FORMS[form]
    x = jax.random.normal(jax.random.key(0), (2, 50, 4, 8))
    mix = mhc.coefficients(cfg, one_layer(cfg, 1.0), x)
    silent = mix._replace(post=jnp.zeros_like(mix.post))
    moved = mhc.write(silent, x, jnp.ones((2, 50, 8)))
    tolerance = 5e-3 if form == "sinkhorn" else 1e-6  # columns of 20 iterations are not exact
    np.testing.assert_allclose(moved.mean(2), x.mean(2), atol=tolerance)
    assert np.all(np.linalg.norm(moved, axis=(2, 3)) <= np.linalg.norm(x, axis=(2, 3)) * (1 + tolerance))
    same = jnp.broadcast_to(x[:, :, :1], x.shape)
    np.testing.assert_allclose(mhc.write(silent, same, x[:, :, 0]), same, atol=1e-5)


@pytest.mark.parametrize("form", ["sinkhorn", "permutation", "unconstrained"])
def test_gain_over_many_sublayers(form):
    """64 random sublayers: the constrained products stay near 1, the others drift; against float64."""
    cfg = FORMS[form]
    x = jax.random.normal(jax.random.key(0), (2, 30, 4, 8))
    seen, product = mhc.watch(cfg, (2, 30)), np.broadcast_to(np.eye(4), (2, 30, 4, 4))

    @jax.jit
    def advance(p, seen):
        mix = mhc.coefficients(cfg, p, x)
        return mix.res, mhc.observe(seen, mix)

    for layer in range(64):
        res, seen = advance(one_layer(cfg, 1.5, layer), seen)
        product = np.asarray(res, np.float64) @ product
    weights = jnp.zeros((2, 30)).at[1, 7].set(0.25).at[0, 3].set(0.75)
    got = mhc.metrics(seen, x, weights)
    each = [0.75 * np.abs(product[0, 3]).sum(axis).max() + 0.25 * np.abs(product[1, 7]).sum(axis).max()
            for axis in (1, 0)]  # fmt: skip
    np.testing.assert_allclose(got["mhc/gain_forward"], each[0], rtol=1e-4)
    np.testing.assert_allclose(got["mhc/gain_backward"], each[1], rtol=1e-4)
    assert got["mhc/gain"] >= max(each) * (1 - 1e-4)
    if form == "unconstrained":
        assert got["mhc/gain"] > 100
    else:
        assert abs(got["mhc/gain"] - 1) < 0.02 and abs(got["mhc/gain_forward"] - 1) < 1e-5
        assert (got["mhc/sum_error"] < 1e-6) == (form == "permutation")
    slope = jax.grad(lambda p: sum(mhc.metrics(advance(p, seen)[1], x, weights).values()))(
        one_layer(cfg, 1.5)
    )
    assert not any(np.any(leaf) for leaf in slope.values())  # watching has no gradient
    rms = np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), (2, 3)))
    np.testing.assert_allclose(got["mhc/stream_rms"], 0.75 * rms[0, 3] + 0.25 * rms[1, 7], rtol=1e-5)


def test_coefficients_of_a_token_depend_on_that_token():
    cfg = FORMS["sinkhorn"]
    p, x = one_layer(cfg, 1.0), jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    one, other = (mhc.coefficients(cfg, p, a) for a in (x, x.at[1, 3].add(1.0)))
    for a, b in zip(one, other, strict=True):
        differs = np.any(np.asarray(a != b).reshape(2, 6, -1), -1)
        assert differs[1, 3] and differs.sum() == 1


def test_coefficients_are_float32_and_streams_keep_their_dtype():
    cfg = FORMS["sinkhorn"]
    p, x = one_layer(cfg, 1.0), jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    y, coarse = x[:, :, 0], x.astype(jnp.bfloat16)
    mix = mhc.coefficients(cfg, p, coarse)
    assert {a.dtype for a in mix} == {jnp.dtype("float32")}
    np.testing.assert_allclose(mix.res.sum(-1), 1, atol=1e-6)  # bfloat16 rows would be off by 1e-3
    h, out = mhc.read(mix, coarse), mhc.write(mix, coarse, y.astype(jnp.bfloat16))
    assert h.dtype == out.dtype == jnp.bfloat16
    exact = mhc.write(mix, coarse.astype(jnp.float32), y.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)  # rounded once


def kept_bytes(f, *args):
    """Bytes that the backward pass of f keeps, without its arguments."""
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *args))
    size = lambda leaves: sum(a.size * a.dtype.itemsize for a in leaves)  # noqa: E731
    return size(kept) - size(jax.tree.leaves(args))


def test_the_backward_pass_computes_again_instead_of_storing():
    B, L, D = 2, 32, 128
    sizes = {}
    for iterations in (2, 20):
        cfg = MhcConfig(4, iterations=iterations)
        p = {"phi": jnp.zeros((4 * D, 24)), "bias": jnp.zeros(24), "alpha": jnp.zeros(3)}

        def sublayer(p, x, cfg=cfg):
            mix = mhc.coefficients(cfg, p, x)
            return mhc.write(mix, x, jnp.sin(mhc.read(mix, x)))

        sizes[iterations] = kept_bytes(sublayer, p, jnp.zeros((B, L, 4, D), jnp.bfloat16))
    assert sizes[2] == sizes[20]
    # y and the sine's own input, and the numbers of `coefficients`, kept before and after the mapping.
    assert 0 <= sizes[20] <= B * L * (2 * 2 * D + 2 * 4 * 24) + 1024


# --- the model


def plain_layer(cfg, project, context, tokens, i, carry, x0, p, kv):
    """The block without streams."""
    x, scale = carry[0], p.get("scale", {})
    if "residual" in scale:
        x = scale["residual"].astype(x.dtype) * x
    if "x0" in scale:
        x = x + scale["x0"].astype(x.dtype) * x0
    y, kv = block.attention(cfg, project, context, tokens, i, x, p["attn"], p["value"], kv)
    x = x + y
    return (x + block.mlp(cfg, project, x, p["mlp"]), None), kv


def test_one_stream_is_the_model_without_streams(monkeypatch):
    """The same program, operation by operation."""
    cfg = dataclasses.replace(
        TINY, **config_lib.BLOCKS["modern"], loop=LoopConfig(2, norm=True), mhc=MhcConfig(1)
    )
    specs, batch = transformer.param_specs(cfg), rows()
    assert not any("mhc" in path for path in params_lib.flatten(specs))
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
    run = lambda p: transformer.forward(cfg, projections.from_config(cfg), p, batch)  # noqa: E731
    one = str(jax.make_jaxpr(run)(params))
    assert jax.eval_shape(run, params).aux == {}
    monkeypatch.setattr(block, "layer", plain_layer)
    assert str(jax.make_jaxpr(run)(params)) == one


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sinkhorn", "permutation", "static"])
def test_start_is_sane_and_every_connection_learns(form):
    """The first loss is that of guessing; gradients reach biases and projections at once, and alphas
    as soon as the projections have moved."""
    cfg, batch = streams(form), rows()
    params = initial(cfg)
    (loss, metrics), grads = gradient(cfg, params, batch)
    assert abs(float(loss) - np.log(32)) < 0.05
    assert abs(float(metrics["mhc/gain"]) - 1) < 1e-5
    connections = {k: g for k, g in params_lib.flatten(grads).items() if "/mhc/" in k and "alpha" not in k}
    assert len(connections) == (2 if form == "static" else 4)
    for path, g in connections.items():
        size, S = np.abs(np.asarray(g, np.float64)), cfg.mhc.streams
        assert np.all(np.isfinite(size)) and all(
            part.max() > 1e-12 for part in np.split(size, (S, 2 * S), -1)
        ), path
    if form != "static":
        moved = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, grads)
        _, grads = gradient(cfg, moved, batch)
        for part in ("attn", "mlp"):
            assert np.all(np.abs(np.asarray(grads["blocks"][part]["mhc"]["alpha"])).max(0) > 1e-9)


def final_streams(cfg, params, batch, monkeypatch):
    """Streams behind the last layer [B, L, S, D]."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(mhc, "collapse", lambda c, x: (caught.append(x), x.mean(2))[1])
        run = jax.jit(lambda p: (transformer.forward(cfg, projections.from_config(cfg), p, batch), caught)[1])
        return np.asarray(run(params)[0])


@pytest.mark.slow
@pytest.mark.parametrize("broken", [True, False])
def test_streams_differ_because_the_start_breaks_their_symmetry(broken, monkeypatch):
    """With equal biases and no projection the streams stay copies for ever: what the start must prevent."""
    cfg = streams("sinkhorn")
    params = initial(cfg)
    if not broken:
        for part in ("attn", "mlp"):
            bias = params["blocks"][part]["mhc"]["bias"]
            params["blocks"][part]["mhc"]["bias"] = bias.at[:, :8].set(0.3)
    tx = optax.adam(0.01)
    state = tx.init(params)
    for step in range(10):
        _, grads = gradient(cfg, params, rows(seed=step))
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    x = final_streams(cfg, params, rows(), monkeypatch)
    apart = np.sqrt(np.mean((x - x.mean(2, keepdims=True)) ** 2)) / np.sqrt(np.mean(x**2))
    if broken:
        assert apart > 0.03
        assert (
            min(np.abs(x[:, :, i] - x[:, :, j]).max() for i, j in itertools.combinations(range(4), 2)) > 1e-3
        )
    else:
        assert apart < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_relabeling_streams_changes_nothing(form):
    cfg, batch = streams(form), rows()
    params = initial(cfg, 0.3)
    S, D = cfg.mhc.streams, cfg.dim
    order = np.array([2, 0, 1, 3][:S])
    table = mhc.permutations(S)
    if form == "permutation":  # P_k between relabeled streams is another of the permutations
        moved = table[:, order][:, :, order]
        res = np.array([next(k for k in range(len(table)) if (table[k] == m).all()) for m in moved])
        res = np.argsort(res)
    else:
        res = np.arange(S * S).reshape(S, S)[order][:, order].reshape(-1)
    columns = np.concatenate([order, S + order, 2 * S + res])
    relabeled = jax.tree.map(lambda a: a, params)
    for part in ("attn", "mlp"):
        p = dict(params["blocks"][part]["mhc"])
        p["bias"] = p["bias"][:, columns]
        if "phi" in p:
            blocks = p["phi"].reshape(cfg.layers, S, D, -1)[:, order]
            p["phi"] = blocks.reshape(cfg.layers, S * D, -1)[..., columns]
        relabeled["blocks"][part]["mhc"] = p
    one, other = output(cfg, params, batch), output(cfg, relabeled, batch)
    np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-4)
    np.testing.assert_allclose(one.aux["mhc/gain"], other.aux["mhc/gain"], rtol=1e-4)


def test_gain_of_the_model_is_that_of_all_its_matrices(monkeypatch):
    """Over layers and loops."""
    cfg = streams("unconstrained", loop=LoopConfig(2, norm=True))
    params, batch, seen = initial(cfg, 0.2), rows(), []
    original = mhc.write
    monkeypatch.setattr(mhc, "write", lambda mix, x, y: (seen.append(mix.res), original(mix, x, y))[1])
    run = jax.jit(lambda p: (transformer.forward(cfg, projections.from_config(cfg), p, batch).aux, seen))
    got, matrices = run(params)
    assert len(matrices) == 2 * 2 * 2
    product = functools.reduce(lambda c, r: np.asarray(r, np.float64) @ c, matrices, np.eye(4))
    for name, axis in (("forward", -1), ("backward", -2)):
        gain = np.abs(product).sum(axis).max(-1).mean()
        np.testing.assert_allclose(got[f"mhc/gain_{name}"], gain, rtol=1e-4)
    assert got["mhc/gain"] > 1.1


def test_scan_and_rematerialization_change_no_gradient():
    cfg = streams("sinkhorn")
    params, batch = initial(cfg, 0.3), rows()
    (_, metrics), grads = gradient(cfg, params, batch)
    (_, again), others = gradient(dataclasses.replace(cfg, unroll=1, remat="block"), params, batch)
    np.testing.assert_allclose(metrics["mhc/gain"], again["mhc/gain"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * (1e-2 + float(jnp.abs(b).max())))


def test_norm_between_loops_keeps_relative_sizes_of_streams():
    cfg = MhcConfig(4)
    x = jnp.arange(1, 5, dtype=jnp.float32)[None, None, :, None] * jax.random.normal(
        jax.random.key(0), (2, 3, 4, 8)
    )
    y = mhc.rms_norm(cfg, x, jnp.full(8, 2.0), 1e-6)
    np.testing.assert_allclose(np.mean(np.square(y), (2, 3)), 4, rtol=1e-5)
    ratio = np.asarray(y) / np.asarray(x)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :, :1, :1], ratio.shape), rtol=1e-5)


def test_connections_belong_to_the_scalar_group():
    """Muon would orthogonalize phi and rescale it."""
    cfg = streams("sinkhorn")
    labels = params_lib.flatten(optim.labels(transformer.param_specs(cfg)))
    assert {name for path, name in labels.items() if "/mhc/" in path} == {"scalar"}
    assert sum("/mhc/" in path for path in labels) == 6


@pytest.mark.slow
def test_pieces_of_a_batch_add_up_and_devices_agree():
    """Loss and gains, with tokens of unequal weight; two batches are one trace."""
    cfg = streams("sinkhorn")
    params, batch = initial(cfg, 0.3), rows()
    batch = batch.replace(weights=batch.weights.at[2:, 5:].set(0))
    (_, whole), slope = gradient(cfg, params, batch)
    traces = gradient._cache_size()
    (_, other), _ = gradient(cfg, params, rows(seed=1))
    assert gradient._cache_size() == traces and other["mhc/gain"] != whole["mhc/gain"]
    pieces = [gradient(cfg, params, jax.tree.map(lambda a: a[i::2], batch))[0][1] for i in range(2)]  # noqa: B023
    mesh = parallel.mesh(config_lib.MeshConfig(data=2, fsdp=2))
    placed = jax.device_put(params, parallel.param_shardings(transformer.param_specs(cfg), mesh))
    assert placed["blocks"]["attn"]["mhc"]["phi"].addressable_shards[0].data.shape == (2, 32, 24)
    (_, spread), spread_slope = gradient(cfg, placed, jax.device_put(batch, parallel.batch_sharding(mesh)))
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[0][name] + pieces[1][name], value, rtol=2e-5)
        np.testing.assert_allclose(spread[name], value, rtol=2e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(spread_slope), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * (1e-2 + float(jnp.abs(a).max())))
