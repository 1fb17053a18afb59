"""Hooks: what counts as training time, anomalies; and the words of --verify_resume."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import optim
from nanochat_jax import params as params_lib
from nanochat_jax.config import Config, LogConfig, LoopConfig, ModelConfig, TrainConfig
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.quant import ternary
from nanochat_jax.telemetry.anomaly import MIN_VALUES
from nanochat_jax.telemetry.goodput import Ledger
from nanochat_jax.telemetry.trace import Trace
from nanochat_jax.train import hooks, loop, verify
from nanochat_jax.types import TrainState


class Sink:
    """Progress and writers in one: remembers."""

    def __init__(self):
        self.printed, self.texts, self.written = [], [], []

    def print(self, line, event="", level="", **fields):
        self.printed.append(line)

    def write(self, step, values):
        self.written.append((step, values))

    def line(self, step, values):
        pass

    def bar(self, step, eta):
        pass

    def text(self, step, tag, value):
        self.texts.append((step, tag, value))


def test_watch_reports_a_spike_of_one_step_once():
    sink = Sink()
    hook = hooks.watch(LogConfig(), sink, sink)
    hook(1, None, {})  # before the first metrics
    for step in range(1, MIN_VALUES + 1):
        hook(step + 1, None, {"step": float(step), "loss/next_token": 2.0 + 0.01 * (step % 3)})
    assert not sink.printed
    for step in (40, 41):
        hook(step + 1, None, {"step": float(step), "loss/next_token": 9.0})
    assert len(sink.printed) == 1 and sink.printed[0].startswith("anomaly 40 | loss spike: 9")
    assert [(step, tag) for step, tag, _ in sink.texts] == [(40, "anomaly")]


@pytest.mark.parametrize(("term", "known"), [("exit", True), ("gate", False)])
def test_no_mfu_without_a_backward_pass(term, known, monkeypatch):
    """The gate's second stage differentiates no layer, which the formula of FLOPs counts."""
    monkeypatch.setattr(hooks.flops, "peak_flops", lambda kind: 1e12)
    loops = LoopConfig(count=2, gate="shared")
    cfg = Config(
        model=ModelConfig(vocab_size=128, dim=16, layers=1, heads=1, kv_heads=1, head_dim=8, loop=loops),
        train=TrainConfig(steps=1, loss=((term, 1.0),)),
    )
    sink = Sink()
    _, schedules = optim.build(cfg.opt, 100)
    hook = hooks.log_metrics(cfg, schedules, sink, sink, Ledger(), Trace(()))
    hook(1, None, {"step": 1.0, "perf/step_ms": 10.0, "data/wait_ms": 0.0})
    ((_, mean),) = sink.written
    assert ("perf/mfu" in mean) == known and mean["perf/tokens_per_second"] > 0


def test_an_interval_counts_the_step_that_logging_waits_for(monkeypatch):
    """A device with steps of 100 ms: each interval says so, and waiting is training, not telemetry."""
    now = 0.0
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: now)
    ledger, sink = Ledger(lambda: now), Sink()

    def wait(state):  # until the step is over that was dispatched before the metrics arrived
        nonlocal now
        now = 0.1 * (done + 1)

    monkeypatch.setattr(hooks.jax, "block_until_ready", wait)
    cfg = Config(train=TrainConfig(steps=100), log=LogConfig(every_steps=5))
    _, schedules = optim.build(cfg.opt, 100)
    hook = hooks.log_metrics(cfg, schedules, sink, sink, ledger, Trace(()))
    hook = hooks.booked(hook, "telemetry", ledger)
    with ledger.within("step"):
        hook(1, None, {})
        for done in range(1, 21):
            now = max(now, 0.1 * done)
            metrics = {"step": float(done), "perf/step_ms": 100.0, "data/wait_ms": 0.0}
            hook(done + 1, None, metrics)
    assert [step for step, _ in sink.written] == [5, 10, 15, 20]
    assert [mean["perf/step_ms"] for _, mean in sink.written] == pytest.approx([100.0] * 4)
    seconds = ledger.seconds()
    assert seconds["telemetry"] == 0.0 and seconds["step"] == pytest.approx(2.1)


def test_watch_reports_starved_steps():
    sink = Sink()
    hook = hooks.watch(LogConfig(), sink, sink)
    for step in range(MIN_VALUES):
        hook(step, None, {"step": float(step), "data/wait_ms": 30.0, "perf/step_ms": 100.0})
    assert len(sink.printed) == 1 and "waiting for data: 0.3" in sink.printed[0]


def test_the_loop_measures_each_step():
    seen = []

    def step(state, batch):
        time.sleep(0.01)
        return state, {}

    def batches():
        while True:
            time.sleep(0.005)
            yield None

    state = type("State", (), {"step": 0})()
    loop.run(step, state, batches(), [lambda done, state, metrics: seen.append(metrics)], 3)
    assert seen[0] == {} and [m["step"] for m in seen[1:]] == [1.0, 2.0, 3.0]
    for metrics in seen[1:]:
        assert metrics["data/wait_ms"] >= 5 and metrics["perf/step_ms"] >= metrics["data/wait_ms"] + 10


def test_a_pause_is_the_time_of_the_hook_only():
    ledger, spans = Ledger(), []
    trace = Trace((spans.append,))
    hooks.aside(lambda done, state, metrics: time.sleep(0.02), "eval", ledger, trace)(1, jnp.ones(3), {})
    assert ledger.paused() == ledger.seconds()["eval"] >= 0.02
    assert [span["name"] for span in spans] == ["eval"]


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ("--config=a.py --verify_resume", "--config=a.py"),
        ("--workdir=x --config=a.py --verify_resume", "--config=a.py"),
        ("--config a.py --workdir x --verify_resume --config.seed=1", "--config a.py --config.seed=1"),
        ("--resume never --verify_resume --config=a.py", "--config=a.py"),
        ("--config=a.py --config.workdir=b --verify_resume", "--config=a.py --config.workdir=b"),
    ],
)
def test_children_get_the_other_words(argv, kept):
    flags = {"--verify_resume": False, "--workdir": True, "--resume": True}
    assert verify._without(tuple(argv.split()), flags) == tuple(kept.split())


@pytest.mark.parametrize("quant", ["full", "ternary"])
def test_rates_and_health_of_an_interval_come_in_one_transfer(quant, tiny, key, monkeypatch):
    """Also of sharded weights, on every device, so that each of several processes has them."""
    model, transfers = dataclasses.replace(tiny, quant=quant), []
    monkeypatch.setattr(hooks.jax, "device_get", lambda x: transfers.append(x) or np.asarray(x))
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    params = params_lib.init_params(transformer.param_specs(model), key)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, place if leaf.ndim > 1 else whole), params)
    project, schedules = projections.from_config(model), optim.build(Config().opt, 100)[1]
    measure, codes, before = hooks._measuring(schedules, project), None, None
    for step, weights in ((0, params), (7, jax.tree.map(jnp.negative, params))):
        state = TrainState(jnp.int32(step), weights, ())
        codes, got = measure(state, codes, step)
        want = optim.learning_rates(schedules, step)
        if quant == "ternary":
            now = ternary.all_codes(state.params, project.ternary_roles(), project.group)
            want |= ternary.health(now, before)
            before = now
            assert ("quant/flip_rate" in got) == (step > 0)
        assert got == pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-6)
    assert len(transfers) == 2 and all(x.ndim == 1 and x.is_fully_replicated for x in transfers)
