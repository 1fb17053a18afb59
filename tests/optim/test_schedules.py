"""Schedules against closed forms in numpy and against optax."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from nanochat_jax.config import ScheduleConfig
from nanochat_jax.optim import schedules

few = hypothesis.settings(max_examples=40, deadline=None)


def values(factor, count):
    return np.asarray(jax.jit(factor)(jnp.arange(count)), np.float64)


def closed_form(cfg, steps, t):
    """One step's factor, with plain Python numbers."""
    w = cfg.warmup_steps
    d = round(cfg.decay_fraction * steps) if cfg.kind == "wsd" else steps - w
    shape = cfg.decay_shape if cfg.kind == "wsd" else cfg.kind
    s = steps - w - d
    if t >= steps:
        return cfg.floor
    if t < w:
        return (t + 1) / w
    if t < w + s:
        return 1.0
    x = (t - w - s) / d
    left = {"linear": 1 - x, "cosine": 0.5 + 0.5 * np.cos(np.pi * x), "sqrt": 1 - np.sqrt(x)}[shape]
    return cfg.floor + (1 - cfg.floor) * left


configs = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["wsd", "cosine", "linear"]),
    warmup_steps=st.integers(0, 20),
    decay_fraction=st.floats(0, 0.6),
    decay_shape=st.sampled_from(["linear", "cosine", "sqrt"]),
    floor=st.floats(0, 1),
)


@few
@hypothesis.given(configs, st.integers(50, 300))
def test_closed_form_and_bounds(cfg, steps):
    got = values(schedules.schedule(cfg, steps), steps + 10)
    want = [closed_form(cfg, steps, t) for t in range(steps + 10)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.min() >= 0 and got.max() <= 1 + 1e-6
    if cfg.warmup_steps:
        np.testing.assert_allclose(got[0], 1 / cfg.warmup_steps, rtol=1e-6)
        assert np.all(np.diff(got[: cfg.warmup_steps]) > 0)
    assert np.all(np.diff(got[cfg.warmup_steps :]) <= 1e-6)  # never rises after the warm-up
    np.testing.assert_allclose(got[steps:], cfg.floor, rtol=1e-6, atol=1e-30)


@few
@hypothesis.given(configs, st.integers(400, 1000))
def test_continuous(cfg, steps):
    """No jump larger than the steepest shape allows (1 - sqrt starts with 1 / sqrt(d))."""
    hypothesis.assume(cfg.decay_fraction > 0.1 and cfg.warmup_steps > 0)
    d = round(cfg.decay_fraction * steps) if cfg.kind == "wsd" else steps - cfg.warmup_steps
    got = values(schedules.schedule(cfg, steps), steps + 2)
    after = np.abs(np.diff(got[cfg.warmup_steps - 1 :]))
    limit = {"linear": 1 / d, "cosine": np.pi / 2 / d, "sqrt": 1 / np.sqrt(d)}
    shape = cfg.decay_shape if cfg.kind == "wsd" else cfg.kind
    assert after.max() <= limit[shape] + 1e-6


def test_equals_optax():
    cfg = ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1)
    theirs = optax.schedules.cosine_decay_schedule(1.0, 90, 0.1)
    got = values(schedules.schedule(cfg, 100), 101)
    np.testing.assert_allclose(got[10:], [theirs(t) for t in range(91)], atol=1e-6)
    cfg = dataclasses.replace(cfg, kind="linear", floor=0.25)
    theirs = optax.schedules.join_schedules(
        [optax.schedules.linear_schedule(0.1, 1.1, 10), optax.schedules.linear_schedule(1.0, 0.25, 90)], [10]
    )
    np.testing.assert_allclose(
        values(schedules.schedule(cfg, 100), 101), [theirs(t) for t in range(101)], atol=1e-6
    )


def test_no_decay_and_no_warmup():
    got = values(schedules.schedule(ScheduleConfig(warmup_steps=0, decay_fraction=0.0, floor=0.3), 10), 12)
    np.testing.assert_allclose(got, [1.0] * 10 + [0.3] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ScheduleConfig(warmup_steps=60, decay_fraction=0.5), "exceed the run of 100"),
        (ScheduleConfig(kind="step"), "wsd, cosine, linear"),
        (ScheduleConfig(decay_shape="round"), "linear, cosine, sqrt"),
    ],
)
def test_errors(cfg, message):
    with pytest.raises(ValueError, match=message):
        schedules.schedule(cfg, 100)


def test_decay_to_zero():
    got = values(schedules.decay_to_zero(50), 60)
    np.testing.assert_allclose(got[:51], 0.5 + 0.5 * np.cos(np.pi * np.arange(51) / 50), atol=1e-6)
    np.testing.assert_allclose(got[50:], 0, atol=1e-7)


def test_extension_without_a_climb_is_refused():
    cfg = ScheduleConfig(warmup_steps=5, decay_fraction=0.4, floor=0.1)
    with pytest.raises(
        ValueError, match=r"jump from 0\.1225 to 1 .* step 100; set opt.schedule.rewarm_steps"
    ):
        schedules.check_extension(cfg, 100, 200, 100)
    # while the rate is still on its plateau, or inside the warm-up, nothing jumps
    assert schedules.check_extension(cfg, 100, 200, 50) == 1.0
    np.testing.assert_allclose(schedules.check_extension(cfg, 100, 200, 2), 2 / 5, rtol=1e-6)
    schedules.check_extension(cfg, 100, 200, 0)
    schedules.check_extension(cfg, 100, 100, 80)
    schedules.check_extension(cfg, 200, 100, 100)  # a shorter run only lowers the rate


def test_rewarmed_climbs_from_the_last_factor():
    cfg = ScheduleConfig(warmup_steps=5, decay_fraction=0.4, floor=0.1, rewarm_steps=8)
    last = schedules.check_extension(cfg, 100, 200, 100)
    plain = schedules.schedule(cfg, 200)
    factor = schedules.rewarmed(plain, last, 100, 8)
    got, base = values(factor, 200), values(plain, 200)
    np.testing.assert_allclose(got[:100], base[:100])
    np.testing.assert_allclose(got[100:108], last + (1 - last) * np.arange(1, 9) / 8, rtol=1e-6)
    np.testing.assert_allclose(got[107:], base[107:])
    assert schedules.rewarmed(plain, last, 100, 0) is plain


@few
@hypothesis.given(configs, st.integers(60, 200), st.integers(0, 100), st.integers(1, 30))
def test_rewarmed_never_jumps_up(cfg, old, more, climb):
    cfg = dataclasses.replace(cfg, rewarm_steps=climb)
    hypothesis.assume(cfg.warmup_steps < old)
    last = schedules.check_extension(cfg, old, old + more, old)
    got = values(schedules.rewarmed(schedules.schedule(cfg, old + more), last, old, climb), old + more + 1)
    rise = np.diff(np.concatenate([[last], got[old : old + more]]))
    assert np.all(rise <= (1 - last) / climb + 1e-6)


def test_cosine_with_warm_restarts_is_optax_sgdr():
    cfg = ScheduleConfig(kind="cosine", warmup_steps=0, floor=0.1, cycles=3)
    factor = schedules.schedule(cfg, 90)
    one = {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": 30, "end_value": 0.1}
    theirs = optax.sgdr_schedule([one] * 3)
    for step in range(90):
        np.testing.assert_allclose(factor(step), theirs(step), atol=1e-5, err_msg=str(step))
    assert [float(factor(t)) for t in (0, 30, 60)] == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(factor(90), 0.1, atol=1e-6)
