"""Hooks of the loop: log, watch, evaluate, sample, save, stop. They observe; they return nothing."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from nanochat_jax import optim
from nanochat_jax.checkpoint import Checkpointer, CheckpointError
from nanochat_jax.config import Config, LogConfig
from nanochat_jax.model import flops
from nanochat_jax.optim.build import Schedules
from nanochat_jax.quant import project as projections
from nanochat_jax.quant import ternary
from nanochat_jax.telemetry import anomaly, goodput
from nanochat_jax.telemetry.console import Progress
from nanochat_jax.telemetry.goodput import Ledger
from nanochat_jax.telemetry.trace import Trace
from nanochat_jax.telemetry.writers import Multi
from nanochat_jax.train.loop import Hook, StopTraining
from nanochat_jax.types import TrainState


def memory_gib() -> float:
    """Peak memory of the device, or of the process where the device does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_now() -> dict[str, float]:
    """Metrics of the device's memory at this moment; {} where it does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "perf/memory_in_use_gib", "bytes_limit": "perf/memory_limit_gib"}
    return {name: stats[key] / 2**30 for key, name in names.items() if key in stats}


def aside(hook: Hook, kind: str, ledger: Ledger, trace: Trace) -> Hook:
    """Book the seconds that a hook takes on `kind`, so that they do not count as training, and make
    it a span.

    The step that is still running when the hook is called does count: it is waited for first.
    """

    def run(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        jax.block_until_ready(state)
        with ledger.within(kind), trace.span(kind, step=done):
            hook(done, state, metrics)

    return run


def booked(hook: Hook, kind: str, ledger: Ledger) -> Hook:
    """Book the host's time in a hook that runs beside the device's step."""

    def run(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        with ledger.within(kind):
            hook(done, state, metrics)

    return run


def profile(
    steps: tuple[int, ...], directory: Path, progress: Progress, ledger: Ledger, trace: Trace
) -> tuple[Hook, Callable[[], None]]:
    """Trace the steps first..last with jax.profiler; nothing for ().

    Returns: (hook, function that ends a trace which the end of the run cut short).
    """
    first, last = steps or (0, 0)
    running = False

    def start(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        nonlocal running
        jax.profiler.start_trace(str(directory))
        running = True

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            jax.profiler.stop_trace()
            progress.print(f"profile | {directory}; show it with xprof or ui.perfetto.dev", "profile")

    begin = aside(start, "profile", ledger, trace)
    end = aside(lambda done, state, metrics: stop(), "profile", ledger, trace)

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        if done and done == first - 1:
            begin(done, state, metrics)
        elif running and done in (0, last):  # 0: the run is over
            end(done, state, metrics)

    return hook, stop


def log_metrics(
    cfg: Config, schedules: Schedules, writers: Multi, progress: Progress, ledger: Ledger, trace: Trace
) -> Hook:
    """Average the metrics of an interval of steps, add speed and learning rates, write them out.

    Args: ledger: tells the seconds that were no training. trace: an interval is a span of it.
    """
    clock = time.perf_counter
    sums: dict[str, float] = {}
    count, began, compiled, pauses = 0, clock(), False, ledger.paused()
    span = trace.begin("interval")
    tokens_per_step = cfg.data.batch * cfg.data.seq_len
    work = flops.train_flops_per_token(cfg.model, cfg.data.seq_len)
    kinds = [device.device_kind for device in jax.devices()]
    # The gate's second stage has no backward pass, which the formula counts: no figure rather than a wrong one.
    second = any(name == "gate" for name, _ in cfg.train.loss)
    peak = None if second else flops.peak_flops(kinds[0])
    measure, codes = _measuring(schedules, projections.from_config(cfg.model)), None

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        nonlocal count, began, compiled, pauses, span, codes
        if not metrics:
            began, pauses = (
                clock(),
                ledger.paused(),
            )  # the first step has just been compiled: its time is no speed
            return
        step = int(metrics["step"])
        if not compiled:  # nor is it a time of its own
            metrics, compiled = metrics | {"perf/step_ms": 0.0}, True
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
        if step % cfg.log.every_steps and step != cfg.train.steps:
            left = (cfg.train.steps - step) * 1e-3 * sums["perf/step_ms"] / count
            progress.bar(step, left or None)
            return
        now, paused = clock(), ledger.paused()
        seconds = max(now - began - (paused - pauses), 1e-9)
        with ledger.within("step"):  # what is computed below comes after the step that is still running
            jax.block_until_ready(state)
        mean = {name: total / count for name, total in sums.items() if name != "step"}
        speed = tokens_per_step * count / seconds
        skipped = int(metrics.get("opt/skipped", 0))
        codes, measured = measure(state, codes, step - 1 - skipped)
        mean |= measured
        mean |= {name: metrics[name] for name in ("opt/skipped", "opt/skipped_in_a_row") if name in metrics}
        mean |= {
            "perf/tokens_per_second": speed,
            "perf/step_ms": 1e3 * seconds / count,
            "perf/memory_gib": memory_gib(),
            **memory_now(),
            "perf/eta_seconds": (cfg.train.steps - step) * seconds / count,
            "perf/goodput": goodput.shares(ledger.seconds())["goodput/step"],
        }
        if peak:
            mean["perf/mfu"] = speed * work / (peak * len(kinds))
        writers.write(step, mean)
        progress.line(step, mean)
        trace.end(span, step=step, steps=count, step_ms=mean["perf/step_ms"], data_ms=mean["data/wait_ms"])
        span = trace.begin("interval")
        sums.clear()
        # From here on, not from when the above is done: the next interval's first step is running already.
        count, began, pauses = 0, now, paused

    return hook


def _measuring(schedules: Schedules, project: projections.Project) -> Callable:
    """(state, codes of the last call or None, updates before) -> (codes, metrics as floats): learning rates,
    and the health of ternary weights if there are any. One program and one transfer: each costs as much as all
    else that is done for an interval."""
    roles, names = project.ternary_roles(), dict[bool, list[str]]()

    @jax.jit
    def vector(params, before, step):
        metrics = optim.learning_rates(schedules, step)
        codes = ternary.all_codes(params, roles, project.group) if roles else None
        if codes is not None:
            metrics |= ternary.health(codes, before)
        names[before is None] = list(metrics)
        return codes, jax.numpy.stack(list(metrics.values()))

    def measure(state: TrainState, before: dict | None, step: int) -> tuple[dict | None, dict[str, float]]:
        codes, values = vector(state.params if roles else None, before, step)
        return codes, dict(zip(names[before is None], jax.device_get(values).tolist(), strict=True))

    return measure


def evaluate(
    score: Callable[[TrainState], dict[str, float]], writers: Multi, progress: Progress, last: dict
) -> Hook:
    """Score the held-out split; the result also stays in `last` for the end of the run."""

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        last.clear()
        last.update(score(state), step=done)
        scores = {name: value for name, value in last.items() if name != "step"}
        writers.write(done, scores)
        text = f"eval {done} | bpb {last['eval/bpb']:.4f} | loss {last['eval/loss']:.4f}"
        progress.print(text, "eval", step=done, **scores)

    return hook


def sample(text: Callable[[TrainState], str], writers: Multi, progress: Progress) -> Hook:
    """Print a sample and write it to the metric sinks."""

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        value = text(state)
        writers.text(done, "eval/sample", value)
        progress.print("sample | " + value.replace("\n", "\n       | "), "sample", step=done)

    return hook


def watch(
    cfg: LogConfig, writers: Multi, progress: Progress, states: dict[str, anomaly.State] | None = None
) -> Hook:
    """Report what `telemetry.anomaly` notices in the metrics of a step. Training goes on: non-finite
    steps are skipped anyway, and what a spike means is for a person to say.

    Args: states: what the detectors remember, of the run before a restart at first; kept up to date.
    """
    states = {} if states is None else states
    table = anomaly.detectors(cfg)

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        if not metrics:
            return
        after, events = anomaly.check(states, metrics, table)
        states.update(after)
        for event in events:
            step = int(metrics["step"])
            writers.text(step, "anomaly", str(event))
            progress.print(f"anomaly {step} | {event}", "anomaly", "warning", step=step, kind=event.kind)

    return hook


def save(
    checkpoints: Checkpointer,
    misc: Callable[[int], dict],
    writers: Multi,
    progress: Progress,
    ledger: Ledger,
    trace: Trace,
) -> Hook:
    """Save when it is due. A save that cannot be made is reported; training goes on, because the
    previous checkpoint is intact and space may come back. Booked as in `aside`."""

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        settled(checkpoints.check, progress, done)
        if not done or not checkpoints.due(done):
            return
        jax.block_until_ready(state)
        start = time.perf_counter()
        try:
            with ledger.within("checkpoint"), trace.span("checkpoint", step=done):
                settled(checkpoints.wait, progress, done)
                checkpoints.save(done, state, misc(done))
            blocked = 1e3 * (time.perf_counter() - start)
            writers.write(done, {"perf/save_ms": blocked})
            progress.print(f"save {done} | blocked for {blocked:.0f} ms", "checkpoint", step=done, ms=blocked)
        except CheckpointError as error:
            progress.print(f"warning: {error}", "checkpoint", "warning", step=done)

    return hook


def tell_stall(progress: Progress) -> Callable[[str, int], None]:
    """Prints what the watchdog found, like an anomaly."""
    return lambda text, step: progress.print(
        f"anomaly {step} | {text}", "anomaly", "warning", step=step, kind="stalled"
    )


def settled(ask: Callable[[], None], progress: Progress, done: int) -> None:
    """Report the failure of the save before, if `ask` (`check` or `wait`) tells of one: it must not keep the
    next one from being tried."""
    try:
        ask()
    except CheckpointError as error:
        progress.print(f"warning: {error}", "checkpoint", "warning", step=done)


def stop_when(interrupted: Callable[[], bool], limit: int) -> Hook:
    """Stop on an interrupt, or after `limit` skipped steps in a row (parameters are then the last
    good ones, because skipped steps change nothing); 0 = no limit."""

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        if interrupted():
            raise StopTraining("interrupted")
        row = int(metrics.get("opt/skipped_in_a_row", 0))
        if limit and row >= limit:
            raise StopTraining(
                f"{row} steps in a row had a non-finite gradient (opt.skip_nonfinite = {limit}); "
                "lower the learning rate or look at the data of these steps"
            )

    return hook
