"""What makes a run's other settings invalid: losses, checkpoints, logs, inference, mesh."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from nanochat_jax.validation.checks import ConfigError, at_least, choice, divides, unused
from nanochat_jax.validation.optimizer import GROUPS, validate_galore

if TYPE_CHECKING:
    from nanochat_jax.config import Config, Weight

LOSS_TERMS = ("next_token", "z", "logit_entropy", "mtp", "exit", "exit_entropy", "gate")


# Settings of a group that its optimizer reads, besides name, lr, weight_decay and cautious.
READ = {
    "muon": ("beta1", "steps", "coefficients", "scale", "ns_dtype", "ns_impl"),
    "normuon": ("beta1", "beta2", "steps", "coefficients", "scale", "ns_dtype", "ns_impl"),
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("beta1", "beta2"),
}
# infer.weights -> presets without matrices that could be held so.
NOT_HELD = {"codes": ("full", "nvfp4_grad", "mxfp4_grad")}
NOT_HELD["packed"] = (*NOT_HELD["codes"], "fp8", "fp4_rows")


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


def _values(weight: Weight) -> tuple[float, ...]:
    """A weight, or those of all its points."""
    return tuple(value for _, value in weight) if isinstance(weight, tuple) else (weight,)


def _validate_points(name: str, points: tuple[tuple[int, float], ...], steps: int) -> None:
    at = [step for step, _ in points]
    if len(at) < 2 or at[0] < 0 or any(b <= a for a, b in itertools.pairwise(at)):
        raise ConfigError(
            f"'train.loss' needs a weight of '{name}' that is a number, or at least two points (step, weight) "
            f"with growing steps from 0 on, got {points!r}"
        )
    if at[0] >= steps:
        raise ConfigError(
            f"'train.loss' changes the weight of '{name}' from step {at[0]} on, which train.steps = {steps} never "
            f"reaches"
        )


def _validate_warmup(c: Config) -> None:
    if c.model.filter.warmup >= c.train.steps:
        raise ConfigError(
            f"'model.filter.warmup' = {c.model.filter.warmup} must be less than 'train.steps' = {c.train.steps}"
        )


def _validate_loss(c: Config) -> None:
    """Terms are known, and the model's further tokens and their term come together."""
    loss, depth = c.train.loss, c.model.mtp.depth
    if not any(any(_values(weight)) for _, weight in loss):
        raise ConfigError(f"'train.loss' needs a term with a weight, got {loss!r}")
    for name, weight in loss:
        choice("train.loss", name, LOSS_TERMS)
        if isinstance(weight, tuple):
            _validate_points(name, weight, c.train.steps)
    weight = sum(max(_values(weight)) for name, weight in loss if name == "mtp")
    if depth == 0 and any(name == "mtp" for name, _ in loss):
        raise ConfigError("'train.loss' has the term 'mtp', which needs model.mtp.depth of at least 1")
    if depth and weight <= 0:
        raise ConfigError(
            f"'model.mtp.depth' = {depth} needs the term 'mtp' in train.loss with a positive weight, "
            f"such as ('mtp', 0.2)"
        )
    if depth >= c.data.seq_len:
        raise ConfigError(f"'model.mtp.depth' = {depth} must be less than 'data.seq_len' = {c.data.seq_len}")
    _validate_exit_loss(c)


