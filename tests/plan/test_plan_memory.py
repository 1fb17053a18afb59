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
from nanochat_jax.bench import throughput
from nanochat_jax.config import (
    CodesConfig,
    Config,
    DataConfig,
    FilterConfig,
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
from nanochat_jax.plan import layers, memory, report, speed
from nanochat_jax.plan.devices import DEVICES
from nanochat_jax.train import program
from nanochat_jax.types import Batch

EXPERIMENT = Path(__file__).parents[2] / "experiments/plan"
sys.path.insert(0, str(EXPERIMENT))
from variants import ADDED, CHECKS, HELD_OUT, LATER, TECHNIQUES, VARIANTS, variant  # noqa: E402

SMALL = ModelConfig(
    vocab_size=256, dim=32, layers=4, heads=2, kv_heads=2, head_dim=16, mlp_dim=64, unroll=1
)  # fmt: skip
PLAIN, ALONE = OptConfig(), MeshConfig()
XLA = json.loads((EXPERIMENT / "results.json").read_text())


def config(model=SMALL, opt=PLAIN, mesh=ALONE, **data):
    return Config(model=model, opt=opt, mesh=mesh, data=DataConfig(**{"seq_len": 128, "batch": 8, **data}))


@pytest.mark.parametrize("name", [*VARIANTS, *HELD_OUT, *LATER, *CHECKS])
def test_xla_agrees(name):
    """Arguments to the byte, the peak within 10 %: XLA's figures as stored by compare.py."""
    predicted = memory.predict(variant(name), "cpu")
    assert predicted.arguments == XLA[name]["arguments"]
    assert abs(predicted.peak / XLA[name]["peak"] - 1) < 0.1


@pytest.mark.filterwarnings("ignore:model.filter.score")
@pytest.mark.parametrize("name", TECHNIQUES)
def test_xla_agrees_on_every_technique(name):
    """Within 5 %, in a scan and written out."""
    predicted = memory.predict(variant(name), "cpu")
    assert predicted.arguments == XLA[name]["arguments"]
    assert abs(predicted.peak / XLA[name]["peak"] - 1) < 0.05


def test_all_variants_are_stored():
    assert len(VARIANTS) == 20 and len(TECHNIQUES) == 2 * len(ADDED)
    assert set(XLA) == {*VARIANTS, *HELD_OUT, *LATER, *TECHNIQUES, *CHECKS}


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


def stacked_outputs(scan):
    """What a scan hands out beside its carry, which has the same shape within and without."""
    within = scan.params["jaxpr"].jaxpr.outvars
    return [o.aval for o, i in zip(scan.outvars, within, strict=True) if o.aval.shape != i.aval.shape]


def scans_over_layers(cfg, lengths):
    """What the forward scans of these lengths hand to the backward pass, bytes each, from the jaxpr."""
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), transformer.param_specs(cfg.model)
    )
    gradient = jax.value_and_grad(losses.make_loss(cfg.model, cfg.train.loss), has_aux=True)
    traced = jax.make_jaxpr(gradient)(params, program.batch_shapes(cfg), jax.random.key(0))
    loops = [
        e for e in traced.jaxpr.eqns
        if e.primitive.name == "scan" and e.params["length"] in lengths and not e.params["reverse"]
    ]  # fmt: skip
    outputs = [stacked_outputs(e) for e in loops]
    return [sum(math.prod(a.shape) * a.dtype.itemsize for a in each) for each in outputs]


def saved_by_the_layers(cfg):
    """Bytes per token that one layer hands to the backward pass."""
    saved = scans_over_layers(cfg, {cfg.model.layers})
    assert len(saved) == cfg.model.loop.count
    return saved[0] / cfg.model.layers / (cfg.data.batch * cfg.data.seq_len)


