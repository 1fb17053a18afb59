"""What a decode step moves, by XLA's own account: the cache is read in place and written once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, LoopConfig, MhcConfig, ModelConfig
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine, slots, speculative
from nanochat_jax.model import block, transformer

CFG = ModelConfig(vocab_size=64, dim=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp_dim=32)
LOOPS = LoopConfig(count=2, before=1, after=1)
KINDS = {
    "plain": (CFG, "all", None),
    "modern": (dataclasses.replace(CFG, **BLOCKS["modern"]), "all", None),
    "window": (dataclasses.replace(CFG, window=(64, 0)), "all", None),
    "scanned": (dataclasses.replace(CFG, unroll=1), "all", None),
    "scanned_pairs": (dataclasses.replace(CFG, unroll=2, layers=4), "all", None),
    "loops": (dataclasses.replace(CFG, layers=1, loop=LOOPS), "all", None),
    "last_loop": (dataclasses.replace(CFG, layers=1, loop=LOOPS), "last", None),
    "exit": (
        dataclasses.replace(CFG, layers=1, loop=dataclasses.replace(LOOPS, gate="shared")), "all", 0.5
    ),
    "streams": (dataclasses.replace(CFG, mhc=MhcConfig(streams=2, form="permutation")), "all", None),
}  # fmt: skip


def _params(cfg):
    """Shapes of the parameters."""
    specs = transformer.param_specs(cfg)
    return jax.eval_shape(lambda key: params_lib.init_params(specs, key), jax.random.key(0))


def _bytes(tree) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


FAST = [("plain", 1, 1), ("loops", 3, 1)]
ALL = [
    (kind, rows, tokens) for kind, (_, loops, quantile) in KINDS.items() for rows in (1, 3, 40)
    for tokens in (1, 4) if tokens == 1 or not (quantile or loops == "last")
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rows", "tokens"),
    FAST + [pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in FAST],
)
def test_a_step_reads_the_cache_in_place(kind, rows, tokens):
    cfg, loops, quantile = KINDS[kind]
    cache = jax.eval_shape(lambda: caches.allocate(cfg, rows, 2048, loops))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, given, cache):
        if tokens == 1:
            return engine.decode(cfg, params, given, cache, quantile)
        return engine.extend(cfg, params, given, jnp.full((rows,), tokens), cache)

    shape = (rows,) if tokens == 1 else (rows, tokens)
    compiled = step.lower(_params(cfg), jax.ShapeDtypeStruct(shape, jnp.int32), cache).compile()
    size = _bytes(cache)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size, "the cache is not written in place"
    assert memory.temp_size_in_bytes < 0.25 * size
    assert compiled.cost_analysis()["bytes accessed"] < 1.5 * size


@pytest.mark.parametrize(
    ("kind", "drafts"), [("plain", 0), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("modern", 0), ("loops", 2)))]
)  # fmt: skip
def test_a_turn_of_several_steps_does_too(kind, drafts):
    cfg, rows, most = KINDS[kind][0], 3, 8
    words = jnp.int32(5), jnp.ones(rows, bool), jnp.bool_(False)
    if drafts:
        state = jax.eval_shape(lambda: speculative.allocate(cfg, rows, 2048, 1))
        lowered = speculative.step.lower(cfg, 1, drafts, most, _params(cfg), state, *words)
    else:
        state = jax.eval_shape(lambda: slots.allocate(cfg, rows, 2048))
        lowered = slots.step.lower(cfg, most, _params(cfg), state, *words)
    memory, size = lowered.compile().memory_analysis(), _bytes(state)
    assert memory.alias_size_in_bytes >= size, "the slots are not changed in place"
    assert memory.temp_size_in_bytes < 0.25 * size


@pytest.mark.parametrize("rows", [3, block.MANY_ROWS + 8])
def test_entries_land_behind_each_rows_length(rows):
    """Against NumPy, in both ways to write."""
    rng = np.random.default_rng(0)
    cache = caches.allocate(CFG, rows, 16)
    old = {name: rng.normal(size=getattr(cache, name).shape).astype(np.float32) for name in ("k", "v")}
    new = {
        name: rng.normal(size=(*a.shape[:3], 2, a.shape[3], a.shape[5])).astype(np.float32)
        for name, a in old.items()
    }
    length = rng.integers(0, 14, rows).astype(np.int32)
    given = cache.replace(length=jnp.asarray(length), **{n: jnp.asarray(a) for n, a in old.items()})
    made = jax.jit(block.append)(given, (new["k"], new["v"]), {}, jnp.ones(3))
    for name, want in old.items():
        for row in range(rows):
            want[:, :, row, :, length[row] : length[row] + 2] = np.swapaxes(new[name][:, :, row], 2, 3)
        np.testing.assert_array_equal(getattr(made, name), want)
    np.testing.assert_array_equal(made.length, length)
