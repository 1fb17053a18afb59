"""What makes a setting invalid: values, and their combinations. Called by `config.resolve`.

Each check raises ConfigError with one sentence: what was expected, what was got, and where.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_jax.config import (
        Config,
        DataConfig,
        FilterConfig,
        GroupConfig,
        LoopConfig,
        MhcConfig,
        ModelConfig,
        MtpConfig,
        OptConfig,
        TrainConfig,
    )


class ConfigError(ValueError):
    """A setting is wrong. The message says what was expected, what was got, and where."""


MLP_KINDS = ("swiglu", "relu2", "reglu2")
QK_NORMS = ("none", "before_rope", "after_rope")
REMAT = ("none", "dots", "block")
FP4_BLOCK = {"nvfp4": 16, "mxfp4": 32}  # elements that share a scale
QUANT_PRESETS = (
    "full", "ternary", "nvfp4", "mxfp4", "nvfp4_grad", "mxfp4_grad", "ternary_nvfp4", "ternary_mxfp4",
    "fp8", "fp4_rows", "fp8_nvfp4",
)  # fmt: skip
GROUPS = ("matrix", "embed", "head", "scalar")
LOSS_TERMS = ("next_token", "z", "logit_entropy", "mtp", "exit", "exit_entropy", "gate")


def nearest(name: str, known: Iterable[str]) -> str:
    """`. Did you mean 'x'?` for the closest known name, or the list of names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f". Did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def _choice(path: str, value: str, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ConfigError(f"'{path}' = '{value}' is unknown{nearest(value, known)}")


def _at_least(path: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"'{path}' must be at least {low}, got {value}")


def _divides(path: str, value: int, by_path: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"'{path}' = {value} must be a multiple of '{by_path}' = {by}")


def validate(config: Config) -> None:
    """Check values and their combinations. Raises: ConfigError."""
    _validate_model(config.model)
    _validate_data(config.data)
    _validate_opt(config.opt, config.train)
    _validate_run(config)
    _validate_mesh(config)


