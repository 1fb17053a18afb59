"""log.profile_steps: exactly these steps are in the trace, and a short run leaves no trace running."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.telemetry.goodput import Ledger
from nanochat_jax.telemetry.trace import Trace
from nanochat_jax.train import hooks, loop


class Sink:
    def __init__(self):
        self.printed = []

    def print(self, line, event="", **fields):
        self.printed.append((event, line))


def run(steps, total, tmp_path):
    """(profile spans, lines, step numbers in the trace) of a loop of `total` steps."""
    sink, spans, ledger = Sink(), [], Ledger()
    hook, stop = hooks.profile(steps, tmp_path, sink, ledger, Trace((spans.append,)))
    double = jax.jit(lambda x: x * 2)

    def step(state, batch):
        return types.SimpleNamespace(step=0, x=double(state.x)), {}

    loop.run(step, types.SimpleNamespace(step=0, x=jnp.ones(3)), iter(range(total)), [hook], total)
    stop()
    # Python 3.13 has a warning about types that jaxlib 0.11 makes; as an error it would end the process.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return spans, sink.printed, step_numbers(tmp_path)


def step_numbers(folder):
    numbers = set()
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    numbers |= {dict(event.stats)["step_num"] for _ in [0] if event.name == "train"}
    return numbers


@pytest.mark.parametrize(("steps", "seen"), [((3, 5), {3, 4, 5}), ((2, 2), {2}), ((5, 9), {5, 6})])
def test_exactly_these_steps_are_traced(steps, seen, tmp_path):
    spans, printed, numbers = run(steps, 6, tmp_path)
    assert numbers == seen
    assert (
        len(spans) == 2 and [event for event, _ in printed] == ["profile"] and str(tmp_path) in printed[0][1]
    )


def test_nothing_is_traced_by_default(tmp_path):
    assert run((), 3, tmp_path) == ([], [], set()) and list(tmp_path.iterdir()) == []
