"""The closed form against real trees, traced programs and XLA's stored figures."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import losses
from nanochat_jax.config import (
    Config,
    DataConfig,
    GaloreConfig,
    GroupConfig,
    LoopConfig,
    MeshConfig,
    MhcConfig,
    ModelConfig,
    OptConfig,
    TrainConfig,
)
from nanochat_jax.model import transformer
from nanochat_jax.plan import memory, report
from nanochat_jax.train import program
from nanochat_jax.types import Batch

EXPERIMENT = Path(__file__).parents[2] / "experiments/plan"
sys.path.insert(0, str(EXPERIMENT))
from variants import HELD_OUT, LATER, VARIANTS, variant  # noqa: E402

SMALL = ModelConfig(
    vocab_size=256, dim=32, layers=4, heads=2, kv_heads=2, head_dim=16, mlp_dim=64, unroll=1
)  # fmt: skip
PLAIN, ALONE = OptConfig(), MeshConfig()
XLA = json.loads((EXPERIMENT / "results.json").read_text())


def config(model=SMALL, opt=PLAIN, mesh=ALONE, **data):
    return Config(model=model, opt=opt, mesh=mesh, data=DataConfig(**{"seq_len": 128, "batch": 8, **data}))


@pytest.mark.parametrize("name", [*VARIANTS, *HELD_OUT, *LATER])
def test_xla_agrees(name):
    """Arguments to the byte, the peak within 10 %: XLA's figures as stored by compare.py."""
    predicted = memory.predict(variant(name), "cpu")
    assert predicted.arguments == XLA[name]["arguments"]
    assert abs(predicted.peak / XLA[name]["peak"] - 1) < 0.1


def test_the_twenty_variants_are_stored():
    assert len(VARIANTS) == 20 and set(XLA) == {*VARIANTS, *HELD_OUT, *LATER}


GALORE = OptConfig(
    matrix=GroupConfig(name="muon", state_bits=8), galore=GaloreConfig(rank=8, min_dim=16, projector_bits=8)
)


@pytest.mark.parametrize("opt", [OptConfig(), GALORE], ids=["default", "galore 8-bit"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2), MeshConfig(fsdp=2, tensor=2)])
def test_bytes_on_each_device_are_those_of_the_real_layout(opt, mesh):
    cfg = config(opt=opt, mesh=mesh)
    parts, predicted = program.Parts(cfg), memory.predict(cfg)

    def on_one(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
        )

    assert predicted.parameters == on_one(parts.target.params)
    assert predicted.optimizer == on_one((parts.target.opt_state, parts.target.step))


def saved_by_the_layers(cfg):
    """Bytes per token that the forward scan over layers hands to the backward pass, from the jaxpr."""
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), transformer.param_specs(cfg.model)
    )
    rows = jax.ShapeDtypeStruct((cfg.data.batch, cfg.data.seq_len), np.int32)
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, np.float32), rows, rows)
    gradient = jax.value_and_grad(losses.make_loss(cfg.model, (("next_token", 1.0),)), has_aux=True)
    traced = jax.make_jaxpr(gradient)(params, batch, jax.random.key(0))
    loops = [
        e for e in traced.jaxpr.eqns
        if e.primitive.name == "scan" and e.params["length"] == cfg.model.layers and not e.params["reverse"]
    ]  # fmt: skip
    assert len(loops) == cfg.model.loop.count
    outputs = loops[0].outvars[loops[0].params["num_carry"] :]
    saved = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in outputs)
    return saved / cfg.model.layers / (cfg.data.batch * cfg.data.seq_len)


@pytest.mark.parametrize("changes", [{}, {"mlp": "relu2", "kv_heads": 1}, {"norm": "weightless"}])
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_saved_tensors_are_those_of_the_traced_program(remat, changes):
    cfg = config(dataclasses.replace(SMALL, remat=remat, **changes), batch=64)
    formula = memory.layer_bytes(cfg.model, 128, 4, "cpu", remat)
    tolerance = 0.03 if remat == "none" else 1e-9
    assert saved_by_the_layers(cfg) == pytest.approx(formula, rel=tolerance)


@pytest.mark.parametrize("streams", [1, 4])
def test_a_recomputed_layer_saves_its_input_and_no_weights(streams):
    """In every loop; a copy of the weights would add 4 * their number to each."""
    model = dataclasses.replace(
        SMALL, remat="block", loop=LoopConfig(count=2), mhc=MhcConfig(streams=streams)
    )
    assert saved_by_the_layers(config(model, batch=2)) == streams * 32 * 4


def test_one_layer_per_scan_step_equals_all_at_once(key):
    from nanochat_jax import params as params_lib
    from nanochat_jax.quant import project

    model = dataclasses.replace(SMALL, value_embed_every=1, layers=2, unroll=0)
    params = params_lib.init_params(transformer.param_specs(model), key)
    tokens = jax.random.randint(key, (1, 8), 0, 256)
    batch = Batch(tokens, tokens, np.ones((1, 8), np.float32), tokens * 0, np.arange(8)[None])

    def hidden(unroll):
        m = dataclasses.replace(model, unroll=unroll)
        return jax.jit(lambda p: transformer.forward(m, project.from_config(m), p, batch).hidden)(params)

    np.testing.assert_allclose(hidden(1), hidden(2), atol=1e-5)


def test_what_must_grow_grows():
    base = memory.predict(config())
    accumulating = memory.predict(dataclasses.replace(config(), train=TrainConfig(microbatches=4)))
    assert accumulating.accumulated == base.gradients and accumulating.activations == base.activations // 4
    looped = memory.predict(config(dataclasses.replace(SMALL, loop=LoopConfig(count=3))))
    assert looped.activations == 3 * base.activations and looped.parameters == base.parameters
    assert memory.predict(config(batch=16)).activations == 2 * base.activations
    assert memory.predict(config(), "cpu").activations > 1.9 * base.activations  # float32, shares


def test_counts():
    model = dataclasses.replace(SMALL, loop=LoopConfig(count=4))
    counted = memory.counts(model)
    blocks = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert counted == {
        "unique": blocks + 2 * 256 * 32 + 32, "unrolled": 4 * blocks + 2 * 256 * 32 + 32, "tables": 2 * 256 * 32,
    }  # fmt: skip


@pytest.mark.slow
def test_compiled_figures():
    """The flag --compile: XLA's arguments are the predicted ones, over two devices."""
    small = dataclasses.replace(SMALL, dim=16, heads=1, kv_heads=1, mlp_dim=16, layers=2)
    cfg = config(small, OptConfig(matrix=GroupConfig(name="lion")), MeshConfig(fsdp=2), seq_len=8, batch=2)
    assert report.compile_step(cfg)["arguments"] == memory.predict(cfg, "cpu").arguments
