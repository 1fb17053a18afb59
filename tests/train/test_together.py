"""All techniques in one step, and every pair of them: finite, learning, one trace, same bits after a checkpoint."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from test_system import arrays

from nanochat_jax import checkpoint, cli, parallel
from nanochat_jax.config import CkptConfig, ConfigError
from nanochat_jax.train import program

# technique -> its settings; "full" is none of them
TECHNIQUES = {
    "ternary": {"model.quant": "ternary"},
    "fp4": {"model.quant": "nvfp4_grad"},
    "streams": {"model.mhc.streams": 2, "model.mhc.form": "permutation"},
    "loops": {"model.loop.count": 2, "model.loop.norm": True},
    "further tokens": {"model.mtp.depth": 1},
    "filter": {"model.filter.keep": 0.6, "model.filter.score": "random"},
    "galore": {"opt.galore.rank": 8, "opt.galore.min_dim": 16, "opt.galore.update_gap": 7},
    "8 bits": {"opt.matrix.state_bits": 8, "opt.codes.block": 32},
}
# Further ones, in pairs only: what they share with those above is shown there.
FURTHER = {
    "layers outside": {"model.loop.before": 1, "model.loop.after": 1},
    "exits": {"model.loop.count": 2, "model.loop.gate": "shared"},
    "fp8": {"model.quant": "fp8"},
    "excess": {"model.filter.keep": 0.6, "data.reference": "made here"},
}
# Refused with a sentence, and two values of one setting.
REFUSED = [("filter", "exits"), ("exits", "excess"), ("filter", "fp8"), ("fp8", "excess")]
SAME = [("ternary", "fp8"), ("fp4", "fp8"), ("filter", "excess")]
PAIRS = [
    pair for pair in itertools.combinations({**TECHNIQUES, **FURTHER}, 2) if pair not in (*REFUSED, *SAME)
]
SMALL = {
    "model.quant": "full", "model.vocab_size": 256, "model.dim": 32, "model.layers": 1, "model.heads": 2,
    "model.kv_heads": 2, "model.head_dim": 16, "model.mlp_dim": 64, "data.seq_len": 32, "data.batch": 8,
    "train.steps": 20, "train.loss_chunk": 64, "opt.schedule.warmup_steps": 1,
}  # fmt: skip


def together(*names, **more):
    """The small config with some techniques."""
    settings = dict(SMALL)
    for name in names:
        settings |= {**TECHNIQUES, **FURTHER}[name]
    if {"ternary", "fp4"} <= set(names):
        settings["model.quant"] = "ternary_nvfp4"
    terms = [("exit", 1.0), ("exit_entropy", 0.05)] if "exits" in names else [("next_token", 1.0)]
    settings["train.loss"] = (*terms, *([("mtp", 0.2)] if "further tokens" in names else []))
    return cli.get_config("tiny", **settings, **more)


def train(cfg, parts=None, state=None, count=20, start=0):
    parts = parts or program.Parts(cfg)
    state = parts.fresh(cfg.seed) if state is None else state
    losses = []
    for i in range(start, start + count):
        rows = arrays(i)
        if (
            cfg.data.reference
        ):  # another model's losses: here, those of one that knows half of the tokens well
            rows["reference"] = np.where(rows["targets"] % 2, 0.5, 5.0).astype(np.float32)
        state, metrics = parts.step(state, parallel.shard_batch(rows, parts.mesh))
        losses.append(float(metrics["loss/next_token"]))
    return np.array(losses), state, parts


def check(cfg):
    losses, state, parts = train(cfg)
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0] - 0.2, losses
    assert parts.step._cache_size() == 1
    return losses, state, parts


def saved_and_restored(tmp_path: Path, cfg, parts, state):
    with checkpoint.Checkpointer(CkptConfig(), tmp_path) as home:
        home.save(int(state.step), state, {}, wait=True)
    with checkpoint.Checkpointer(CkptConfig(), tmp_path) as home:
        return home.restore(parts.target, parts.fresh_opt)[0]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_pair_learns_in_one_trace(pair):
    check(together(*pair))


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
def test_pairs_that_cannot_be_are_refused(pair):
    with pytest.raises(ConfigError, match=r"'model.filter.keep' must be 1 with"):
        together(*pair)


@pytest.mark.slow
def test_what_follows_the_step_on_several_devices():
    """A scheduled weight, first steps of all tokens and running averages: the same as on one device, and all
    of it in the checkpoint's state."""
    settings = {
        "train.loss": (("next_token", 1.0), ("z", ((1, 0.0), (3, 1e-2)))),
        "model.filter.keep": 0.5, "model.filter.score": "ema", "model.filter.warmup": 2,
    }  # fmt: skip
    made = []
    for sizes in ({}, {"mesh.data": 2, "mesh.fsdp": 2}):
        cfg = cli.get_config("tiny", **SMALL, **settings, **sizes)
        parts, seen = program.Parts(cfg), []
        state = parts.fresh(cfg.seed)
        for i in range(4):
            state, metrics = parts.step(state, parallel.shard_batch(arrays(i), parts.mesh))
            seen.append(
                [float(metrics[name]) for name in ("loss/total", "filter/kept_share", "loss/weight_z")]
            )
        made.append((np.array(seen), np.asarray(state.opt_state.table)))
        assert parts.step._cache_size() == 1
    (one, table), (several, spread) = made
    np.testing.assert_allclose(one[:, 2], [0, 0, 5e-3, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(one[:2, 1], 1, rtol=1e-5)
    assert np.all(one[2:, 1] < 0.7) and np.abs(table - np.log(256)).max() > 1e-3
    np.testing.assert_allclose(several, one, rtol=1e-3)
    np.testing.assert_allclose(spread, table, rtol=1e-3)


@pytest.fixture(scope="module")
def everything():
    cfg = together(*TECHNIQUES)
    return cfg, *check(cfg)


@pytest.mark.slow
def test_everything_reports_its_health(everything):
    cfg, *_ = everything
    parts = program.Parts(cfg)
    _, metrics = jax.eval_shape(parts.step, parts.shapes, program.batch_shapes(cfg))
    for name in ("loss/mtp_1", "mhc/gain", "filter/kept_nll", "filter/kept_share", "loss/entropy"):
        assert name in metrics


@pytest.mark.slow
def test_everything_goes_on_from_a_checkpoint_with_the_same_bits(everything, tmp_path):
    cfg, _, straight, parts = everything
    _, half, _ = train(cfg, parts, count=11)
    half = saved_and_restored(tmp_path, cfg, parts, half)
    _, resumed, _ = train(cfg, parts, half, count=9, start=11)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_everything_on_eight_devices(everything):
    """Stochastic roundings and 8-bit codes flip where sums differ in their last bits: close, not equal."""
    _, alone, *_ = everything
    cfg = together(*TECHNIQUES, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    sharded, state, parts = train(cfg)
    np.testing.assert_allclose(sharded[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(sharded, alone, rtol=0.05)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(parts.layout), strict=True):
        assert leaf.sharding == place
