"""Coded ternary leaves and layers apart: the training forward's bits, the same text, no copies of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, LoopConfig, ModelConfig, MtpConfig
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine, load, speculative
from nanochat_jax.kernels import dispatch, integer
from nanochat_jax.model import transformer
from nanochat_jax.quant import coded, matmul, ternary
from nanochat_jax.quant import project as projections

CFG = ModelConfig(
    vocab_size=100, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, quant="ternary",
    **BLOCKS["modern"],
)  # fmt: skip
LOOPED = dataclasses.replace(
    CFG, layers=1, loop=LoopConfig(count=2, before=2, after=1), mtp=MtpConfig(depth=1), value_embed_every=0
)


@functools.cache
def params_of(cfg):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    noisy = lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731
    return jax.tree.map(noisy, params)


@pytest.mark.parametrize("dtype", ["int8", "float32", "bfloat16"])
@pytest.mark.parametrize("act", [jnp.float32, jnp.bfloat16])
def test_bits_of_the_training_forward(dtype, act):
    w = 0.02 * jax.random.normal(jax.random.key(0), (300, 16))
    x = jax.random.normal(jax.random.key(1), (1, 5, 300)).astype(act)
    want = matmul.matmul(x, (w,), "ternary", "int8", 0)[0]
    leaf = coded.code(w, 0, dtype)
    assert leaf.shape == w.shape and leaf.ndim == 2 and leaf.codes.dtype == dtype
    got = coded.matmul(x, leaf)
    assert got.dtype == act
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("quant", ["full", "ternary"])
@pytest.mark.parametrize("base", [CFG, LOOPED], ids=["plain", "looped"])
def test_what_is_cast_first_may_rest_cast(quant, base):
    """In bfloat16: the same bits, tables and full matrices in half the bytes, latent ternary ones and gains as they
    were."""
    cfg = dataclasses.replace(base, quant=quant, dtype="bfloat16")
    params = params_of(cfg)
    rested = projections.at_rest(cfg, params, jnp.bfloat16)
    flat = params_lib.flatten(rested)
    half = {path for path, leaf in flat.items() if leaf.dtype == jnp.bfloat16}
    assert {"embed", "head"} <= half and ("blocks/attn/q" in half) == (quant == "full")
    assert not any("scale" in path or "norm" in path for path in half)
    batch = engine.batch_of(jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.zeros((2,), jnp.int32))
    project = projections.from_config(cfg)

    def logits(params):
        hidden = transformer.forward(cfg, project, params, batch).hidden
        return transformer.logits(cfg, params, hidden)

    want, got = (np.asarray(jax.jit(logits)(p), np.float32) for p in (params, rested))
    np.testing.assert_array_equal(got, want)
    exact = dataclasses.replace(cfg, dtype="float32")
    same = load.served(exact, params, InferConfig(weights="full"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(same))


@pytest.mark.parametrize("act", ["int8", "full"])
def test_scales_of_groups_equal_float64(act):
    w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(512, 32), (5, 512)]))
    wide = np.asarray(ternary.dequantize(*ternary.quantize_ternary(w, 128)), np.float64)
    rows, inverse = ternary.int8_rows(x) if act == "int8" else (x, jnp.ones((5, 1)))
    want = np.asarray(rows, np.float64) * np.asarray(inverse, np.float64) @ wide
    got = coded.matmul(x, coded.code(w, 128, "float32"), act)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_full_activations_are_multiplied_as_they_are():
    w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(64, 8), (3, 64)]))
    want = np.asarray(x, np.float64) @ np.asarray(
        ternary.dequantize(*ternary.quantize_ternary(w)), np.float64
    )
    got = coded.matmul(x, coded.code(w, 0, "int8"), "full")
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_what_cannot_be_multiplied_is_refused():
    leaf = coded.code(jnp.ones((32, 16)), 0, "int8")
    with pytest.raises(ValueError, match="'attn/q' has ternary codes, but its rule says 'full'"):
        projections.Project(projections.PRESETS["full"])("attn/q", jnp.ones((1, 32)), leaf)
    with pytest.raises(ValueError, match="multiply int8 or full activations, not 'nvfp4'"):
        coded.matmul(jnp.ones((1, 32)), leaf, "nvfp4")


def test_the_carrier_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        dispatch, "fastest", lambda impls, arguments, runs: asked.append(arguments()) or "int8"
    )
    assert coded.carrier(2, 48, 32) == coded.carrier(2, 48, 32) == "int8"
    ((q, codes),) = asked
    assert q.shape == (2, 48) and set(codes) == set(integer.IMPLS)
    assert all(t.dtype == name and t.shape == (48, 32) for name, ts in codes.items() for t in ts)


def test_a_refused_carrier_leaves_the_product_to_the_next(monkeypatch):
    def refuses(*operands):
        raise NotImplementedError("sizes are no multiples of 16")

    w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(64, 8), (3, 64)]))
    want = coded.matmul(x, coded.code(w, 0, "int8"))
    monkeypatch.setitem(integer.IMPLS, "int8", refuses)
    np.testing.assert_array_equal(coded.matmul(x, coded.code(w, 0, "int8")), want)


@pytest.mark.parametrize("cfg", [CFG, LOOPED], ids=["modern", "loops"])
def test_layers_apart_give_the_same_logits(cfg):
    """XLA may fuse them differently, so to rounding. A layer in another's place would be far outside."""
    cfg = dataclasses.replace(cfg, quant="full")
    params = params_of(cfg)
    apart = transformer.apart(params)
    assert isinstance(apart["blocks"], tuple) and len(apart["blocks"]) == cfg.layers
    assert apart["embed"] is params["embed"]
    batch = engine.batch_of(jnp.arange(12, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32))
    project = projections.from_config(cfg)
    run = jax.jit(lambda p: transformer.forward(cfg, project, p, batch).hidden)
    np.testing.assert_allclose(run(apart), run(params), atol=1e-5)
    swapped = {name: tuple(reversed(v)) if isinstance(v, tuple) else v for name, v in apart.items()}
    assert np.abs(run(swapped) - run(params)).max() > 1e-3


