"""Copies of the state that differ in one bit on one device are found and named; equal ones are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import parallel
from nanochat_jax.checkpoint import state_sha256
from nanochat_jax.config import MeshConfig
from nanochat_jax.train import loop, replicas
from nanochat_jax.types import TrainState

SPECS = {"split": P("fsdp", "tensor"), "half": P(None, "tensor"), "both": P(("data", "fsdp")), "norm": P()}


@pytest.fixture(scope="module")
def mesh():
    return parallel.mesh(MeshConfig(2, 2, 2))


def state_on(mesh):
    place = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    values = {
        "split": jnp.arange(32.0).reshape(4, 8), "half": jnp.arange(32, dtype=jnp.int8).reshape(4, 8),
        "both": jnp.arange(8, dtype=jnp.bfloat16), "norm": jnp.array([0.0, -0.0, jnp.nan]),
    }  # fmt: skip
    everywhere = NamedSharding(mesh, P())
    state = TrainState(jax.device_put(jnp.int32(3), everywhere), jax.device_put(values, place), ())
    return state, TrainState(everywhere, place, ())


def spoil(leaf, device):
    """The leaf with one bit flipped in one device's copy."""
    pieces = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1)[-1:].view(np.uint8)[0] ^= 1
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)


def test_equal_copies_pass_and_stay_as_they_are(mesh):
    state, layout = state_on(mesh)
    before = state_sha256(state)
    replicas.check(layout, mesh)(7, state, {})
    assert state_sha256(state) == before


@pytest.mark.parametrize("name", ["split", "half", "norm"])
def test_one_bit_on_one_device_is_found(mesh, name):
    state, layout = state_on(mesh)
    hook = replicas.check(layout, mesh)
    hook(4, state, {})
    for device in mesh.devices.reshape(-1):
        spoiled = state.replace(params=state.params | {name: spoil(state.params[name], device)})
        with pytest.raises(
            replicas.ReplicaError, match="after step 9 copies of the state differ: "
        ) as caught:
            hook(9, spoiled, {})
        first = all(
            index == 0 for index in np.argwhere(mesh.devices == device)[0][: 1 if name == "split" else 2]
        )
        named = str(caught.value).split("differ: ")[1]
        assert named.startswith(f"params/{name} on ") and "checkpoints after step 4 may hold" in named
        if not first:  # else all other copies differ from this one
            assert named.startswith(f"params/{name} on {device}, from the first")


def test_what_is_split_everywhere_has_no_copies(mesh):
    """Half of the devices hold each part of "both", once along data and fsdp: only tensor copies it."""
    state, layout = state_on(mesh)
    spec = P(("data", "fsdp", "tensor"))
    layout = layout.replace(params=layout.params | {"both": NamedSharding(mesh, spec)})
    leaf = jax.device_put(state.params["both"], layout.params["both"])
    state = state.replace(params=state.params | {"both": spoil(leaf, mesh.devices[1, 0, 1])})
    replicas.check(layout, mesh)(1, state, {})


def test_a_run_checks_after_its_steps(mesh):
    state, layout = state_on(mesh)

    def step(state, batch):
        done = int(state.step) + 1
        params = state.params | (
            {"norm": spoil(state.params["norm"], mesh.devices[1, 1, 0])} if done == 4 else {}
        )
        return state.replace(step=jax.device_put(jnp.int32(done), layout.step), params=params), {}

    hook = loop.every(3, replicas.check(layout, mesh))
    with pytest.raises(replicas.ReplicaError, match=r"after step 6 .*params/norm"):
        loop.run(step, state, iter(range(20)), [hook], 12)
