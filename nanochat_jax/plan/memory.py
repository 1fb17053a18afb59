"""Memory of a training step on one device, in closed form: nothing is compiled or allocated.

Exact, because counted on the real trees: parameters, gradients, optimizer state, batch. Estimated: what
is alive besides them at the fullest moment, the largest of:

    loss        saved activations of all layers of all loops + LOGITS copies of a chunk's logits + states
                that the losses read, and their gradients + gradients of the tables
    further     the same, while the layers of further tokens (model.mtp) are differentiated
    backward    all gradients, two sets of the layers' with loops + saved activations + everything that one
                layer's backward needs at once
    optimizer   gradients + updates + LEAVES copies of the largest leaf

Of one layer see `plan.layers`. Terms are buffers that XLA:CPU's own lists of what is alive at the fullest
moment name (experiments/plan); LEAVES alone is fitted. Layers are taken to run in a scan, as on GPU, unless
model.unroll writes them out. More than two loops run in a scan then, with one set of gradients beside the
sum, and a copy of what one loop saves; loops written out have one each, because XLA adds them all at the
end, in one fusion. The weights reach a layer as the scan hands them out, and are not saved; without
rematerialization copies of them are, see `layers.copied_bytes`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from nanochat_jax import losses, optim, parallel
from nanochat_jax import params as params_lib
from nanochat_jax.config import (
    Config,
    FilterConfig,
    MeshConfig,
    MhcConfig,
    ModelConfig,
    OptConfig,
    layer_period,
    padded_vocab,
)
from nanochat_jax.model import collider, loop, transformer
from nanochat_jax.plan import layers
from nanochat_jax.types import TrainState

LOGITS = 3  # float32 copies of a chunk's logits: product, softmax, gradient
LEAVES = 3  # float32 copies of the largest leaf while it is updated
EDGES = 4  # [B, L, D] at the loss: the last stream, that over its RMS, hidden states, their gradient
BATCH_FIELDS = 5  # int32 or float32 [B, L] of a Batch; one more with data.reference


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, by category. The first four are exact."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int  # one set; see `temporary` for the others that exist at the peak
    activations: int  # saved for the backward pass by all layers and loops
    layer: int  # working set of one layer's backward
    logits: int  # of a chunk, all copies
    edges: int
    accumulated: int  # gradients added over microbatches and loops, beyond the one set
    phases: Mapping[str, int]  # temporary bytes of each phase; the largest counts

    @property
    def temporary(self) -> int:
        return max(self.phases.values())

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.batch

    @property
    def peak(self) -> int:
        return self.arguments + self.temporary


def predict(cfg: Config, platform: str = "gpu") -> Memory:
    """Memory of the step of a config on each device of its mesh.

    Args: platform: "gpu" (bfloat16, fused attention) or "cpu" (float32, saved shares of attention), as
    far as the config leaves it to the device.
    Raises: ValueError if a weight does not divide over the mesh.
    """
    m, t = cfg.model, cfg.train
    if m.filter.warmup:  # the step holds both programs and runs one: the larger counts
        filters = FilterConfig(), dataclasses.replace(m.filter, warmup=0)
        both = [dataclasses.replace(cfg, model=dataclasses.replace(m, filter=f)) for f in filters]
        return max((predict(one, platform) for one in both), key=lambda memory: memory.peak)
    sizes = weight_bytes(m, cfg.mesh)
    optimizer = state_bytes(cfg.opt, m, cfg.mesh, t.steps)
    total, table = sum(sizes.values()), 4 * padded_vocab(m) * m.dim // cfg.mesh.tensor
    rows = cfg.data.batch // (t.microbatches * cfg.mesh.data * cfg.mesh.fsdp)
    L, width, cpu = cfg.data.seq_len, layers.item_bytes(m, platform), platform == "cpu"
    tokens, written = rows * L, cpu and layers.is_written(m, m.layers)
    stream = tokens * m.dim * width
    saved, behind, work = trunk_bytes(cfg, platform, tokens, sizes)
    further = further_bytes(cfg, platform, tokens, sizes)
    # More than two loops run in a scan: two sets of the blocks' gradients, and stacks of what is read out.
    scans = _loops_scan(m)
    most = 2 if scans else m.loop.count
    again = (most - 1) * _part(sizes, "blocks/")
    again += (min(loop.readouts(m), most) - 1) * _part(sizes, "after/")
    own = _part(sizes, "embed", "head")
    carried = total if t.microbatches > 1 else 0
    # A microbatch's gradients of the tables have joined the sum when those of the layers begin.
    gradients = total + (carried - own if carried else 0)
    # The embedding's, zeros at first, and the head's of every pass over hidden states.
    tables = (0 if carried else 2 + (m.mtp.depth > 0)) * table
    # Each device adds up gradients of whole tables before they are scattered, and gathers the head.
    whole = (3 + (carried > 0)) * table - own if parallel.own_rows(cfg.mesh) and cfg.mesh.fsdp > 1 else 0
    logits = LOGITS * 4 * padded_vocab(m) // cfg.mesh.tensor * chunk_tokens(cfg, rows)
    exits = any(name in losses.EXITS for name, _ in t.loss) * m.loop.count * (4 if scans else 2)
    beside = tokens * 8 * m.head_dim + stream * exits  # rotary tables; readouts of the loops
    beside += 2 * width * table // 4 if width < 4 else 0  # casts of both tables
    beside += 0 if cpu else rows * L * L * (1 + width)  # masks
    # The copies that several streams begin with, as they are and flat.
    beside += 2 * m.mhc.streams * stream if written and m.mhc.streams > 1 else 0
    beside += decoded_bytes(cfg.opt, m, sizes) if cpu and carried else 0
    edges = beside + EDGES * stream
    # XLA:CPU moves the optimizer's state away first. Where it was there is room for buffers that are not
    # larger: gradients, which a scan of layers begins with zeros, and what a layer needs, but not for stacks
    # and logits.
    there = carried + tables if written or not cpu else max(optimizer, gradients - own * (whole > 0))
    phases = {
        "loss": there + whole + saved + further + logits + edges,
        "optimizer": 2 * total + LEAVES * max(sizes.values()),
    }
    if m.filter.keep < 1 and written:
        made = round(tokens * m.layers * m.loop.count * layers.made_again_bytes(m, L, width))
        phases["loss"] += made if m.filter.score == "random" else 0  # needs no loss, and comes first
        saved += made
    if written:
        phases["backward"] = max(carried + tables + saved, gradients + again) + work + beside
    else:
        phases["backward"] = gradients + again + whole + saved - behind + work + beside
    if m.mtp.depth and not cpu:
        phases["further"] = carried + tables + whole + saved + further + work + edges
    batch = (
        (BATCH_FIELDS + bool(cfg.data.reference)) * 4 * cfg.data.batch * L // (cfg.mesh.data * cfg.mesh.fsdp)
    )
    return Memory(
        total,
        optimizer,
        batch,
        total,
        saved + further,
        work,
        logits,
        edges,
        gradients - total + again,
        phases,
    )


def _part(sizes: Mapping[str, int], *names: str) -> int:
    """Bytes of the weights whose path begins with one of the names."""
    return sum(size for path, size in sizes.items() if path.startswith(names))


def _loops_scan(m: ModelConfig) -> bool:
    """Whether the loops run in a scan."""
    return m.loop.count > 2 and m.layers > (m.unroll or layer_period(m))


def trunk_bytes(cfg: Config, platform: str, tokens: int, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Bytes that the layers of all stacks and loops save, of which some are gone when the backward pass of the
    looped ones begins, and what one layer's backward needs beside.

    Args: tokens: of a microbatch on one device. sizes: `weight_bytes`.
    """
    m, mesh, cpu = cfg.model, cfg.mesh, platform == "cpu"
    L, width, tensor = cfg.data.seq_len, layers.item_bytes(m, platform), cfg.mesh.tensor
    filtered = m.filter.keep < 1
    if filtered:
        one, copied = layers.filtered_bytes(m, width, tensor), 0
    else:
        one = layers.layer_bytes(m, L, width, platform, m.remat, tensor)
        one -= layers.coded_bytes(m, width, tensor) if m.remat == "none" else 0
        copied = layers.copied_bytes(m, platform, tensor)
    if mesh.fsdp > 1 and parallel.own_rows(mesh):
        copied = 0  # gathered again instead
    saved = behind = 0.0
    times = {"before": 1, "blocks": m.loop.count, "after": loop.readouts(m)}
    for name, n in {"before": m.loop.before, "blocks": m.layers, "after": m.loop.after}.items():
        before = saved
        if platform == "cpu" and layers.is_written(m, n):
            own = one if filtered else layers.written_bytes(m, L, width, m.remat)
            saved += times[name] * n * tokens * own + _part(sizes, f"{name}/")
        else:  # a scan over loops copies what one of them saves; copies of weights are the same in all
            scans = name == "blocks" and _loops_scan(m)
            saved += n * (tokens * one * (times[name] + scans) + copied * (1 if scans else times[name]))
        # A scan over loops holds the layers after each loop as well, where each is read out.
        if name == "after" and not (m.loop.count > 2 and times[name] > 1):
            behind = saved - before
    if cpu and layers.is_written(m, m.layers):
        # Gradients of the stream and of what down reads; with a filter, all that kept rows lead to.
        share = collider.kept_count(m.filter, L) / L if filtered else 1.0
        work = tokens * width * (m.dim * m.mhc.streams + share * (2 if filtered else 1) * m.mlp_dim)
    elif filtered:
        work = tokens * layers.filtered_work_bytes(m, L, width, platform, tensor)
    else:
        work = tokens * layers.work_bytes(m, L, width, platform, tensor)
    # The layer's weights, cut out of the stacks and side by side; over fsdp whole, and their gradients.
    work += gathered(m, mesh, sizes) or _part(sizes, "blocks/") // m.layers * cpu
    return round(saved), round(behind), round(work)