@pytest.mark.parametrize("changes", [{}, {"mlp": "relu2", "kv_heads": 1}, {"norm": "weightless"}])
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_saved_tensors_are_those_of_the_traced_program(remat, changes):
    cfg = config(dataclasses.replace(SMALL, remat=remat, **changes), batch=64)
    formula = layers.layer_bytes(cfg.model, 128, 4, "cpu", remat)
    formula += layers.copied_bytes(cfg.model, "cpu") / (64 * 128)
    tolerance = 0.03 if remat == "none" else 1e-9
    assert saved_by_the_layers(cfg) == pytest.approx(formula, rel=tolerance)


@pytest.mark.parametrize(
    "changes", [{"quant": "ternary"}, {"mhc": MhcConfig(4)}, {"mhc": MhcConfig(2, "permutation")}]
)
def test_saved_tensors_of_techniques(changes):
    """Codes of one byte instead of what products read; streams, sublayers' outputs and coefficients."""
    cfg = config(dataclasses.replace(SMALL, remat="none", **changes), batch=64)
    formula = layers.layer_bytes(cfg.model, 128, 4, "cpu", "none") - layers.coded_bytes(cfg.model, 4)
    formula += layers.copied_bytes(cfg.model, "cpu") / (64 * 128)
    assert saved_by_the_layers(cfg) == pytest.approx(formula, rel=0.03)


@pytest.mark.parametrize(("unroll", "layers_of"), [(1, 4), (2, 4), (4, 4), (3, 3), (1, 1), (8, 4)])
def test_what_is_written_out_has_no_scan(unroll, layers_of):
    cfg = config(dataclasses.replace(SMALL, layers=layers_of, unroll=unroll), batch=2)
    steps = {n for n in (4, 2, 3) if n == layers_of // unroll}
    assert layers.is_written(cfg.model, layers_of) != bool(steps and scans_over_layers(cfg, steps))


def test_layers_that_are_written_out_keep_what_they_would_make_again():
    """On CPU: all but the activation of the gate. On GPU, where barriers hold, the input alone."""
    cfgs = [config(dataclasses.replace(SMALL, unroll=4, remat=remat)) for remat in ("none", "block")]
    none, block = (memory.predict(cfg, "cpu").activations for cfg in cfgs)
    assert none - block == 4 * 8 * 128 * 64 * 4
    none, block = (memory.predict(cfg, "gpu").activations for cfg in cfgs)
    assert none > 10 * block


@pytest.mark.parametrize("streams", [1, 4])
def test_a_recomputed_layer_saves_its_input_and_no_weights(streams):
    """In every loop; a copy of the weights would add 4 * their number to each."""
    model = dataclasses.replace(
        SMALL, remat="block", loop=LoopConfig(count=2), mhc=MhcConfig(streams=streams)
    )
    assert saved_by_the_layers(config(model, batch=2)) == streams * 32 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"mlp": "relu2", "kv_heads": 1}, {"dtype": "bfloat16"}, {"quant": "ternary"}, {"quant": "nvfp4"},
        {"quant": "ternary", "quant_group": 16}, {"quant": "fp8"}, {"quant": "fp4_rows"},
        {"quant": "mxfp4_grad"}, {"quant": "ternary_nvfp4"},
    ],
)  # fmt: skip
def test_copies_of_weights_are_counted(changes):
    """What stays when there are no rows, from two numbers of rows; gains, scales and keys beside it."""
    one, two = (config(dataclasses.replace(SMALL, **changes), batch=n) for n in (1, 2))
    rest = 2 * scans_over_layers(one, {4})[0] - scans_over_layers(two, {4})[0]
    copied = layers.copied_bytes(one.model, "cpu")
    assert rest / 4 == pytest.approx(copied, rel=0.2, abs=600)
    plan = [memory.predict(cfg, "cpu").activations for cfg in (one, two)]
    assert 2 * plan[0] - plan[1] == 4 * copied
    for none in ({"remat": "block"}, {"filter": FilterConfig(0.5, "random")}):
        assert layers.copied_bytes(dataclasses.replace(one.model, **none), "cpu") == 0


