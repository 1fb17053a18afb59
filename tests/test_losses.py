"""The chunked token loss against automatic differentiation of the plain formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import losses
from nanochat_jax import params as params_lib
from nanochat_jax.config import ModelConfig
from nanochat_jax.model import transformer
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

CFG = ModelConfig(vocab_size=60, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=32)


def case(seed=0, B=2, L=12):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, L, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(16, 128)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 60, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.random((B, L)) * (rng.random((B, L)) > 0.3), jnp.float32)
    return hidden, head, targets, weights


def plain(cfg, coefficients, hidden, head, targets, weights):
    raw = hidden @ head
    if cfg.softcap:
        raw = cfg.softcap * jnp.tanh(raw / cfg.softcap)
    z = raw[..., : cfg.vocab_size]
    log_p = jax.nn.log_softmax(z)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    statistics = {
        "nll": nll, "z": jax.nn.logsumexp(z, -1) ** 2, "entropy": -jnp.sum(jnp.exp(log_p) * log_p, -1),
    }  # fmt: skip
    return sum(c * jnp.sum(weights * statistics[name]) for name, c in coefficients)


@pytest.mark.parametrize("grads", [False, True])
def test_the_head_is_cast_before_the_chunks(grads):
    """In bfloat16: no chunk casts it again, and loss and gradients are those of the head cast by hand."""
    hidden, head, targets, weights = case()
    hidden = hidden.astype(jnp.bfloat16)

    def loss(hidden, head):
        given = (CFG, 4, (("nll", 1.0), ("z", 0.0), ("entropy", 0.0)), hidden, head, targets, weights)
        return losses.token_loss(*given)[0]

    run = jax.grad(loss, (0, 1)) if grads else loss
    program = jax.make_jaxpr(run)(hidden, head)
    before, _, inside = str(program).partition("scan[")
    cast = "bf16[16,128] = convert_element_type"
    assert cast in before and inside and cast not in inside
    same = run(hidden, head.astype(jnp.bfloat16).astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, run(hidden, head), same)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [2, 7, 24, 1000])
@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.1, -0.3)])
def test_value_and_gradients(softcap, chunk, mix):
    cfg = dataclasses.replace(CFG, softcap=softcap)
    coefficients = tuple(zip(losses.STATISTICS, mix, strict=True))
    hidden, head, targets, weights = case()

    def ours(hidden, head):
        return 3 * losses.token_loss(cfg, chunk, coefficients, hidden, head, targets, weights)[0]

    def theirs(hidden, head):
        return 3 * plain(cfg, coefficients, hidden, head, targets, weights)

    got, got_grads = jax.value_and_grad(ours, (0, 1))(hidden, head)
    want, want_grads = jax.value_and_grad(theirs, (0, 1))(hidden, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(ours(hidden, head), want, rtol=1e-5)  # also without differentiation
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(1 + jnp.abs(b).max()))


def test_a_leading_axis_is_walked_in_turn():
    """[M, B, L] gives the total, the sums and the gradients of M separate calls."""
    pieces = [case(seed) for seed in range(3)]
    head, mix = pieces[0][1], (("nll", 1.0), ("z", 0.1), ("entropy", -0.3))
    hidden, targets, weights = (jnp.stack([piece[i] for piece in pieces]) for i in (0, 2, 3))

    def each(hidden, head):
        outs = [losses.token_loss(CFG, 7, mix, hidden[m], head, targets[m], weights[m]) for m in range(3)]
        return sum(total for total, _ in outs), jnp.stack([sums["nll"] for _, sums in outs])

    def stacked(hidden, head):
        total, sums = losses.token_loss(CFG, 7, mix, hidden, head, targets, weights)
        return total, sums["nll"]

    want = jax.value_and_grad(each, (0, 1), has_aux=True)(hidden, head)
    got = jax.value_and_grad(stacked, (0, 1), has_aux=True)(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_full_logits_are_never_materialized():
    """The largest array of the compiled gradient is far below batch x length x vocabulary."""
    cfg = dataclasses.replace(CFG, vocab_size=8192)
    B, L, D = 4, 256, 16
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, L, D), (D, 8192), (B, L))]
    targets = jax.ShapeDtypeStruct((B, L), jnp.int32)

    def loss(hidden, head, weights, targets):
        return losses.token_loss(
            cfg, 64, (("nll", 1.0), ("z", 0.0), ("entropy", 0.0)), hidden, head, targets, weights
        )[0]

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < B * L * 8192 * 4 / 2


def model_case():
    params = params_lib.init_params(transformer.param_specs(CFG), jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 60, (2, 12)), jnp.int32)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    return params, Batch(tokens, jnp.roll(tokens, -1, 1), ones / 24.0, ones, positions)


@pytest.mark.parametrize("name", sorted(set(losses.TERMS) - {"mtp", *losses.EXITS}))  # tests/model/
def test_every_term_is_finite_and_descends(name, key):
    """A small step against the gradient changes the term's own statistic in its direction."""
    params, batch = model_case()
    loss_fn = losses.make_loss(CFG, ((name, 1.0),), 16)
    (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
    assert math.isfinite(value) and float(jnp.linalg.norm(grads["head"])) > 0
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    after, moved_metrics = loss_fn(moved, batch, key)
    assert after < value
    change = moved_metrics[f"loss/{name}"] - metrics[f"loss/{name}"]
    assert change > 0 if name == "logit_entropy" else change < 0


@pytest.mark.parametrize("name", ["z", "logit_entropy"])
def test_zero_weight_is_absence(name, key):
    params, batch = model_case()
    alone = jax.grad(lambda p: losses.make_loss(CFG, (("next_token", 1.0),), 16)(p, batch, key)[0])(params)
    zero = jax.grad(
        lambda p: losses.make_loss(CFG, (("next_token", 1.0), (name, 0.0)), 16)(p, batch, key)[0]
    )(params)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(zero), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_targets_have_no_influence(key):
    params, batch = model_case()
    masked = batch.replace(weights=batch.weights.at[:, 6:].set(0.0))
    other = masked.replace(targets=masked.targets.at[:, 6:].set(0))
    loss_fn = losses.make_loss(CFG, (("next_token", 1.0), ("z", 0.1)), 16)
    assert loss_fn(params, masked, key)[0] == loss_fn(params, other, key)[0]


def test_token_nll_matches_the_loss(key):
    params, batch = model_case()
    nll = losses.make_token_nll(CFG, 16)(params, batch)
    loss, _ = losses.make_loss(CFG, (("next_token", 1.0),), 16)(params, batch, key)
    np.testing.assert_allclose(jnp.sum(nll * batch.weights), loss, rtol=1e-5)


# --- weights that follow the step

POINTS = ((2, 0.3), (6, 0.1), (7, 0.5))


def test_a_scheduled_weight_lies_on_the_lines_between_its_points():
    at = jax.jit(lambda step: losses.weight_at(POINTS, step))
    got = [float(at(step)) for step in range(10)]
    np.testing.assert_allclose(got, np.interp(range(10), [2, 6, 7], [0.3, 0.1, 0.5]), rtol=1e-6)
    assert losses.weight_at(0.3, jnp.int32(5)) == 0.3 and at._cache_size() == 1


@pytest.mark.parametrize("name", ["next_token", "z", "logit_entropy"])
def test_a_scheduled_weight_is_at_every_step_that_number(name, key):
    """Loss, metrics and gradient, in one trace for all steps."""
    params, batch = model_case()
    others = tuple((term, 0.2) for term in ("next_token", "z", "logit_entropy") if term != name)
    run = jax.jit(jax.value_and_grad(losses.make_loss(CFG, (*others, (name, POINTS)), 16), has_aux=True))
    for step in (0, 3, 6, 20):
        weight = float(np.interp(step, *zip(*POINTS, strict=True)))
        fixed = jax.value_and_grad(losses.make_loss(CFG, (*others, (name, weight)), 16), has_aux=True)
        (loss, metrics), grads = run(params, batch, key, jnp.int32(step))
        (want, wanted), want_grads = fixed(params, batch, key)
        np.testing.assert_allclose(metrics.pop(f"loss/weight_{name}"), weight, rtol=1e-6)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        for got, expected in zip(
            jax.tree.leaves((metrics, grads)), jax.tree.leaves((wanted, want_grads)), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    assert run._cache_size() == 1


def test_numbers_leave_no_trace_of_the_step(key):
    """The program does not read the step where all weights are numbers; where one is scheduled it does."""
    params, batch = model_case()

    def text(terms):
        gradient = jax.value_and_grad(losses.make_loss(CFG, terms, 16), has_aux=True)
        return str(jax.make_jaxpr(gradient)(params, batch, key, jnp.int32(3)).jaxpr.eqns)

    def without(terms):
        gradient = jax.value_and_grad(losses.make_loss(CFG, terms, 16), has_aux=True)
        return str(jax.make_jaxpr(gradient)(params, batch, key).jaxpr.eqns)

    fixed = (("next_token", 1.0), ("z", 0.1))
    assert len(text(fixed)) == len(without(fixed))
    assert len(text((("next_token", 1.0), ("z", POINTS)))) > len(text(fixed))


def test_the_train_step_passes_its_step_on(key):
    """Two steps under a weight that is 1 and then 0: the second one moves nothing."""
    params, batch = model_case()
    loss_fn = losses.make_loss(CFG, (("next_token", ((0, 1.0), (1, 0.0))),), 16)
    tx = optax.sgd(0.1)
    step = jax.jit(steps.make_train_step(loss_fn, tx, 0, microbatches=2))
    first, metrics = step(steps.new_state(params, tx), batch)
    second, later = step(first, batch)
    np.testing.assert_allclose([metrics["loss/weight_next_token"], later["loss/total"]], [1, 0], rtol=1e-5)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, first.params)), strict=True))
    for a, b in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
        np.testing.assert_array_equal(a, b)
