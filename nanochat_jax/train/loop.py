"""The loop: dispatch a step, then look at the one before. Nothing else blocks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from nanochat_jax.data.sources import DataError
from nanochat_jax.train.step import StepFn
from nanochat_jax.types import Batch, Metrics, TrainState

# (steps done, state after them, metrics of the step before as floats, with its number in "step").
# After the last step comes one more call with 0 steps done, only to deliver its metrics.
Hook = Callable[[int, TrainState, dict[str, float]], None]
T = TypeVar("T")


class StopTraining(Exception):
    """Raised by a hook, or instead of a batch, to end the run; the loop returns the last state."""


class DataFailedError(RuntimeError):
    """No further batch could be made, or the data of an evaluation could not be read. The message says why, and
    at which step the state is saved."""


def until_failure(batches: Iterator[T], failures: list[Exception]) -> Iterator[T]:
    """Pass batches on; a failure to make one is kept in `failures` and stops training like a hook, so that
    the steps up to it can be saved."""
    try:
        yield from batches
    except Exception as error:
        failures.append(error)
        raise StopTraining(f"the data failed: {type(error).__name__}") from error


def or_stop(hook: Hook, failures: list[Exception]) -> Hook:
    """A hook that reads data: a failure to is kept in `failures` and stops training, as in `until_failure`."""

    def run(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        try:
            hook(done, state, metrics)
        except (DataError, OSError) as error:
            failures.append(error)
            raise StopTraining(f"the data failed: {type(error).__name__}") from error

    return run


def every(n: int, hook: Hook) -> Hook:
    """Call `hook` when the number of steps done is a multiple of n; never if n is 0."""

    def maybe(step: int, state: TrainState, metrics: dict[str, float]) -> None:
        if n and step and step % n == 0:
            hook(step, state, metrics)

    return maybe


def run(
    step_fn: StepFn, state: TrainState, batches: Iterator[Batch], hooks: list[Hook], total_steps: int
) -> tuple[TrainState, str]:
    """Train until `total_steps` steps are done or a hook raises StopTraining.

    Metrics arrive one step late, so that fetching them never makes the device wait; after the
    last step, or a stop, the hooks are called once more, with its metrics. `step_fn` donates the state:
    hooks get the new one and must not keep it.
    Returns: (state, "" or the reason of the stop).
    """
    pending: tuple[int, Metrics, dict[str, float]] | None = None
    done = int(state.step)
    try:
        while done < total_steps:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):  # for log.profile_steps
                state, metrics = step_fn(state, batch)
            done += 1
            arrived = _fetch(pending)
            # Without the hooks: dispatching this step and waiting for the one before.
            took = time.perf_counter() - start
            pending = (done, metrics, {"data/wait_ms": 1e3 * waited, "perf/step_ms": 1e3 * took})
            for hook in hooks:
                hook(done, state, arrived)
        reason = ""
    except StopTraining as stop:
        reason = str(stop)
    arrived = _fetch(pending)
    for hook in hooks:
        with contextlib.suppress(StopTraining):  # it is over already
            hook(0, state, arrived)
    return state, reason


def _fetch(pending: tuple[int, Metrics, dict[str, float]] | None) -> dict[str, float]:
    """One transfer for all metrics of a step; {} before the first."""
    if pending is None:
        return {}
    step, metrics, times = pending
    floats = {name: float(value) for name, value in jax.device_get(metrics).items()}
    return floats | times | {"step": float(step)}
