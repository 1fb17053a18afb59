"""Loops, exit gate and adaptive exit against a model in NumPy float64, and against plain formulas."""

import dataclasses
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from nanochat_jax import losses, optim
from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, LoopConfig, MhcConfig, ModelConfig
from nanochat_jax.evals import loss as eval_loss
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine
from nanochat_jax.model import flops, loop, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

V, B, L, R = 40, 2, 9, 3
SMALL = ModelConfig(
    vocab_size=V, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=24, dtype="float32"
)
FULL = LoopConfig(count=R, norm=True, before=1, after=1, inject="add", gate="shared")
CFG = dataclasses.replace(SMALL, loop=FULL)
EXIT = (("exit", 1.0), ("exit_entropy", 0.3))


def of(cfg=CFG, **changes):
    return dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, **changes))


@functools.cache
def initial(cfg=CFG):
    """Random weights around 0, gains around 1."""
    rng = np.random.default_rng(1)
    specs = params_lib.flatten(transformer.param_specs(cfg))
    ones = {path: float("norm" in path or path.endswith("residual")) for path in specs}
    values = {path: ones[path] + 0.3 * rng.normal(size=spec.shape) for path, spec in specs.items()}
    leaves = [jnp.asarray(value, jnp.float32) for value in values.values()]
    return jax.tree.structure(transformer.param_specs(cfg)).unflatten(leaves)


def rows(length=L):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (B, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    weights = jnp.asarray(rng.integers(0, 2, tokens.shape), jnp.float32).at[:, 0].set(1)
    return Batch(tokens, jnp.roll(tokens, -1, 1), weights, jnp.ones_like(tokens), positions)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cfg, params, batch, each_loop=True):
    return transformer.forward(cfg, projections.from_config(cfg), params, batch, each_loop=each_loop)


# --- the model in NumPy, float64: layers, loops, gate, and tokens that leave


def norm(x, gain=1.0):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + SMALL.norm_eps) * gain


def rotate(x, positions):
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * SMALL.rope_theta ** (-np.arange(half) / half)
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def numpy_layer(p, x, running, before):
    """One SwiGLU layer. Tokens that do not run have the keys and values `before`, and keep x."""
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    h = norm(x, p["attn"]["norm"])
    q, k, v = ((h @ p["attn"][n]).reshape(*h.shape[:2], -1, SMALL.head_dim) for n in "qkv")
    q, k = rotate(q, positions), rotate(k, positions)
    if before is not None:
        k, v = (np.where(running[..., None, None], new, old) for new, old in zip((k, v), before, strict=True))
    scores = np.einsum("bthk,bshk->bhts", q, k) / SMALL.head_dim**0.5
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("bhts,bshk->bthk", share / share.sum(-1, keepdims=True), v).reshape(*x.shape[:2], -1)
    y = x + y @ p["attn"]["o"]
    h = norm(y, p["mlp"]["norm"])
    gate = h @ p["mlp"]["gate"]
    y = y + (gate / (1 + np.exp(-gate)) * (h @ p["mlp"]["up"])) @ p["mlp"]["down"]
    return np.where(running[..., None], y, x), (k, v)


