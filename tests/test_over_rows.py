"""Gradients over devices: the numbers of one device, exchanged once a step, in the bytes that are predicted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import losses, parallel
from nanochat_jax.config import (
    Config,
    DataConfig,
    FilterConfig,
    LoopConfig,
    MeshConfig,
    MhcConfig,
    ModelConfig,
    MtpConfig,
    TrainConfig,
)
from nanochat_jax.model import transformer
from nanochat_jax.plan import collectives, traffic
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

MODEL = ModelConfig(
    vocab_size=128, dim=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp_dim=32, unroll=1, remat="block",
    loop=LoopConfig(count=2),
)  # fmt: skip


def config(mesh, model=MODEL, microbatches=2):
    return Config(
        model=model, mesh=MeshConfig(**mesh), data=DataConfig(seq_len=8, batch=8),
        train=TrainConfig(microbatches=microbatches),
    )  # fmt: skip


def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (8, 8), dtype=np.int32)
    weights = rng.uniform(size=(8, 8)).astype(np.float32) / 64
    return Batch(
        tokens,
        tokens[::-1].copy(),
        weights,
        np.ones_like(tokens),
        np.tile(np.arange(8, dtype=np.int32), (8, 1)),
    )


def gradient_of(cfg):
    """The gradient of a whole step on the config's mesh."""
    specs, mesh, dtype = transformer.param_specs(cfg.model), parallel.mesh(cfg.mesh), cfg.mesh.reduce_dtype
    loss = losses.make_loss(cfg.model, cfg.train.loss, 64, parallel.whole_layer(mesh, specs, dtype))
    gradient = jax.value_and_grad(loss, has_aux=True)
    return parallel.over_rows(mesh, specs, dtype)(
        functools.partial(steps._accumulate, gradient, cfg.train.microbatches)
    )


def compiled(cfg, prepare=lambda batch, state: batch):
    """It compiled, and its arguments."""
    run, specs, mesh = gradient_of(cfg), transformer.param_specs(cfg.model), parallel.mesh(cfg.mesh)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, specs)
    places = parallel.param_shardings(specs, mesh)
    given = (
        jax.device_put(params, places),
        jax.device_put(prepare(rows(), ()), parallel.batch_sharding(mesh)),
        jax.random.key(0),
    )
    step = jax.jit(run, out_shardings=(None, places)).lower(*given).compile()
    return step, given


@functools.cache
def alone():
    step, given = compiled(config({}))
    return jax.tree.map(np.asarray, step(*given))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}])
def test_sums_and_bytes(mesh):
    """float32 rounding apart: rows are added in another order. Bytes to the byte, beside scalars."""
    cfg = config(mesh)
    step, given = compiled(cfg)
    got = step(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-6), got, alone())
    assert "u16[" not in step.as_text()
    if "tensor" not in mesh:
        assert_bytes(step, cfg)


@pytest.mark.slow
def test_every_stack_and_loss_over_devices():
    """Streams, layers before and after three loops in a scan, exits, further tokens and value embeddings."""
    loops = LoopConfig(count=3, before=1, after=1, gate="per_loop", norm=True)
    model = dataclasses.replace(
        MODEL, loop=loops, mhc=MhcConfig(2, "permutation"), mtp=MtpConfig(1), value_embed_every=1, x0_scalars=True
    )  # fmt: skip
    terms = (("exit", 1.0), ("exit_entropy", 0.1), ("mtp", 0.5))
    prepare, results = losses.make_prepare(model), []
    for mesh in ({}, {"data": 2, "fsdp": 2}):
        cfg = config(mesh, model)
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, loss=terms))
        step, given = compiled(cfg, prepare)
        results.append(jax.tree.map(np.asarray, step(*given)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-3, atol=1e-5), *results)


