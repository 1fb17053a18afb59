"""Tokens per second that a device can be expected to reach, from its data sheet.

A roofline, with parts that do not overlap:

    step = products / (EFFICIENCY * peak) + activations' traffic / bandwidth
         + optimizer (products as above, its bytes / bandwidth) + bytes exchanged (plan.traffic) / link

EFFICIENCY is an assumption, what well-tuned training reaches in its matrix products; nothing here was
measured. FP4 and ternary run as emulation in bfloat16, so their products count at bfloat16's peak.
"""

import math
from dataclasses import dataclass

from nanochat_jax import optim
from nanochat_jax import params as params_lib
from nanochat_jax.config import Config
from nanochat_jax.model import flops, loop, transformer
from nanochat_jax.plan import layers, memory
from nanochat_jax.plan import traffic as collective_bytes
from nanochat_jax.plan.devices import Device

EFFICIENCY = 0.5
PASSES = 3  # each saved tensor is written once and read about twice
AGAIN = {"none": 1.0, "dots": 1.0, "block": 4 / 3}  # products with those made a second time


@dataclass(frozen=True)
class Speed:
    """Prediction for a whole mesh. mfu: 6N FLOPs (without recomputation) over all devices' peak."""

    flops_per_token: float
    tokens_per_step: int
    seconds_per_step: float
    tokens_per_second: float
    mfu: float
    hours: float
    kilowatt_hours: float
    ceiling: float  # tokens/s at the peak itself: no program can be faster


def predict(cfg: Config, device: Device) -> Speed:
    """Speed of a config on the devices of its mesh."""
    devices = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor
    work = flops.train_flops_per_token(cfg.model, cfg.data.seq_len)
    tokens = cfg.data.batch * cfg.data.seq_len
    peak = devices * device.flops
    products = tokens * products_per_token(cfg) + optimizer_flops(cfg)
    saved = layers.layer_bytes(cfg.model, cfg.data.seq_len, 2, "gpu", "none", cfg.mesh.tensor)
    streams = layers.STREAMS * cfg.model.mhc.streams * cfg.model.dim * 2 * (cfg.model.mhc.streams > 1)
    applied = passes(cfg) * loop.trained_layers(cfg.model) + PASSES * cfg.model.mtp.depth
    traffic = applied * tokens * (saved + streams) / (cfg.mesh.data * cfg.mesh.fsdp)
    bytes_ = memory.predict(cfg)
    update = 6 * bytes_.parameters + 2 * bytes_.optimizer  # read and write each; gradients and updates too
    exchanged = sum(collective_bytes.predict(cfg).values())
    seconds = products / (EFFICIENCY * peak) + (traffic + update) / device.bandwidth + exchanged / device.link
    hours = cfg.train.steps * seconds / 3600
    return Speed(
        work, tokens, seconds, tokens / seconds, tokens / seconds * work / peak, hours,
        hours * devices * device.watts / 1000, peak / work,
    )  # fmt: skip


def products_per_token(cfg: Config) -> float:
    """FLOPs per token with products made a second time: what a device runs, where MFU counts each once."""
    trunk, further = flops.parts(cfg.model, cfg.data.seq_len)
    if cfg.model.filter.keep == 1:
        return (trunk + further) * AGAIN[cfg.model.remat]
    # Kept rows run forward once more before they are differentiated (model/collider.py).
    return trunk * (1 + 3 * flops.kept_share(cfg.model, cfg.data.seq_len)) / 3 + further


def passes(cfg: Config) -> float:
    """Passes over a layer's tensors. With a filter all rows are written, and the kept ones once more and read."""
    if cfg.model.filter.keep == 1:
        return PASSES
    return 1 + PASSES * flops.kept_share(cfg.model, cfg.data.seq_len)


def optimizer_flops(cfg: Config) -> float:
    """Products of Newton-Schulz in one update: steps * (4 m^2 n + 2 m^3) per matrix, m the shorter side."""
    group, rank = cfg.opt.matrix, cfg.opt.galore.rank
    if not group.name.endswith("muon"):
        return 0.0
    specs = transformer.param_specs(cfg.model)
    total, labels = 0.0, params_lib.flatten(optim.labels(specs))
    for path, spec in params_lib.flatten(specs).items():
        if labels[path] != "matrix":
            continue
        *stack, a, b = spec.shape
        short, long = min(a, b), max(a, b)
        projected = rank and short >= cfg.opt.galore.min_dim and short > rank
        m = rank if projected else short
        total += math.prod(stack) * group.steps * (4 * m * m * long + 2 * m**3)
        total += math.prod(stack) * 4 * rank * short * long if projected else 0.0
    return total