def _validate_exit_loss(c: Config) -> None:
    """The exit gate and the terms that train it come together; its second stage trains nothing else."""
    loss, gate, opt = dict(c.train.loss), c.model.loop.gate, c.opt
    terms = [name for name in ("exit", "exit_entropy", "gate") if name in loss]
    if gate == "none" and terms:
        raise ConfigError(
            f"'train.loss' has the term '{terms[0]}', which needs an exit gate in model.loop.gate"
        )
    if gate != "none" and all(max(_values(loss.get(name, 0.0))) <= 0 for name in ("exit", "gate")):
        raise ConfigError(
            f"'model.loop.gate' = '{gate}' needs the term 'exit' or 'gate' in train.loss with a positive weight"
        )
    if "gate" in loss and len(loss) > 1:
        raise ConfigError(
            f"'train.loss' has the term 'gate', which freezes all other weights, and so leaves nothing to learn "
            f"for '{next(name for name in loss if name != 'gate')}'"
        )
    if "gate" in loss:
        decayed = [name for name in GROUPS if getattr(opt, name).weight_decay]
        if decayed or opt.fire.steps:
            key = f"opt.{decayed[0]}.weight_decay" if decayed else "opt.fire.steps"
            raise ConfigError(
                f"'train.loss' has the term 'gate', which freezes all other weights, but '{key}' would change them"
            )
    if "gate" in loss:
        unused("model.loop", c.model.loop, "the term 'gate' in train.loss reads all loops", ("readout",))
    if "gate" in loss and gate == "per_loop":
        raise ConfigError(
            "'train.loss' has the term 'gate', which never trains the first loop's bias of "
            "model.loop.gate = 'per_loop'; use 'shared'"
        )
    if terms and c.model.filter.keep < 1:
        raise ConfigError(
            f"'model.filter.keep' must be 1 with the term '{terms[0]}' in train.loss, which learns from all "
            f"tokens, got {c.model.filter.keep}"
        )


def validate_run(c: Config) -> None:
    validate_galore(c)
    if not c.name or any(ch in c.name for ch in "/\\ \t\n"):
        raise ConfigError(f"'name' must be a word without slashes or spaces, got {c.name!r}")
    if not 0 <= c.seed < 2**31:
        raise ConfigError(f"'seed' must be in 0..2^31-1, got {c.seed}")
    t = c.train
    at_least("train.steps", t.steps, 1)
    at_least("train.microbatches", t.microbatches, 1)
    at_least("train.loss_chunk", t.loss_chunk, 1)
    at_least("train.stall_seconds", t.stall_seconds, 0)
    if t.stall_exit and not t.stall_seconds:
        raise ConfigError("'train.stall_exit' has no effect because train.stall_seconds is 0")
    divides("data.batch", c.data.batch, "train.microbatches", t.microbatches)
    _validate_loss(c)
    _validate_reference(c)
    _validate_warmup(c)
    k = c.ckpt
    at_least("ckpt.every_steps", k.every_steps, 0)
    at_least("ckpt.every_minutes", k.every_minutes, 0)
    at_least("ckpt.keep_last", k.keep_last, 1)
    at_least("ckpt.keep_every_steps", k.keep_every_steps, 0)
    at_least("ckpt.min_free_gb", k.min_free_gb, 0)
    choice("ckpt.verify", k.verify, ("size", "sha256"))
    at_least("eval.every_steps", c.eval.every_steps, 0)
    at_least("eval.batches", c.eval.batches, 0)
    at_least("eval.sample_tokens", c.eval.sample_tokens, 0)
    _validate_log(c)
    i = c.infer
    at_least("infer.max_tokens", i.max_tokens, 1)
    at_least("infer.temperature", i.temperature, 0)
    at_least("infer.top_k", i.top_k, 0)
    at_least("infer.capacity", i.capacity, 2)
    if not 0 < i.top_p <= 1:
        raise ConfigError(f"'infer.top_p' must be in (0, 1], got {i.top_p}")
    if not 0 <= i.exit_quantile <= 1:
        raise ConfigError(f"'infer.exit_quantile' must be in [0, 1], got {i.exit_quantile}")
    if c.model.loop.gate == "none":
        unused("infer", i, "model.loop.gate is 'none'", ("exit_quantile",))
    choice("infer.loop_cache", i.loop_cache, ("all", "last"))
    if c.model.loop.count == 1:
        unused("infer", i, "model.loop.count is 1", ("loop_cache",))
    choice("infer.weights", i.weights, ("auto", "full", "codes", "packed"))
    choice("infer.impl", i.impl, ("auto", "pallas", "reference"))
    if c.model.quant in NOT_HELD.get(i.weights, ()):
        what = "ternary, NVFP4 or MXFP4 weights" if i.weights == "packed" else "weights in low bits"
        raise ConfigError(
            f"'infer.weights' = '{i.weights}' needs {what} in the forward pass, but model.quant is '{c.model.quant}'"
        )
    if i.impl != "auto" and i.weights != "packed":
        raise ConfigError(f"'infer.impl' has no effect because infer.weights is '{i.weights}', not 'packed'")
    _validate_drafts(c)


