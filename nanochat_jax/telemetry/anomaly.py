"""Notice when a run goes wrong: spikes of loss or gradient, non-finite values, starved steps.

A detector is a pure function `(state, value) -> (state, event or None)`; `check` runs all of them
on the metrics of a step. The spike detectors compare a value with the median of the last 128
unsuspicious ones, in units of 1.4826 * MAD, which is the standard deviation of normal noise but
does not care about outliers. Fixed limits (a gradient norm of 10, an entropy of 5 nats) mean nothing
without the model's size and vocabulary (the entropy of a healthy model is its loss, so a limit of 5
fires on every model that has learnt something): they are options of `LogConfig`, off by default.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat_jax.config import LogConfig

WINDOW = 128  # values that are remembered
MIN_VALUES = 32  # values before a detector may fire
COOL_DOWN = 50  # values after an event during which the detector stays silent
SIGMAS = 6.0
SIGMA_OF_MAD = 1.4826  # standard deviation / median absolute deviation, for normal noise
LOSS_MARGIN = 0.25  # nats; smaller jumps are no spike, however calm the loss was
NORM_MARGIN = math.log(2.0)  # a gradient norm must at least double
ENTROPY_MARGIN = 0.25  # nats
SLOWER = math.log(1.5)  # steps must take half as long again
SLOW_STEPS = 8  # in a row; a single slow step is the operating system's business
STARVED = 0.2  # share of the step spent waiting for data


@dataclass(frozen=True)
class State:
    """What a detector remembers. Plain numbers, so `dataclasses.asdict` can be saved as JSON.

    values: the last unsuspicious values, oldest first. quiet: values until it may fire again.
    rejected: suspicious values in a row.
    """

    values: tuple[float, ...] = ()
    quiet: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Event:
    """Something to look at: `value` passed `threshold`; `median` is what was usual."""

    kind: str
    value: float
    threshold: float
    median: float
    hint: str

    def __str__(self) -> str:
        usual = f"usually {self.median:.4g}, " * math.isfinite(self.median)
        limit = f" ({usual}limit {self.threshold:.4g})" * math.isfinite(self.threshold)
        return f"{self.kind}: {self.value:.4g}{limit}; {self.hint}"


Detector = Callable[[State, float], tuple[State, Event | None]]


def loss_spike(state: State, value: float) -> tuple[State, Event | None]:
    """Fires when a loss (nats) exceeds the median by 6 sigma and by 0.25.

    While the loss falls steeply, its fall counts as spread, and only greater jumps fire.
    """
    hint = "look at the data of this step; if it happens again, lower the learning rate"
    return _spike(state, value, LOSS_MARGIN, lambda x: Event("loss spike", value, x[0], x[1], hint))


def norm_spike(state: State, value: float) -> tuple[State, Event | None]:
    """Fires when the logarithm of a gradient norm exceeds its median by 6 sigma and by log 2."""
    if not value > 0:  # also NaN: `nonfinite` speaks of that
        return _next(state), None
    hint = "clipping (opt.clip) bounds its effect; if it happens again, lower the learning rate"
    return _spike(
        state,
        math.log(value),
        NORM_MARGIN,
        lambda x: Event("gradient spike", value, _exp(x[0]), _exp(x[1]), hint),
    )


def entropy_drop(state: State, value: float) -> tuple[State, Event | None]:
    """Fires when the entropy of predictions (nats) falls below its median by 6 sigma and by 0.25.

    An entropy that follows the loss down is learning; one that falls at once is over-confidence.
    """
    hint = "predictions became sure of themselves at once; compare with the loss of this step"
    return _spike(state, -value, ENTROPY_MARGIN, lambda x: Event("entropy drop", value, -x[0], -x[1], hint))


def slow_steps(state: State, value: float) -> tuple[State, Event | None]:
    """Fires when 8 steps in a row take 6 sigma and half as long again as the median, in log time.

    Args: value: milliseconds of a step; 0 (the step that compiles) is left out.
    """
    if not value > 0:
        return _next(state), None
    hint = "the same work takes longer: look for other programs, a hot device, or swapping"
    return _spike(
        state,
        math.log(value),
        SLOWER,
        lambda x: Event("slow steps", value, _exp(x[0]), _exp(x[1]), hint),
        SLOW_STEPS,
    )


def nonfinite(state: State, value: float) -> tuple[State, Event | None]:
    """Fires at a NaN or an infinity."""
    after = _next(state)
    if math.isfinite(value) or after.quiet:
        return after, None
    hint = "the step is skipped (opt.skip_nonfinite); a lower learning rate or a longer warm-up helps"
    return replace(after, quiet=COOL_DOWN), Event("not finite", value, math.inf, math.nan, hint)


def stall(state: State, value: float) -> tuple[State, Event | None]:
    """Fires when the median share of the last 32 steps spent waiting for data exceeds 20%.

    Args: value: the share of one step, in [0, 1].
    """
    if not math.isfinite(value):
        return _next(state), None
    after = _next(state, (*state.values, value)[-MIN_VALUES:])
    if len(after.values) < MIN_VALUES or after.quiet or max(after.values) <= STARVED:
        return after, None
    median = statistics.median(after.values)
    if median <= STARVED:
        return after, None
    hint = "raise data.workers or data.prefetch; other programs may be taking the processor"
    return replace(after, quiet=COOL_DOWN), Event("waiting for data", median, STARVED, median, hint)


def _spike(
    state: State,
    value: float,
    margin: float,
    event: Callable[[tuple[float, float]], Event],
    patience: int = 1,
) -> tuple[State, Event | None]:
    """The rule of the spike detectors; `event` receives (threshold, median).

    Args: patience: suspicious values in a row that make an event.
    """
    if not math.isfinite(value):
        return _next(state), None
    if len(state.values) < MIN_VALUES:
        return _next(state, (*state.values, value)), None
    learned = _next(state, (*state.values, value)[-WINDOW:], 0)
    if value <= min(state.values) + margin:  # and so below the median's: at most steps nothing need be sorted
        return learned, None
    median = statistics.median(state.values)
    if value <= median + margin:  # whatever the spread
        return learned, None
    sigma = SIGMA_OF_MAD * statistics.median([abs(v - median) for v in state.values])
    threshold = median + max(SIGMAS * sigma, margin)
    if value <= threshold:
        return learned, None
    after = _next(state)
    if after.rejected + 1 >= WINDOW:  # no spike but a new level: learn it instead of firing for ever
        return State((), after.quiet), None
    after = replace(after, rejected=after.rejected + 1)
    if after.quiet or after.rejected < patience:
        return after, None
    return replace(after, quiet=COOL_DOWN), event((threshold, median))


def _next(state: State, values: tuple[float, ...] | None = None, rejected: int | None = None) -> State:
    """The state one value later. Not by `replace`, which takes longer than a detector: this is every step."""
    return State(
        state.values if values is None else values,
        max(0, state.quiet - 1),
        state.rejected if rejected is None else rejected,
    )


def _exp(number: float) -> float:
    return math.exp(min(number, 700.0))  # exp(710) overflows


def _data_share(metrics: dict[str, float]) -> float | None:
    """Share of the step spent waiting for data, if both times are known."""
    wait, step = metrics.get("data/wait_ms"), metrics.get("perf/step_ms")
    return None if wait is None or not step else wait / step


def _beyond(kind: str, limit: float, sign: int, hint: str) -> Detector:
    """Fires when sign * (value - limit) > 0: a fixed limit."""

    def detector(state: State, value: float) -> tuple[State, Event | None]:
        after = _next(state)
        if after.quiet or not sign * (value - limit) > 0:
            return after, None
        return replace(after, quiet=COOL_DOWN), Event(kind, value, limit, math.nan, hint)

    return detector


Table = dict[str, tuple[Callable[[dict[str, float]], float | None], Detector]]
# name -> (the value among a step's metrics, or None if it is absent; detector)
DETECTORS: Table = {
    "loss": (lambda metrics: metrics.get("loss/next_token"), loss_spike),
    "norm": (lambda metrics: metrics.get("opt/grad_norm"), norm_spike),
    "loss_finite": (lambda metrics: metrics.get("loss/next_token"), nonfinite),
    "norm_finite": (lambda metrics: metrics.get("opt/grad_norm"), nonfinite),
    "stall": (_data_share, stall),
    "entropy": (lambda metrics: metrics.get("loss/entropy"), entropy_drop),
    "speed": (lambda metrics: metrics.get("perf/step_ms"), slow_steps),
}


def detectors(cfg: LogConfig) -> Table:
    """The detectors of a run: DETECTORS, and the fixed limits that its settings ask for."""
    found = dict(DETECTORS)
    if cfg.min_entropy:
        low = _beyond("low entropy", cfg.min_entropy, -1, "log.min_entropy is a fixed limit")
        found["min_entropy"] = (lambda metrics: metrics.get("loss/entropy"), low)
    if cfg.max_grad_norm:
        high = _beyond("large gradient", cfg.max_grad_norm, 1, "log.max_grad_norm is a fixed limit")
        found["max_grad_norm"] = (lambda metrics: metrics.get("opt/grad_norm"), high)
    return found


def to_json(states: dict[str, State]) -> dict[str, Any]:
    """The states for a checkpoint, so that a continued run is not blind for its first 32 steps."""
    return {name: asdict(state) for name, state in states.items()}


def from_json(record: dict[str, Any]) -> dict[str, State]:
    """What `to_json` made."""
    return {name: State(tuple(r["values"]), r["quiet"], r["rejected"]) for name, r in record.items()}


def check(
    states: dict[str, State], metrics: dict[str, float], table: Table = DETECTORS
) -> tuple[dict[str, State], list[Event]]:
    """Run every detector whose metric is present.

    Args: states: what the last call returned, {} at first. metrics: of one step, as floats.
    Returns: (states for the next call, events in the order of the table).
    """
    after, events = dict(states), []
    for name, (value_of, detector) in table.items():
        value = value_of(metrics)
        if value is not None:
            after[name], event = detector(states.get(name, State()), value)
            if event:
                events.append(event)
    return after, events
