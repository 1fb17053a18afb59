"""A whole run, composed from its parts: config -> shapes -> layout -> restore or init -> loop.

With the `__main__` files and words.py, the only place that holds the whole Config.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax import chat, checkpoint, losses, optim, parallel, processes, tokenizer
from nanochat_jax import params as params_lib
from nanochat_jax.config import Config, ConfigError, InferConfig, padded_vocab
from nanochat_jax.data import mixture, pipeline, shards
from nanochat_jax.evals import loss as eval_loss
from nanochat_jax.inference import engine, load
from nanochat_jax.model import collider, flops, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.telemetry import anomaly, goodput, logs, manifest
from nanochat_jax.telemetry.console import Progress, si
from nanochat_jax.telemetry.trace import Exporter, SpanFile, Trace
from nanochat_jax.telemetry.writers import Multi, open_writers
from nanochat_jax.train import hooks, loop, replicas, watchdog, words, workdir
from nanochat_jax.train import step as steps
from nanochat_jax.types import TrainState

log = logging.getLogger(__name__)


def parameter_table(cfg: Config) -> str:
    """Path, shape, format, optimizer group, count and bytes of every weight, and the totals."""
    specs = params_lib.flatten(transformer.param_specs(cfg.model))
    groups = params_lib.flatten(optim.labels(transformer.param_specs(cfg.model)))
    formats = {
        f"{stack}/{role}": project.precision(role).weight
        for stack, project in projections.by_stack(cfg.model).items()
        for role in projections.BLOCK_ROLES
    }
    rows = [("path", "shape", "format", "group", "count", "bytes")]
    for path, spec in specs.items():
        count = math.prod(spec.shape)
        kind = formats.get(path, "full")
        rows.append(
            (path, "x".join(map(str, spec.shape)), kind, groups[path], f"{count:,}", f"{4 * count:,}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    totals = {name: si(count) for name, count in transformer.counts(cfg.model).items()}
    work = flops.train_flops_per_token(cfg.model, cfg.data.seq_len)
    lines.append(
        f"parameters: {totals['unique']} unique, {totals['unrolled']} unrolled, "
        f"of which {totals['tables']} in tables; {si(work)} FLOPs per training token"
    )
    return "\n".join(lines)


class Parts:
    """The pure pieces of a run, made from its Config: no data, no arrays."""

    def __init__(
        self, cfg: Config, extension: tuple[float, int] | None = None, devices: Sequence[Any] | None = None
    ):
        self.specs = transformer.param_specs(cfg.model)
        factor, start = extension or (None, 0)
        self.mesh = parallel.mesh(cfg.mesh, devices)
        whole = parallel.whole_layer(self.mesh, self.specs, cfg.mesh.reduce_dtype)
        self.loss_fn = losses.make_loss(cfg.model, cfg.train.loss, cfg.train.loss_chunk, whole)
        spread = parallel.over_layers(self.mesh)
        tx, self.schedules = optim.build(cfg.opt, cfg.train.steps, factor, start, spread, cfg.seed)
        self.tx = collider.averaging(tx, cfg.model.filter, padded_vocab(cfg.model))
        self.init = lambda key: steps.new_state(params_lib.init_params(self.specs, key), self.tx)
        self.shapes = jax.eval_shape(self.init, jax.random.key(0))
        self.layout = parallel.state_shardings(self.shapes, self.specs, self.mesh)
        self.target = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), self.shapes, self.layout
        )
        prepare = losses.make_prepare(cfg.model)
        over_rows = parallel.over_rows(self.mesh, self.specs, cfg.mesh.reduce_dtype)
        first = None
        if n := cfg.model.filter.warmup:
            made = losses.make_loss(cfg.model, cfg.train.loss, cfg.train.loss_chunk, whole, first=True)
            first = n, made
        step = steps.make_train_step(
            self.loss_fn, self.tx, cfg.seed, cfg.train.microbatches, prepare, over_rows, first
        )
        rows, everywhere = parallel.batch_sharding(self.mesh), parallel.replicated(self.mesh)
        self.step = jax.jit(
            step, donate_argnums=0, in_shardings=(self.layout, rows), out_shardings=(self.layout, everywhere)
        )
        self.eval_step = jax.jit(
            parallel.within(self.mesh)(steps.make_eval_step(losses.make_eval_nll(cfg))),
            in_shardings=(self.layout.params, rows, None),
            out_shardings=everywhere,
        )

    def fresh(self, seed: int) -> TrainState:
        """The state before the first step, created where it lives."""
        return jax.jit(self.init, out_shardings=self.layout)(jax.random.key(seed))

    def fresh_opt(self, params: Any) -> Any:
        """A new optimizer state for given parameters."""
        return jax.jit(self.tx.init, out_shardings=self.layout.opt_state)(params)


def batch_shapes(cfg: Config, mesh: jax.sharding.Mesh | None = None) -> parallel.Batch:
    """Shapes of a training batch, as the data pipeline makes it; with a mesh, where its rows lie."""
    place = None if mesh is None else parallel.batch_sharding(mesh)
    whole, real = (
        jax.ShapeDtypeStruct((cfg.data.batch, cfg.data.seq_len), t, sharding=place)
        for t in (np.int32, np.float32)
    )
    reference = real if cfg.data.reference else None
    return parallel.Batch(whole, whole, real, whole, whole, reference=reference)  # type: ignore[arg-type]


def dry_run(cfg: Config) -> str:
    """Trace the whole step without data or arrays; returns the parameter table and state size."""
    parts = Parts(cfg)
    _, metrics = jax.eval_shape(parts.step, parts.shapes, batch_shapes(cfg))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.shapes))
    return f"{parameter_table(cfg)}\ntraining state: {size / 2**20:.1f} MiB; metrics: {', '.join(sorted(metrics))}"


def start_state(
    cfg: Config, home: Path, checkpoints: checkpoint.Checkpointer, resume: str
) -> tuple[Parts, TrainState, tuple[float, int] | None, str]:
    """Own checkpoint, else ckpt.init_from, else scratch.

    Returns: (parts, state, extension of the schedule, a line for the user).
    Raises: ConfigError if the workdir holds another run, or --resume contradicts what is there.
    """
    latest = checkpoints.latest()
    processes.alike(f"a newest checkpoint in {home}", f"{0 if latest is None else latest + 1:07x}")
    if resume == "must" and latest is None:
        raise ConfigError(f"--resume=must, but {home} has no checkpoint")
    if resume == "never" and latest is not None:
        raise ConfigError(
            f"--resume=never, but {home} has a checkpoint of step {latest}; choose another --workdir"
        )
    if latest is None:
        parts = Parts(cfg)
        state = parts.fresh(cfg.seed)
        if not cfg.ckpt.init_from:
            return parts, state, None, "starting from scratch"
        state = TrainState(state.step, _initial_params(cfg, parts, state.params), state.opt_state)
        return parts, state, None, f"starting from the parameters of {cfg.ckpt.init_from}"
    if (home / "config.json").exists():
        before = json.loads((home / "config.json").read_text())
        if differences := manifest.changed_keys(before, manifest.to_dict(cfg)):
            raise ConfigError(
                f"{home} holds a run with other settings ({'; '.join(differences)}); use another --workdir"
            )
    parts = Parts(cfg)
    state, misc = checkpoints.restore(parts.target, parts.fresh_opt)  # of the newest intact step
    step, old_steps = int(state.step), misc["config"]["train"]["steps"]
    extension = tuple(misc["extension"]) if misc["extension"] else None
    if old_steps != cfg.train.steps:
        last = optim.check_extension(cfg.opt.schedule, old_steps, cfg.train.steps, step)
        extension = (last, step) if cfg.opt.schedule.rewarm_steps else None
    if extension:
        parts = Parts(cfg, extension)  # the same shapes, another schedule
    return parts, state, extension, f"continuing at step {step}"


def _same_tokenizer(cfg: Config, sha256: str) -> None:
    """Parameters mean nothing with another tokenizer's ids. Raises: ConfigError."""
    own = Path(cfg.ckpt.init_from) / "tokenizer.json"
    if cfg.ckpt.init_from and own.exists() and tokenizer.load(own).sha256 != sha256:
        raise ConfigError(
            f"'ckpt.init_from' = '{cfg.ckpt.init_from}' was trained with another tokenizer than this run's; set "
            f"data.tokenizer = {own}"
        )


