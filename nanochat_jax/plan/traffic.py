"""Bytes that devices exchange in a training step, in closed form; `collectives` reads the real ones off HLO.

With n devices, by the ring algorithms that are optimal in bytes, each device sends

    data     2 (n-1)/n of the weights' bytes, once: gradients of all microbatches are added before
    fsdp     (n-1)/n of the layers' bytes, three times for every application of a layer in every microbatch
             (gathered forward and backward, gradients scattered), and once each of the tables
    tensor   2 (n-1)/n of the activations' bytes, twice per layer and pass: behind attention and the MLP
    muon     whole matrices, or projections of GaLore, on one device each: to them, and updates back

The first two are exact (parallel.over_rows writes these collectives out). tensor and the optimizer are left
to the compiler; the formula is what it should do at least. Weights and gradients are float32, or bfloat16
with mesh.reduce_dtype; activations have the compute dtype.
"""

import math

from nanochat_jax import optim, parallel
from nanochat_jax import params as params_lib
from nanochat_jax.config import Config
from nanochat_jax.model import loop, transformer
from nanochat_jax.optim import galore
from nanochat_jax.plan import memory
from nanochat_jax.plan.collectives import sent
from nanochat_jax.plan.layers import item_bytes

Bytes = dict[str, float]  # kind of collective -> bytes that one device sends in a step
REMADE = {"none": 0, "dots": 1, "block": 1}  # forward passes more whose activations are exchanged again


def predict(cfg: Config, platform: str = "gpu") -> Bytes:
    """Bytes sent by each device in a step, by kind of collective; {} on one device."""
    return added(gradients(cfg), activations(cfg, platform), optimizer(cfg))


def added(*parts: Bytes) -> Bytes:
    """The sum of several accounts, kind by kind."""
    kinds = sorted({kind for part in parts for kind in part})
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in kinds}


def gradients(cfg: Config) -> Bytes:
    """What `parallel.over_rows` exchanges: gradients, and weights split over fsdp. Exact."""
    d, f, t = cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor
    narrow = cfg.mesh.reduce_dtype == "bfloat16"
    width, found = 2 if narrow else 4, {"all-reduce": 0.0, "all-gather": 0.0, "reduce-scatter": 0.0}
    found["all-to-all"] = 0.0

    def add(size: float, n: int) -> None:
        """An all-reduce of so many numbers; in bfloat16 as all-to-all and all-gather of padded parts."""
        if narrow:
            size = math.ceil(size / n) * n
            found["all-to-all"] += sent("all-to-all", width * size, n)
            found["all-gather"] += sent("all-gather", width * size, n)
        else:
            found["all-reduce"] += sent("all-reduce", width * size, n)

    sharded = params_lib.flatten(parallel.param_shardings(transformer.param_specs(cfg.model), memory.abstract_mesh(cfg.mesh)))  # type: ignore[arg-type]  # fmt: skip
    for path, spec in params_lib.flatten(transformer.param_specs(cfg.model)).items():
        size = math.prod(spec.shape) / (t if "tensor" in str(sharded[path].spec) else 1)
        stack = path.split("/")[0]
        split = f > 1 and t == 1 and "embed" in spec.axes
        if split:
            times = cfg.train.microbatches * applied(cfg, stack) if stack in parallel.STACKS else 1
            gathers = 2 if stack in parallel.STACKS else 1
            found["all-gather"] += gathers * times * sent("all-gather", width * size, f)
            kind = "all-to-all" if narrow else "reduce-scatter"
            found[kind] += times * (f - 1) / f * width * size
        left = d if split or t > 1 else d * f
        if left > 1:
            add(size / f if split or (t > 1 and "embed" in spec.axes) else size, left)
    return {kind: size for kind, size in found.items() if size}


def applied(cfg: Config, stack: str) -> int:
    """Times that a training step runs a stack of layers on each row."""
    times = {"before": 1, "blocks": cfg.model.loop.count, "after": loop.readouts(cfg.model)}
    return times[stack]


def activations(cfg: Config, platform: str) -> Bytes:
    """What mesh.tensor exchanges at least: sums of partial products [rows, L, D]."""
    m, t = cfg.model, cfg.mesh.tensor
    if t == 1:
        return {}
    tokens = cfg.data.batch * cfg.data.seq_len / (cfg.mesh.data * cfg.mesh.fsdp)
    passes = 2 + REMADE[m.remat]  # forward, backward, and forward made again
    layers = loop.trained_layers(m) + m.mtp.depth
    size = item_bytes(m, platform) * m.dim * tokens
    return {"all-reduce": 2 * passes * layers * sent("all-reduce", size, t)}


def optimizer(cfg: Config) -> Bytes:
    """What Muon exchanges to see whole matrices: momenta to `parallel.over_layers`, and updates back.

    With GaLore the projections, which are smaller: added up over fsdp where it splits the side that is projected.
    """
    d, f = cfg.mesh.data, cfg.mesh.fsdp
    if not cfg.opt.matrix.name.endswith("muon") or d * f * cfg.mesh.tensor == 1:
        return {}
    specs, g = transformer.param_specs(cfg.model), cfg.opt.galore
    groups = params_lib.flatten(optim.labels(specs))
    found = dict.fromkeys(("all-gather", "all-reduce", "all-to-all"), 0.0)
    for path, spec in params_lib.flatten(specs).items():
        if groups[path] != "matrix" or len(spec.shape) < 3:
            continue
        layers, m, n = spec.shape
        replicas = d if layers % d == 0 else 1
        parts = f if (layers // replicas) % f == 0 else 1
        summed = False
        if g.rank and galore.projects(spec.shape, g.rank, g.min_dim):
            summed = spec.axes[1 if m <= n else 2] == "embed"
            m, n = (g.rank, n) if m <= n else (m, g.rank)
        size = 4 * layers * m * n
        if summed and f > 1:
            found["all-reduce"] += sent("all-reduce", size, f)
            found["all-gather"] += sent("all-gather", size, replicas * parts)
            continue
        if parts > 1:
            found["all-to-all"] += 2 * sent("all-to-all", size / (f * replicas), f)
        found["all-gather"] += sent("all-gather", size / f, replicas)
    return {kind: size for kind, size in found.items() if size}
