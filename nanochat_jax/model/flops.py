"""Floating-point operations of the model, by formula, for MFU and planning.

Convention (arXiv:2204.02311): a training token costs 6 FLOPs per matmul weight it meets, and
12 * heads * head_dim * (visible positions) per attention layer, not halved for causality. Loops
repeat the blocks, and an exit gate the layers after them and the head, once per loop (this is its first
stage; the second has no backward pass). Each further token of multi-token prediction has one layer, with
the last one's window, and the head once more. Where the backward pass sees a share r of the tokens only,
a third of this is the forward pass and r times two thirds the backward; layers computed again never
count. Embedding look-ups, norms and the optimizer are left out.
"""

import math

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import collider, transformer
from nanochat_jax.params import flatten


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token of a row of `seq_len` tokens."""
    R = cfg.loop.count
    readouts = R if cfg.loop.gate != "none" else 1
    times = {"blocks": R, "value": R, "loop": R, "before": 1, "after": readouts, "mtp": 1, "head": readouts}
    weights = 0
    for path, spec in flatten(transformer.param_specs(cfg)).items():
        if spec.matmul:
            weights += times[path.split("/")[0]] * math.prod(spec.shape)
    unembedding = math.prod(transformer.param_specs(cfg)["embed"].shape)
    weights += unembedding * (readouts * cfg.tied + cfg.mtp.depth)

    def visible(i: int) -> int:
        return min(cfg.window[i % len(cfg.window)] or seq_len, seq_len) if cfg.window else seq_len

    stacks = {"blocks": cfg.layers, "before": cfg.loop.before, "after": cfg.loop.after}
    seen = sum(times[name] * sum(map(visible, range(n))) for name, n in stacks.items())
    seen += cfg.mtp.depth * visible(cfg.layers - 1)
    whole = 6 * weights + 12 * cfg.heads * cfg.head_dim * seen
    kept = collider.kept_count(cfg.filter, seq_len) / seq_len
    return whole * (1 + 2 * kept) / 3


# Dense bfloat16 peak in FLOP/s, by the start of jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, or None if it is not in the table (CPUs never are)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)