def _initial_params(cfg: Config, parts: Parts, fresh: Any) -> Any:
    """The parameters of ckpt.init_from. An exit gate that it lacks is the fresh one: a looped model can be
    trained without and get its gate in a run of its own (train.loss = gate)."""
    source, target = Path(cfg.ckpt.init_from) / "ckpt", parts.target.params

    def has_gate() -> bool:
        return checkpoint.read_misc(source)["config"]["model"]["loop"].get("gate", "none") != "none"

    if cfg.model.loop.gate == "none" or has_gate():
        return checkpoint.restore_params(source, target, cfg.ckpt.verify)[0]
    rest = {name: part for name, part in target["loop"].items() if name != "gate"}
    target = {name: part for name, part in target.items() if name != "loop"} | (
        {"loop": rest} if rest else {}
    )
    params, _ = checkpoint.restore_params(source, target, cfg.ckpt.verify)
    return params | {"loop": params.get("loop", {}) | {"gate": fresh["loop"]["gate"]}}


def train(
    cfg: Config, home: Path, cache: Path, facts: dict, resume: str, interrupted: Callable[[], bool]
) -> int:
    """Run to the end of the config. Returns the exit status: 0, 1 (stopped), 130 (interrupted).

    With several processes all call this; process 0 alone writes, except to checkpoints, and prints.
    Raises: ConfigError if another run holds the workdir; workdir.UnwritableError if its disk, or that of the
    prepared data, is full; processes.PeerError if another process is lost, or has another config, other data or
    another workdir; loop.DataFailedError if no further batch can be made or the held-out data cannot be read,
    after saving the steps so far; checkpoint.CheckpointError if the last step cannot be saved.
    """

    def advice() -> str:
        return f"{_kept(home)}; the same command in all processes continues this run"

    with processes.losses_reported(advice), contextlib.ExitStack() as stack:
        problem = None
        if processes.first():
            try:
                stack.enter_context(workdir.held(home))
            except (ConfigError, workdir.UnwritableError) as error:
                problem = error
        processes.together(problem, processes.PeerError("process 0 cannot use the workdir"))
        return _train(cfg, home, cache, facts, resume, interrupted)


