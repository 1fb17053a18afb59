"""Memory of a training step on one device, in closed form: nothing is compiled or allocated.

Exact, because counted on the real trees: parameters, gradients, optimizer state, batch. Estimated: what
is alive besides them at the fullest moment, the largest of three:

    backward    gradients of two loops + accumulated ones + saved activations of all layers of all loops
                + everything one layer's backward needs at once + the edges (embedding, hidden, d_head)
    loss        accumulated gradients + saved activations + LOGITS copies of a chunk's logits + the edges
    optimizer   gradients + updates + LEAVES copies of the largest leaf

The counts of saved tensors are those of jax's own partial evaluation of one layer (test_memory reads them
off the traced program) for layers that run in a scan, as on GPU or with model.unroll = 1; LOGITS, LEAVES,
EDGES, STREAMS and FP4 are fitted to XLA's memory analysis, see experiments/plan. More than two loops
run in a scan, with one set of gradients beside the sum, and a copy of what one loop saves; loops written out have one each, because XLA adds them all at the
end, in one fusion. The weights reach a layer as the scan hands them out, and are not saved; without
rematerialization copies of them are, see `copied_bytes`.
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
    ModelConfig,
    OptConfig,
    layer_period,
    padded_vocab,
)
from nanochat_jax.kernels.attention import QUERY_BLOCK
from nanochat_jax.model import collider, loop, transformer
from nanochat_jax.model.layers import MLPS
from nanochat_jax.quant import project as projections
from nanochat_jax.types import TrainState

LOGITS = 4  # float32 copies of a chunk's logits: product, capped, softmax, gradient
LEAVES = 3  # float32 copies of the largest leaf while it is updated
EDGES = 2  # activations [B, L, D] besides the layers': embedding, hidden states
STREAMS = 9  # copies of the residual streams during one layer's backward
FP4 = 4  # float32 copies of the widest product's operands: emulated codes, rotations, random bits
FP8 = 2  # the same of FP8, which neither rotates nor draws: values and ratios; counted, not fitted
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
    total, blocks = sum(sizes.values()), sum(b for p, b in sizes.items() if p.startswith("blocks/"))
    rows = cfg.data.batch // (t.microbatches * cfg.mesh.data * cfg.mesh.fsdp)
    L, width = cfg.data.seq_len, item_bytes(m, platform)
    tokens, applied, tensor = rows * L, loop.trained_layers(m), cfg.mesh.tensor
    one = layer_bytes(m, L, width, platform, m.remat, tensor)
    whole = layer_bytes(m, L, width, platform, "none", tensor)
    kept = one - m.dim * m.mhc.streams * width if m.remat == "dots" else 0  # not made a second time
    streams = STREAMS * m.mhc.streams * m.dim * width if m.mhc.streams > 1 else 0
    copies = FP4 if "fp4" in m.quant else FP8 if "fp8" in m.quant else 0
    emulated = copies * 4 * (m.dim + (2 if MLPS[m.mlp][1] else 1) * m.mlp_dim // tensor)
    scans = m.loop.count > 2 and m.layers > (m.unroll or layer_period(m))
    held = applied + m.layers * scans  # a scan over loops copies what one of them saves
    if m.filter.keep < 1:  # of the trunk's layers; those of further tokens are differentiated as always
        saved, constant = tokens * filtered_bytes(m, width, tensor) * held, m.dim * m.mhc.streams * width
        share = collider.kept_count(m.filter, L) / L
        work = round(tokens * (share * (whole + streams + emulated) + constant))
        if m.mtp.depth:
            work = max(work, tokens * (whole + emulated))
    else:
        copying = applied - (m.loop.count - 1) * m.layers * scans  # copies are the same in every loop
        copying = (
            0 if cfg.mesh.fsdp > 1 and parallel.own_rows(cfg.mesh) else copying
        )  # gathered again instead
        saved = tokens * one * held + copied_bytes(m, platform, tensor) * copying
        work = tokens * (whole - kept + streams + emulated)
    work += gathered(m, cfg.mesh, sizes)
    logits = LOGITS * 4 * padded_vocab(m) // cfg.mesh.tensor * chunk_tokens(cfg, rows)
    depth = m.mtp.depth
    saved += tokens * depth * one
    # Each device adds up gradients of whole tables before they are scattered.
    table = padded_vocab(m) * m.dim // cfg.mesh.tensor
    head, casts = 2 * 4 * table, 2 * width * table if width < 4 else 0
    unsplit = 2 * 4 * table * (cfg.mesh.fsdp - 1) // cfg.mesh.fsdp if parallel.own_rows(cfg.mesh) else 0
    mask = rows * L * L * (1 + width) if platform != "cpu" else 0
    # The exit gate's loss reads the hidden states after every loop, and gives each a gradient.
    exits = 2 * m.loop.count - 1 if any(name in losses.EXITS for name, _ in t.loss) else 0
    edges = tokens * m.dim * width * (EDGES + exits + depth * 2) + head + casts + mask
    after = sum(b for p, b in sizes.items() if p.startswith("after/"))
    most = 2 if scans else m.loop.count  # sets of gradients of loops
    further = (most - 1) * blocks + (min(loop.readouts(m), most) - 1) * after
    carried = total + unsplit if t.microbatches > 1 else 0
    accumulated = carried + further
    phases = {
        "backward": total + accumulated + saved + work + edges,
        "loss": carried + saved + logits + edges,
        "optimizer": 2 * total + LEAVES * max(sizes.values()),
    }
    batch = (
        (BATCH_FIELDS + bool(cfg.data.reference)) * 4 * cfg.data.batch * L // (cfg.mesh.data * cfg.mesh.fsdp)
    )
    return Memory(total, optimizer, batch, total, saved, work, logits, edges, accumulated, phases)


def item_bytes(m: ModelConfig, platform: str) -> int:
    """Bytes of an activation."""
    name = m.dtype if m.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(name).itemsize


def layer_bytes(m: ModelConfig, length: int, width: int, platform: str, remat: str, tensor: int = 1) -> int:
    """Bytes per token that one layer saves for its backward pass, without filtering.

    Tensors of `width` bytes: the layer's input; under "dots" also the products of its matrices; under
    "none" the inputs and outputs of every operation, and on CPU attention's shares (on GPU the fused
    kernel keeps one number per head instead). tensor: devices over which heads and the MLP are split.
    """
    D, F, HK, GK = m.dim, m.mlp_dim / tensor, m.heads * m.head_dim / tensor, m.kv_heads * m.head_dim / tensor
    H = m.heads / tensor
    if remat == "block":
        return D * m.mhc.streams * width
    gated = MLPS[m.mlp][1]
    if remat == "dots":
        return round(width * (D * m.mhc.streams + HK + 2 * GK + D + (2 if gated else 1) * F))
    if platform == "cpu":
        blocks = max(1, length // QUERY_BLOCK)
        shares = H * (QUERY_BLOCK * (blocks + 1) / 2 + 2) if length % QUERY_BLOCK == 0 else H * length
        heads = 4 * HK
    else:
        shares, heads = H * 4 / width, 2 * HK + 2 * GK
    inner = (6 if gated else 2.25) * F
    extra = HK if m.qk_norm != "none" else 0
    stream = (6 if m.norm == "weighted" else 4) * D + HK + 2 * (m.mhc.streams - 1) * D
    return round(width * (stream + heads + extra + shares + inner) + 16)


def filtered_bytes(m: ModelConfig, width: int, tensor: int = 1) -> int:
    """Bytes per token that one layer saves with model.filter: its input, keys and values (model/collider.py)."""
    return round(width * (m.dim * m.mhc.streams + 2 * m.kv_heads * m.head_dim / tensor))


def copied_bytes(m: ModelConfig, platform: str, tensor: int = 1) -> int:
    """Bytes of weights that one layer saves in every loop, without rematerialization.

    Weights that a product takes as they are cost nothing. Codes, casts to a narrower dtype, and on CPU the
    copies that put q, k and v, and gate and up, side by side for one product (quant.project) are saved.
    """
    if m.remat != "none" or m.filter.keep < 1:
        return 0
    project, width = projections.from_config(m), item_bytes(m, platform)
    D, F, HK, GK = m.dim, m.mlp_dim, m.heads * m.head_dim, m.kv_heads * m.head_dim
    gated = MLPS[m.mlp][1]
    sizes = {
        "attn/q": D * HK, "attn/k": D * GK, "attn/v": D * GK, "attn/o": HK * D,
        "mlp/gate": D * F * gated, "mlp/up": D * F, "mlp/down": F * D,
    }  # fmt: skip
    found = 0
    for role, size in sizes.items():
        precision = project.precision(role)
        beside = platform == "cpu" and precision.grad == "full"
        beside &= role in ("attn/q", "attn/k", "attn/v") or (gated and role in ("mlp/gate", "mlp/up"))
        cost = {"full": width if beside or width < 4 else 0, "ternary": width if m.quant_group else 1}
        cost |= {"fp8": 1, "fp4_rows": width}
        found += size // tensor * cost.get(precision.weight, 2)  # FP4's codes are kept in bfloat16
    return found


def chunk_tokens(cfg: Config, rows: int) -> int:
    """Tokens of one device whose logits exist at once, as losses cuts them."""
    seen = rows if parallel.own_rows(cfg.mesh) else cfg.data.batch // cfg.train.microbatches
    size = max(1, min(cfg.data.seq_len, cfg.train.loss_chunk // seen))
    while cfg.data.seq_len % size:
        size -= 1
    return size * rows


def gathered(m: ModelConfig, mesh: MeshConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of one layer's weights that fsdp gathers, and of their gradient before it is scattered."""
    blocks = sum(b for p, b in sizes.items() if p.startswith("blocks/"))
    return 2 * blocks // m.layers * mesh.fsdp if mesh.fsdp > 1 else 0


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