def _validate_drafts(c: Config) -> None:
    i, loops, depth = c.infer, c.model.loop.count, c.model.mtp.depth
    at_least("infer.draft_tokens", i.draft_tokens, 0)
    at_least("infer.draft_loops", i.draft_loops, 0)
    if not i.draft_tokens:
        return unused("infer", i, "infer.draft_tokens is 0", ("draft_loops",))
    if i.draft_loops >= loops:
        raise ConfigError(
            f"'infer.draft_loops' must be below model.loop.count = {loops}, got {i.draft_loops}: drafts with "
            "all loops cost as much as the tokens"
        )
    if not i.draft_loops and i.draft_tokens > depth:
        raise ConfigError(
            f"'infer.draft_tokens' must be at most model.mtp.depth = {depth}, got {i.draft_tokens}; of a model "
            "with loops infer.draft_loops > 0 drafts without such layers"
        )
    if i.draft_tokens > 16:
        raise ConfigError(f"'infer.draft_tokens' must be at most 16, got {i.draft_tokens}")
    if i.exit_quantile < 1:
        raise ConfigError(
            "'infer.exit_quantile' must be 1 with infer.draft_tokens: a step reads several tokens"
        )
    if i.loop_cache != "all":
        raise ConfigError(
            "'infer.loop_cache' must be 'all' with infer.draft_tokens: of tokens that are read together each "
            "needs what every loop left of the ones before"
        )


def _validate_log(c: Config) -> None:
    g = c.log
    at_least("log.every_steps", g.every_steps, 1)
    choice("log.format", g.format, ("text", "json"))
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
    at_least("log.min_entropy", g.min_entropy, 0)
    at_least("log.max_grad_norm", g.max_grad_norm, 0)


def validate_mesh(c: Config) -> None:
    mesh = c.mesh
    for key in ("data", "fsdp", "tensor"):
        at_least(f"mesh.{key}", getattr(mesh, key), 1)
    if mesh.tensor > 1 and c.data.pool.order == "completion" and not c.data.pool.replay:
        raise ConfigError(
            f"'data.pool.order' must not be 'completion' with mesh.tensor = {mesh.tensor}: devices that share "
            "rows may belong to several processes, whose orders would differ"
        )
    choice("mesh.reduce_dtype", mesh.reduce_dtype, ("float32", "bfloat16"))
    if mesh.data * mesh.fsdp == 1:
        unused("mesh", mesh, "mesh.data and mesh.fsdp are 1", ("reduce_dtype",))
    if mesh.tensor > 1:
        unused("mesh", mesh, "mesh.tensor leaves the exchange to the compiler", ("reduce_dtype",))
    rows = c.data.batch // c.train.microbatches
    divides("data.batch / train.microbatches", rows, "mesh.data * mesh.fsdp", mesh.data * mesh.fsdp)
    m = c.model
    at_least("train.check_replicas_steps", c.train.check_replicas_steps, 0)
    if c.train.check_replicas_steps and mesh.data * mesh.fsdp * mesh.tensor == 1:
        raise ConfigError("'train.check_replicas_steps' has no effect because the mesh is one device")
    for path, size, axis in (
        ("model.heads * model.head_dim", m.heads * m.head_dim, "tensor"),
        ("model.kv_heads * model.head_dim", m.kv_heads * m.head_dim, "tensor"),
        ("model.mlp_dim", m.mlp_dim, "tensor"),
        ("model.dim", m.dim, "fsdp"),
    ):
        divides(path, size, f"mesh.{axis}", getattr(mesh, axis))