def assert_bytes(step, cfg):
    measured, sometimes = collectives.exchanged(step.as_text(), jax.device_count())
    predicted = traffic.gradients(cfg)
    assert set(measured) == set(predicted) | {"all-reduce"} and not sometimes  # loss and metrics are scalars
    for kind, size in measured.items():
        assert size == pytest.approx(predicted.get(kind, 0), abs=100 if kind == "all-reduce" else 0.1), kind


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "fsdp": 2}])
def test_bfloat16_crosses_the_wire(mesh):
    """As bits, half of float32's; losses are those of float32 weights rounded to 8 bits where gathered."""
    cfg = config({**mesh, "reduce_dtype": "bfloat16"})
    step, given = compiled(cfg)
    (loss, _), grads = step(*given)
    (want, _), wanted = alone()
    np.testing.assert_allclose(loss, want, rtol=2**-23 if "fsdp" not in mesh else 2e-2)
    for got, true in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.linalg.norm(got - true)) <= (0.006 if "fsdp" not in mesh else 0.1) * np.linalg.norm(
            true
        )
    text = step.as_text()
    assert "u16[" in text
    assert_bytes(step, cfg)
    full, half = (sum(traffic.gradients(c).values()) for c in (config(mesh), cfg))
    assert half == pytest.approx(full / 2, rel=0.01)


def scans(jaxpr):
    """Every scan of a program: (backward?, its text, what it hands out)."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            within = [v.aval.shape for v in equation.params["jaxpr"].jaxpr.outvars]
            outputs = [v.aval.shape for v in equation.outvars]
            shapes = [o for o, i in zip(outputs, within, strict=True) if o != i]  # without the carry
            yield equation.params["reverse"], str(equation.params["jaxpr"]), shapes
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


@pytest.mark.parametrize(
    "changes", [{}, {"remat": "dots"}, {"remat": "none"}, {"filter": True, "remat": "none"}]
)
def test_whole_weights_are_not_kept(changes):
    """Both passes gather each layer's seven matrices, whatever else is recomputed; none is handed over."""
    if "filter" in changes:
        changes = {**changes, "filter": FilterConfig(0.5, "random")}
    cfg = config(
        {"fsdp": 4}, dataclasses.replace(MODEL, loop=LoopConfig(), dim=48, **changes), microbatches=1
    )
    run = gradient_of(cfg)
    specs = transformer.param_specs(cfg.model)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), specs)
    found = list(scans(jax.make_jaxpr(run)(params, rows(), jax.random.key(0)).jaxpr))
    layers = [each for each in found if "reduce_scatter" in each[1] or "all_gather" in each[1]]
    assert [backward for backward, _, _ in layers] == [False, True]
    assert [text.count("all_gather[") for _, text, _ in layers] == [7, 7]
    assert layers[1][1].count("reduce_scatter[") == 7
    sides = {(48, 32), (32, 48), (48, 96), (48, 64)}
    assert not [shape for shape in layers[0][2] if shape[-2:] in sides]


def test_microbatches_exchange_no_more_over_replicas():
    """Only fsdp, which must gather what it uses, pays per microbatch."""
    for mesh, factor in (({"data": 4}, 1.0), ({"fsdp": 4}, 2.0)):
        few, many = (traffic.gradients(config(mesh, microbatches=n)) for n in (1, 2))
        ratio = sum(many.values()) / sum(few.values())
        assert ratio == 1 if factor == 1 else 1.5 < ratio < 2


def test_one_device_is_as_without():
    mesh, specs = parallel.mesh(MeshConfig()), transformer.param_specs(MODEL)
    assert parallel.whole_layer(mesh, specs) is None
    f = object()
    assert parallel.over_rows(mesh, specs)(f) is f  # type: ignore[arg-type]
    assert traffic.predict(config({})) == {}


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"data": 2, "tensor": 2}])
def test_tensor_sends_sums_of_activations_only(mesh):
    """Weights side by side would be exchanged: 2.7 times the bytes for machine B."""
    cfg = config(mesh)
    step, *_ = compiled(cfg)
    found, _ = collectives.exchanged(step.as_text(), parallel.mesh(cfg.mesh).size)
    assert set(found) == {"all-reduce"}
    expected = sum(traffic.added(traffic.gradients(cfg), traffic.activations(cfg, "cpu")).values())
    assert expected <= found["all-reduce"] <= 1.8 * expected


def test_more_of_everything_is_more_traffic():
    base = config({"fsdp": 2})
    loops = dataclasses.replace(base, model=dataclasses.replace(MODEL, loop=LoopConfig(count=4)))
    assert sum(traffic.gradients(loops).values()) > 1.5 * sum(traffic.gradients(base).values())