def numpy_model(cfg, params, tokens, quantile=np.inf, prompt=0):
    """(logits after each loop [R, B, L, V], p [R, B, L], loops of each token [B, L]).

    Tokens from `prompt` on leave at the quantile: their streams and keys then stay as they are."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    tokens = np.asarray(tokens)
    everyone = np.ones(tokens.shape, bool)

    def through(stack, x, running=everyone, before=None):
        size, kept = jax.tree.leaves(stack)[0].shape[0], []
        for i in range(size):
            own = jax.tree.map(lambda a: a[i], stack)  # noqa: B023
            x, kv = numpy_layer(own, x, running, before[i] if before else None)
            kept.append(kv)
        return x, kept

    x = p["embed"][tokens]
    if cfg.loop.before:
        x, _ = through(p["before"], x)
    entered, running, kept, there = x, everyone, None, np.ones(tokens.shape)
    logits, shares, depth = [], [], np.zeros(tokens.shape, int)
    for r in range(1, cfg.loop.count + 1):
        y = x
        if r > 1 and cfg.loop.norm:
            y = norm(y, p["loop"]["norm"])
        if r > 1 and cfg.loop.inject == "add":
            y = y + entered
        if r > 1 and cfg.loop.inject == "linear":
            y = np.concatenate([y, entered], -1) @ p["loop"]["inject"]
        y, kept = through(p["blocks"], y, running, kept)
        x = np.where(running[..., None], y, x)
        depth += running
        out = through(p["after"], x)[0] if cfg.loop.after else x
        logits.append((norm(out, p["norm"]) @ p["head"])[..., :V])
        leave = 1 / (1 + np.exp(-(norm(x) @ p["loop"]["gate"]["w"])[..., 0] - p["loop"]["gate"]["b"][0]))
        shares.append(there * leave if r < cfg.loop.count else there)
        there = there * (1 - leave)
        running = running & ((1 - there < quantile) | (np.arange(tokens.shape[1]) < prompt))
    return np.stack(logits), np.stack(shares), depth


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_states_gate_and_loss_in_float64(key):
    """Logits after each loop, exit probabilities, and the whole objective with its metrics."""
    params, batch = initial(), steps.normalize(rows())
    output = run(CFG, params, batch)
    z, p, _ = numpy_model(CFG, params, batch.tokens)
    got = jax.jit(lambda h: transformer.logits(CFG, params, h))(output.loops)[..., :V]
    np.testing.assert_allclose(got, z, atol=2e-4)
    np.testing.assert_allclose(np.exp(loop.exit_log_probs(output.exits)), p, atol=2e-5)
    np.testing.assert_array_equal(output.hidden, output.loops[-1])
    w, targets = np.asarray(batch.weights, np.float64), np.asarray(batch.targets)
    nll = -np.take_along_axis(log_softmax(z), targets[None, ..., None], -1)[..., 0]
    total, metrics = jax.jit(losses.make_loss(CFG, EXIT, 4))(params, batch, key)
    spread = -(w * p * np.log(p)).sum()
    want = {
        **{f"loss/loop_{r + 1}": (w * nll[r]).sum() for r in range(R)},
        "loss/next_token": (w * nll[-1]).sum(), "loss/exit": (w * p * nll).sum(), "loss/exit_entropy": spread,
        "loop/exit_entropy": spread, "loop/mean_exit": (w * p * np.arange(1, R + 1)[:, None, None]).sum(),
        "loss/entropy": -(w[..., None] * np.exp(log_softmax(z[-1])) * log_softmax(z[-1])).sum(),
    }  # fmt: skip
    assert set(metrics) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(total, want["loss/exit"] - 0.3 * spread, rtol=2e-5)


def test_all_gradients_against_whole_logits(key):
    """Trunk, head and gate; also that a state after r loops learns through its own prediction."""
    params, batch = initial(), steps.normalize(rows())
    loss_fn = losses.make_loss(CFG, EXIT, 4)
    got = jax.jit(jax.grad(lambda p: loss_fn(p, batch, key)[0]))(params)

    def plain(params):
        output = transformer.forward(CFG, projections.from_config(CFG), params, batch, each_loop=True)
        log_q = jax.nn.log_softmax((output.loops @ params["head"])[..., :V])
        each = jnp.broadcast_to(batch.targets, log_q.shape[:-1])[..., None]
        nll = -jnp.take_along_axis(log_q, each, -1)[..., 0]
        leave, there, p = jax.nn.sigmoid(output.exits), 1.0, []
        for r in range(R - 1):
            p, there = [*p, leave[r] * there], there * (1 - leave[r])
        p = jnp.stack([*p, there])
        return jnp.sum(batch.weights[None] * (p * nll + 0.3 * p * jnp.log(p)))

    want = params_lib.flatten(jax.jit(jax.grad(plain))(params))
    for path, value in params_lib.flatten(got).items():
        largest = float(jnp.abs(want[path]).max())
        assert largest > 0, f"{path} has no gradient"
        np.testing.assert_allclose(value, want[path], atol=3e-5 * largest, err_msg=path)


def test_several_streams_persist_through_the_loops():
    """The state after one of two loops is the model with one loop: mixed, not collapsed, between them."""
    cfg = of(dataclasses.replace(CFG, mhc=MhcConfig(2, "permutation")), count=2, gate="none")
    params, batch = initial(cfg), rows()
    output, alone = run(cfg, params, batch), run(of(cfg, count=1), params, batch, False)
    np.testing.assert_allclose(output.loops[0], alone.hidden, atol=1e-5)
    assert alone.loops is None and output.exits is None
    assert not np.allclose(output.loops[1], alone.hidden, atol=0.1)


def test_shared_layers_equal_copies_and_gradients_add_up():
    """before, twice the blocks, after: the same as four layers of which two are copies."""
    options = {name: BLOCKS["modern"][name] for name in ("residual_scalars", "x0_scalars", "mlp")}
    plain = dataclasses.replace(SMALL, **options)
    cfg = dataclasses.replace(plain, loop=LoopConfig(count=2, before=1, after=1))
    deep = dataclasses.replace(plain, layers=4)
    params, batch = initial(cfg), rows()
    parts = [params[name] for name in ("before", "blocks", "blocks", "after")]
    copied = {k: v for k, v in params.items() if k not in ("before", "after")}
    copied["blocks"] = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def loss(c, p):
        return jnp.sum(transformer.forward(c, projections.from_config(c), p, batch).hidden ** 3)

    run = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
    (value, grads), (same, separate) = run(cfg, params), run(deep, copied)
    np.testing.assert_allclose(value, same, rtol=1e-5)
    for path, each in params_lib.flatten(separate["blocks"]).items():
        want = {"before": each[:1], "blocks": each[1:2] + each[2:3], "after": each[3:]}
        for name in want:
            got = params_lib.flatten(grads[name])[path]
            np.testing.assert_allclose(got, want[name], atol=2e-5 * (1 + float(jnp.abs(each).max())))


def test_one_loop_adds_nothing():
    """Names of parameters, and no gate, states or cache beyond the ordinary ones."""
    assert {path.split("/")[0] for path in params_lib.flatten(transformer.param_specs(SMALL))} == {
        "blocks", "embed", "head", "norm"
    }  # fmt: skip
    plain = dataclasses.replace(SMALL, loop=LoopConfig())
    assert plain == SMALL and loop.outside(SMALL) == {} and loop.param_specs(SMALL) == {}
    assert caches.allocate(SMALL, 1, 8).outside == {} and loop.effective_layers(CFG) == 1 + 3 * 1 + 1
    new = set(params_lib.flatten(transformer.param_specs(CFG))) - set(
        params_lib.flatten(transformer.param_specs(SMALL))
    )
    assert {path.split("/")[0] for path in new} == {"before", "after", "loop"}


def test_every_run_of_a_layer_has_its_own_number(monkeypatch):
    """What random rounding is keyed by, counted through prelude, loops, and readouts of every loop."""
    seen, plain = [], transformer._numbered

    def spy(cfg, project, blocks, first):
        seen.extend(range(first, first + cfg.layers))
        return plain(cfg, project, blocks, first)

    monkeypatch.setattr(transformer, "_numbered", spy)
    cfg = of(dataclasses.replace(CFG, layers=2), before=3, after=2)
    shapes = jax.eval_shape(lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0)))
    jax.eval_shape(functools.partial(transformer.forward, cfg, projections.from_config(cfg)), shapes, rows())
    assert seen == list(range(3 + 3 * 2 + 2)) and len(seen) == loop.effective_layers(cfg)
    seen.clear()
    project = projections.from_config(cfg)
    jax.eval_shape(lambda p, b: transformer.forward(cfg, project, p, b, each_loop=True), shapes, rows())
    assert sorted(seen) == list(range(3 + 3 * 2 + 3 * 2))


def test_groups_of_the_weights():
    groups = params_lib.flatten(optim.labels(transformer.param_specs(CFG)))
    for path, spec in params_lib.flatten(transformer.param_specs(CFG)).items():
        if path.split("/")[0] in ("before", "after", "blocks"):
            assert groups[path] == ("matrix" if len(spec.shape) == 3 else "scalar"), path
        elif path.startswith("loop/"):
            assert groups[path] == "scalar", path


# --- the exit distribution


def numpy_exits(logits):
    leave, there, p = 1 / (1 + np.exp(-np.asarray(logits, np.float64))), 1.0, []
    for value in leave[:-1]:
        p.append(value * there)
        there *= 1 - value
    return np.asarray([*p, there])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.floats(0, 1))
def test_exit_distribution_and_quantiles(logits, quantile):
    """Explicit products and cumulative sums in float64; the quantile never takes a token out earlier when
    it is raised."""
    a = jnp.asarray(logits, jnp.float32)
    got, want = np.exp(np.asarray(loop.exit_log_probs(a), np.float64)), numpy_exits(logits)
    assert abs(got.sum() - 1) < 1e-6 and np.isfinite(loop.exit_log_probs(a)).all()
    np.testing.assert_allclose(got, want, atol=1e-6)
    reached = np.cumsum(want)[:-1]
    if np.all(np.abs(reached - quantile) > 1e-6):
        assert int(loop.exit_loop(a, quantile)) == 1 + int((reached < quantile).sum())
    for lower in (0.0, quantile / 2):
        assert int(loop.exit_loop(a, lower)) <= int(loop.exit_loop(a, quantile))
    assert int(loop.exit_loop(a, 0.0)) == 1


def test_extreme_gates():
    sure, never = jnp.full((4,), 100.0), jnp.full((4,), -100.0)
    np.testing.assert_allclose(np.exp(loop.exit_log_probs(sure)), [1, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(np.exp(loop.exit_log_probs(never)), [0, 0, 0, 1], atol=1e-7)
    for a in (sure, never, 1e4 * sure):
        slope = jax.grad(lambda a: loop.entropy(loop.exit_log_probs(a)))(a)
        assert np.isfinite(slope).all() and np.isfinite(loop.entropy(loop.exit_log_probs(a)))


def test_start_of_the_gate():
    """One bias: 1/2, 1/4, 1/8, 1/8. A bias per loop: uniform, where the entropy has its maximum."""
    shares = {}
    for kind in ("shared", "per_loop"):
        cfg = of(CFG, count=4, gate=kind)
        gate = params_lib.init_params(loop.param_specs(cfg), jax.random.key(0))["loop"]["gate"]
        assert gate["w"].shape == (SMALL.dim, 1) and not gate["w"].any()
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, SMALL.dim)), jnp.float32)
        shares[kind] = loop.exit_log_probs(jnp.stack([loop.gate(cfg, gate, x, r + 1) for r in range(4)]))
    np.testing.assert_allclose(np.exp(shares["shared"][:, 0, 0]), [0.5, 0.25, 0.125, 0.125], rtol=1e-6)
    np.testing.assert_allclose(np.exp(shares["per_loop"][:, 0, 0]), 4 * [0.25], rtol=1e-6)
    np.testing.assert_allclose(loop.entropy(shares["per_loop"]), math.log(4), rtol=1e-6)
    flat = jnp.asarray([-math.log(3), -math.log(2), 0.0, 0.0])
    slope = jax.grad(lambda a: loop.entropy(loop.exit_log_probs(a)))(flat)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_entropy_bonus_is_divergence_from_uniform():
    log_p = loop.exit_log_probs(jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32))
    p = np.exp(np.asarray(log_p, np.float64))
    divergence = (p * (np.log(p) + math.log(5))).sum(0)
    np.testing.assert_allclose(-loop.entropy(log_p), divergence - math.log(5), atol=1e-6)


# --- the second stage


def test_second_stage_formula_and_signs():
    rng = np.random.default_rng(0)
    a, nll = rng.normal(size=(3, 6)), 2 + 0.02 * rng.normal(size=(3, 6))
    leave = 1 / (1 + np.exp(-a))
    want = np.zeros(6)
    for r in (1, 2):
        stay = 1 / (1 + np.exp(-50 * (np.maximum(0, nll[r - 1] - nll[r]) - 0.005)))
        want -= (stay * np.log(1 - leave[r]) + (1 - stay) * np.log(leave[r])) / 3
    got = loop.stage_two(jnp.asarray(a, jnp.float32), jnp.asarray(nll, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for change, sign in ((-0.1, 1), (0.0, -1)):  # the second loop helped: stay; it did not: leave
        slope = jax.grad(lambda a, c=change: loop.stage_two(a, jnp.asarray([2.0, 2.0 + c])))(jnp.zeros(2))
        assert np.sign(slope[1]) == sign and slope[0] == 0
    still = jax.grad(lambda nll: loop.stage_two(jnp.ones(2), nll))(jnp.asarray([2.0, 1.99]))
    assert not still.any()


def test_second_stage_trains_the_gate_alone(key):
    params, batch = initial(), steps.normalize(rows())
    loss_fn = losses.make_loss(CFG, (("gate", 1.0),), 4)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, key)
    for path, grad in params_lib.flatten(grads).items():
        assert bool(jnp.any(grad != 0)) == path.startswith("loop/gate/"), path
    assert value == metrics["loss/gate"]
    z, _, _ = numpy_model(CFG, params, batch.tokens)
    nll = -np.take_along_axis(log_softmax(z), np.asarray(batch.targets)[None, ..., None], -1)[..., 0]
    each = loop.stage_two(run(CFG, params, batch).exits, jnp.asarray(nll, jnp.float32))
    np.testing.assert_allclose(value, jnp.sum(batch.weights * each), rtol=1e-4)


def test_terms_need_a_gate():
    for name in losses.EXITS:
        with pytest.raises(ValueError, match="need an exit gate"):
            losses.make_loss(SMALL, ((name, 1.0),))


def test_no_gate_sees_a_later_token():
    params, batch = initial(), rows()
    other = batch.replace(tokens=batch.tokens.at[:, 6].add(1) % V)
    before, after = run(CFG, params, batch).exits, run(CFG, params, other).exits
    np.testing.assert_array_equal(before[:, :, :6], after[:, :, :6])
    assert not np.array_equal(before[:, :, 6], after[:, :, 6])


# --- evaluation


def test_bits_per_byte_of_every_loop():
    params, batch = initial(), rows()
    each = jax.jit(losses.make_token_nll(CFG, 4, each_loop=True))(params, batch)
    last = jax.jit(losses.make_token_nll(CFG, 4))(params, batch)
    np.testing.assert_allclose(each[-1], last, rtol=1e-5)
    last, sizes = each[-1], np.arange(128) % 3
    scores = eval_loss.bits_per_byte(steps.make_eval_step(lambda p, b: each), params, [batch, batch], sizes)
    counted = (np.asarray(batch.weights) > 0) & (sizes[batch.targets] > 0)
    for r in range(R):
        want = (
            np.asarray(each[r], np.float64)[counted].sum() / math.log(2) / sizes[batch.targets][counted].sum()
        )
        np.testing.assert_allclose(scores[f"eval/bpb_loop_{r + 1}"], want, rtol=1e-6)
    assert scores["eval/bpb"] == scores[f"eval/bpb_loop_{R}"]
    plain = eval_loss.bits_per_byte(steps.make_eval_step(lambda p, b: last), params, [batch, batch], sizes)
    assert set(scores) - set(plain) == {f"eval/bpb_loop_{r}" for r in (1, 2, 3)}
    assert all(scores[name] == value for name, value in plain.items())


# --- adaptive exit


def decode_all(cfg, params, tokens, prompt, quantile):
    """Teacher-forced logits of the tokens from the prompt's last on, and the loops of each."""
    cache = caches.allocate(cfg, B, L + 3)
    start = jnp.asarray([prompt] * B, jnp.int32)
    logits, cache = jax.jit(engine.prefill, static_argnums=0)(cfg, params, tokens[:, :prompt], start, cache)
    project, found, depth = projections.from_config(cfg), [logits], []

    @jax.jit
    def one(token, cache):
        batch = engine.batch_of(token[:, None], cache.length)
        output = transformer.forward(cfg, project, params, batch, cache, quantile=quantile)
        return transformer.logits(cfg, params, output.hidden[:, 0]), output.cache, output.depth

    for t in range(prompt, L):
        logits, cache, loops = one(tokens[:, t], cache)
        found.append(logits)
        depth.append(loops)
    return np.stack(found, 1)[..., :V], depth


