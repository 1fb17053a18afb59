"""Do the copies of the state on different devices still have the same bits?

Replicas compute the same updates from the same reduced gradients. If a device computes wrong, or a
process made something of its own, they drift apart without a sign: each goes on from its own copy, and a
checkpoint holds one of them. The check adds up the bits of every leaf on every device (as
`checkpoint.fingerprint` does) and compares what must be copies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nanochat_jax import parallel
from nanochat_jax.checkpoint import bit_sum
from nanochat_jax.params import path_name
from nanochat_jax.train.loop import Hook
from nanochat_jax.types import TrainState

EXIT_MISMATCH = 4
NAMED = 3  # leaves that a message names


class ReplicaError(RuntimeError):
    """Copies of a state differ. The message names leaves and devices."""

    exit_code = EXIT_MISMATCH


def check(layout: TrainState, mesh: Mesh) -> Hook:
    """A hook that compares all copies of the state. It waits for the step, and changes nothing.

    Args: layout: the NamedSharding of every leaf. With several processes all call the hook.
    Returns: hook that raises ReplicaError, in every process alike.
    """
    axes = tuple(mesh.axis_names)
    flat = jax.tree_util.tree_leaves_with_path(layout)
    names, specs = [path_name(path) for path, _ in flat], [place.spec for _, place in flat]
    last = 0

    def local(state: TrainState) -> jax.Array:
        sums = [bit_sum(leaf) for leaf in jax.tree.leaves(state)]
        return jnp.stack(sums).reshape((1,) * len(axes) + (len(sums),))

    spec_tree = jax.tree.map(lambda place: place.spec, layout)
    every = jax.shard_map(
        local, mesh=mesh, in_specs=(spec_tree,), out_specs=PartitionSpec(*axes), check_vma=False
    )
    sums_of = jax.jit(every, out_shardings=parallel.replicated(mesh))

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        nonlocal last
        sums = np.asarray(jax.device_get(sums_of(state)))
        found = [
            f"{name} on {device}"
            for i, (name, spec) in enumerate(zip(names, specs, strict=True))
            for device in _unlike(sums[..., i], axes, spec, mesh)
        ]
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise ReplicaError(
                f"after step {done} copies of the state differ: {', '.join(found[:NAMED])}{more}, from the first "
                f"copy of each; a device computes wrong, or a process differs; checkpoints after step {last} may "
                "hold wrong values"
            )
        last = done

    return hook


def _unlike(sums: np.ndarray, axes: tuple[str, ...], spec: PartitionSpec, mesh: Mesh) -> list[str]:
    """Devices whose sum is not that of the first copy. sums: uint32, one per device of the mesh."""
    used = {name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())}
    copied = tuple(slice(0, 1) if axis not in used else slice(None) for axis in axes)
    differ = np.broadcast_to(sums[copied], sums.shape) != sums
    return [f"{mesh.devices[tuple(where)]}" for where in np.argwhere(differ)]
