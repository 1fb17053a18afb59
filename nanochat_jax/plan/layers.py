"""Bytes that layers save for their backward pass, and need while it runs: per token, of one layer.

Layers run in a scan, as on GPU or with model.unroll = 1, or are written out one after the other. A scan
hands what a layer saves from step to step, so that jax decides what it is: the counts are those of its own
partial evaluation (test_plan_memory reads them off the traced program). What a layer needs beside that,
and what XLA:CPU keeps of layers that are written out, are the buffers that its own lists of live buffers
name, see experiments/plan.
"""

import dataclasses

import jax.numpy as jnp

from nanochat_jax.config import FilterConfig, MhcConfig, ModelConfig
from nanochat_jax.kernels.attention import QUERY_BLOCK
from nanochat_jax.model import collider, mhc
from nanochat_jax.model.layers import MLPS
from nanochat_jax.quant import project as projections

# Copies of the residual streams in one layer's backward: what the scan hands out, twice, once flat; slices
# for both sublayers; the streams between them; gradients of slices; the gradient that goes on.
STREAMS = 7


def is_written(m: ModelConfig, layers: int) -> bool:
    """Whether a stack of so many layers is written out by model.unroll (0 = one layer per step): also where
    it does not divide the stack, see `loop.outside`."""
    return bool(m.unroll) and (layers <= m.unroll or layers % m.unroll > 0)


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
        stored, heads = shares(m, length) / tensor, 4 * HK
        stored += 2 * H if length % QUERY_BLOCK == 0 else 0
    else:
        stored, heads = H * 4 / width, 2 * HK + 2 * GK
    inner = (6 if gated else 2.25) * F
    extra = HK if m.qk_norm != "none" else 0
    stream = (6 if m.norm == "weighted" else 4) * D + HK
    if m.mhc.streams > 1:  # streams before both sublayers, their outputs and coefficients
        stream += (2 * m.mhc.streams + 2) * D + 4 * mhc.coefficient_count(m.mhc)
    return round(width * (stream + heads + extra + stored + inner) + 16)


def item_bytes(m: ModelConfig, platform: str) -> int:
    """Bytes of an activation."""
    name = m.dtype if m.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(name).itemsize


def coded_bytes(m: ModelConfig, width: int, tensor: int = 1) -> float:
    """Bytes per token that a layer saves less without rematerialization, as products keep codes of one byte."""
    project, found = projections.from_config(m), 0.0
    inputs = {
        "attn/q": m.dim,
        "attn/o": m.heads * m.head_dim / tensor,
        "mlp/up": m.dim,
        "mlp/down": m.mlp_dim / tensor,
    }
    for role, numbers in inputs.items():
        found += (width - 1) * numbers * (project.precision(role).act in ("int8", "fp8"))
    return found


def shares(m: ModelConfig, length: int) -> float:
    """Numbers per token that attention's shares are on CPU: queries in blocks, with the keys up to each."""
    blocks = length // QUERY_BLOCK
    return m.heads * (length if length % QUERY_BLOCK else QUERY_BLOCK * (blocks + 1) / 2)


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


def work_bytes(m: ModelConfig, length: int, width: int, platform: str, tensor: int = 1) -> float:
    """Bytes per token that one layer's backward pass needs at once in a scan, without what it has saved.

    All that the layer saves without rematerialization, made again under "block" and "dots". Under "none" the
    scan has saved it: narrow tensors are cut out of the stacks, and of those as wide as the MLP XLA reads
    the stacks themselves, so that their three gradients are all. Beside it, on CPU, the keys and values up to
    each block of queries but the last, and the outputs of attention before the division; the layer's input,
    as the scan hands it out, and the gradient of the stream.
    """
    one = dataclasses.replace(m, mhc=MhcConfig(), quant="full")
    numbers = layer_bytes(one, length, width, platform, "none", tensor) / width + m.dim
    inner = m.mlp_dim / tensor
    if m.remat == "none":
        numbers -= (3 if MLPS[m.mlp][1] else 1) * inner
    if m.remat == "dots":  # not made again
        numbers -= layer_bytes(one, length, width, platform, "dots", tensor) / width - m.dim
    if platform == "cpu":
        numbers += (m.heads * m.head_dim + copied_keys(m, length)) / tensor
    if projections.from_config(m).precision("mlp/up").weight != "full":
        numbers += inner  # gradients of codes' products are put side by side
    if m.mhc.streams > 1:
        # In place of input and gradient of the one stream: what a sublayer reads, its output, that one's gradient.
        numbers += (1 + STREAMS * m.mhc.streams) * m.dim + 2 * coefficient_numbers(m)
    return numbers * width + emulated_bytes(m, tensor)


