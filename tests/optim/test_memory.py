"""State bytes: counted on real states, and equal to the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import optim
from nanochat_jax.bench import optimizers as bench
from nanochat_jax.optim import galore, memory, quantized
from nanochat_jax.params import flatten


def test_counts_are_those_of_the_allocated_state():
    params = {"a": {"w": jnp.ones((4, 8)), "norm": jnp.ones(8)}, "norm": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9))
    got = memory.state_bytes(tx, params)
    # a/norm ends in norm, but is its own: the longest path wins
    assert got == {"a/norm": 3 * 8 * 4, "a/w": 3 * 32 * 4, "norm": 3 * 3 * 2, "": 4}
    assert sum(got.values()) == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


@pytest.mark.parametrize("chain", bench.CHAINS)
def test_every_state_is_owned_by_its_parameters(chain):
    """All but counters: what sharding rules and checkpoints know a state's place by."""
    model, rank = bench.TREES["tiny"]
    tx, _ = optim.build(bench.settings(chain, rank), 100)
    assert memory.state_bytes(tx, bench.shapes_of(model))[""] <= 100


@pytest.mark.parametrize(
    ("chain", "want"),
    [
        ("adamw", 8.0),
        ("muon", 4.0),
        ("adamw 8-bit", quantized.bytes_per_parameter(2, 128)),
        ("muon 8-bit", quantized.bytes_per_parameter(1, 128)),
        ("foam 1 (adamw)", 4.0),
        ("foam 3 (adamw)", 1.0),
        ("foam 1 (muon)", 2.0),
        ("foam 1 (muon 8-bit)", quantized.bytes_per_parameter(1, 128) / 2),
    ],
)
def test_bytes_per_matrix_parameter(chain, want):
    assert bench.measure_memory(chain, "config_a")["matrix"] == pytest.approx(want)


@pytest.mark.parametrize("tree", ["nano_125m", "config_a", "config_b", "config_c"])
def test_galore_bytes_follow_the_formula(tree):
    model, rank = bench.TREES[tree]
    shapes = [x.shape for x in jax.tree.leaves(bench.shapes_of(model)["blocks"]) if x.ndim == 3]
    elements = sum(np.prod(s) for s in shapes)
    tx, _ = optim.build(bench.settings("galore(muon)", rank), 100)
    of = memory.state_bytes(tx, bench.shapes_of(model))
    got = sum(v for k, v in of.items() if k.startswith("blocks/") and "norm" not in k)
    assert got == sum(galore.state_bytes(s, rank) for s in shapes)
    assert 0.15 < got / elements / 4 < 0.75


def test_groups_add_up():
    got = memory.by_group({"a": 8, "b": 4, "": 4}, {"a": 2, "b": 2}, {"a": "matrix", "b": "scalar"})
    assert got == {"matrix": 4.0, "scalar": 2.0, "all": 4.0}


def test_the_report_has_a_line_for_every_chain():
    row = {"matrix": 1.0, "all": 2.0, "temporary": 3.0}
    record = {
        "memory": {"tiny": dict.fromkeys(bench.CHAINS, row)}, "parameters": {"tiny": 1e6}, "ranks": {"tiny": 64},
        "times": {"tiny": {"muon": {"ratio_to_muon": 1.0}}},
    }  # fmt: skip
    text = bench.table(record)
    assert all(chain in text for chain in bench.CHAINS) and text.count("1.00x") == 1


@pytest.mark.slow
def test_times_are_measured_for_every_chain(monkeypatch):
    small = bench._model(64, 2, 2, 128, 128, True)
    monkeypatch.setitem(bench.TREES, "small", (small, 8))
    monkeypatch.setattr(bench.GaloreConfig, "min_dim", 32)
    times = bench.measure_times("small", blocks=1, steps=1)
    assert set(times) == set(bench.CHAINS)
    assert times["muon"]["ratio_to_muon"] == 1.0 and all(row["ms"] > 0 for row in times.values())
    assert flatten(bench.shapes_of(small))