def _kept(home: Path) -> str:
    """What a restart will find."""
    step = checkpoint.latest_step(home / "ckpt")
    return "there is no checkpoint yet" if step is None else f"the checkpoint of step {step} is intact"


def _train(
    cfg: Config, home: Path, cache: Path, facts: dict, resume: str, interrupted: Callable[[], bool]
) -> int:
    main = processes.first()
    settings = json.dumps([manifest.to_dict(cfg), jax.__version__], sort_keys=True)
    processes.alike("a config or a version of jax", hashlib.sha256(settings.encode()).hexdigest())
    processes.require_shared(home)
    ledger, trace, exporter = goodput.Ledger(), *_trace(cfg, home, facts, main)
    quiet = None if main else open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    progress = Progress(cfg.train.steps, quiet, cfg.log.format, trace.ids)
    if cfg.log.format == "json":  # warnings, and other packages' lines, too
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logs.JsonFormatter(trace.ids))
    with workdir.written(cache / "tokens"):
        corpus = mixture.prepare(cfg.data, cfg.model.vocab_size, cache / "tokens", progress.print)
    processes.alike("prepared data", corpus.sha256)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpointer(cfg.ckpt, home / "ckpt"))
        if checkpoints.latest() is None:
            _same_tokenizer(cfg, corpus.tokenizer.sha256)
        parts, state, extension, origin = start_state(cfg, home, checkpoints, resume)
        first = int(state.step)
        before = checkpoint.read_misc(home / "ckpt", first) if first else {}
        noticed = anomaly.from_json(before.get("anomaly", {}))
        device = jax.devices()[0]
        facts = facts | {
            "devices": {"platform": device.platform, "kind": device.device_kind, "count": len(jax.devices())},
            "processes": processes.count(),
            "data": corpus.facts,
        }
        if main:
            with workdir.written(home):
                manifest.write(home, cfg, facts)
                shards.save_whole(home / "tokenizer.json", corpus.tokenizer)
        progress.print(words.opening(cfg, home, corpus, origin))
        span = trace.begin("run", run=cfg.name, first_step=first)
        writers = open_writers(cfg.log, home, first, cfg.name, trace.ids) if main else Multi([])
        stack.callback(writers.close)
        if first == 0:
            writers.text(0, "config", json.dumps(manifest.to_dict(cfg), indent=1))

        def misc(step: int) -> dict:
            tokens = step * cfg.data.batch * cfg.data.seq_len
            return {
                "step": step, "data_position": step, "tokens": tokens, "config": manifest.to_dict(cfg),
                "extension": extension, "data_sha256": corpus.sha256,
                "tokenizer_sha256": corpus.tokenizer.sha256, "eval": dict(scores),
                "anomaly": anomaly.to_json(noticed),
            }  # fmt: skip

        scores: dict[str, float] = {}
        evaluate = hooks.evaluate(_scorer(cfg, parts, corpus), writers, progress, scores)
        sample = hooks.sample(_sampler(cfg, parts, corpus), writers, progress)
        evaluate = hooks.aside(evaluate, "eval", ledger, trace)
        sample = hooks.aside(sample, "eval", ledger, trace)
        failures: list[Exception] = []
        # Of several processes the others wait for this one: there is no step at which all could save.
        alone = processes.count() == 1
        if alone:
            evaluate = loop.or_stop(evaluate, failures)
        scored = [loop.every(cfg.eval.every_steps, evaluate)]
        if cfg.eval.sample_tokens:
            scored.append(loop.every(cfg.eval.every_steps, sample))
        log_metrics = hooks.log_metrics(cfg, parts.schedules, writers, progress, ledger, trace)
        profile, stop_profile = hooks.profile(
            cfg.log.profile_steps if main else (), home / "profile", progress, ledger, trace
        )
        if cfg.train.check_replicas_steps:
            same = hooks.aside(replicas.check(parts.layout, parts.mesh), "telemetry", ledger, trace)
            scored.insert(0, loop.every(cfg.train.check_replicas_steps, same))
        stalled = watchdog.reporter(
            home, jax.process_index(), hooks.tell_stall(progress), cfg.train.stall_exit,
            lambda: f"{_kept(home)}; the same command continues this run",
        )  # fmt: skip
        alive = watchdog.watching(cfg.train.stall_seconds, first, ledger.doing, stalled)
        wanted = [
            stack.enter_context(alive),
            hooks.booked(log_metrics, "telemetry", ledger),
            hooks.booked(hooks.watch(cfg.log, writers, progress, noticed), "telemetry", ledger),
            *scored,
            hooks.save(checkpoints, misc, writers, progress, ledger, trace),
            profile,
            hooks.stop_when(interrupted, cfg.opt.skip_nonfinite),
        ]
        if first < cfg.train.steps:
            progress.print("compiling the step")
        rows = own_rows(cfg, parts)
        batches = pipeline.batches(cfg.data, corpus, cfg.seed, first, rows, journal=home / "data_order.bin")
        fed = loop.until_failure(batches, failures) if alone else batches
        on_device = goodput.waiting(parallel.prefetch(fed, parts.mesh), ledger)
        began = time.perf_counter()
        try:
            with ledger.within("step"):
                step = _timed_first(parts.step, progress, ledger)
                state, reason = loop.run(step, state, on_device, wanted, cfg.train.steps)
        except BaseException as error:
            trace.end(span, error=f"{type(error).__name__}: {error}")
            if exporter:
                exporter.close()
            raise
        finally:
            batches.close()
            stop_profile()
        done, took = int(state.step), time.perf_counter() - began
        if not reason and scores.get("step") != done:
            try:
                evaluate(done, state, {})
            except loop.StopTraining as stop:
                reason = str(stop)
        if (
            not reason
            and cfg.eval.sample_tokens
            and (not cfg.eval.every_steps or done % cfg.eval.every_steps)
        ):
            sample(done, state, {})
        with ledger.within("checkpoint"), trace.span("checkpoint", step=done):
            hooks.settled(checkpoints.wait, progress, done)
            checkpoints.save(done, state, misc(done), wait=True)
        seconds = ledger.seconds()
        result = {"state_sha256": checkpoint.state_sha256(state), "stop": reason, "seconds": seconds}
        if main:
            with workdir.written(home):
                manifest.write_result(home, misc(done) | result)
        writers.write(done, goodput.shares(seconds))
        writers.close()
        trace.end(span, error=reason, last_step=done)
        if exporter:
            exporter.close()
    progress.print(goodput.line(seconds), "goodput", **goodput.shares(seconds))
    if failures:
        what = f"{type(failures[0]).__name__}: {processes.first_line(failures[0])}"
        raise loop.DataFailedError(
            f"stopped at step {done}, which is saved: the data failed ({what}); the same command continues this run"
        ) from failures[0]
    if reason:
        progress.print(f"stopped at step {done}: {reason}\nthe same command continues this run")
        return 130 if reason == "interrupted" else 1
    progress.print(words.closing(cfg, home, scores, done - first, took))
    return 0


