"""Layouts: stacks of matrices spread over devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax import parallel
from nanochat_jax.config import MeshConfig
from nanochat_jax.optim import muon


def test_one_device_needs_no_layout():
    assert parallel.over_layers(parallel.mesh(MeshConfig())) is None


@pytest.mark.parametrize(("layers", "parts"), [(8, 8), (16, 8), (4, 4), (2, 2), (6, 2), (3, 1)])
def test_layers_are_split_as_far_as_they_go(layers, parts):
    mesh = parallel.mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    constrain = parallel.over_layers(mesh)
    out = jax.jit(constrain)(jnp.zeros((layers, 4, 8)))
    assert out.addressable_shards[0].data.shape == (layers // parts, 4, 8)
    assert jax.jit(constrain)(jnp.zeros((4, 8))).shape == (4, 8)  # no stack: unchanged


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_newton_schulz_runs_on_each_devices_own_matrices(sizes):
    """The products see a quarter of the stack, and the result is that of one device."""
    mesh = parallel.mesh(MeshConfig(**sizes))
    inside = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    g = jax.random.normal(jax.random.key(0), (4, 32, 64))
    plain = muon.scale_by_muon()
    want, _ = plain.update(g, plain.init(g))
    tx = muon.scale_by_muon(constrain=parallel.over_layers(mesh))
    state = jax.device_put(plain.init(g), jax.tree.map(lambda x: inside if x.ndim else None, plain.init(g)))
    update = jax.jit(tx.update, out_shardings=(inside, None))
    got, _ = update(jax.device_put(g, inside), state)
    np.testing.assert_allclose(got, want, atol=2e-5)
    text = update.lower(jax.device_put(g, inside), state).compile().as_text()
    shapes = [re.search(r"= f32\[([\d,]+)\]\S* dot\(", line) for line in text.splitlines()]
    shapes = [tuple(map(int, found[1].split(","))) for found in shapes if found]
    assert shapes and all(math.prod(shape[:-2]) == 1 for shape in shapes), shapes  # one matrix of the four
