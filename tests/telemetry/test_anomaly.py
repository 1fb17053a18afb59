"""Detectors: silent on healthy runs, alert to injected trouble, pure."""

import dataclasses
import json
import math

import numpy as np
import pytest

from nanochat_jax.config import LogConfig
from nanochat_jax.telemetry import anomaly
from nanochat_jax.telemetry.anomaly import COOL_DOWN, MIN_VALUES, WINDOW, State


def watch(detector, values, state=State()):  # noqa: B008 (frozen)
    """[(index, event)] of a detector over a series, and its last state."""
    events = []
    for index, value in enumerate(values):
        state, event = detector(state, float(value))
        if event:
            events.append((index, event))
    return events, state


def healthy(seed, steps=10_000):
    """A falling loss with noise that has memory, and log-normal gradient norms."""
    rng = np.random.default_rng(seed)
    noise = np.zeros(steps)
    for i in range(1, steps):
        noise[i] = 0.5 * noise[i - 1] + 0.06 * rng.normal()
    return 2.0 + 6.0 * np.exp(-np.arange(steps) / 400) + noise, 0.8 * np.exp(0.3 * rng.normal(size=steps))


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_healthy_steps_raise_nothing(seed):
    losses, norms = healthy(seed)
    assert watch(anomaly.loss_spike, losses)[0] == []
    assert watch(anomaly.norm_spike, norms)[0] == []
    assert watch(anomaly.nonfinite, losses)[0] == []


@pytest.mark.parametrize("seed", range(3))
def test_every_injected_spike_is_found(seed):
    losses, norms = healthy(seed, 2000)
    places = [MIN_VALUES, 700, 999, 1500]
    losses[places] += 3.0
    norms[places] *= 30
    for detector, values in ((anomaly.loss_spike, losses), (anomaly.norm_spike, norms)):
        events, _ = watch(detector, values)
        assert [index for index, _ in events] == places
        for index, event in events:
            assert event.value == values[index] > event.threshold > event.median > 0 and event.hint


def test_the_threshold_is_the_stated_formula():
    values = [*np.random.default_rng(0).normal(3.0, 0.2, WINDOW + 40), 99.0]
    ((_, event),), _ = watch(anomaly.loss_spike, values)
    window = np.array(values[40:-1])
    median = np.median(window)
    sigma = 1.4826 * np.median(np.abs(window - median))
    np.testing.assert_allclose((event.median, event.threshold), (median, median + 6 * sigma), rtol=1e-12)


def test_calm_values_need_a_real_jump():
    assert watch(anomaly.loss_spike, [2.0] * 100 + [2.25])[0] == []
    assert len(watch(anomaly.loss_spike, [2.0] * 100 + [2.26])[0]) == 1
    assert watch(anomaly.norm_spike, [0.5] * 100 + [0.999])[0] == []
    assert len(watch(anomaly.norm_spike, [0.5] * 100 + [1.001])[0]) == 1


def test_nothing_fires_before_enough_values():
    assert watch(anomaly.loss_spike, [1.0] * (MIN_VALUES - 1) + [50.0])[0] == []
    assert len(watch(anomaly.loss_spike, [1.0] * MIN_VALUES + [50.0])[0]) == 1


def test_cool_down_and_suspicious_values_are_not_learned():
    events, state = watch(anomaly.loss_spike, [1.0] * 100 + [9.0] * (COOL_DOWN + 1))
    assert [index for index, _ in events] == [100, 100 + COOL_DOWN]
    assert set(state.values) == {1.0} and state.rejected == COOL_DOWN + 1


def test_a_new_level_is_learned_at_last():
    events, state = watch(anomaly.loss_spike, [1.0] * 100 + [9.0] * 2000)
    assert len(events) <= 3 and set(state.values) == {9.0} and len(state.values) == WINDOW


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad):
    events, _ = watch(anomaly.nonfinite, [1.0, bad, bad, *[1.0] * COOL_DOWN, bad])
    assert [index for index, _ in events] == [1, 3 + COOL_DOWN]
    assert str(events[0][1]).startswith("not finite: ") and "limit" not in str(events[0][1])
    for detector in (anomaly.loss_spike, anomaly.norm_spike, anomaly.stall):
        events, state = watch(detector, [1e-3] * 40 + [bad] * 10)
        assert events == [] and all(map(math.isfinite, state.values))


def test_a_gradient_of_zero_is_no_error():
    assert watch(anomaly.norm_spike, [0.0, 1.0] * 100)[0] == []


def test_a_starved_loop_is_noticed():
    assert watch(anomaly.stall, [0.1] * 500 + [0.9] * 10)[0] == []  # a hiccup
    events, _ = watch(anomaly.stall, [0.1] * 100 + [0.5] * 40)
    assert len(events) == 1 and 0.2 < events[0][1].value <= 0.5 and "data.workers" in events[0][1].hint


