"""Bytes between devices: read off HLO, and in closed form, against sums by hand and stored compilations."""

import dataclasses
import json
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat_jax import cli
from nanochat_jax.config import Config, GaloreConfig, MeshConfig, ModelConfig, OptConfig
from nanochat_jax.model import transformer
from nanochat_jax.plan import collectives, fit, memory, report, speed, traffic
from nanochat_jax.plan.devices import DEVICES, USABLE

EXPERIMENT = Path(__file__).parents[2] / "experiments/plan"
sys.path.insert(0, str(EXPERIMENT))
import exchange  # noqa: E402

STORED = json.loads((EXPERIMENT / "traffic.json").read_text())

HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%outer (p: (s32[])) -> (s32[]) {
  %w.1 = (s32[], f32[8,4]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[2]{0}, /*index=1*/f32[3,2]{1,0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add.1
}

%refresh (p: (s32[])) -> (s32[]) {
  %s = f32[4]{0} reduce-scatter(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add.1
}

%branch (p: f32[]) -> f32[] {
  %q = f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%fused (p: f32[]) -> f32[] {
  ROOT %z = u16[6]{0} all-to-all(%x), replica_groups={}
}

ENTRY %main.9 (p0: f32[]) -> f32[] {
  %w.2 = (s32[]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"},"x":{"n":"7"}}
  %w.3 = (s32[]) while(%t), condition=%c, body=%refresh
  %k = f32[] conditional(%i, %a, %b), branch_computations={%branch, %other}
  %f = f32[] fusion(%p0), kind=kLoop, calls=%fused
  %g = (f32[2]{0}, f32[16]{0}) all-gather-start(%p0), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %h = f32[16]{0} all-gather-done(%g)
}
"""


def test_loops_multiply_and_what_may_not_run_is_apart():
    always, sometimes = collectives.exchanged(HLO, 8)
    assert always == {
        "all-gather": 15 * 64 * 3 / 4 + 64 * 7 / 8, "all-reduce": 3 * 2 * (8 + 24) / 2, "all-to-all": 12 * 7 / 8
    }  # fmt: skip
    assert sometimes == {"reduce-scatter": 3 * 16, "collective-permute": 40}


def test_no_entry():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives.exchanged("HloModule x", 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[4,8]{1,0}", 128), ("bf16[]", 2), ("(s32[2]{0}, pred[3], u16[5])", 8 + 3 + 10), ("f8e4m3fn[7]", 7),
        ("s4[3]", 2), ("token[]", 0), ("f32[4,8]{1,0:T(8,128)}", 128),
    ],
)  # fmt: skip
def test_sizes_of_types(text, size):
    assert collectives.shape_bytes(text) == size


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3), ("replica_groups=[4,2]<=[2,4]T(1,0)", 2), ("replica_groups={}", 6),
        ("replica_groups=mesh['a'=2,'b'=3] {'a','b'}", 6), ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
    ],
)  # fmt: skip
def test_group_sizes(groups, n):
    assert collectives.group_size(f"%x), channel_id=1, {groups}, to_apply=%add", 6) == n


@hypothesis.given(st.integers(1, 64), st.integers(0, 10**9))
def test_an_all_reduce_is_a_scatter_and_a_gather(n, size):
    parts = collectives.sent("reduce-scatter", size / n, n) + collectives.sent("all-gather", size, n)
    assert collectives.sent("all-reduce", size, n) == pytest.approx(parts)
    assert collectives.sent("all-to-all", size, n) <= size


@pytest.mark.parametrize("name", ["config_a:loop", "config_b:loop", "config_c:loop"])
def test_replicas_send_their_gradients_once(name):
    """Whatever the microbatches and loops; in bfloat16 half of it."""
    cfg = fit.changed(cli.get_config(name), {"mesh.data": 2, "mesh.fsdp": 1})
    weights = transformer.counts(cfg.model)["unique"]
    assert traffic.gradients(cfg) == {"all-reduce": 4 * weights}
    narrow = traffic.gradients(fit.changed(cfg, {"mesh.reduce_dtype": "bfloat16"}))
    assert sum(narrow.values()) == pytest.approx(2 * weights, rel=1e-4)


def test_fsdp_gathers_each_layer_when_it_is_used():
    cfg = fit.changed(cli.get_config("config_b:loop"), {"mesh.data": 1, "mesh.fsdp": 2})
    D, F, N = 1536, 6144, 20
    phi = 2 * (2 * D) * (2 * 2 + 4)  # of the streams, whose sides are streams * D
    layer = N * (4 * D * D + 3 * D * F + phi)
    tables = 2 * 50304 * D
    found, uses = traffic.gradients(cfg), 8 * 4
    assert found["all-gather"] == 4 * (2 * uses * layer + tables) / 2
    assert found["reduce-scatter"] == 4 * (uses * layer + tables) / 2
    half = traffic.gradients(fit.changed(cfg, {"mesh.reduce_dtype": "bfloat16"}))
    assert (
        half["all-gather"] == pytest.approx(found["all-gather"] / 2, rel=1e-3)
        and "reduce-scatter" not in half
    )


def test_tensor_sends_activations():
    cfg = fit.changed(cli.get_config("config_b:loop"), {"mesh.data": 1, "mesh.tensor": 2})
    tokens, passes = 32 * 4096, 3
    assert traffic.activations(cfg, "gpu") == {"all-reduce": 2 * passes * 80 * 2 * 1536 * tokens}
    assert traffic.activations(fit.changed(cfg, {"mesh.tensor": 1}), "gpu") == {}


@pytest.mark.parametrize(
    ("sizes", "gathered", "added"), [({"data": 2}, 106_496, 0), ({"fsdp": 2}, 98_304 + 2048, 196_608)]
)
def test_muon_with_galore_exchanges_projections(sizes, gathered, added):
    """Against a compiled step (jaxlib 0.10.2, dim 64, 4 layers, rank 16), less its gradients; within 3 %."""
    model = ModelConfig(vocab_size=512, dim=64, layers=4, heads=4, kv_heads=4, head_dim=16, mlp_dim=192)
    opt = OptConfig(galore=GaloreConfig(rank=16, min_dim=32))
    found = traffic.optimizer(Config(model=model, opt=opt, mesh=MeshConfig(**sizes)))
    assert found["all-gather"] == pytest.approx(gathered, rel=0.03)
    assert found.get("all-reduce", 0) == added
    assert found.get("all-to-all", 0) == (8192 if "fsdp" in sizes else 0)


def test_two_cards_without_nvlink_are_replicas():
    """What config_b.py chooses is the fastest layout that fits, by prediction."""
    cfg, card = cli.get_config("config_b"), DEVICES["rtx4090"]
    layouts = [{"data": 2}, {"fsdp": 2}, {"fsdp": 2, "reduce_dtype": "bfloat16"}, {"tensor": 2}]
    seconds = {}
    for sizes in layouts:
        mesh = dataclasses.replace(cfg.mesh, **({"data": 1, "fsdp": 1, "tensor": 1} | sizes))
        other = dataclasses.replace(cfg, mesh=mesh)
        if memory.predict(other).peak <= USABLE * card.memory:
            seconds[mesh] = speed.predict(other, card).seconds_per_step
    assert len(seconds) == 4 and min(seconds, key=lambda mesh: seconds[mesh]) == cfg.mesh
    assert cfg.mesh.data == 2


def test_the_report_says_what_is_exchanged():
    shown = report.text(report.plan(cli.get_config("config_b"), "rtx4090"))
    assert "exchange     " in shown and "all-reduce" in shown
    assert "exchange" not in report.text(report.plan(cli.get_config("config_a"), "rtxpro6000"))
    record = report.plan(cli.get_config("config_b"), "rtx4090")
    record["xla"] = {
        "for": "rtx4090",
        "instead": "",
        "arguments": 1,
        "temporary": 1,
        "peak": 2,
        "predicted": 2,
        "traffic": {"all-reduce": 2e9},
    }
    record["xla"] |= {"sometimes": {"all-gather": 3e9}, "expected": {"all-reduce": 1e9}}
    shown = report.text(record)
    assert (
        "2 GB by XLA for rtx4090 (all-reduce 2); expected for it 1" in shown
        and "refresh a subspace all-gather 3" in shown
    )


@pytest.mark.parametrize("name", STORED)
def test_stored_compilations_agree(name):
    """XLA's figures of experiments/plan/exchange.py. Without tensor, what over_rows exchanges is exact, and
    the rest, the optimizer, a small share of it."""
    found, cfg = STORED[name], exchange.case(name)
    alone = name.startswith(exchange.GRADIENTS)
    of_gradients = traffic.added(traffic.gradients(cfg), traffic.activations(cfg, "cpu"))
    assert found["expected"] == pytest.approx(of_gradients if alone else traffic.predict(cfg, "cpu"))
    assert found["microbatches"] == cfg.train.microbatches
    measured, expected = (sum(found[key].values()) for key in ("traffic", "expected"))
    if cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor == 1:
        assert measured == expected == 0
    elif cfg.mesh.tensor > 1:
        assert set(found["traffic"]) == {"all-reduce"} and 0.6 * measured <= expected <= measured
    elif alone:
        assert expected == pytest.approx(measured, abs=1000)  # of scalars
    else:
        assert 0.5 * measured <= expected <= 1.1 * measured
        assert found["traffic"].get("reduce-scatter", 0) == traffic.gradients(cfg).get("reduce-scatter", 0)
