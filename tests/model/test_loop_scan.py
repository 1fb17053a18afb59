"""Loops that run in a scan: the same function as loops written out, with gradients of two sets at most."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import losses
from nanochat_jax.config import LoopConfig, ModelConfig
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

BASE = ModelConfig(vocab_size=64, dim=16, layers=2, heads=1, kv_heads=1, head_dim=16, mlp_dim=32)
EXIT = (("exit", 1.0), ("exit_entropy", 0.1))


def rows():
    tokens = np.random.default_rng(1).integers(0, 64, (1, 8), dtype=np.int32)
    ones = np.ones((1, 8), np.float32) / 8
    return Batch(tokens, tokens, ones, np.ones((1, 8), np.int32), np.arange(8, dtype=np.int32)[None])


def gradient(cfg, terms):
    return jax.value_and_grad(losses.make_loss(cfg, terms), has_aux=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loops", "terms"),
    [
        (LoopConfig(count=5, norm=True, inject="add"), (("next_token", 1.0),)),
        (LoopConfig(count=3, before=1, after=2, gate="per_loop"), EXIT),
        (LoopConfig(count=3, inject="linear", after=1, gate="shared", readout="sampled"), EXIT),
    ],
)
def test_a_scan_over_loops_equals_loops_written_out(loops, terms):
    """Whose layers run all at once (unroll = all of them) instead of one per step. Float32 rounding apart:
    gradients of the loops are added in another order."""
    written = dataclasses.replace(BASE, loop=loops, unroll=2)
    scanned = dataclasses.replace(written, unroll=1)
    leaves, structure = jax.tree.flatten(transformer.param_specs(written))
    rng = np.random.default_rng(0)
    params = structure.unflatten([0.3 * rng.normal(size=s.shape).astype(np.float32) for s in leaves])
    results = [jax.jit(gradient(cfg, terms))(params, rows(), jax.random.key(2)) for cfg in (written, scanned)]
    for cfg in (written, scanned):
        run = functools.partial(transformer.forward, cfg, projections.from_config(cfg), batch=rows())
        text = str(jax.make_jaxpr(lambda p, run=run: run(params=p, each_loop=terms == EXIT).hidden)(params))
        assert (f"length={loops.count}" in text) == (cfg is scanned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), *results)


def test_gradients_of_many_loops_need_no_more_memory():
    """XLA's temporaries of 8 loops exceed those of 3 by the streams that they save, and not by gradients."""

    def temporary(count):
        cfg = dataclasses.replace(
            BASE, loop=LoopConfig(count=count), unroll=1, remat="block", dim=32, mlp_dim=256
        )
        params = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), transformer.param_specs(cfg)
        )
        step = jax.jit(gradient(cfg, (("next_token", 1.0),)))
        return step.lower(params, rows(), jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    blocks = 4 * 2 * (4 * 32 * 16 + 3 * 32 * 256)
    assert temporary(8) - temporary(3) < 0.3 * blocks
