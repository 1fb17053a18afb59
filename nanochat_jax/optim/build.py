"""From settings to one optax transform:
outer(clip -> partition{group: wrappers(direction) -> decay -> rate}).

The dicts below are the only places where a name becomes a transform. Parameters are told apart
by their paths (LABEL_RULES), never by rank: a stack of norm gains has rank 2 as well.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import params as params_lib
from nanochat_jax.config import GROUPS, GroupConfig, OptConfig
from nanochat_jax.optim import fire, foam, fused, galore, lion, muon, normuon, quantized, schedules, skip
from nanochat_jax.types import Metrics

# Lays a stack of matrices out over devices before work that needs them whole; None = as they are.
Constrain = Callable[..., jax.Array] | None

# Settings of a group -> direction (no learning rate, no sign).
OPTIMIZERS: dict[str, Callable[[GroupConfig, Constrain], optax.GradientTransformation]] = {
    "muon": lambda g, constrain: _muon(g, constrain),
    "normuon": lambda g, constrain: optax.chain(_muon(g, constrain), normuon.scale_by_neuron_norm(g.beta2)),
    "adamw": lambda g, _: optax.scale_by_adam(g.beta1, g.beta2, g.eps),
    "lion": lambda g, _: lion.scale_by_lion(g.beta1, g.beta2),
}

# The same directions element by element, where all but Newton-Schulz is: their 8-bit update can be one kernel.
FORMS: dict[str, Callable[[GroupConfig, Constrain], fused.Form]] = {
    "muon": lambda g, constrain: fused.muon(g.beta1, _orthogonalizer(g, constrain)),
    "normuon": lambda g, constrain: fused.muon(g.beta1, _orthogonalizer(g, constrain))._replace(
        behind=normuon.scale_by_neuron_norm(g.beta2)
    ),
    "adamw": lambda g, _: fused.adam(g.beta1, g.beta2, g.eps),
    "lion": lambda g, _: fused.lion(g.beta1, g.beta2),
}

# Applied in order to a group's direction (transform, its form or None, group's name, settings, seed), innermost
# first: GaLore over 8-bit codes of folded moments. Each is the identity at its setting's neutral value.
Wrapper = Callable[
    [optax.GradientTransformation, fused.Form | None, str, OptConfig, int], optax.GradientTransformation
]
WRAPPERS: dict[str, Wrapper] = {
    "foam": lambda tx, form, name, cfg, seed: _folded(tx, cfg) if name == "matrix" and cfg.foam.level else tx,
    "codes": lambda tx, form, name, cfg, seed: (
        _coded(tx, form, name, cfg, seed) if getattr(cfg, name).state_bits == 8 else tx
    ),
    "galore": lambda tx, form, name, cfg, seed: (
        _galore(tx, cfg, seed) if name == "matrix" and cfg.galore.rank else tx
    ),
}

# Applied in order to the complete transform, each a no-op at its setting's neutral value.
OUTER: dict[str, Callable[[optax.GradientTransformation, OptConfig], optax.GradientTransformation]] = {
    "fire": lambda tx, cfg: fire.fire(tx, _matrices, cfg.fire.steps, scale=cfg.fire.scale),
    "skip_spikes": lambda tx, cfg: skip.skip_spikes(tx, cfg.spike_sigmas) if cfg.spike_sigmas else tx,
    "skip_nonfinite": lambda tx, cfg: skip.skip_nonfinite(tx) if cfg.skip_nonfinite else tx,
}

# (regex on the whole path, group); the first match wins.
LABEL_RULES = (
    (r"(blocks|before|after|mtp)/(attn|mlp)/(q|k|v|o|gate|up|down)|mtp/join|loop/inject", "matrix"),
    (r"embed|value/embed", "embed"),
    (r"head", "head"),
    (r".*", "scalar"),
)

Schedules = dict[str, Callable[[jax.typing.ArrayLike], jax.Array]]  # group -> (step -> learning rate)


def labels(tree: Any) -> Any:
    """The group of every leaf, in a tree of the same structure."""
    return params_lib.label(tree, LABEL_RULES)


def build(
    cfg: OptConfig,
    steps: int,
    start_factor: float | None = None,
    start_step: int = 0,
    constrain: Constrain = None,
    seed: int = 0,
) -> tuple[optax.GradientTransformation, Schedules]:
    """The optimizer of a run, and its learning rates.

    Args:
        cfg: groups, schedule, clipping and skipping.
        steps: updates of the whole run.
        start_factor: last factor used, when a run is extended with opt.schedule.rewarm_steps
            (`schedules.check_extension` returns it); None = the plain schedule.
        start_step: first update of the extension.
        constrain: see `muon.scale_by_muon`; `parallel.over_layers(mesh)` where there is a mesh.
        seed: of random subspaces and stochastic rounding.

    Returns: (tx, schedules). `tx` needs `params` in update; weight decay is decoupled and
        multiplied by the learning rate. `schedules` maps each group to a function from the count
        of applied updates (skipped ones do not count) to its learning rate.
    Raises: ValueError for unknown names or an impossible schedule.
    """
    factor = schedules.schedule(cfg.schedule, steps)
    if start_factor is not None:
        factor = schedules.rewarmed(factor, start_factor, start_step, cfg.schedule.rewarm_steps)
    shrink = schedules.decay_to_zero(steps) if cfg.decay_to_zero else None

    groups: dict[str, GroupConfig] = {name: getattr(cfg, name) for name in GROUPS}
    rates = {name: _times(group.lr, factor) for name, group in groups.items()}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: optax.chain(
            direction(name, cfg, constrain, seed),
            decay(group, shrink),
            optax.scale_by_learning_rate(rates[name]),
        )
        for name, group in groups.items()
    }
    clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
    tx: optax.GradientTransformation = optax.chain(clip, optax.partition(transforms, labels))
    for outer in OUTER.values():
        tx = outer(tx, cfg)
    return tx, rates


def direction(
    name: str, cfg: OptConfig, constrain: Constrain = None, seed: int = 0
) -> optax.GradientTransformation:
    """The direction that a group's settings name, in its wrappers.

    Raises: ValueError for an unknown optimizer.
    """
    group: GroupConfig = getattr(cfg, name)
    if group.name not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{group.name}'; known: {', '.join(OPTIMIZERS)}")
    shaped = group.name in ("muon", "normuon") and name == "matrix" and cfg.galore.rank
    inner = dataclasses.replace(group, scale="unit") if shaped else group
    tx = OPTIMIZERS[group.name](inner, constrain)
    form = FORMS[group.name](inner, constrain) if group.name in FORMS else None
    for wrapper in WRAPPERS.values():
        tx = wrapper(tx, form, name, cfg, seed)
    # GaLore shows Muon projected shapes; the factor by shape belongs to the real ones.
    return optax.chain(tx, muon.scale_by_shape(group.scale)) if shaped else tx


def _folded(tx: optax.GradientTransformation, cfg: OptConfig) -> optax.GradientTransformation:
    group, level = cfg.matrix, cfg.foam.level
    if group.name == "adamw":  # the paper's formulas; not those of Adam with folded storage
        return foam.scale_by_foam_adam(level, group.beta1, group.beta2, group.eps, cfg.foam.second_moment)
    return foam.fold_state(tx, level)


def _coded(
    tx: optax.GradientTransformation, form: fused.Form | None, name: str, cfg: OptConfig, seed: int
) -> optax.GradientTransformation:
    c = cfg.codes
    codes = {"mu": c.momentum, "nu": "dynamic_unsigned"}
    form = None if name == "matrix" and cfg.foam.level else form  # folded moments are not the form's
    return quantized.quantize_state(tx, codes, c.block, c.rounding, seed, c.scales, form=form, impl=c.impl)


def _galore(tx: optax.GradientTransformation, cfg: OptConfig, seed: int) -> optax.GradientTransformation:
    g = cfg.galore
    return galore.galore(
        tx, g.rank, g.update_gap, g.scale or "rms", g.min_dim, g.method, g.oversampling,
        g.power_iterations, g.projector_bits, g.momentum, seed,
    )  # fmt: skip


def _matrices(tree: Any) -> Any:
    """Which leaves belong to the matrix group."""
    return jax.tree.map(lambda label: label == "matrix", labels(tree))


def _muon(group: GroupConfig, constrain: Constrain) -> optax.GradientTransformation:
    return muon.scale_by_muon(
        group.beta1, group.steps, group.coefficients, group.scale, dtype=_ns_dtype(group),
        constrain=constrain, impl=group.ns_impl,
    )  # fmt: skip


def _orthogonalizer(group: GroupConfig, constrain: Constrain) -> Callable[[jax.Array, jax.Array], jax.Array]:
    dtype = _ns_dtype(group)
    return muon.orthogonalizer(group.steps, group.coefficients, group.scale, dtype, constrain, group.ns_impl)


def _ns_dtype(group: GroupConfig) -> str | None:
    return None if group.ns_dtype == "auto" else group.ns_dtype


def decay(group: GroupConfig, factor: schedules.Factor | None = None) -> optax.GradientTransformation:
    """Decoupled weight decay of a group, times a factor of the update count if one is given."""
    if group.weight_decay == 0:
        return optax.identity()
    add = add_cautious_decay if group.cautious else optax.add_decayed_weights
    return add(group.weight_decay if factor is None else _times(group.weight_decay, factor))


def add_cautious_decay(weight_decay: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Add weight_decay * w to the direction u only where u * w >= 0.

    There, descent along u shrinks the weight anyway; elsewhere decay would work against it.

    Args: weight_decay: float, or schedule of the update count.
    Returns: transform like `optax.add_decayed_weights`, to stand before the learning rate.
    Raises: ValueError from update without params.
    """
    plain = optax.add_decayed_weights(weight_decay)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        decayed, state = plain.update(updates, state, params)
        agreeing = jax.tree.map(lambda u, d, p: jnp.where(u * p >= 0, d, u), updates, decayed, params)
        return agreeing, state

    return optax.GradientTransformationExtraArgs(plain.init, update)


def learning_rates(
    schedules: Mapping[str, Callable[[jax.typing.ArrayLike], jax.Array]], step: jax.typing.ArrayLike
) -> Metrics:
    """Metrics "opt/lr_<group>" of the update with index `step`.

    Args:
        schedules: from `build`.
        step: int32 [], number of updates applied before (without skipped ones).

    Returns: float32 [] per group.
    """
    return {f"opt/lr_{name}": rate(step) for name, rate in schedules.items()}


def _times(peak: float, factor: schedules.Factor) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Schedule peak * factor(step)."""
    return lambda step: peak * factor(step)
