"""Properties of the whole model: causality, isolation, caching, looping, scanning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, LoopConfig, MhcConfig, ModelConfig
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine
from nanochat_jax.model import flops, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

SMALL = ModelConfig(vocab_size=64, dim=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_dim=64)
VARIANTS = {
    "plain": SMALL,
    "modern": dataclasses.replace(SMALL, **BLOCKS["modern"]),
    "portable": dataclasses.replace(SMALL, **BLOCKS["portable"]),
    "ternary": dataclasses.replace(SMALL, **BLOCKS["modern"], quant="ternary"),
    "window": dataclasses.replace(SMALL, window=(5, 0)),
    "loops": dataclasses.replace(SMALL, loop=LoopConfig(count=3, norm=True)),
    "streams": dataclasses.replace(SMALL, **BLOCKS["modern"], mhc=MhcConfig(4, "permutation")),
    "reglu2": dataclasses.replace(SMALL, mlp="reglu2", sub_norm=True, tied=True),
}
VARIANTS["seed"] = dataclasses.replace(SMALL, **(BLOCKS["seed"] | {"quant_group": 8}), quant="ternary")


def rows(cfg, length=16, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (batch, length)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    ones = jnp.ones_like(tokens)
    return Batch(tokens, jnp.roll(tokens, -1, 1), ones.astype(jnp.float32), ones, positions)


def initial(cfg, seed=0):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(seed))
    # A visible head and random gains, so that nothing is hidden behind ones and near-zeros.
    noise = params_lib.init_params(
        jax.tree.map(
            lambda s: dataclasses.replace(s, init=params_lib.normal(0.1)), transformer.param_specs(cfg)
        ),
        jax.random.key(seed + 1),
    )
    return jax.tree.map(jnp.add, params, noise)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, batch):
    hidden = transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden
    return transformer.logits(cfg, params, hidden)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_position_sees_a_later_one(name):
    cfg = VARIANTS[name]
    params, batch = initial(cfg), rows(cfg)
    before = logits(cfg, params, batch)
    changed = batch.replace(tokens=batch.tokens.at[:, 9].add(1) % cfg.vocab_size)
    after = logits(cfg, params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert not np.array_equal(before[:, 9:], after[:, 9:])


def test_causality_by_gradient():
    cfg = VARIANTS["modern"]
    params, batch = initial(cfg), rows(cfg)
    embed = params["embed"]

    def output(table, position):
        x = logits(
            cfg,
            params | {"embed": table},
            batch.replace(tokens=jnp.arange(32, dtype=jnp.int32).reshape(2, 16)),
        )
        return jnp.sum(x[:, position] ** 2)

    slope = jax.grad(output)(embed, 7)
    sizes = jnp.abs(slope[:32].reshape(2, 16, -1)).sum(-1)
    assert np.all(sizes[:, 8:] == 0) and np.all(sizes[:, :8] > 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_in_one_row_do_not_see_each_other(name):
    cfg = VARIANTS[name]
    params, batch = initial(cfg), rows(cfg)
    cut = 6
    segments = jnp.where(batch.positions < cut, 1, 2)
    positions = jnp.where(batch.positions < cut, batch.positions, batch.positions - cut)
    together = logits(cfg, params, batch.replace(segments=segments, positions=positions))
    alone = Batch(*(jnp.asarray(a)[:, cut:] for a in (batch.tokens, batch.targets, batch.weights)),
                  segments=segments[:, cut:], positions=positions[:, cut:])  # fmt: skip
    np.testing.assert_allclose(together[:, cut:], logits(cfg, params, alone), atol=2e-5)


def test_the_prefix_matters():
    cfg = VARIANTS["ternary"]
    params, batch = initial(cfg), rows(cfg)
    shuffled = batch.replace(tokens=batch.tokens.at[:, :15].set(batch.tokens[:, :15][:, ::-1]))
    assert not np.allclose(logits(cfg, params, batch)[:, 15], logits(cfg, params, shuffled)[:, 15], atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", [(7, 1, 8), (1,) * 4 + (12,)])
def test_cached_pieces_equal_the_full_forward(name, split):
    cfg = VARIANTS[name]
    params, batch = initial(cfg), rows(cfg)
    full = logits(cfg, params, batch)
    cache, start, pieces = caches.allocate(cfg, 2, 24), 0, []
    project = projections.from_config(cfg)
    for size in split:
        piece = jax.tree.map(lambda a: a[:, start : start + size], batch)  # noqa: B023
        output = transformer.forward(cfg, project, params, piece, cache)
        pieces.append(transformer.logits(cfg, params, output.hidden))
        cache, start = output.cache, start + size
    assert np.all(cache.length == 16)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=3e-5)


def test_padding_of_a_prompt_leaves_no_trace():
    cfg = VARIANTS["modern"]
    params = initial(cfg)
    tokens = rows(cfg).tokens
    short, cache = engine.prefill(cfg, params, tokens[:, :5], jnp.array([5, 5]), caches.allocate(cfg, 2, 32))
    padded = jnp.full((2, 12), 63, jnp.int32).at[:, :5].set(tokens[:, :5])
    long, padded_cache = engine.prefill(cfg, params, padded, jnp.array([5, 5]), caches.allocate(cfg, 2, 32))
    np.testing.assert_allclose(short, long, atol=1e-5)
    after, _ = engine.decode(cfg, params, tokens[:, 5], cache)
    after_padded, _ = engine.decode(cfg, params, tokens[:, 5], padded_cache)
    np.testing.assert_allclose(after, after_padded, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in ("modern", "streams")), "window", "ternary", "loops"],
)
def test_scanned_layers_equal_unrolled_layers(name):
    cfg = VARIANTS[name]
    params, batch = initial(cfg), rows(cfg)

    def loss(p, unroll):
        return jnp.sum(logits(dataclasses.replace(cfg, unroll=unroll), p, batch) ** 2)

    values, grads = zip(*(jax.value_and_grad(loss)(params, unroll) for unroll in (2, 4)), strict=True)
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(grads[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * (1 + float(jnp.abs(b).max())))


def test_two_loops_equal_twice_the_layers():
    cfg = dataclasses.replace(SMALL, loop=LoopConfig(count=2))
    params, batch = initial(cfg), rows(cfg)
    deep = dataclasses.replace(SMALL, layers=8)
    copied = params | {"blocks": jax.tree.map(lambda a: jnp.concatenate([a, a]), params["blocks"])}
    np.testing.assert_allclose(logits(cfg, params, batch), logits(deep, copied, batch), atol=1e-5)

    def loss(c, p):
        return jnp.sum(logits(c, p, batch) ** 2)

    shared = jax.grad(lambda p: loss(cfg, p))(params)["blocks"]
    separate = jax.grad(lambda p: loss(deep, p))(copied)["blocks"]
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(separate), strict=True):
        np.testing.assert_allclose(a, b[:4] + b[4:], rtol=2e-3, atol=1e-2)


def test_one_loop_is_no_loop():
    looped = dataclasses.replace(SMALL, loop=LoopConfig(count=1))
    params, batch = initial(SMALL), rows(SMALL)
    np.testing.assert_array_equal(logits(SMALL, params, batch), logits(looped, params, batch))
    one, plain = (str(jax.make_jaxpr(lambda p, c=c: logits(c, p, batch))(params)) for c in (looped, SMALL))
    assert one == plain


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_rematerialization_changes_no_gradient(remat):
    params, batch = initial(SMALL), rows(SMALL)
    cfg = dataclasses.replace(SMALL, remat=remat)
    plain = jax.grad(lambda p: jnp.sum(logits(SMALL, p, batch) ** 2))(params)
    again = jax.grad(lambda p: jnp.sum(logits(cfg, p, batch) ** 2))(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(b).max())))


def test_permuting_heads_with_their_weights_changes_nothing():
    cfg = dataclasses.replace(SMALL, kv_heads=4)
    params, batch = initial(cfg), rows(cfg)
    order = jnp.array([2, 0, 3, 1])

    def columns(w):
        return w.reshape(*w.shape[:-1], 4, 8)[..., order, :].reshape(w.shape)

    attn = dict(params["blocks"]["attn"])
    attn |= {name: columns(attn[name]) for name in ("q", "k", "v")}
    attn["o"] = columns(attn["o"].mT).mT
    permuted = params | {"blocks": params["blocks"] | {"attn": attn}}
    np.testing.assert_allclose(logits(cfg, params, batch), logits(cfg, permuted, batch), atol=1e-5)


def test_query_head_reads_its_own_group():
    """Head h uses key head h // (H / G); tiling instead is what broke the seed system's serving."""
    grouped, full = SMALL, dataclasses.replace(SMALL, kv_heads=4)
    params, batch = initial(grouped), rows(grouped)
    attn = dict(params["blocks"]["attn"])
    for name in ("k", "v"):
        attn[name] = jnp.repeat(attn[name].reshape(4, 32, 2, 8), 2, axis=2).reshape(4, 32, 32)
    copied = params | {"blocks": params["blocks"] | {"attn": attn}}
    np.testing.assert_allclose(logits(grouped, params, batch), logits(full, copied, batch), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", BLOCKS)
def test_initial_loss_is_that_of_guessing(preset, tied):
    block = BLOCKS[preset] | {"tied": tied, "quant_group": 0}
    if tied:
        block["embed_std"] = 0.02
    cfg = ModelConfig(
        vocab_size=500, dim=64, layers=2, heads=2, kv_heads=2, head_dim=32, mlp_dim=128, **block
    )
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(3))
    batch = rows(cfg, 64, 4)
    z = logits(cfg, params, batch)
    nll = jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, batch.targets[..., None], -1)[..., 0]
    assert abs(float(nll.mean()) - np.log(500)) < 0.1 * np.log(500)