@pytest.mark.parametrize("quantile", [0.45, 0.75])
def test_adaptive_exit_in_float64(quantile):
    """Rows that leave at different loops; later tokens find a token's last keys where it did not run."""
    params, tokens, prompt = initial(), rows().tokens, 3
    z, _, want = numpy_model(CFG, params, tokens, quantile, prompt)
    got, depth = decode_all(CFG, params, tokens, prompt, quantile)
    np.testing.assert_array_equal(np.stack(depth, 1), want[:, prompt:])
    assert len(set(want[:, prompt:].ravel().tolist())) > 1 and np.any(want[0, prompt:] != want[1, prompt:])
    np.testing.assert_allclose(got, z[-1, :, prompt - 1 :], atol=3e-4)
    plain, _, _ = numpy_model(CFG, params, tokens)
    assert np.abs(plain[-1] - z[-1]).max() > 1e-2  # leaving early is visible


def test_all_loops_equal_the_full_forward():
    params, tokens = initial(), rows().tokens
    got, depth = decode_all(CFG, params, tokens, 3, None)
    want = numpy_model(CFG, params, tokens)[0][-1]
    np.testing.assert_allclose(got, want[:, 2:], atol=3e-4)
    assert depth[0] is None


class Counter:
    """A projection that notes every product when it is computed, not when it is traced."""

    key = None

    def __init__(self):
        self.count = 0

    def _note(self):
        self.count += 1

    def spared(self):
        return self

    def __call__(self, role, x, w):
        return self.several((role,), x, (w,))[0]

    def several(self, roles, x, ws):
        if roles == ("mlp/down",):
            jax.debug.callback(self._note)
        return tuple(x @ w for w in ws)


