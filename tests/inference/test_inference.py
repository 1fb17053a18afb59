"""Sampling against brute force, generation against the full forward pass, text from a run."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import params as params_lib
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import BLOCKS, Config, ConfigError, InferConfig, ModelConfig
from nanochat_jax.inference import engine, load, sample
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

CFG = ModelConfig(
    vocab_size=100, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, quant="ternary",
    **BLOCKS["modern"],
)  # fmt: skip


def params_of(cfg, seed=0):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(seed))
    return (
        params if cfg.tied else params | {"head": jax.random.normal(jax.random.key(9), params["head"].shape)}
    )


def full_argmax(cfg, params, ids):
    """The likeliest next token at every position, by one full forward pass without a cache."""
    tokens = jnp.array([ids], jnp.int32)
    index = jnp.arange(len(ids), dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens)

    @jax.jit
    def run(params):
        batch = Batch(tokens, tokens, ones * 1.0, ones, index)
        hidden = transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden
        return jnp.argmax(transformer.logits(cfg, params, hidden)[0], -1)

    return np.asarray(run(params)).tolist()


@pytest.mark.parametrize("block", ["modern", pytest.param("portable", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompt", [pytest.param([5], marks=pytest.mark.slow), list(range(1, 38))])
def test_greedy_equals_the_argmax_of_the_full_forward(block, prompt):
    cfg = dataclasses.replace(CFG, **BLOCKS[block])
    params = params_of(cfg)
    greedy = InferConfig(max_tokens=24, temperature=0.0, capacity=64)
    got = list(engine.generate(cfg, params, prompt, greedy, jax.random.key(0)))
    assert got == full_argmax(cfg, params, [*prompt, *got])[len(prompt) - 1 : -1]
    assert len(got) == 24 and len(set(got)) > 1


def test_one_compilation_each():
    params = params_of(CFG)
    first, following = engine._first._cache_size(), engine._next._cache_size()
    for i, temperature in enumerate((0.0, 0.7, 1.3)):
        settings = InferConfig(
            max_tokens=5, temperature=temperature, top_k=3 * i, top_p=1 - 0.2 * i, capacity=48
        )
        list(engine.generate(CFG, params, [1, 2, 3 + i], settings, jax.random.key(i)))
    assert engine._first._cache_size() == first + 1 and engine._next._cache_size() == following + 1


def test_same_key_same_text():
    params, settings = params_of(CFG), InferConfig(max_tokens=12, temperature=1.0, capacity=64)
    one, two, three = (
        list(engine.generate(CFG, params, [7], settings, jax.random.key(k))) for k in (1, 1, 2)
    )
    assert one == two != three
    short = dataclasses.replace(settings, max_tokens=5)  # a draw depends on its place, not on the length
    assert list(engine.generate(CFG, params, [7], short, jax.random.key(1))) == one[:5]


def test_bad_requests():
    params = params_of(CFG)
    with pytest.raises(ValueError, match=r"60 prompt tokens and max_tokens = 10 exceed infer.capacity = 64"):
        next(
            engine.generate(CFG, params, [1] * 60, InferConfig(max_tokens=10, capacity=64), jax.random.key(0))
        )
    for prompt in ([], [100], [-1]):
        with pytest.raises(ValueError, match=r"a prompt needs token ids in 0..99"):
            next(engine.generate(CFG, params, prompt, InferConfig(), jax.random.key(0)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_narrowing_equals_brute_force(seed, top_k, top_p, temperature):
    z = np.random.default_rng(seed).normal(size=10)
    controls = sample.neutral(1)._replace(
        temperature=jnp.float32(temperature), top_k=jnp.int32(top_k), top_p=jnp.float32(top_p)
    )
    got = sample.narrow(jnp.asarray(z, jnp.float32)[None], controls)
    order = np.argsort(-z)
    kept = order[: min(top_k, 10)] if top_k else order
    p = np.exp(z[kept] / temperature - (z[kept] / temperature).max())
    p /= p.sum()
    before = np.cumsum(p) - p
    clear = np.abs(before - top_p) > 1e-4  # float32 sums may fall on the other side of the limit
    finite = np.isfinite(np.asarray(got[0]))
    expected = before < top_p
    assert (
        np.array_equal(finite[kept][clear], expected[clear]) and not finite[np.setdiff1d(order, kept)].any()
    )


def test_frequencies_of_draws():
    z = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda k: sample.sample(z, k, jnp.float32(1), jnp.int32(3), jnp.float32(1))[0])
    shares = np.bincount(np.asarray(draw(keys)), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)
    assert int(sample.sample(z, keys[0], jnp.float32(0), jnp.int32(0), jnp.float32(1))[0]) == 0


def test_text_comes_in_whole_characters():
    tokenizer = tokenizers.byte_tokenizer()
    made = list(load.pieces(tokenizer, iter([*tokenizer.encode("é😀"), 10**6])))
    assert "".join(made) == "é😀" and all("\ufffd" not in piece for piece in made)
    cut = tokenizer.encode("😀")[:2]
    assert "".join(load.pieces(tokenizer, iter(cut))) == "\ufffd"


@pytest.mark.multiprocess
def test_command_line(tmp_path, child_env):
    def call(*words):
        return subprocess.run([sys.executable, "-m", *words], env=child_env, capture_output=True, text=True)

    home = tmp_path / "run"
    train = ("nanochat_jax.train", "--config=configs/smoke.py", f"--workdir={home}", "--config.train.steps=8",
             "--config.data.max_bytes=600000", "--config.opt.schedule.warmup_steps=2")  # fmt: skip
    result = call(*train)
    assert result.returncode == 0, result.stderr
    assert f"python -m nanochat_jax.inference --workdir={home}" in result.stderr
    text = call(
        "nanochat_jax.inference",
        f"--workdir={home}",
        "--prompt=import os",
        "--max_tokens=8",
        "--temperature=0",
    )
    assert text.returncode == 0 and text.stdout.startswith("import os") and len(text.stdout) > 10
    again = call(
        "nanochat_jax.inference",
        f"--workdir={home}",
        "--prompt=import os",
        "--max_tokens=8",
        "--temperature=0",
    )
    assert again.stdout == text.stdout
    lost = call("nanochat_jax.inference", f"--workdir={tmp_path / 'no'}", "--prompt=x")
    assert lost.returncode == 2 and "is not a run: it has no config.json" in lost.stderr


def test_pieces_of_a_prompt_need_every_loops_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"'infer.loop_cache' must be 'all' for the server and the chat"):
        load.load_engine(Config(), tmp_path, InferConfig(loop_cache="last"), 1)