def test_padding_ids_are_never_predicted():
    cfg = dataclasses.replace(SMALL, vocab_size=50)
    params = initial(cfg)
    assert params["embed"].shape[0] == 128
    probabilities = jax.nn.softmax(logits(cfg, params, rows(cfg)), -1)
    assert float(probabilities[..., 50:].max()) == 0.0


def test_adding_a_weight_keeps_the_other_initial_values():
    plain = params_lib.init_params(transformer.param_specs(SMALL), jax.random.key(0))
    more = dataclasses.replace(SMALL, sub_norm=True, value_embed_every=2, x0_scalars=True)
    extended = params_lib.flatten(params_lib.init_params(transformer.param_specs(more), jax.random.key(0)))
    for path, value in params_lib.flatten(plain).items():
        np.testing.assert_array_equal(value, extended[path])


@pytest.mark.parametrize("name", ["plain", "modern", "loops", "portable"])
def test_flops_formula_agrees_with_the_compiler(name):
    """XLA counts every operation of the unrolled forward and backward; ours only the products."""
    cfg = dataclasses.replace(
        VARIANTS[name], dim=128, heads=4, kv_heads=4, head_dim=32, mlp_dim=512, vocab_size=1024
    )
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    batch = rows(cfg, 64, 2)

    def loss(p):  # the reference attention, because the blocked one skips products
        return jnp.sum(logits(cfg, p, batch) ** 2)

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    ours = flops.train_flops_per_token(cfg, 64) * 2 * 64
    assert 0.9 < ours / counted < 1.05