def own_rows(cfg: Config, parts: Parts) -> tuple[int, int]:
    """This process's share of the rows, see `parallel.data_shard`.

    Raises: ConfigError if processes that share rows would order them each in its own way.
    """
    index, count = parallel.data_shard(parts.mesh)
    if cfg.data.pool.order == "completion" and count < processes.count():
        raise ConfigError(
            f"'data.pool.order' = 'completion' is each process's own order, but {processes.count()} processes "
            f"share {count} parts of a batch because mesh.tensor spans them"
        )
    return index, count


def _trace(cfg: Config, home: Path, facts: dict, main: bool) -> tuple[Trace, Exporter | None]:
    """The trace of this start of a run: into spans.jsonl, and to the collector of log.otlp; from process 0."""
    exporter = None
    if cfg.log.otlp and main:
        exporter = Exporter(cfg.log.otlp, {"service.name": "nanochat_jax", "run": cfg.name})
    sinks = (*([SpanFile(home / "spans.jsonl")] if main else []), *([exporter] if exporter else []))
    return Trace(sinks, facts.get("environment", {}).get("TRACEPARENT", "")), exporter


def _timed_first(step_fn: steps.StepFn, progress: Progress, ledger: goodput.Ledger) -> steps.StepFn:
    """Say how long the first call took, and warn if a later one compiles again."""
    calls = itertools.count()

    def timed(state, batch):
        index, start = next(calls), time.perf_counter()
        with ledger.within("compile" if index == 0 else "step"):
            result = step_fn(state, batch)
        if index == 0:
            progress.print(f"compiled in {time.perf_counter() - start:.1f} s")
        elif (traces := step_fn._cache_size()) > 1:  # type: ignore[attr-defined]
            progress.print(
                f"warning: the step was compiled {traces} times; an argument changed shape or type"
            )
        return result

    return timed