def test_loops_that_nobody_needs_are_not_computed():
    params, counter = initial(), Counter()
    cache = caches.allocate(CFG, B, 8)
    token = rows().tokens[:, 0]

    @jax.jit
    def one(quantile):
        batch = engine.batch_of(token[:, None], cache.length)
        output = transformer.forward(CFG, counter, params, batch, cache, quantile=quantile)  # type: ignore[arg-type]
        return output.depth

    counts = []
    for quantile in (0.0, 0.6, 2.0):
        counter.count = 0
        depth = jax.block_until_ready(one(jnp.float32(quantile)))
        jax.effects_barrier()
        assert counter.count == 2 + int(depth.max())  # layers before and after, and one per loop
        counts.append(counter.count)
    assert counts[0] == 3 and counts[-1] == 5


def test_generation_with_one_loop_per_token(key):
    """At quantile 0 the answer after its first token is that of the model with one loop."""
    cfg, greedy = of(count=2, before=0, after=0), InferConfig(max_tokens=6, temperature=0.0, capacity=32)
    params, prompt = initial(cfg), [3, 1, 4]
    params = params | {"embed": 3 * params["embed"]}  # answers then depend on the prompt
    leaving, ran = dataclasses.replace(greedy, exit_quantile=0.0), []
    first, *early = engine.generate(cfg, params, prompt, leaving, key, ran)
    assert [int(loops[0]) for loops in ran] == [1] * 5
    one, short = of(cfg, count=1, gate="none"), dataclasses.replace(greedy, max_tokens=5)
    assert early == list(engine.generate(one, params, [*prompt, first], short, key))
    z = numpy_model(cfg, params, [[*prompt, first, *early]])[0]
    assert z[0, 0, 3:-1].argmax(-1).tolist() == early != z[1, 0, 3:-1].argmax(-1).tolist()
    assert z[1, 0, 2].argmax() == first  # the prompt is read with all loops


