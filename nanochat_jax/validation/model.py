"""What makes the settings under `model` invalid."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING

from nanochat_jax.validation.checks import ConfigError, at_least, choice, divides, unused

if TYPE_CHECKING:
    from nanochat_jax.config import FilterConfig, LoopConfig, MhcConfig, ModelConfig, MtpConfig

MLP_KINDS = ("swiglu", "relu2", "reglu2")
QK_NORMS = ("none", "before_rope", "after_rope")
REMAT = ("none", "dots", "block")
FP4_BLOCK = {"nvfp4": 16, "mxfp4": 32}  # elements that share a scale
QUANT_PRESETS = (
    "full", "ternary", "ternary_int8", "nvfp4", "mxfp4", "nvfp4_grad", "mxfp4_grad", "ternary_nvfp4",
    "ternary_mxfp4", "fp8", "fp4_rows", "fp8_nvfp4",
)  # fmt: skip


def validate_model(m: ModelConfig) -> None:
    for key in ("dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"):
        at_least(f"model.{key}", getattr(m, key), 1)
    at_least("model.vocab_size", m.vocab_size, 2)
    divides("model.heads", m.heads, "model.kv_heads", m.kv_heads)
    if m.head_dim % 2:
        raise ConfigError(f"'model.head_dim' must be even (rotary pairs), got {m.head_dim}")
    choice("model.mlp", m.mlp, MLP_KINDS)
    choice("model.norm", m.norm, ("weighted", "weightless"))
    choice("model.qk_norm", m.qk_norm, QK_NORMS)
    choice("model.quant", m.quant, QUANT_PRESETS)
    choice("model.dtype", m.dtype, ("auto", "float32", "bfloat16"))
    choice("model.remat", m.remat, REMAT)
    for key in ("norm_eps", "qk_gain", "rope_theta", "embed_std"):
        if getattr(m, key) <= 0:
            raise ConfigError(f"'model.{key}' must be positive, got {getattr(m, key)}")
    for key in ("softcap", "value_embed_every", "quant_group", "unroll"):
        at_least(f"model.{key}", getattr(m, key), 0)
    _validate_loop(m.loop)
    _validate_mtp(m.mtp)
    _validate_filter(m.filter, m)
    if m.qk_gain != 1.0 and m.qk_norm == "none":
        raise ConfigError("'model.qk_gain' has no effect because model.qk_norm is 'none'")
    _validate_mhc(m.mhc)
    for window in m.window:
        at_least("model.window", window, 0)
    if m.quant_group and not m.quant.startswith("ternary"):
        raise ConfigError(f"'model.quant_group' has no effect because model.quant is '{m.quant}'")
    if m.quant_group and m.quant == "ternary_int8":
        raise ConfigError(
            f"'model.quant_group' must be 0 with model.quant = 'ternary_int8', whose gradients are integer "
            f"products with the codes, got {m.quant_group}"
        )
    if m.quant_group:
        _matrices_divide(m, "model.quant_group", m.quant_group)
    _validate_fp4(m)
    if m.unroll:
        divides("model.layers", m.layers, "model.unroll", m.unroll)
        period = layer_period(m)
        if m.unroll % period:
            raise ConfigError(
                f"'model.unroll' = {m.unroll} must be a multiple of {period}, the period of "
                "model.window and model.value_embed_every, or 0"
            )


def _validate_loop(c: LoopConfig) -> None:
    at_least("model.loop.count", c.count, 1)
    at_least("model.loop.before", c.before, 0)
    at_least("model.loop.after", c.after, 0)
    choice("model.loop.inject", c.inject, ("none", "add", "linear"))
    choice("model.loop.gate", c.gate, ("none", "shared", "per_loop"))
    choice("model.loop.readout", c.readout, ("all", "sampled"))
    if c.count == 1:
        unused("model.loop", c, "model.loop.count is 1", ("norm", "inject", "gate"))
    if c.gate == "none":
        unused("model.loop", c, "model.loop.gate is 'none'", ("readout",))


def _validate_mhc(c: MhcConfig) -> None:
    at_least("model.mhc.streams", c.streams, 1)
    at_least("model.mhc.iterations", c.iterations, 1)
    choice("model.mhc.form", c.form, ("sinkhorn", "permutation", "unconstrained"))
    if c.streams == 1:
        unused("model.mhc", c, "model.mhc.streams is 1", ("form", "iterations", "dynamic"))
    if c.form != "sinkhorn":
        unused("model.mhc", c, f"model.mhc.form is '{c.form}'", ("iterations",))
    if c.form == "permutation" and c.streams > 4:
        raise ConfigError(
            f"'model.mhc.streams' must be at most 4 where model.mhc.form is 'permutation' (S! matrices), "
            f"got {c.streams}"
        )


def _matrices_divide(m: ModelConfig, path: str, by: int) -> None:
    """All sizes that a block's matrix takes in are multiples of a setting."""
    for key, value in (("dim", m.dim), ("mlp_dim", m.mlp_dim), ("heads * head_dim", m.heads * m.head_dim)):
        divides(f"model.{key}", value, path, by)


