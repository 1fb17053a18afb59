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


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4), (4, 2, 1)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_every_process_loads_the_rows_of_its_devices(sizes, each):
    """Eight devices shared by 8 / each processes, the devices of a process in a row, as jax orders them."""
    mesh, rows = parallel.mesh(MeshConfig(*sizes)), 16
    held = {}
    for device, (part, *_) in parallel.batch_sharding(mesh).devices_indices_map((rows, 3)).items():
        held.setdefault(device.id // each, set()).update(range(rows)[part])
    shares = set()
    for process, wanted in held.items():
        index, count = parallel.data_shard(mesh, lambda device: device.id // each, process)
        assert set(range(index * rows // count, (index + 1) * rows // count)) == wanted
        shares.add((index, count))
    assert {index for index, _ in shares} == set(range(next(iter(shares))[1]))  # together all rows


def test_rows_that_are_no_block_are_refused():
    mesh = parallel.mesh(MeshConfig(4, 1, 2))
    with pytest.raises(ValueError, match=r"process 0 holds the parts \[0, 2\] of 4 of a batch"):
        parallel.data_shard(mesh, lambda device: device.id // 2 % 2, 0)
    uneven = {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 1}
    with pytest.raises(ValueError, match="must be blocks of one size"):
        parallel.data_shard(mesh, lambda device: uneven[device.id], 1)


def test_one_process_loads_everything():
    assert parallel.data_shard(parallel.mesh(MeshConfig(2, 2, 2))) == (0, 1)