def test_exits_are_refused_where_they_cannot_be():
    params, batch, cache = initial(), rows(), caches.allocate(CFG, B, 16)
    project = projections.from_config(CFG)
    with pytest.raises(ValueError, match="one token per row"):
        transformer.forward(CFG, project, params, batch, cache, quantile=0.5)
    with pytest.raises(ValueError, match="without a cache"):
        transformer.forward(CFG, project, params, batch, cache, each_loop=True)


# --- cost


def test_flops_of_every_part():
    """A gate adds the readouts of the other loops: head, layers after, and its own D weights per loop."""
    cfg, length = dataclasses.replace(CFG, layers=2), 64
    layer = 4 * 16 * 16 + 3 * 16 * 24
    seen = 12 * 2 * 8 * length
    plain = 6 * (16 * 128 + (1 + 2 * R + 1) * layer) + (1 + 2 * R + 1) * seen
    assert flops.train_flops_per_token(of(cfg, gate="none"), length) == plain
    gated = plain + (R - 1) * (6 * (16 * 128 + layer) + seen) + R * 6 * 16
    assert flops.train_flops_per_token(cfg, length) == gated


def test_full_logits_are_never_materialized():
    cfg = dataclasses.replace(CFG, vocab_size=8192)
    hidden, head = (
        jax.ShapeDtypeStruct((R, 4, 256, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, 8192), jnp.float32),
    )
    weights, targets = (jax.ShapeDtypeStruct((R, 4, 256), kind) for kind in (jnp.float32, jnp.int32))

    def loss(hidden, head, weights, targets):
        return losses.weighted_nll(cfg, 64, hidden, head, targets, weights)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(hidden, head, weights, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 8192 * 4 / 2


# --- one loop's predictions, another injection, one loop's cache


def keys_of_each_loop():
    """For each loop a key that samples it."""
    found: dict = {}
    for i in range(50):
        found.setdefault(int(losses._sampled_loop(jax.random.key(i), R)), jax.random.key(i))
    return [found[r] for r in range(R)]


@pytest.mark.slow
def test_the_mean_over_sampled_loops_is_the_whole_objective(key):
    """Loss, terms and every gradient: the estimate is unbiased, exactly."""
    params, batch, terms = initial(), steps.normalize(rows()), (*EXIT, ("next_token", 0.5))
    whole = jax.jit(jax.value_and_grad(losses.make_loss(CFG, terms, 4), has_aux=True))
    one = jax.jit(jax.value_and_grad(losses.make_loss(of(readout="sampled"), terms, 4), has_aux=True))
    (loss, metrics), grads = whole(params, batch, key)
    each = [one(params, batch, k) for k in keys_of_each_loop()]
    assert one._cache_size() == 1 and len({float(e[0][0]) for e in each}) == R
    (mean_loss, mean_metrics), mean_grads = jax.tree.map(lambda *a: sum(a) / R, *each)
    np.testing.assert_allclose(mean_loss, loss, rtol=1e-5)
    assert {"loss/exit", "loss/exit_entropy", "loss/next_token", "loss/entropy"} <= set(mean_metrics)
    for name, value in mean_metrics.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5, err_msg=name)
    wanted = params_lib.flatten(grads)
    for path, value in params_lib.flatten(mean_grads).items():
        largest = float(jnp.abs(wanted[path]).max())
        np.testing.assert_allclose(value, wanted[path], atol=3e-5 * largest, err_msg=path)