def _scorer(
    cfg: Config, parts: Parts, corpus: mixture.Mixture | shards.Corpus
) -> Callable[[TrainState], dict[str, float]]:
    made = pipeline.val_parts(cfg.data, corpus, cfg.eval.batches)
    sizes = corpus.tokenizer.token_bytes(padded_vocab(cfg.model))

    index, count = parallel.data_shard(parts.mesh)
    size = cfg.data.batch // count
    own = slice(index * size, (index + 1) * size)

    def score(state: TrainState) -> dict[str, float]:
        def place(arrays):
            return parallel.shard_batch({field: rows[own] for field, rows in arrays.items()}, parts.mesh)

        return eval_loss.of_parts(parts.eval_step, state.params, made, place, sizes)

    return score


def _sampler(
    cfg: Config, parts: Parts, corpus: mixture.Mixture | shards.Corpus
) -> Callable[[TrainState], str]:
    words, stops = corpus.tokenizer, frozenset[int]()
    prompt = [words.bos_id, *words.encode(cfg.eval.prompt)]
    if cfg.data.kind == "chat":
        prompt = chat.prompt(words, [{"role": "user", "content": cfg.eval.prompt}])
        stops = chat.stop_ids(words)
    length = cfg.eval.sample_tokens
    settings = InferConfig(
        max_tokens=length, temperature=cfg.infer.temperature, top_k=cfg.infer.top_k, top_p=cfg.infer.top_p,
        capacity=max(cfg.infer.capacity, len(prompt) + length), exit_quantile=cfg.infer.exit_quantile,
        loop_cache=cfg.infer.loop_cache,
    )  # fmt: skip

    everywhere = jax.jit(lambda params: params, out_shardings=parallel.replicated(parts.mesh))

    def text(state: TrainState) -> str:
        if processes.count() == 1:
            params = jax.device_put(state.params, jax.devices()[0])
        else:  # every process makes the sample, from a copy of its own, so that all run the same programs
            params = jax.tree.map(lambda leaf: leaf.addressable_data(0), everywhere(state.params))
        ids = engine.generate(cfg.model, params, prompt, settings, jax.random.key(cfg.seed))
        said = itertools.takewhile(lambda i: i not in stops, ids)
        return cfg.eval.prompt + "\n" * bool(stops) + "".join(load.pieces(words, said))

    return text
