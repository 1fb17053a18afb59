"""Meshes and shardings: the only file that names mesh axes.

`data` replicates parameters, `fsdp` splits parameters and batch, `tensor` splits single matrices.
Model code names no mesh axis; the partitioner derives the collectives from where arrays live.
Changing the layout means changing mesh sizes, or RULES.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.config import MeshConfig
from nanochat_jax.params import ParamSpec, flatten, owner, path_name
from nanochat_jax.types import Batch, Params, TrainState

AXES = ("data", "fsdp", "tensor")
STACKS = ("before", "blocks", "after")  # weights [layer, ...] that `whole_layer` gathers
Gradient = Callable[..., Any]  # (params, batch, key) -> ((loss, metrics), grads)
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


def mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh of a config, over jax's devices or those given.

    Raises: ValueError if there are fewer devices than the sizes ask for, or, with several processes, more.
    """
    shape = tuple(getattr(cfg, axis) for axis in AXES)
    needed, devices = int(np.prod(shape)), list(devices or jax.devices())
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


def over_layers(mesh: Mesh) -> Callable[..., jax.Array] | None:
    """Lay a stack of matrices out with whole matrices on each device; None on a single device.

    Returns: function of an array [N, ..., m, n] that splits N over as many mesh axes as divide it,
    and nothing else. Work on the matrices is then shared by all devices, replicas included, instead
    of repeated by each. With back=True, for the work's result, N is not split any more. What comes before
    and after keeps its own layout: else the compiler would split the layers of all gradients and updates,
    and gather them where they are whole. Arrays without a stacked axis pass.
    """
    if mesh.size == 1:
        return None

    def put(x: jax.Array, axes: tuple[str, ...] | None, rest: Any) -> jax.Array:
        layout = PartitionSpec(axes, *(rest,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    def constrain(x: jax.Array, back: bool = False) -> jax.Array:
        if x.ndim < 3:
            return x
        x = put(x, None, PartitionSpec.UNCONSTRAINED)
        if back:
            return x
        left, axes = x.shape[0], []
        for axis in AXES:
            if left % mesh.shape[axis] == 0:
                left //= mesh.shape[axis]
                axes.append(axis)
        return put(x, tuple(axes), None)

    return constrain


def over_rows(mesh: Mesh, specs: Mapping[str, Any], dtype: str = "float32") -> Callable[[Gradient], Gradient]:
    """Let each device differentiate its own rows, and add the results once; the identity on one device.

    Left to itself the partitioner adds the gradients of every microbatch, and reads the split axis of
    weights as one of products: it gathers the rows and adds activations. Here all axes are the program's
    own (`jax.shard_map`): gradients of all microbatches are added on each device, and over devices at the
    end. Stacks of layers stay split over fsdp, and `whole_layer` gathers them one layer at a time; what
    else is split is gathered once. With mesh.tensor > 1 only replicas are treated so, and with fsdp as well
    all is left to the compiler.

    Args: specs: of the weights. dtype: of the exchanged numbers, float32 or bfloat16; added in float32.
    Returns: function of f(params, batch, key) -> ((loss, metrics), grads), all sums over rows, that gives
    the same function of global arrays. Each device's key is its own.
    """
    manual: tuple[str, ...] = AXES
    if not own_rows(MeshConfig(**mesh.shape)):  # jaxlib 0.10.2 aborts on tables split over both other axes
        manual = ("data",) if mesh.shape["fsdp"] == 1 else ()
    rows = tuple(axis for axis in ("data", "fsdp") if axis in manual and mesh.shape[axis] > 1)
    if not rows:
        return within(mesh)
    split = {
        path: _split_axis(spec, mesh) if "fsdp" in rows else None for path, spec in flatten(specs).items()
    }
    layouts = jax.tree_util.tree_map_with_path(
        lambda path, spec: PartitionSpec(*(
            "fsdp" if i == split[path_name(path)] else None for i in range(len(spec.shape))
        )),
        specs,
    )  # fmt: skip

    def outside(path: tuple) -> int | None:
        name = path_name(path)
        return None if name.split("/")[0] in STACKS else split[name]

    def gathered(path: tuple, w: jax.Array) -> jax.Array:
        axis = outside(path)
        return w if axis is None else _gather(w, axis, dtype)

    def added(path: tuple, g: jax.Array) -> jax.Array:
        """Over the axes that the gradient was not added over yet."""
        if (axis := outside(path)) is not None:
            g = _scatter(g, axis, dtype)
        left = tuple(axis for axis in rows if axis != "fsdp" or split[path_name(path)] is None)
        return _add(g, left, dtype)

    def wrap(f: Gradient) -> Gradient:
        def local(params: Any, batch: Batch, key: jax.Array, index: jax.Array) -> Any:
            whole = jax.tree_util.tree_map_with_path(gathered, params)
            sums, grads = f(whole, batch, jax.random.fold_in(key, index[0]))
            return jax.lax.psum(sums, rows), jax.tree_util.tree_map_with_path(added, grads)

        parts = int(np.prod([mesh.shape[axis] for axis in rows]))

        def run(params: Any, batch: Batch, key: jax.Array) -> Any:
            return jax.shard_map(
                local, mesh=mesh, in_specs=(layouts, PartitionSpec(rows), PartitionSpec(), PartitionSpec(rows)),
                out_specs=(PartitionSpec(), layouts), axis_names=set(manual), check_vma=False,
            )(params, batch, key, jax.numpy.arange(parts))  # fmt: skip

        return run

    return wrap


def within(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Let a function to be traced know that single matrices are split (mesh.tensor), see `dispatch.divided`; the
    identity where none are."""
    if own_rows(MeshConfig(**mesh.shape)):
        return lambda f: f

    def wrap(f: Callable) -> Callable:
        @functools.wraps(f)
        def run(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return f(*args)

        return run

    return wrap


def own_rows(sizes: MeshConfig) -> bool:
    """Whether each device differentiates rows of its own, or some share rows (tensor)."""
    return sizes.tensor == 1


def whole_layer(
    mesh: Mesh, specs: Mapping[str, Any], dtype: str = "float32"
) -> Callable[[str, Params], Params] | None:
    """Gathers one layer's weights over fsdp, inside `over_rows`; None where nothing is split so.

    Returns: function (name of the stack, weights of one of its layers) -> the same, whole. Its gradient
    adds over devices and leaves each its part.
    """
    if mesh.shape["fsdp"] == 1 or not own_rows(MeshConfig(**mesh.shape)):
        return None
    split = {path: _split_axis(spec, mesh) for path, spec in flatten(specs).items()}

    def whole(stack: str, layer: Params) -> Params:
        def each(path: tuple, w: jax.Array) -> jax.Array:
            axis = split.get(f"{stack}/{path_name(path)}")
            return w if axis is None else _gather(w, axis - 1, dtype)  # the axis of layers is gone

        return jax.tree_util.tree_map_with_path(each, layer)

    return whole


def _split_axis(spec: ParamSpec, mesh: Mesh) -> int | None:
    """The dimension of a weight that fsdp splits."""
    found = [i for i, axis in enumerate(spec.axes) if "fsdp" in _names(RULES[axis])]
    return found[0] if found and mesh.shape["fsdp"] > 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: jax.Array, axis: int, dtype: str) -> jax.Array:
    """All devices' parts of `axis` over fsdp, sent in a dtype."""
    return _gather_forward(w, axis, dtype)[0]


def _gather_forward(w, axis, dtype):
    bits = jax.lax.all_gather(_sent(w, dtype), "fsdp", axis=axis, tiled=True)
    return _received(bits, w.dtype), None


def _gather_backward(axis, dtype, _, g):
    return (_scatter(g, axis, dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(g: jax.Array, axis: int, dtype: str, over: str | tuple[str, ...] = "fsdp") -> jax.Array:
    """The sum over devices, of which each keeps its part of `axis`."""
    if dtype == "float32":
        return jax.lax.psum_scatter(g, over, scatter_dimension=axis, tiled=True)
    parts = jax.lax.axis_size(over)
    bits = _sent(jax.numpy.moveaxis(g, axis, 0), dtype)
    bits = jax.lax.all_to_all(bits.reshape(parts, -1, *bits.shape[1:]), over, 0, 0)
    return jax.numpy.moveaxis(jax.numpy.sum(_received(bits, g.dtype), 0), 0, axis)


def _add(g: jax.Array, over: tuple[str, ...], dtype: str) -> jax.Array:
    """The sum over devices. In bfloat16 each device adds its part of all in float32, and sends the sum."""
    if not over or dtype == "float32":
        return jax.lax.psum(g, over) if over else g
    parts = jax.lax.axis_size(over)
    flat = jax.numpy.pad(g.reshape(-1), (0, -g.size % parts))
    total = _scatter(flat, 0, dtype, over)
    bits = jax.lax.all_gather(_sent(total, dtype), over, axis=0, tiled=True)
    return _received(bits, g.dtype)[: g.size].reshape(g.shape)


def _sent(x: jax.Array, dtype: str) -> jax.Array:
    """What crosses the wire: bfloat16 as bits, so that no backend computes or sends something wider."""
    if dtype == "float32":
        return x
    return jax.lax.bitcast_convert_type(x.astype(jax.numpy.bfloat16), jax.numpy.uint16)


def _received(bits: jax.Array, dtype: Any) -> jax.Array:
    if bits.dtype != jax.numpy.uint16:
        return bits
    return jax.lax.bitcast_convert_type(bits, jax.numpy.bfloat16).astype(dtype)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Rows split over the data axes; the same for every field [B, L] of a Batch."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_shard(
    mesh: Mesh,
    process_of: Callable[[Any], int] = lambda device: device.process_index,
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
