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
from nanochat_jax.kernels.fp4 import FORMATS
from nanochat_jax.model import collider, loop, transformer
from nanochat_jax.params import flatten
from nanochat_jax.quant import project as projections


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token of a row of `seq_len` tokens."""
    trunk, further = parts(cfg, seq_len)
    return trunk * (1 + 2 * kept_share(cfg, seq_len)) / 3 + further


def executed_per_token(cfg: ModelConfig, seq_len: int, tokens: int) -> float:
    """FLOPs per token that a training step runs, as XLA counts them on an unrolled model.

    Unlike `train_flops_per_token` with what is made a second time in the backward pass (model.remat =
    "block", model.filter), the arithmetic of several residual streams, and the roundings and rotations of
    low-bit formats. Other arithmetic between the products (norms, softmax) is left out; its share falls with
    dim. Args: tokens: of a microbatch; the weights' roundings are spread over them.
    """
    trunk, further = parts(cfg, seq_len)
    share = kept_share(cfg, seq_len)
    layers = loop.trained_layers(cfg)
    down = 2 * cfg.dim * cfg.mlp_dim  # not made again: nobody reads a layer's output to differentiate it
    if cfg.filter.keep < 1:  # kept rows run forward once more before they are differentiated
        total = trunk * (1 + 3 * share) / 3 - share * down * layers + further
    elif cfg.remat == "block":
        heads = loop.readouts(cfg) + cfg.mtp.depth
        blocks = trunk + further - 6 * math.prod(transformer.param_specs(cfg)["embed"].shape) * heads
        total = trunk + further + blocks / 3 - down * (layers + cfg.mtp.depth)
    else:
        total = trunk + further
    forward, backward = rounding_flops(cfg, tokens)
    once = 1 + (share if cfg.filter.keep < 1 else cfg.remat == "block")
    return total + layers * (stream_flops(cfg) * share + forward * once + backward * share)


def stream_flops(cfg: ModelConfig) -> float:
    """FLOPs per token of one layer's reading, mixing and writing of S residual streams, forward and backward.

    The products with phi are those of weights, see `parts`. Counted in XLA's program, see STREAM_COSTS.
    """
    S, D = cfg.mhc.streams, cfg.dim
    if S == 1:
        return 0.0
    square, linear, constant = STREAM_COSTS
    return 2 * D * (square * S * S + linear * S + constant)


def rounding_flops(cfg: ModelConfig, tokens: int) -> tuple[float, float]:
    """FLOPs per token of one layer's roundings in the (forward, backward) pass, with Hadamard rotations.

    fp4_rows is left out: it rounds in the forward pass alone, and its costs were not counted.
    """
    project, how = projections.from_config(cfg), cfg.fp4
    forward = backward = 0.0
    for role, spec in flatten(transformer.param_specs(cfg)["blocks"]).items():
        if role not in projections.BLOCK_ROLES:
            continue
        inputs, outputs = spec.shape[1:]
        p, weights = project.precision(role), inputs * outputs / tokens
        forward += ROUND.get(p.act, 0) * inputs + ROUND.get(p.weight, 0) * weights
        given = p.weight == "full" and how.operands == "both"  # w is rounded for dx, not in codes already
        if p.grad == "fp8":
            backward += ROUND["fp8"] * (2 * outputs + inputs + weights * (p.weight == "full"))
        elif p.grad == "int8":
            backward += ROUND["int8"] * outputs
        elif p.grad in FORMATS:
            dy, other = (ROUND[p.grad] if plain else STOCHASTIC for plain in (
                how.stochastic == "none", how.stochastic != "both",
            ))  # fmt: skip
            turn = 2 * how.hadamard
            if how.products != "wgrad":
                both = turn * (how.rotated == "both" and p.weight == "full")
                backward += (dy + both) * outputs + (other * given + both) * weights
            if how.products != "dgrad":
                backward += (dy + turn) * outputs + (other * (how.operands == "both") + turn) * inputs
    return forward, backward


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


# Of one sublayer, forward and backward, per channel: times S^2, S and 1. Fitted to XLA's count.
STREAM_COSTS = (9.5, 11.0, 4.0)
# Operations of rounding one number to nearest, and in FP4 stochastically. Counted by XLA.
ROUND = {"ternary": 7, "int8": 5, "fp8": 6, "nvfp4": 22, "mxfp4": 22}
STOCHASTIC = 49

# Dense bfloat16 peak in FLOP/s, by the start of jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, or None if it is not in the table (CPUs never are)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)
