"""What makes the settings under `opt` invalid."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nanochat_jax.validation.checks import ConfigError, at_least, choice, unused

if TYPE_CHECKING:
    from nanochat_jax.config import Config, GroupConfig, OptConfig, TrainConfig

GROUPS = ("matrix", "embed", "head", "scalar")
# Settings of a group that its optimizer reads, besides name, lr, weight_decay and cautious.
READ = {
    "muon": ("beta1", "steps", "coefficients", "scale", "ns_dtype", "ns_impl"),
    "normuon": ("beta1", "beta2", "steps", "coefficients", "scale", "ns_dtype", "ns_impl"),
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("beta1", "beta2"),
}


def _check_unread(path: str, g: GroupConfig) -> None:
    """A changed setting that the group's optimizer does not read is a mistake, not a no-op."""
    default = type(g)()
    for key in ("beta2", "eps", "steps", "coefficients", "scale", "ns_dtype", "ns_impl"):
        if key not in READ[g.name] and getattr(g, key) != getattr(default, key):
            raise ConfigError(f"'{path}.{key}' has no effect because {path}.name is '{g.name}'")
    if g.cautious and not g.weight_decay:
        raise ConfigError(f"'{path}.cautious' has no effect because {path}.weight_decay is 0")


def validate_opt(o: OptConfig, t: TrainConfig) -> None:
    for group in GROUPS:
        g: GroupConfig = getattr(o, group)
        path = f"opt.{group}"
        choice(f"{path}.name", g.name, READ)
        if g.name.endswith("muon") and group != "matrix":
            raise ConfigError(f"'{path}.name' = '{g.name}' works on matrices only; use adamw or lion")
        _check_unread(path, g)
        choice(f"{path}.coefficients", g.coefficients, ("jordan", "polar_express", "dion"))
        choice(f"{path}.scale", g.scale, ("original", "rms", "spectral"))
        choice(f"{path}.ns_dtype", g.ns_dtype, ("auto", "float32", "bfloat16"))
        choice(f"{path}.ns_impl", g.ns_impl, ("auto", "pallas", "reference"))
        at_least(f"{path}.steps", g.steps, 1)
        at_least(f"{path}.weight_decay", g.weight_decay, 0)
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
    choice("opt.schedule.kind", s.kind, ("wsd", "cosine", "linear"))
    choice("opt.schedule.decay_shape", s.decay_shape, ("linear", "cosine", "sqrt"))
    at_least("opt.schedule.warmup_steps", s.warmup_steps, 0)
    at_least("opt.schedule.rewarm_steps", s.rewarm_steps, 0)
    for key in ("decay_fraction", "decay_shape"):
        if s.kind != "wsd" and getattr(s, key) != getattr(type(s)(), key):
            raise ConfigError(f"'opt.schedule.{key}' has no effect because opt.schedule.kind is '{s.kind}'")
    at_least("opt.schedule.cycles", s.cycles, 1)
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
    at_least("opt.clip", o.clip, 0)
    at_least("opt.skip_nonfinite", o.skip_nonfinite, 0)
    at_least("opt.spike_sigmas", o.spike_sigmas, 0)


def _validate_memory(o: OptConfig) -> None:
    """GaLore, FOAM, FIRE and 8-bit codes."""
    c, g, f = o.codes, o.galore, o.foam
    at_least("opt.codes.block", c.block, 1)
    choice("opt.codes.momentum", c.momentum, ("linear", "dynamic"))
    choice("opt.codes.rounding", c.rounding, ("nearest", "stochastic"))
    choice("opt.codes.scales", c.scales, ("float32", "bfloat16"))
    choice("opt.codes.impl", c.impl, ("auto", "pallas", "reference"))
    if all(getattr(o, group).state_bits == 32 for group in GROUPS):
        keys = [field.name for field in dataclasses.fields(c)]
        unused("opt.codes", c, "no group has state_bits = 8", keys)
    for key, low in (
        ("rank", 0), ("update_gap", 1), ("scale", 0), ("min_dim", 1), ("oversampling", 0), ("power_iterations", 0)
    ):  # fmt: skip
        at_least(f"opt.galore.{key}", getattr(g, key), low)
    choice("opt.galore.method", g.method, ("randomized", "exact"))
    choice("opt.galore.momentum", g.momentum, ("keep", "reset", "rotate", "transport"))
    if g.projector_bits not in (8, 16, 32):
        raise ConfigError(f"'opt.galore.projector_bits' must be 8, 16 or 32, got {g.projector_bits}")
    if not g.rank:
        others = [field.name for field in dataclasses.fields(g) if field.name != "rank"]
        unused("opt.galore", g, "opt.galore.rank is 0", others)
    if g.method == "exact":
        unused("opt.galore", g, "opt.galore.method is 'exact'", ("oversampling", "power_iterations"))
    if (
        g.rank
        and g.momentum == "rotate"
        and (o.matrix.state_bits == 8 or f.level or o.matrix.name == "normuon")
    ):
        raise ConfigError(
            "'opt.galore.momentum' = 'rotate' needs plain float32 moments; use 'transport' with 8-bit, "
            "folded or NorMuon state"
        )
    at_least("opt.foam.level", f.level, 0)
    choice("opt.foam.second_moment", f.second_moment, ("squared_mean", "mean_square"))
    if not f.level or o.matrix.name != "adamw":
        why = "opt.foam.level is 0" if not f.level else f"opt.matrix.name is '{o.matrix.name}'"
        unused("opt.foam", f, why, ("second_moment",))
    if f.level and o.matrix.name == "normuon":
        raise ConfigError("'opt.foam.level' cannot fold NorMuon's state; use opt.matrix.name = 'muon'")
    for step in o.fire.steps:
        at_least("opt.fire.steps", step, 0)
    choice("opt.fire.scale", o.fire.scale, ("fan", "norm", "unit"))
    if not o.fire.steps:
        unused("opt.fire", o.fire, "opt.fire.steps is ()", ("scale",))


def validate_galore(c: Config) -> None:
    """GaLore that projects no matrix of this model is a mistake."""
    g, m = c.opt.galore, c.model
    heads, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    sides = [min(m.dim, heads), min(m.dim, kv), min(m.dim, m.mlp_dim)]
    if g.rank and not any(side >= g.min_dim and side > g.rank for side in sides):
        raise ConfigError(
            f"'opt.galore.rank' = {g.rank} projects nothing: the matrices' shorter sides are "
            f"{', '.join(map(str, sides))}, and 'opt.galore.min_dim' is {g.min_dim}"
        )