def test_a_step_reads_each_weight_once():
    """By XLA's own account: of a stack every layer is copied first, and latent weights are rounded."""
    cfg = dataclasses.replace(CFG, dim=128, mlp_dim=256, head_dim=32, layers=4)
    params = params_of(cfg)

    @jax.jit
    def step(params, tokens, cache):
        return engine.decode(cfg, params, tokens, cache)[0]

    def moved(params):
        tokens, cache = jnp.zeros(1, jnp.int32), caches.allocate(cfg, 1, 16)
        return step.lower(params, tokens, cache).compile().cost_analysis()["bytes accessed"]

    def size(tree):
        return sum(a.nbytes for name, part in tree.items() if name not in ("embed", "value")
                   for a in jax.tree.leaves(part))  # fmt: skip

    served = transformer.apart(projections.hold(cfg, params, "codes", "float32"))
    assert moved(served) < 1.3 * size(served)
    assert moved(params) > 2 * size(params)


@pytest.mark.parametrize("weights", ["codes", "packed"])
def test_more_layers_than_are_written_out_stay_stacked(monkeypatch, weights):
    monkeypatch.setattr(load, "WRITTEN_OUT", 0)
    cfg = dataclasses.replace(CFG, unroll=1, value_embed_every=0)
    params = params_of(cfg)
    served = load.served(cfg, params, InferConfig(weights=weights))
    assert served["blocks"]["attn"]["q"].shape == params["blocks"]["attn"]["q"].shape
    run = jax.jit(lambda p: engine.decode(cfg, p, jnp.array([5]), caches.allocate(cfg, 1, 16))[0][0, :100])
    want, got = run(params), run(served)
    assert float(jnp.std(got - want)) < 0.02 * float(jnp.std(want))


@pytest.mark.slow
@pytest.mark.parametrize("loops", [0, 1], ids=["layers", "loops"])
@pytest.mark.parametrize("weights", ["codes", "packed"])
def test_drafts_of_served_weights_leave_the_text(weights, loops):
    params = params_of(LOOPED)
    plain = InferConfig(max_tokens=8, temperature=0.0, capacity=32, weights=weights)
    served = load.served(LOOPED, params, plain)
    want = list(engine.generate(LOOPED, served, [5, 7, 11], plain, jax.random.key(0)))
    drafting = dataclasses.replace(plain, draft_tokens=1, draft_loops=loops)
    assert list(speculative.generate(LOOPED, served, [5, 7, 11], drafting, jax.random.key(0))) == want


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["auto", "codes", "packed", "full"])
@pytest.mark.parametrize("cfg", [CFG, LOOPED], ids=["modern", "loops"])
def test_greedy_text_is_that_of_the_latent_weights(cfg, weights):
    params, greedy = params_of(cfg), InferConfig(max_tokens=6, temperature=0.0, capacity=32, weights=weights)
    served = load.served(cfg, params, greedy)
    assert load.form(cfg, greedy) == ("codes" if weights == "auto" else weights)
    plain = list(engine.generate(cfg, params, [5, 7, 11], greedy, jax.random.key(0)))
    assert list(engine.generate(cfg, served, [5, 7, 11], greedy, jax.random.key(0))) == plain
    assert len(set(plain)) > 1