def decoded_bytes(opt: OptConfig, m: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of 8-bit moments that are read through a table, decoded: linear codes are multiplied where they
    are used, but look-ups of XLA:CPU are buffers, and come before the loop over microbatches."""
    of = params_lib.flatten(optim.labels(transformer.param_specs(m)))
    found = 0
    for path, size in sizes.items():
        group = getattr(opt, of[path])
        if group.state_bits == 8:
            found += size * ((opt.codes.momentum == "dynamic") + (group.name == "adamw"))
    return found


def further_bytes(cfg: Config, platform: str, tokens: int, sizes: Mapping[str, int]) -> int:
    """Bytes that model.mtp keeps until its own backward pass: its layers', states and their gradients."""
    m, depth = cfg.model, cfg.model.mtp.depth
    if not depth:
        return 0
    L, width = cfg.data.seq_len, layers.item_bytes(m, platform)
    single = dataclasses.replace(m, mhc=MhcConfig())
    states = 3 * depth + 2  # hidden, their gradients, over the RMS; one offset's of both in chunks
    if m.mtp.kind == "chained":  # the embedding, both over the RMS, side by side, joined, and the stream
        states += 7 * depth
    if platform == "cpu":  # written out, see model/mtp.py
        one = layers.written_bytes(single, L, width, m.remat)
        return round(tokens * (depth * one + states * m.dim * width)) + _part(sizes, "mtp/")
    one = layers.layer_bytes(single, L, width, platform, m.remat, cfg.mesh.tensor)
    return round(tokens * (depth * one + states * m.dim * width))


def chunk_tokens(cfg: Config, rows: int) -> int:
    """Tokens of one device whose logits exist at once, as losses cuts them."""
    seen = rows if parallel.own_rows(cfg.mesh) else cfg.data.batch // cfg.train.microbatches
    size = max(1, min(cfg.data.seq_len, cfg.train.loss_chunk // seen))
    while cfg.data.seq_len % size:
        size -= 1
    return size * rows


def gathered(m: ModelConfig, mesh: MeshConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of one layer's weights that fsdp gathers, and of their gradient before it is scattered."""
    return 2 * _part(sizes, "blocks/") // m.layers * mesh.fsdp if mesh.fsdp > 1 else 0


def abstract_mesh(mesh: MeshConfig) -> AbstractMesh:
    """A mesh of no devices."""
    shape = tuple(getattr(mesh, axis) for axis in parallel.AXES)
    return AbstractMesh(shape, parallel.AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def weight_bytes(m: ModelConfig, mesh: MeshConfig) -> dict[str, int]:
    """float32 bytes of every weight on each device, by path."""
    specs, on = transformer.param_specs(m), abstract_mesh(mesh)
    layouts = params_lib.flatten(parallel.param_shardings(specs, on))  # type: ignore[arg-type]
    flat = params_lib.flatten(specs)
    return {path: 4 * math.prod(layouts[path].shard_shape(spec.shape)) for path, spec in flat.items()}


@functools.cache
def state_bytes(opt: OptConfig, m: ModelConfig, mesh: MeshConfig, steps: int) -> int:
    """Bytes of the optimizer's state and the step counter on each device, counted leaf by leaf."""
    specs = transformer.param_specs(m)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
    tx, _ = optim.build(opt, steps)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {}, jax.eval_shape(tx.init, params))  # type: ignore[arg-type]
    layout = parallel.state_shardings(state, specs, abstract_mesh(mesh))  # type: ignore[arg-type]
    places = params_lib.flatten(layout)
    return sum(
        math.prod(places[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in params_lib.flatten(state).items()
    )