def filtered_work_bytes(m: ModelConfig, length: int, width: int, platform: str, tensor: int = 1) -> float:
    """`work_bytes` per token with model.filter: that of the kept rows, which attend to all keys, made again;
    and for all rows keys and values, as attention reads them, and the gradient of the layer's input."""
    plain = dataclasses.replace(m, filter=FilterConfig(), remat="block")
    kept = work_bytes(plain, length, width, platform, tensor)
    if platform == "cpu":
        kept += width * (m.heads * length - shares(m, length) - copied_keys(m, length)) / tensor
    return collider.kept_count(m.filter, length) / length * kept + filtered_bytes(m, width, tensor)


def copied_keys(m: ModelConfig, length: int) -> float:
    """Numbers per token that attention on CPU copies of keys and values, for all blocks of queries but the last."""
    blocks = max(1, length // QUERY_BLOCK) if length % QUERY_BLOCK == 0 else 1
    return m.kv_heads * m.head_dim * (blocks - 1)


def coefficient_numbers(m: ModelConfig) -> float:
    """Numbers per token of one sublayer's connection (model/mhc.py): coefficients before and after their
    scale and in parts, and all iterations of Sinkhorn-Knopp with logarithms of sums; the signs of maxima
    are bytes."""
    S = m.mhc.streams
    found = 2 * mhc.coefficient_count(m.mhc) + 4 * S
    return found + (m.mhc.iterations * (2 * S * S + 2.5 * S) if m.mhc.form == "sinkhorn" else 0)


def emulated_bytes(m: ModelConfig, tensor: int = 1) -> float:
    """Bytes per token that the emulation of FP4 and FP8 needs beside: float32 whatever the dtype.

    FP4, of an operand as wide as the MLP: rotated, in codes, and random bits, of x's and dy's; of the narrow
    ones as many, made early; scales of every 16 numbers. FP8 neither rotates nor draws: values and ratios.
    """
    D, F = m.dim, m.mlp_dim / tensor
    if "fp4" in m.quant:
        return 4 * (4 * F + 6 * D + 10 * F / 16)
    return 4 * 2 * (D + (2 if MLPS[m.mlp][1] else 1) * F) if "fp8" in m.quant else 0


def written_bytes(m: ModelConfig, length: int, width: int, remat: str) -> float:
    """Bytes per token that one layer that is written out keeps on CPU until its backward pass.

    Whatever model.remat: XLA drops its barriers before it merges equal expressions, so that what would be
    made again is merged with what was made, and stays.
    """
    D, HK, GK = m.dim, m.heads * m.head_dim, m.kv_heads * m.head_dim
    numbers = 6 * D  # of both sublayers: the input over its RMS, that times the gain, the stream behind it
    # Queries, rotated; keys and values; outputs before and behind the division, and by token.
    numbers += 4 * HK + 2 * GK + copied_keys(m, length) + shares(m, length)
    # Products, gate's and up's in one; sigmoid; silu, which is made again if anything is; what down reads.
    numbers += ((5 if remat == "none" else 4) if MLPS[m.mlp][1] else 2) * m.mlp_dim
    if m.mhc.streams > 1:  # of both sublayers: slices of the streams, new streams, the output
        numbers += 2 * (2 * m.mhc.streams * D + D + coefficient_numbers(m))
    return numbers * width


def made_again_bytes(m: ModelConfig, length: int, width: int) -> float:
    """Bytes per token that a layer that is written out keeps on CPU with model.filter besides `filtered_bytes`:
    the kept rows of all layers are made again before the first layer's backward pass."""
    own = m.kv_heads * m.head_dim
    kept = written_bytes(m, length, width, "block") - width * (
        2 * own + copied_keys(m, length) + shares(m, length)
    )
    return collider.kept_count(m.filter, length) / length * (kept + width * m.heads * length)
