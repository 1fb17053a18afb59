"""Floating-point operations of the model, by formula, for MFU and planning.

Convention (arXiv:2204.02311): a training token costs 6 FLOPs per matmul weight it meets, and
12 * heads * head_dim * (visible positions) per attention layer, not halved for causality. Loops
repeat the blocks, and an exit gate the layers after them and the head, once per loop (this is its first
stage; the second has no backward pass). Each further token of multi-token prediction has one layer, with
the last one's window, and the head once more. Where the backward pass sees a share r of the tokens only
(model/collider.py), a third of the trunk and its head is the forward pass and r times two thirds the
backward; layers behind the trunk are differentiated on all rows. Layers computed again never count. Embedding look-ups, norms and the optimizer are left out.
"""

import math

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import collider, loop, transformer
from nanochat_jax.params import flatten


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token of a row of `seq_len` tokens."""
    trunk, further = parts(cfg, seq_len)
    return trunk * (1 + 2 * kept_share(cfg, seq_len)) / 3 + further


def kept_share(cfg: ModelConfig, seq_len: int) -> float:
    """Share of the tokens that the backward pass sees."""
    return collider.kept_count(cfg.filter, seq_len) / seq_len


def parts(cfg: ModelConfig, seq_len: int) -> tuple[float, float]:
    """FLOPs of forward and backward over all tokens, per token: (the trunk and its head, further tokens)."""
    R, readouts = cfg.loop.count, loop.readouts(cfg)
    times = {"blocks": R, "value": R, "loop": R, "before": 1, "after": readouts, "head": readouts}
    weights, further = 0, 0
    for path, spec in flatten(transformer.param_specs(cfg)).items():
        stack = path.split("/")[0]
        if spec.matmul and stack == "mtp":
            further += math.prod(spec.shape)
        elif spec.matmul:
            weights += (R - 1 if path == "loop/inject" else times[stack]) * math.prod(spec.shape)
    unembedding = math.prod(transformer.param_specs(cfg)["embed"].shape)
    weights += unembedding * readouts * cfg.tied
    further += unembedding * cfg.mtp.depth

    def visible(i: int) -> int:
        return min(cfg.window[i % len(cfg.window)] or seq_len, seq_len) if cfg.window else seq_len

    stacks = {"blocks": cfg.layers, "before": cfg.loop.before, "after": cfg.loop.after}
    seen = sum(times[name] * sum(map(visible, range(n))) for name, n in stacks.items())
    position = 12 * cfg.heads * cfg.head_dim
    return 6 * weights + position * seen, 6 * further + position * cfg.mtp.depth * visible(cfg.layers - 1)


# Dense bfloat16 peak in FLOP/s, by the start of jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, or None if it is not in the table (CPUs never are)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)