def products(jaxpr, times=1):
    """2 * rows * columns * contracted of every dot_general, those of scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * times * inner * math.prod(equation.outvars[0].aval.shape)
        runs = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                total += products(body, runs)
    return total


def test_sampling_reads_two_predictions_and_not_each():
    """Of 8 heads, and of 8 times the layers after the loops, 2 remain: exactly what the formula says."""
    cfg, batch = of(count=8), steps.normalize(rows())
    shapes = jax.eval_shape(lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0)))

    def work(cfg):
        loss_fn = losses.make_loss(cfg, EXIT, B * L)
        return products(jax.make_jaxpr(loss_fn)(shapes, batch, jax.random.key(0)).jaxpr)

    saved = flops.parts(cfg, L)[0] - flops.parts(of(cfg, readout="sampled"), L)[0]
    assert work(cfg) - work(of(cfg, readout="sampled")) == B * L * saved / 3  # forward only


def test_linear_injection_in_float64_and_from_nothing():
    cfg = of(inject="linear")
    params, tokens = initial(cfg), rows().tokens
    output = run(cfg, params, rows())
    got = jax.jit(lambda h: transformer.logits(cfg, params, h))(output.loops)[..., :V]
    np.testing.assert_allclose(got, numpy_model(cfg, params, tokens)[0], atol=1e-3)
    # It starts as the identity on the stream, so as no injection at all.
    fresh = params_lib.init_params(transformer.param_specs(cfg)["loop"], jax.random.key(0))
    started = params | {"loop": params["loop"] | {"inject": fresh["inject"]}}
    without = params | {"loop": {k: v for k, v in params["loop"].items() if k != "inject"}}
    np.testing.assert_allclose(
        run(cfg, started, rows()).loops, run(of(inject="none"), without, rows()).loops, atol=2e-6
    )
    assert optim.labels(transformer.param_specs(cfg))["loop"]["inject"] == "matrix"


def decode_with(cfg, params, tokens, prompt, loops, overwrite=False):
    """Teacher-forced logits; overwrite: after every call all loops' entries become the last one's."""
    cache = caches.allocate(cfg, B, L + 3, loops)
    prefill, decode = (jax.jit(f, static_argnums=0) for f in (engine.prefill, engine.decode))

    def last(cache):
        if not overwrite:
            return cache
        return cache.replace(k=cache.k.at[:].set(cache.k[-1]), v=cache.v.at[:].set(cache.v[-1]))

    start = jnp.asarray([prompt] * B, jnp.int32)
    logits, cache = prefill(cfg, params, tokens[:, :prompt], start, cache)
    found = [logits]
    for t in range(prompt, L):
        logits, cache = decode(cfg, params, tokens[:, t], last(cache))
        found.append(logits)
    return np.stack(found, 1)[..., :V], cache


def test_a_cache_of_the_last_loop_is_one_that_the_last_loop_overwrites():
    params, tokens = initial(), rows().tokens
    got, small = decode_with(CFG, params, tokens, 3, "last")
    want, whole = decode_with(CFG, params, tokens, 3, "all", overwrite=True)
    assert small.k.shape == (1, *whole.k.shape[1:]) and whole.k.shape[0] == R
    np.testing.assert_allclose(got, want, atol=1e-5)
    every, _ = decode_with(CFG, params, tokens, 3, "all")
    np.testing.assert_array_equal(got[:, 0], every[:, 0])  # the prompt is read with every loop's own
    assert np.abs(got[:, 2:] - every[:, 2:]).max() > 1e-2


@pytest.mark.parametrize("quantile", [0.0, 2.0])
def test_tokens_that_leave_early_with_a_cache_of_the_last_loop(quantile):
    """At 0 every token runs once, so later ones find what the first loop wrote; at 2 none leaves."""
    params, tokens = initial(), rows().tokens
    cache, decode = caches.allocate(CFG, B, L + 3, "last"), jax.jit(engine.decode, static_argnums=0)
    for t in range(L):
        logits, cache = decode(CFG, params, tokens[:, t], cache, jnp.float32(quantile))
    z = numpy_model(CFG, params, tokens)[0]
    if quantile == 0.0:
        np.testing.assert_allclose(logits[:, :V], z[0, :, -1], atol=3e-4)
    else:
        want, _ = decode_with(CFG, params, tokens, 1, "last")
        np.testing.assert_allclose(logits[:, :V], want[:, -1], atol=1e-5)
    assert cache.k.shape[0] == 1


def test_held_out_losses_with_exits(key):
    """Each token is scored after the loop at which it leaves, by hand from the losses of each loop."""
    params, batch, quantile = initial(), rows(), 0.6
    nll, left = jax.jit(losses.make_token_nll(CFG, 4, True, quantile))(params, batch)
    _, p, _ = numpy_model(CFG, params, batch.tokens)
    want = 1 + (np.cumsum(p, 0)[:-1] < quantile).sum(0)
    np.testing.assert_array_equal(left, want)
    assert len(set(want.ravel().tolist())) > 1
    sizes = np.full(V, 2, np.int32)
    made = eval_loss.bits_per_byte(steps.make_eval_step(lambda p, b: (nll, left)), params, [batch], sizes)
    counted = np.asarray(batch.weights) > 0
    each = np.take_along_axis(np.asarray(nll, np.float64), want[None] - 1, 0)[0]
    bits = each[counted].sum() / math.log(2) / (2 * counted.sum())
    np.testing.assert_allclose(made["eval/bpb_exit"], bits, rtol=1e-6)
    np.testing.assert_allclose(made["eval/mean_exit"], want[counted].mean(), rtol=1e-6)
    plain = eval_loss.bits_per_byte(steps.make_eval_step(lambda p, b: nll), params, [batch], sizes)
    assert set(made) - set(plain) == {"eval/bpb_exit", "eval/mean_exit"}
