"""The programs of answers, compiled for a card that is not here: no second cache, no weights cast or unpacked."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, LoopConfig, ModelConfig, MtpConfig
from nanochat_jax.inference import load, slots, speculative
from nanochat_jax.kernels import card
from nanochat_jax.model import transformer

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(card.missing()), reason=card.missing() or "-"),
    pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning"),
]
CFG = ModelConfig(
    vocab_size=2048, dim=256, layers=3, heads=4, kv_heads=4, head_dim=64, mlp_dim=1024, quant="ternary",
    **BLOCKS["modern"],
)  # fmt: skip
LOOPED = dataclasses.replace(
    CFG, loop=LoopConfig(count=2, before=1), mtp=MtpConfig(depth=1), value_embed_every=0
)
CAPACITY = 2048


def nbytes(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def room(cfg, rows, drafting, weights):
    """Bytes: (temporary of one turn, a second cache, parameters as they are held)."""
    of, scalar = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((), jnp.int32)
    specs = transformer.param_specs(cfg)
    with card.aimed("h200") as devices:
        params = jax.eval_shape(
            lambda: load.served(
                cfg, params_lib.init_params(specs, jax.random.key(0)), InferConfig(weights=weights), rows
            )
        )
        if drafting:
            state = jax.eval_shape(lambda: speculative.allocate(cfg, rows, CAPACITY, 0))
            run = lambda p, s, *rest: speculative.step(cfg, 0, 1, 4, p, s, *rest)  # noqa: E731
        else:
            state = jax.eval_shape(lambda: slots.allocate(cfg, rows, CAPACITY))
            run = lambda p, s, *rest: slots.step(cfg, 4, p, s, *rest)  # noqa: E731
        compiled = card.compiled(
            jax.jit(run, donate_argnums=1), params, state, scalar, of((rows,), bool), of((), bool),
            mesh=card.alone(devices), spills=True,
        )  # fmt: skip
    return compiled.memory_analysis().temp_size_in_bytes, nbytes(state), nbytes(params)


# With drafts several tokens of a row meet a layer's keys and values, which are copied out for that product where
# XLA is left its defaults; the cache itself stays where it is.
@pytest.mark.parametrize("rows", [8, 40])  # more than 32 rows are written in a loop
@pytest.mark.parametrize(
    ("cfg", "drafting", "share"), [(CFG, False, 0.2), (LOOPED, False, 0.2), (LOOPED, True, 0.7)]
)
def test_a_turn_changes_the_cache_in_place(cfg, drafting, share, rows):
    temporary, cache, _ = room(cfg, rows, drafting, "packed")
    assert temporary < share * cache


@pytest.mark.parametrize("weights", ["full", "packed"])
def test_a_turn_neither_casts_nor_unpacks_weights(weights):
    """One row: what the turn writes down is less than the parameters, which it only reads."""
    cfg = dataclasses.replace(CFG, vocab_size=32768, quant="full" if weights == "full" else "ternary")
    temporary, _, params = room(cfg, 1, False, weights)
    assert temporary < 0.2 * params