@pytest.mark.parametrize("streams", [1, 4])
def test_a_filtered_layer_saves_its_input_keys_and_values(streams):
    model = dataclasses.replace(
        SMALL, kv_heads=1, mhc=MhcConfig(streams=streams), filter=FilterConfig(0.25, "random")
    )
    cfg = config(model, batch=2)
    assert saved_by_the_layers(cfg) == 4 * (32 * streams + 2 * 16)
    filtered = memory.predict(config(model, batch=2), "cpu")
    assert filtered.activations == 4 * 2 * 128 * 4 * (32 * streams + 2 * 16)
    # A quarter of the rows' work, made again, and of all rows the gradient of the input, keys and values.
    again = memory.predict(
        config(dataclasses.replace(model, filter=FilterConfig(), remat="block"), batch=2), "cpu"
    )
    weights = memory.weight_bytes(model, ALONE)
    weights = sum(size for path, size in weights.items() if path.startswith("blocks/")) / 4
    work = (again.layer - weights) / 4 + filtered.activations / 4 + weights
    assert filtered.layer == pytest.approx(work) and filtered.layer < again.layer


def test_layers_before_and_after_the_loops_save_as_well():
    """And with an exit gate those after them once per loop, with gradients of their own."""
    outer = LoopConfig(count=2, before=3, after=5, gate="shared")
    model = dataclasses.replace(SMALL, loop=outer, remat="block")
    exits = TrainConfig(loss=(("exit", 1.0), ("exit_entropy", 0.1)))
    cfg = dataclasses.replace(config(model), train=exits)
    saved, predicted = scans_over_layers(cfg, {3, 4, 5}), memory.predict(cfg, "cpu")
    assert len(saved) == 5 and predicted.activations == sum(saved)
    layer = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert predicted.accumulated == (4 + 5) * layer
    ungated = dataclasses.replace(model, loop=dataclasses.replace(outer, gate="none"))
    plain = memory.predict(config(ungated), "cpu")
    assert plain.activations == sum(saved) * 16 // 21 and plain.accumulated == 4 * layer
    # Two loops' hidden states, and their gradients.
    assert predicted.edges - plain.edges == 4 * 8 * 128 * 32 * 4


def test_where_a_layer_is_makes_no_difference():
    """Also to the speed."""
    whole, parts = (
        config(dataclasses.replace(SMALL, layers=n, loop=LoopConfig(before=k, after=k)))
        for n, k in ((4, 0), (2, 1))
    )
    assert memory.predict(whole).activations == memory.predict(parts).activations
    seconds = [speed.predict(cfg, DEVICES["h100"]).seconds_per_step for cfg in (whole, parts)]
    assert seconds[0] == pytest.approx(seconds[1])


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_a_split_layer_is_one_with_fewer_heads(remat, platform):
    """Of two devices that share heads and the MLP, each saves what a layer of half of them does."""
    model, mesh = dataclasses.replace(SMALL, remat=remat), MeshConfig(tensor=2)
    half = dataclasses.replace(model, heads=1, kv_heads=1, mlp_dim=32)
    split, halved = memory.predict(config(model, mesh=mesh), platform), memory.predict(config(half), platform)
    assert split.activations == halved.activations and split.layer == halved.layer


@pytest.mark.parametrize("quant", ["fp8", "fp8_nvfp4", "nvfp4"])
def test_emulated_formats_need_copies(quant):
    assert (
        memory.predict(config(dataclasses.replace(SMALL, quant=quant))).layer > memory.predict(config()).layer
    )


def reads_a_reference(cfg):
    model = dataclasses.replace(cfg.model, filter=FilterConfig(0.5))
    return dataclasses.replace(cfg, model=model, data=dataclasses.replace(cfg.data, reference="losses.npy"))