def test_check_runs_what_is_there_and_keeps_its_input():
    states: dict = {}
    metrics = {"loss/next_token": 2.0, "opt/grad_norm": 1.0, "data/wait_ms": 1.0, "perf/step_ms": 100.0}
    metrics["loss/entropy"] = 2.0
    for _ in range(40):
        before = dict(states)
        states, events = anomaly.check(states, metrics)
        assert events == []
    assert set(states) == set(anomaly.DETECTORS) and before != states
    frozen = dict(states)
    _, events = anomaly.check(states, {"loss/next_token": 20.0, "opt/grad_norm": math.nan})
    assert [event.kind for event in events] == ["loss spike", "not finite"] and states == frozen
    assert anomaly.check({}, {}) == ({}, [])
    assert anomaly.check({}, {"data/wait_ms": 1.0})[0] == {}  # without a step time there is no share
    assert str(events[0]).startswith("loss spike: 20 (usually 2, limit 2.25); look at the data")


def test_states_survive_json():
    _, state = watch(anomaly.loss_spike, np.linspace(3, 2, 200))
    again = State(**json.loads(json.dumps(dataclasses.asdict(state))))
    assert dataclasses.replace(again, values=tuple(again.values)) == state


@pytest.mark.parametrize("seed", range(3))
def test_entropy_that_follows_the_loss_is_no_event_and_one_that_falls_is(seed):
    losses, _ = healthy(seed, 3000)
    assert watch(anomaly.entropy_drop, losses)[0] == []
    losses[2000] -= 1.5
    ((index, event),) = watch(anomaly.entropy_drop, losses)[0]
    assert index == 2000 and event.kind == "entropy drop"
    assert event.value == losses[2000] < event.threshold < event.median


def test_steps_that_stay_slow_are_told_and_single_ones_are_not():
    rng = np.random.default_rng(0)
    times = 50.0 * np.exp(0.05 * rng.normal(size=1000))
    times[0] = 0.0  # the step that compiled
    times[100:900:50] *= 4
    assert watch(anomaly.slow_steps, times)[0] == []
    times[500:508] *= 2
    ((index, event),) = watch(anomaly.slow_steps, times)[0]
    assert index == 507 and event.kind == "slow steps"
    assert event.value == pytest.approx(times[507]) and event.median == pytest.approx(50, rel=0.1)
    # A new level is learnt: two reminders, then silence.
    times[500:] *= 2
    assert 1 <= len(watch(anomaly.slow_steps, times)[0]) <= 3


def test_fixed_limits_are_options():
    metrics = {"loss/entropy": 4.0, "opt/grad_norm": 11.0}
    assert anomaly.detectors(LogConfig()) == anomaly.DETECTORS
    assert anomaly.check({}, metrics, anomaly.detectors(LogConfig()))[1] == []
    table = anomaly.detectors(LogConfig(min_entropy=5.0, max_grad_norm=10.0))
    states, events = anomaly.check({}, metrics, table)
    assert [(e.kind, e.value, e.threshold) for e in events] == [
        ("low entropy", 4.0, 5.0),
        ("large gradient", 11.0, 10.0),
    ]
    assert str(events[0]).startswith("low entropy: 4 (limit 5); ")
    for _ in range(COOL_DOWN - 1):
        states, events = anomaly.check(states, metrics, table)
        assert events == []
    assert len(anomaly.check(states, metrics, table)[1]) == 2
    assert anomaly.check({}, {"loss/entropy": 5.0, "opt/grad_norm": 10.0}, table)[1] == []


def test_what_detectors_remember_survives_json():
    states = {}
    for step in range(100):
        states, _ = anomaly.check(states, {"loss/next_token": 2 + 0.01 * (step % 5) + 9 * (step == 90)})
    record = json.loads(json.dumps(anomaly.to_json(states)))
    assert anomaly.from_json(record) == states and states["loss"].quiet > 0
    assert anomaly.from_json({}) == {}


def plain_spike(state, value, margin, patience):
    """The rule as it reads, everything computed at every value: (state, whether it fires)."""
    quiet, values = max(0, state.quiet - 1), state.values
    if not math.isfinite(value):
        return State(values, quiet, state.rejected), False
    if len(values) < MIN_VALUES:
        return State((*values, value), quiet, state.rejected), False
    median = float(np.median(values))
    sigma = anomaly.SIGMA_OF_MAD * float(np.median(np.abs(np.array(values) - median)))
    if value <= median + max(anomaly.SIGMAS * sigma, margin):
        return State((*values, value)[-WINDOW:], quiet, 0), False
    if state.rejected + 1 >= WINDOW:
        return State((), quiet), False
    fires = not quiet and state.rejected + 1 >= patience
    return State(values, COOL_DOWN if fires else quiet, state.rejected + 1), fires


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_what_need_not_be_computed_changes_nothing(seed, patience):
    """Calm and rough series with spikes, NaN, and a new level."""
    rng = np.random.default_rng(seed)
    values = 2.0 + np.cumsum(rng.normal(0, 0.02 * seed, 700)) + rng.normal(0, [0.02, 0.2][seed % 2], 700)
    values[rng.integers(0, 700, 30)] += rng.exponential(1.0, 30)
    values[rng.integers(0, 700, 5)] = math.nan
    values[450:] += 3.0
    state, want = State(), State()
    fired = 0
    for value in values.tolist():
        state, event = anomaly._spike(state, value, 0.25, lambda limits: limits, patience)
        want, fires = plain_spike(want, value, 0.25, patience)
        assert (state, bool(event)) == (want, fires)
        fired += fires
    assert fired
