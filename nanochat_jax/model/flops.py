"""Floating-point operations of the model, by formula, for MFU and planning.

Convention (arXiv:2204.02311): a training token costs 6 FLOPs per matmul weight it meets, and
12 * heads * head_dim * (visible positions) per attention layer, not halved for causality. Loops
repeat the blocks; each further token of multi-token prediction has one layer, with the last one's
window, and the head once more. Where the backward pass sees a share r of the tokens only, a third of
this is the forward pass and r times two thirds the backward; layers computed again never count.
Embedding look-ups, norms and the optimizer are left out.
"""

import math

from nanochat_jax.config import ModelConfig
from nanochat_jax.model import collider, transformer
from nanochat_jax.params import flatten


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token of a row of `seq_len` tokens."""
    blocks = outside = 0
    for path, spec in flatten(transformer.param_specs(cfg)).items():
        if spec.matmul and path.startswith(("blocks/", "value/")):
            blocks += math.prod(spec.shape)
        elif spec.matmul:
            outside += math.prod(spec.shape)
    unembedding = math.prod(transformer.param_specs(cfg)["embed"].shape)
    outside += unembedding * (cfg.tied + cfg.mtp.depth)
    windows = [cfg.window[i % len(cfg.window)] if cfg.window else 0 for i in range(cfg.layers)]
    visible = [min(window or seq_len, seq_len) for window in windows]
    attention = 12 * cfg.heads * cfg.head_dim
    further = cfg.mtp.depth * attention * visible[-1]
    whole = 6 * outside + further + cfg.loop.count * (6 * blocks + attention * sum(visible))
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
