"""Every second is booked once."""

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat_jax.telemetry import goodput
from nanochat_jax.telemetry.goodput import KINDS, Ledger


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_run_with_known_times():
    clock = Clock()
    ledger = Ledger(clock)

    def spend(seconds):
        clock.now += seconds

    def items():
        for _ in range(3):
            spend(2)
            yield None

    spend(5)  # init
    with ledger.within("step"):
        for index, _ in enumerate(goodput.waiting(items(), ledger)):
            with ledger.within("compile" if index == 0 else "step"):
                spend(10)
            with ledger.within("eval"):
                spend(1)
                with ledger.within("checkpoint"):  # the inner kind has it
                    spend(4)
                spend(1)
    spend(3)
    assert ledger.seconds() == {
        "step": 20.0, "compile": 10.0, "data": 6.0, "checkpoint": 12.0, "eval": 6.0, "telemetry": 0.0,
        "profile": 0.0, "other": 8.0,
    }  # fmt: skip
    assert ledger.paused() == 18.0
    assert goodput.line(ledger.seconds()) == (
        "goodput 32.3% | compile 16.1% | data 9.7% | checkpoint 19.4% | eval 9.7% | other 12.9%"
    )
    assert goodput.shares(ledger.seconds())["goodput/wall_seconds"] == 62.0


@hypothesis.given(
    st.recursive(
        st.floats(0, 1e3),
        lambda inner: st.lists(st.tuples(st.sampled_from(KINDS), inner), max_size=4),
        max_leaves=20,
    )
)
def test_all_kinds_add_up_to_the_wall_time(plan):
    clock = Clock()
    ledger = Ledger(clock)

    def follow(node):
        if isinstance(node, float):
            clock.now += node
            return
        for kind, inner in node:
            with ledger.within(kind):
                follow(inner)

    follow(plan)
    seconds = ledger.seconds()
    assert sum(seconds.values()) == pytest.approx(clock.now - 100.0, abs=1e-6)
    assert min(seconds.values()) >= 0
    parts = goodput.shares(seconds)
    if parts.pop("goodput/wall_seconds"):
        assert sum(parts.values()) == pytest.approx(1.0)


def test_an_exception_closes_its_kind():
    clock = Clock()
    ledger = Ledger(clock)
    with pytest.raises(ZeroDivisionError), ledger.within("eval"):
        clock.now += 1
        _ = 1 / 0
    clock.now += 2
    seconds = ledger.seconds()
    assert (seconds["eval"], seconds["other"]) == (1.0, 2.0)


def test_an_unknown_kind_is_a_mistake():
    with pytest.raises(KeyError, match="evl"), Ledger().within("evl"):
        pass


def test_an_end_of_data_ends_the_loop():
    assert list(goodput.waiting(iter([1, 2]), Ledger())) == [1, 2]