@pytest.mark.parametrize("made", [lambda cfg: cfg, reads_a_reference])
def test_batches_made_elsewhere_are_those_of_the_pipeline(made, monkeypatch):
    """The plan's bytes, the benchmark's random rows, and what --compile lowers the step with."""
    cfg = made(config())
    shapes = program.batch_shapes(cfg)
    fields = {f.name: getattr(shapes, f.name) for f in dataclasses.fields(shapes)}
    fields = {name: (s.shape, s.dtype) for name, s in fields.items() if s is not None}
    rows = throughput.random_rows(cfg)
    assert {name: (a.shape, a.dtype) for name, a in rows.items()} == fields
    assert memory.predict(cfg).batch == sum(a.nbytes for a in rows.values())

    class LoweredError(Exception):
        pass

    class Parts:
        target, step = None, None

        def __init__(self, cfg, devices=None):
            self.step = self

        def lower(self, target, batch):
            raise LoweredError(batch)

    monkeypatch.setattr(program, "Parts", Parts)
    with pytest.raises(LoweredError) as caught:
        report.compile_step(cfg)
    assert caught.value.args == (shapes,)


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
    weights = 4 * layers.copied_bytes(SMALL, "gpu")  # whatever the rows
    tables = 2 * 4 * 256 * 32  # have joined the sum when the layers begin
    assert accumulating.accumulated == base.gradients - tables
    assert accumulating.activations - weights == (base.activations - weights) // 4
    looped = memory.predict(config(dataclasses.replace(SMALL, loop=LoopConfig(count=3))))
    # Three loops, and a copy of one; copies of weights are the same in every loop.
    assert looped.activations == 4 * base.activations - 3 * weights and looped.parameters == base.parameters
    assert looped.accumulated == sum(b for p, b in memory.weight_bytes(SMALL, ALONE).items() if "blocks" in p)
    assert memory.predict(config(batch=16)).activations == 2 * base.activations - weights
    assert memory.predict(config(), "cpu").activations > 1.9 * base.activations  # float32, shares


def test_what_a_table_of_codes_costs():
    """Decoded second moments, where a loop over microbatches follows; linear codes are multiplied."""

    def of(name, **changes):
        opt = OptConfig(matrix=GroupConfig(name=name, state_bits=8), **changes)
        return memory.decoded_bytes(opt, SMALL, memory.weight_bytes(SMALL, ALONE))

    matrices = 4 * 4 * (4 * 32 * 32 + 3 * 32 * 64)
    assert of("muon") == 0 and of("adamw") == matrices
    assert of("adamw", codes=CodesConfig(momentum="dynamic")) == 2 * matrices


def test_counts():
    model = dataclasses.replace(SMALL, loop=LoopConfig(count=4))
    counted = transformer.counts(model)
    blocks = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert counted == {
        "unique": blocks + 2 * 256 * 32 + 32, "unrolled": 4 * blocks + 2 * 256 * 32 + 32, "tables": 2 * 256 * 32,
    }  # fmt: skip


@pytest.mark.slow
def test_compiled_figures():
    """The flag --compile: XLA's arguments and collectives are the predicted ones, over two devices."""
    small = dataclasses.replace(SMALL, dim=16, heads=1, kv_heads=1, mlp_dim=16, layers=2)
    cfg = config(small, OptConfig(matrix=GroupConfig(name="lion")), MeshConfig(fsdp=2), seq_len=8, batch=2)
    figures = report.compile_step(cfg)
    assert figures["arguments"] == memory.predict(cfg, "cpu").arguments
    assert figures["expected"] and not figures["sometimes"]
    for kind, size in figures["traffic"].items():  # the loss, metrics and norms beside it: scalars
        assert size == pytest.approx(figures["expected"].get(kind, 0), abs=500)


@pytest.mark.slow
def test_xla_merges_what_written_out_layers_would_make_again():
    """Rematerialization saves most of the activations in a scan, next to nothing where layers are written out."""

    def temporary(unroll, remat):
        cfg = config(dataclasses.replace(SMALL, vocab_size=128, unroll=unroll, remat=remat))
        specs = transformer.param_specs(cfg.model)
        params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), specs)
        gradient = jax.jit(jax.grad(losses.make_loss(cfg.model, cfg.train.loss), has_aux=True))
        compiled = gradient.lower(params, program.batch_shapes(cfg), jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    stored = temporary(4, "none")
    assert temporary(4, "block") > 0.85 * stored and temporary(1, "block") < 0.6 * stored