def _validate_model(m: ModelConfig) -> None:
    for key in ("dim", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"):
        _at_least(f"model.{key}", getattr(m, key), 1)
    _at_least("model.vocab_size", m.vocab_size, 2)
    _divides("model.heads", m.heads, "model.kv_heads", m.kv_heads)
    if m.head_dim % 2:
        raise ConfigError(f"'model.head_dim' must be even (rotary pairs), got {m.head_dim}")
    _choice("model.mlp", m.mlp, MLP_KINDS)
    _choice("model.norm", m.norm, ("weighted", "weightless"))
    _choice("model.qk_norm", m.qk_norm, QK_NORMS)
    _choice("model.quant", m.quant, QUANT_PRESETS)
    _choice("model.dtype", m.dtype, ("auto", "float32", "bfloat16"))
    _choice("model.remat", m.remat, REMAT)
    for key in ("norm_eps", "qk_gain", "rope_theta", "embed_std"):
        if getattr(m, key) <= 0:
            raise ConfigError(f"'model.{key}' must be positive, got {getattr(m, key)}")
    for key in ("softcap", "value_embed_every", "quant_group", "unroll"):
        _at_least(f"model.{key}", getattr(m, key), 0)
    _validate_loop(m.loop)
    _validate_mtp(m.mtp)
    _validate_filter(m.filter, m)
    if m.qk_gain != 1.0 and m.qk_norm == "none":
        raise ConfigError("'model.qk_gain' has no effect because model.qk_norm is 'none'")
    _validate_mhc(m.mhc)
    for window in m.window:
        _at_least("model.window", window, 0)
    if m.quant_group and not m.quant.startswith("ternary"):
        raise ConfigError(f"'model.quant_group' has no effect because model.quant is '{m.quant}'")
    if m.quant_group:
        _matrices_divide(m, "model.quant_group", m.quant_group)
    _validate_fp4(m)
    if m.unroll:
        _divides("model.layers", m.layers, "model.unroll", m.unroll)
        period = layer_period(m)
        if m.unroll % period:
            raise ConfigError(
                f"'model.unroll' = {m.unroll} must be a multiple of {period}, the period of "
                "model.window and model.value_embed_every, or 0"
            )


def _validate_loop(c: LoopConfig) -> None:
    _at_least("model.loop.count", c.count, 1)
    _at_least("model.loop.before", c.before, 0)
    _at_least("model.loop.after", c.after, 0)
    _choice("model.loop.inject", c.inject, ("none", "add"))
    _choice("model.loop.gate", c.gate, ("none", "shared", "per_loop"))
    if c.count == 1:
        _unused("model.loop", c, "model.loop.count is 1", ("norm", "inject", "gate"))


def _validate_mhc(c: MhcConfig) -> None:
    _at_least("model.mhc.streams", c.streams, 1)
    _at_least("model.mhc.iterations", c.iterations, 1)
    _choice("model.mhc.form", c.form, ("sinkhorn", "permutation", "unconstrained"))
    if c.streams == 1:
        _unused("model.mhc", c, "model.mhc.streams is 1", ("form", "iterations", "dynamic"))
    if c.form != "sinkhorn":
        _unused("model.mhc", c, f"model.mhc.form is '{c.form}'", ("iterations",))
    if c.form == "permutation" and c.streams > 4:
        raise ConfigError(
            f"'model.mhc.streams' must be at most 4 where model.mhc.form is 'permutation' (S! matrices), "
            f"got {c.streams}"
        )


def _matrices_divide(m: ModelConfig, path: str, by: int) -> None:
    """All sizes that a block's matrix takes in are multiples of a setting."""
    for key, value in (("dim", m.dim), ("mlp_dim", m.mlp_dim), ("heads * head_dim", m.heads * m.head_dim)):
        _divides(f"model.{key}", value, path, by)


def _validate_fp4(m: ModelConfig) -> None:
    f = m.fp4
    _choice("model.fp4.stochastic", f.stochastic, ("none", "gradient", "both"))
    _choice("model.fp4.rotated", f.rotated, ("wgrad", "both"))
    _choice("model.fp4.signs", f.signs, ("none", "fixed", "random"))
    _choice("model.fp4.operands", f.operands, ("gradient", "both"))
    _choice("model.fp4.products", f.products, ("dgrad", "wgrad", "both"))
    _at_least("model.fp4.hadamard", f.hadamard, 0)
    if f.hadamard and (f.hadamard.bit_count() != 1 or f.hadamard > 256):
        raise ConfigError(f"'model.fp4.hadamard' must be 0 or a power of 2 up to 256, got {f.hadamard}")
    _choice("model.fp4.outside", f.outside, ("full", "fp4"))
    if not 0 <= f.outliers < 1:
        raise ConfigError(f"'model.fp4.outliers' must be in [0, 1), got {f.outliers}")
    _at_least("model.fp4.estimator", f.estimator, 1)
    name = next((name for name in FP4_BLOCK if name in m.quant), "")
    of_rows = {"outliers", "estimator"}
    others = {field.name for field in dataclasses.fields(f)} - of_rows - {"outside"}
    unread = (others if not name else set()) | (of_rows if m.quant != "fp4_rows" else set())
    _unused("model.fp4", f, f"model.quant is '{m.quant}'", sorted(unread))
    if m.quant in ("full", "ternary"):
        _unused("model.fp4", f, f"model.quant is '{m.quant}'", ("outside",))
    if not m.loop.before + m.loop.after:
        _unused("model.fp4", f, "model.loop.before and model.loop.after are 0", ("outside",))
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
        _unused("model.fp4", f, "model.fp4.hadamard is 0", ("rotated", "signs"))
    if f.products == "dgrad" and f.rotated == "wgrad":
        _unused("model.fp4", f, "model.fp4.products is 'dgrad'", ("hadamard", "signs"))
    if f.products == "dgrad" and not m.quant.endswith("_grad"):
        why = f"model.quant = '{m.quant}' has weights in codes and model.fp4.products is 'dgrad'"
        _unused("model.fp4", f, why, ("operands",))
    block, path = FP4_BLOCK[name], f"the block of {name}"
    if f.rotated == "both" and f.hadamard > block:
        block, path = f.hadamard, "model.fp4.hadamard"
    _matrices_divide(m, path, block)
    _divides("model.kv_heads * head_dim", m.kv_heads * m.head_dim, path, block)


def _validate_mtp(p: MtpConfig) -> None:
    _at_least("model.mtp.depth", p.depth, 0)
    _choice("model.mtp.kind", p.kind, ("chained", "parallel"))
    if not 0 < p.decay <= 1:
        raise ConfigError(f"'model.mtp.decay' must be in (0, 1], got {p.decay}")
    if not p.depth:
        _unused("model.mtp", p, "model.mtp.depth is 0", ("kind", "decay"))
    if p.depth == 1:
        _unused("model.mtp", p, "model.mtp.depth is 1", ("decay",))


def _validate_filter(f: FilterConfig, m: ModelConfig) -> None:
    if not 0 < f.keep <= 1:
        raise ConfigError(f"'model.filter.keep' must be in (0, 1], got {f.keep}")
    _choice("model.filter.score", f.score, ("excess", "loss", "middle", "random"))
    if not 0 <= f.trim < 1:
        raise ConfigError(f"'model.filter.trim' must be in [0, 1), got {f.trim}")
    if f.keep == 1:
        _unused("model.filter", f, "model.filter.keep is 1", ("score", "trim"))
        return
    if f.score in ("middle", "random"):
        _unused("model.filter", f, f"model.filter.score is '{f.score}'", ("trim",))
    if f.keep + f.trim > 1:
        raise ConfigError(
            f"'model.filter.trim' = {f.trim} must leave the share that is kept, model.filter.keep = {f.keep}"
        )
    if m.remat != "none":
        raise ConfigError(
            f"'model.remat' must be 'none' with model.filter.keep below 1, which itself recomputes layers in "
            f"the backward pass, got '{m.remat}'"
        )
    if f.score == "loss":
        warnings.warn(
            "model.filter.score = 'loss' keeps noise and drops what is easy; it is a control, and costs quality",
            stacklevel=4,
        )


def _validate_reference(c: Config) -> None:
    """A file of losses and the score that reads it come together."""
    f, excess = c.model.filter, c.model.filter.keep < 1 and c.model.filter.score == "excess"
    if excess and not c.data.reference:
        raise ConfigError(
            f"'model.filter.score' = 'excess' with model.filter.keep = {f.keep} needs data.reference, a file "
            "of another model's losses"
        )
    if c.data.reference and not excess:
        why = f"model.filter.score is '{f.score}'" if f.keep < 1 else "model.filter.keep is 1"
        raise ConfigError(f"'data.reference' has no effect because {why}")


def _validate_loss(c: Config) -> None:
    """Terms are known, and the model's further tokens and their term come together."""
    loss, depth = c.train.loss, c.model.mtp.depth
    if not any(weight for _, weight in loss):
        raise ConfigError(f"'train.loss' needs a term with a weight, got {loss!r}")
    for name, _ in loss:
        _choice("train.loss", name, LOSS_TERMS)
    weight = sum(weight for name, weight in loss if name == "mtp")
    if depth == 0 and any(name == "mtp" for name, _ in loss):
        raise ConfigError("'train.loss' has the term 'mtp', which needs model.mtp.depth of at least 1")
    if depth and weight <= 0:
        raise ConfigError(
            f"'model.mtp.depth' = {depth} needs the term 'mtp' in train.loss with a positive weight, "
            f"such as ('mtp', 0.2)"
        )
    if depth >= c.data.seq_len:
        raise ConfigError(f"'model.mtp.depth' = {depth} must be less than 'data.seq_len' = {c.data.seq_len}")
    _validate_exit_loss(dict(loss), c.model.loop.gate)
    exits = [name for name, _ in loss if name in ("exit", "exit_entropy", "gate")]
    if exits and c.model.filter.keep < 1:
        raise ConfigError(
            f"'model.filter.keep' must be 1 with the term '{exits[0]}' in train.loss, which learns from all "
            f"tokens, got {c.model.filter.keep}"
        )


def _validate_exit_loss(loss: dict[str, float], gate: str) -> None:
    """The exit gate and the terms that train it come together; its second stage trains nothing else."""
    terms = [name for name in ("exit", "exit_entropy", "gate") if name in loss]
    if gate == "none" and terms:
        raise ConfigError(
            f"'train.loss' has the term '{terms[0]}', which needs an exit gate in model.loop.gate"
        )
    if gate != "none" and loss.get("exit", 0) <= 0 and loss.get("gate", 0) <= 0:
        raise ConfigError(
            f"'model.loop.gate' = '{gate}' needs the term 'exit' or 'gate' in train.loss with a positive weight"
        )
    if "gate" in loss and len(loss) > 1:
        raise ConfigError(
            f"'train.loss' has the term 'gate', which freezes all other weights, and so leaves nothing to learn "
            f"for '{next(name for name in loss if name != 'gate')}'"
        )
    if "gate" in loss and gate == "per_loop":
        raise ConfigError(
            "'train.loss' has the term 'gate', which never trains the first loop's bias of "
            "model.loop.gate = 'per_loop'; use 'shared'"
        )


def layer_period(m: ModelConfig) -> int:
    """Layers after which static per-layer options repeat; all of them if they do not divide."""
    period = math.lcm(max(1, len(m.window)), max(1, m.value_embed_every))
    return period if m.layers % period == 0 else m.layers


def _validate_data(d: DataConfig) -> None:
    if not d.source:
        raise ConfigError("'data.source' is empty; expected stdlib, rust, a path, a glob, or hf:<dataset>")
    _at_least("data.seq_len", d.seq_len, 2)
    _at_least("data.batch", d.batch, 1)
    _at_least("data.workers", d.workers, 0)
    _at_least("data.prefetch", d.prefetch, 1)
    _at_least("data.max_bytes", d.max_bytes, 0)
    if not 1 <= d.val_percent <= 50:
        raise ConfigError(f"'data.val_percent' must be in 1..50, got {d.val_percent}")


# Settings of a group that its optimizer reads, besides name, lr, weight_decay and cautious.
READ = {
    "muon": ("beta1", "steps", "coefficients", "scale", "ns_dtype"),
    "normuon": ("beta1", "beta2", "steps", "coefficients", "scale", "ns_dtype"),
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("beta1", "beta2"),
}


def _check_unread(path: str, g: GroupConfig) -> None:
    """A changed setting that the group's optimizer does not read is a mistake, not a no-op."""
    default = type(g)()
    for key in ("beta2", "eps", "steps", "coefficients", "scale", "ns_dtype"):
        if key not in READ[g.name] and getattr(g, key) != getattr(default, key):
            raise ConfigError(f"'{path}.{key}' has no effect because {path}.name is '{g.name}'")
    if g.cautious and not g.weight_decay:
        raise ConfigError(f"'{path}.cautious' has no effect because {path}.weight_decay is 0")


def _validate_opt(o: OptConfig, t: TrainConfig) -> None:
    for group in GROUPS:
        g: GroupConfig = getattr(o, group)
        path = f"opt.{group}"
        _choice(f"{path}.name", g.name, READ)
        if g.name.endswith("muon") and group != "matrix":
            raise ConfigError(f"'{path}.name' = '{g.name}' works on matrices only; use adamw or lion")
        _check_unread(path, g)
        _choice(f"{path}.coefficients", g.coefficients, ("jordan", "polar_express", "dion"))
        _choice(f"{path}.scale", g.scale, ("original", "rms", "spectral"))
        _choice(f"{path}.ns_dtype", g.ns_dtype, ("auto", "float32", "bfloat16"))
        _at_least(f"{path}.steps", g.steps, 1)
        _at_least(f"{path}.weight_decay", g.weight_decay, 0)
        for key in ("lr", "eps"):
            if getattr(g, key) <= 0:
                raise ConfigError(f"'{path}.{key}' must be positive, got {getattr(g, key)}")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(g, key) < 1:
                raise ConfigError(f"'{path}.{key}' must be in [0, 1), got {getattr(g, key)}")
        if g.state_bits not in (8, 32):
            raise ConfigError(f"'{path}.state_bits' must be 8 or 32, got {g.state_bits}")
        if g.state_bits == 8 and group == "scalar":
            raise ConfigError(f"'{path}.state_bits' has no effect because vectors keep float32 moments")
    _validate_memory(o)
    s = o.schedule
    _choice("opt.schedule.kind", s.kind, ("wsd", "cosine", "linear"))
    _choice("opt.schedule.decay_shape", s.decay_shape, ("linear", "cosine", "sqrt"))
    _at_least("opt.schedule.warmup_steps", s.warmup_steps, 0)
    _at_least("opt.schedule.rewarm_steps", s.rewarm_steps, 0)
    for key in ("decay_fraction", "decay_shape"):
        if s.kind != "wsd" and getattr(s, key) != getattr(type(s)(), key):
            raise ConfigError(f"'opt.schedule.{key}' has no effect because opt.schedule.kind is '{s.kind}'")
    _at_least("opt.schedule.cycles", s.cycles, 1)
    if s.cycles > 1 and s.kind != "cosine":
        raise ConfigError(f"'opt.schedule.cycles' has no effect because opt.schedule.kind is '{s.kind}'")
    for key in ("floor", "decay_fraction"):
        if not 0 <= getattr(s, key) <= 1:
            raise ConfigError(f"'opt.schedule.{key}' must be in [0, 1], got {getattr(s, key)}")
    if s.warmup_steps >= t.steps:
        raise ConfigError(
            f"'opt.schedule.warmup_steps' = {s.warmup_steps} must be less than 'train.steps' = {t.steps}"
        )
    if s.kind == "wsd" and s.warmup_steps + round(s.decay_fraction * t.steps) > t.steps:
        raise ConfigError(
            f"'opt.schedule.decay_fraction' = {s.decay_fraction} of {t.steps} steps and "
            f"{s.warmup_steps} warm-up steps exceed the run; lower one"
        )
    _at_least("opt.clip", o.clip, 0)
    _at_least("opt.skip_nonfinite", o.skip_nonfinite, 0)
    _at_least("opt.spike_sigmas", o.spike_sigmas, 0)


def _unused(path: str, settings: Any, why: str, keys: Iterable[str]) -> None:
    """A changed setting of a technique that is off is a mistake."""
    for key in keys:
        if getattr(settings, key) != getattr(type(settings)(), key):
            raise ConfigError(f"'{path}.{key}' has no effect because {why}")


def _validate_memory(o: OptConfig) -> None:
    """GaLore, FOAM, FIRE and 8-bit codes."""
    c, g, f = o.codes, o.galore, o.foam
    _at_least("opt.codes.block", c.block, 1)
    _choice("opt.codes.momentum", c.momentum, ("linear", "dynamic"))
    _choice("opt.codes.rounding", c.rounding, ("nearest", "stochastic"))
    _choice("opt.codes.scales", c.scales, ("float32", "bfloat16"))
    if all(getattr(o, group).state_bits == 32 for group in GROUPS):
        _unused("opt.codes", c, "no group has state_bits = 8", ("block", "momentum", "rounding", "scales"))
    for key, low in (
        ("rank", 0), ("update_gap", 1), ("scale", 0), ("min_dim", 1), ("oversampling", 0), ("power_iterations", 0)
    ):  # fmt: skip
        _at_least(f"opt.galore.{key}", getattr(g, key), low)
    _choice("opt.galore.method", g.method, ("randomized", "exact"))
    _choice("opt.galore.momentum", g.momentum, ("keep", "reset", "rotate", "transport"))
    if g.projector_bits not in (8, 16, 32):
        raise ConfigError(f"'opt.galore.projector_bits' must be 8, 16 or 32, got {g.projector_bits}")
    if not g.rank:
        others = [field.name for field in dataclasses.fields(g) if field.name != "rank"]
        _unused("opt.galore", g, "opt.galore.rank is 0", others)
    if g.method == "exact":
        _unused("opt.galore", g, "opt.galore.method is 'exact'", ("oversampling", "power_iterations"))
    if (
        g.rank
        and g.momentum == "rotate"
        and (o.matrix.state_bits == 8 or f.level or o.matrix.name == "normuon")
    ):
        raise ConfigError(
            "'opt.galore.momentum' = 'rotate' needs plain float32 moments; use 'transport' with 8-bit, "
            "folded or NorMuon state"
        )
    _at_least("opt.foam.level", f.level, 0)
    _choice("opt.foam.second_moment", f.second_moment, ("squared_mean", "mean_square"))
    if not f.level or o.matrix.name != "adamw":
        why = "opt.foam.level is 0" if not f.level else f"opt.matrix.name is '{o.matrix.name}'"
        _unused("opt.foam", f, why, ("second_moment",))
    if f.level and o.matrix.name == "normuon":
        raise ConfigError("'opt.foam.level' cannot fold NorMuon's state; use opt.matrix.name = 'muon'")
    for step in o.fire.steps:
        _at_least("opt.fire.steps", step, 0)
    _choice("opt.fire.scale", o.fire.scale, ("fan", "norm", "unit"))
    if not o.fire.steps:
        _unused("opt.fire", o.fire, "opt.fire.steps is ()", ("scale",))


def _validate_galore(c: Config) -> None:
    """GaLore that projects no matrix of this model is a mistake."""
    g, m = c.opt.galore, c.model
    heads, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    sides = [min(m.dim, heads), min(m.dim, kv), min(m.dim, m.mlp_dim)]
    if g.rank and not any(side >= g.min_dim and side > g.rank for side in sides):
        raise ConfigError(
            f"'opt.galore.rank' = {g.rank} projects nothing: the matrices' shorter sides are "
            f"{', '.join(map(str, sides))}, and 'opt.galore.min_dim' is {g.min_dim}"
        )


def _validate_run(c: Config) -> None:
    _validate_galore(c)
    if not c.name or any(ch in c.name for ch in "/\\ \t\n"):
        raise ConfigError(f"'name' must be a word without slashes or spaces, got {c.name!r}")
    if not 0 <= c.seed < 2**31:
        raise ConfigError(f"'seed' must be in 0..2^31-1, got {c.seed}")
    t = c.train
    _at_least("train.steps", t.steps, 1)
    _at_least("train.microbatches", t.microbatches, 1)
    _at_least("train.loss_chunk", t.loss_chunk, 1)
    _divides("data.batch", c.data.batch, "train.microbatches", t.microbatches)
    _validate_loss(c)
    _validate_reference(c)
    k = c.ckpt
    _at_least("ckpt.every_steps", k.every_steps, 0)
    _at_least("ckpt.every_minutes", k.every_minutes, 0)
    _at_least("ckpt.keep_last", k.keep_last, 1)
    _at_least("ckpt.keep_every_steps", k.keep_every_steps, 0)
    _at_least("ckpt.min_free_gb", k.min_free_gb, 0)
    _choice("ckpt.verify", k.verify, ("size", "sha256"))
    _at_least("eval.every_steps", c.eval.every_steps, 0)
    _at_least("eval.batches", c.eval.batches, 0)
    _at_least("eval.sample_tokens", c.eval.sample_tokens, 0)
    _validate_log(c)
    i = c.infer
    _at_least("infer.max_tokens", i.max_tokens, 1)
    _at_least("infer.temperature", i.temperature, 0)
    _at_least("infer.top_k", i.top_k, 0)
    _at_least("infer.capacity", i.capacity, 2)
    if not 0 < i.top_p <= 1:
        raise ConfigError(f"'infer.top_p' must be in (0, 1], got {i.top_p}")
    if not 0 <= i.exit_quantile <= 1:
        raise ConfigError(f"'infer.exit_quantile' must be in [0, 1], got {i.exit_quantile}")
    if c.model.loop.gate == "none":
        _unused("infer", i, "model.loop.gate is 'none'", ("exit_quantile",))
    _choice("infer.weights", i.weights, ("full", "packed"))
    _choice("infer.impl", i.impl, ("auto", "pallas", "reference"))
    if i.weights == "packed" and not c.model.quant.startswith("ternary"):
        raise ConfigError(
            f"'infer.weights' = 'packed' needs ternary weights, but model.quant is '{c.model.quant}'"
        )
    if i.impl != "auto" and i.weights == "full":
        raise ConfigError("'infer.impl' has no effect because infer.weights is 'full'")


def _validate_log(c: Config) -> None:
    g = c.log
    _at_least("log.every_steps", g.every_steps, 1)
    _choice("log.format", g.format, ("text", "json"))
    if g.profile_steps:
        steps = g.profile_steps
        if len(steps) != 2 or not 2 <= steps[0] <= steps[1] <= c.train.steps:
            raise ConfigError(
                f"'log.profile_steps' must be (first, last) in 2..train.steps = {c.train.steps} (step 1 "
                f"compiles), got {steps}"
            )
    if not 0 <= g.prometheus_port < 2**16:
        raise ConfigError(f"'log.prometheus_port' must be in 0..65535, got {g.prometheus_port}")
    if g.otlp and not g.otlp.startswith(("http://", "https://")):
        raise ConfigError(
            f"'log.otlp' must be an address such as http://127.0.0.1:4318/v1/traces, got '{g.otlp}'"
        )
    _at_least("log.min_entropy", g.min_entropy, 0)
    _at_least("log.max_grad_norm", g.max_grad_norm, 0)


def _validate_mesh(c: Config) -> None:
    mesh = c.mesh
    for key in ("data", "fsdp", "tensor"):
        _at_least(f"mesh.{key}", getattr(mesh, key), 1)
    rows = c.data.batch // c.train.microbatches
    _divides("data.batch / train.microbatches", rows, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    m = c.model
    for path, size, axis in (
        ("model.heads * model.head_dim", m.heads * m.head_dim, "tensor"),
        ("model.kv_heads * model.head_dim", m.kv_heads * m.head_dim, "tensor"),
        ("model.mlp_dim", m.mlp_dim, "tensor"),
        ("model.dim", m.dim, "fsdp"),
    ):
        _divides(path, size, f"mesh.{axis}", getattr(mesh, axis))