def _validate_fp4(m: ModelConfig) -> None:
    f = m.fp4
    choice("model.fp4.stochastic", f.stochastic, ("none", "gradient", "both"))
    choice("model.fp4.rotated", f.rotated, ("wgrad", "both"))
    choice("model.fp4.signs", f.signs, ("none", "fixed", "random"))
    choice("model.fp4.operands", f.operands, ("gradient", "both"))
    choice("model.fp4.products", f.products, ("dgrad", "wgrad", "both"))
    choice("model.fp4.impl", f.impl, ("auto", "pallas", "reference"))
    at_least("model.fp4.hadamard", f.hadamard, 0)
    if f.hadamard and (f.hadamard.bit_count() != 1 or f.hadamard > 256):
        raise ConfigError(f"'model.fp4.hadamard' must be 0 or a power of 2 up to 256, got {f.hadamard}")
    choice("model.fp4.outside", f.outside, ("full", "same"))
    if not 0 <= f.outliers < 1:
        raise ConfigError(f"'model.fp4.outliers' must be in [0, 1), got {f.outliers}")
    at_least("model.fp4.estimator", f.estimator, 1)
    name = next((name for name in FP4_BLOCK if name in m.quant), "")
    of_rows = {"outliers", "estimator"}
    others = {field.name for field in dataclasses.fields(f)} - of_rows - {"outside"}
    unread = (others if not name else set()) | (of_rows if m.quant != "fp4_rows" else set())
    unused("model.fp4", f, f"model.quant is '{m.quant}'", sorted(unread))
    if m.quant in ("full", "ternary"):
        unused("model.fp4", f, f"model.quant is '{m.quant}'", ("outside",))
    if not m.loop.before + m.loop.after:
        unused("model.fp4", f, "model.loop.before and model.loop.after are 0", ("outside",))
    if not name:
        return
    if m.quant_group:
        raise ConfigError(
            f"'model.quant_group' must be 0 with model.quant = '{m.quant}', got {m.quant_group}"
        )
    if f.operands == "gradient" and f.stochastic == "both":
        raise ConfigError("'model.fp4.stochastic' = 'both' needs model.fp4.operands = 'both'")
    if f.rotated == "both" and not m.quant.endswith("_grad"):
        raise ConfigError(
            f"'model.fp4.rotated' = 'both' rotates dx's weights, which would undo the codes of "
            f"model.quant = '{m.quant}'; use a preset ending in _grad"
        )
    if not f.hadamard:
        unused("model.fp4", f, "model.fp4.hadamard is 0", ("rotated", "signs"))
    if f.products == "dgrad" and f.rotated == "wgrad":
        unused("model.fp4", f, "model.fp4.products is 'dgrad'", ("hadamard", "signs"))
    if f.products == "dgrad" and not m.quant.endswith("_grad"):
        why = f"model.quant = '{m.quant}' has weights in codes and model.fp4.products is 'dgrad'"
        unused("model.fp4", f, why, ("operands",))
    block, path = FP4_BLOCK[name], f"the block of {name}"
    if f.rotated == "both" and f.hadamard > block:
        block, path = f.hadamard, "model.fp4.hadamard"
    _matrices_divide(m, path, block)
    divides("model.kv_heads * head_dim", m.kv_heads * m.head_dim, path, block)


def _validate_mtp(p: MtpConfig) -> None:
    at_least("model.mtp.depth", p.depth, 0)
    choice("model.mtp.kind", p.kind, ("chained", "parallel"))
    if not 0 < p.decay <= 1:
        raise ConfigError(f"'model.mtp.decay' must be in (0, 1], got {p.decay}")
    if not p.depth:
        unused("model.mtp", p, "model.mtp.depth is 0", ("kind", "decay"))
    if p.depth == 1:
        unused("model.mtp", p, "model.mtp.depth is 1", ("decay",))


def _validate_filter(f: FilterConfig, m: ModelConfig) -> None:
    if not 0 < f.keep <= 1:
        raise ConfigError(f"'model.filter.keep' must be in (0, 1], got {f.keep}")
    choice("model.filter.score", f.score, ("excess", "ema", "loss", "middle", "random"))
    at_least("model.filter.warmup", f.warmup, 0)
    if not 0 <= f.decay < 1:
        raise ConfigError(f"'model.filter.decay' must be in [0, 1), got {f.decay}")
    if not 0 <= f.trim < 1:
        raise ConfigError(f"'model.filter.trim' must be in [0, 1), got {f.trim}")
    if f.keep == 1:
        unused("model.filter", f, "model.filter.keep is 1", ("score", "trim", "decay", "warmup"))
        return
    if f.score != "ema":
        unused("model.filter", f, f"model.filter.score is '{f.score}'", ("decay",))
    if f.score in ("middle", "random"):
        unused("model.filter", f, f"model.filter.score is '{f.score}'", ("trim",))
    if f.keep + f.trim > 1:
        raise ConfigError(
            f"'model.filter.trim' = {f.trim} must leave the share that is kept, model.filter.keep = {f.keep}"
        )
    if m.remat != "none":
        raise ConfigError(
            f"'model.remat' must be 'none' with model.filter.keep below 1, which itself recomputes layers in "
            f"the backward pass, got '{m.remat}'"
        )
    if m.quant in ("fp8", "nvfp4", "fp8_nvfp4"):
        raise ConfigError(
            f"'model.filter.keep' must be 1 with model.quant = '{m.quant}', whose activations share a scale over "
            f"all tokens, so that kept ones alone would round differently, got {f.keep}"
        )
    if f.score == "loss":
        warnings.warn(
            "model.filter.score = 'loss' keeps noise and drops what is easy; it is a control, and costs quality",
            stacklevel=4,
        )


def layer_period(m: ModelConfig) -> int:
    """Layers after which static per-layer options repeat; all of them if they do not divide."""
    period = math.lcm(max(1, len(m.window)), max(1, m.value_embed_every))
    return period if m.layers % period == 0 else m.layers
