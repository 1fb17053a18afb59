"""Meshes and shardings: the only file that names mesh axes.

`data` replicates parameters, `fsdp` splits parameters and batch, `tensor` splits single matrices.
Model code names no mesh axis; the partitioner derives the collectives from where arrays live.
Changing the layout means changing mesh sizes, or RULES.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.config import MeshConfig
from nanochat_jax.params import ParamSpec, flatten, owner, path_name
from nanochat_jax.types import Batch, TrainState

AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str | None, str | tuple[str, ...] | None]
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "layer": None,
    None: None,
}


def mesh(cfg: MeshConfig) -> Mesh:
    """The device mesh of a config.

    Raises: ValueError if there are fewer devices than the sizes ask for, or, with several processes, more.
    """
    shape = tuple(getattr(cfg, axis) for axis in AXES)
    needed, devices = int(np.prod(shape)), jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {needed} devices, but there are "
            f"{len(devices)} ({devices[0].platform}); lower mesh.data, mesh.fsdp or mesh.tensor"
        )
    if jax.process_count() > 1 and needed < len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, shape, strict=True))} uses {needed} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; it must use all: raise mesh.data, mesh.fsdp or mesh.tensor"
        )
    # Auto, stated: make_mesh defaults to explicit axes, under which contracting a sharded dimension raises.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def partition(path: str, spec: ParamSpec, mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Where one weight's dimensions go.

    Raises: ValueError naming the weight if an axis does not divide or is used twice.
    """
    entries = [rules[axis] for axis in spec.axes]
    for size, axis, entry in zip(spec.shape, spec.axes, entries, strict=True):
        parts = int(np.prod([mesh.shape[name] for name in _names(entry)]))
        if size % parts:
            raise ValueError(
                f"{path}: axis '{axis}' = {size} is not divisible by mesh axis '{'*'.join(_names(entry))}' = {parts}"
            )
    used = collections.Counter(itertools.chain.from_iterable(_names(e) for e in entries))
    if twice := [name for name, times in used.items() if times > 1]:
        raise ValueError(f"{path}: mesh axis '{twice[0]}' is used for two dimensions of {spec.axes}")
    return PartitionSpec(*entries)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def param_shardings(specs: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> Any:
    """NamedSharding of every weight, in the tree of `specs`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: NamedSharding(mesh, partition(path_name(path), spec, mesh, rules)), specs
    )


def state_shardings(
    state: TrainState, specs: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES
) -> TrainState:
    """NamedSharding of every leaf of a TrainState of arrays or ShapeDtypeStructs.

    A leaf whose path ends in a weight's path is laid out like that weight in the dimensions that agree
    (momenta, 8-bit codes and scales, projections); everything else is replicated.
    """
    shapes = flatten(specs)
    layouts = {path: partition(path, spec, mesh, rules) for path, spec in shapes.items()}

    def find(path: tuple, leaf: Any) -> NamedSharding:
        weight = owner(path_name(path), layouts)
        if weight is None:
            return NamedSharding(mesh, PartitionSpec())
        entries = []
        for size, own, entry in zip(leaf.shape, shapes[weight].shape, layouts[weight], strict=False):
            parts = int(np.prod([mesh.shape[axis] for axis in _names(entry)]))
            # A dimension of another size (projected, folded, one scale per block) is not split.
            entries.append(entry if size == own and size % parts == 0 else None)
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(find, state)


def over_layers(mesh: Mesh) -> Callable[[jax.Array], jax.Array] | None:
    """Lay a stack of matrices out with whole matrices on each device; None on a single device.

    Returns: function of an array [N, ..., m, n] that splits N over as many mesh axes as divide it,
    and nothing else. Work on the matrices is then shared by all devices, replicas included, instead
    of repeated by each. Arrays without a stacked axis pass.
    """
    if mesh.size == 1:
        return None

    def constrain(x: jax.Array) -> jax.Array:
        if x.ndim < 3:
            return x
        left, axes = x.shape[0], []
        for axis in AXES:
            if left % mesh.shape[axis] == 0:
                left //= mesh.shape[axis]
                axes.append(axis)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(tuple(axes))))

    return constrain


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows split over the data axes; the same for every field [B, L] of a Batch."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_shard(
    mesh: Mesh,
    process_of: Callable[[jax.Device], int] = lambda device: device.process_index,
    process: int | None = None,
) -> tuple[int, int]:
    """Which rows of every batch this process must load: those that its devices hold.

    Processes that hold the same rows, because mesh.tensor spans them, load the same.
    Args: process_of: the process of a device. process: default this one.
    Returns: (index, count): rows [index * B / count, (index + 1) * B / count) of a batch of B.
    Raises: ValueError if the rows of a process are no such block.
    """
    process = jax.process_index() if process is None else process
    parts = int(np.prod([mesh.shape[axis] for axis in _names(RULES["batch"])]))
    owned: dict[int, set[int]] = collections.defaultdict(set)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        owned[process_of(device)].update(range(parts)[rows])
    own = sorted(owned[process])
    blocks = sorted({tuple(sorted(part)) for part in owned.values()})
    if list(itertools.chain.from_iterable(blocks)) != list(range(parts)) or len({*map(len, blocks)}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: process {process} holds the parts {own} of {parts} of a batch, others "
            f"{blocks}; they must be blocks of one size, so put the devices of a process next to each other"
        )
    return blocks.index(tuple(own)), len(blocks)


def shard_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Put numpy rows of every Batch field onto the mesh: all rows [B, L], or with several processes this
    one's share of them, see `data_shard`."""
    place = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(Batch(**arrays), place)
    count = _shards(mesh)
    whole = {name: (count * rows.shape[0], *rows.shape[1:]) for name, rows in arrays.items()}
    make = jax.make_array_from_process_local_data
    return Batch(**{name: make(place, rows, whole[name]) for name, rows in arrays.items()})


@functools.lru_cache(maxsize=8)
def _shards(mesh: Mesh) -> int:
    return data_shard(mesh)[1]


def prefetch(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> Iterator[Batch]:
    """Yield device batches, with `ahead` transfers already under way (device_put is asynchronous)."""
    queue: collections.deque[Batch] = collections.deque()
    for arrays in batches:
        queue.append(shard_batch(arrays, mesh))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
