"""What watching a run costs: all hooks and sinks around a step that does nothing.

The real loop, hooks and writers run with a step that returns at once, so that the host's work for
telemetry is all there is: the upper bound of what it can add to a step, because a device that is
busy meanwhile hides it. Compared with the median step of the same config. Protocol: every block
runs `steps` steps twice, without hooks and with them; the difference counts, the median block wins.
The thread's own time is told as well, to which other programs on the machine add little.
"""

import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import parallel
from nanochat_jax.bench import throughput
from nanochat_jax.config import Config
from nanochat_jax.telemetry.console import Progress
from nanochat_jax.telemetry.goodput import Ledger, waiting
from nanochat_jax.telemetry.trace import SpanFile, Trace
from nanochat_jax.telemetry.writers import open_writers
from nanochat_jax.train import hooks, loop, program
from nanochat_jax.types import Metrics, TrainState

BUDGET = 0.01  # share of the step that telemetry may cost


def telemetry(cfg: Config, blocks: int = 5, steps: int = 5, host_steps: int = 200) -> dict[str, Any]:
    """Measure; returns a JSON-able record.

    Args: blocks, steps: of the real step. host_steps: steps that do nothing, per block.
    """
    cfg_steps = host_steps * (2 * blocks + 2)
    real = throughput.throughput(cfg, blocks, steps)["step_ms"]["median"]
    parts = program.Parts(cfg)
    state = parts.fresh(cfg.seed)
    batch = parallel.shard_batch(throughput.random_rows(cfg), parts.mesh)
    _, shapes = jax.eval_shape(parts.step, parts.shapes, batch)
    metrics = {name: jnp.asarray(1.0 + 0.01 * index) for index, name in enumerate(shapes)}
    numbers = itertools.count()

    def idle(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        # Values that differ, so that the detectors' windows fill as in a run.
        return state, metrics | {"loss/next_token": jnp.float32(2.0 + 0.001 * (next(numbers) % 7))}

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        ledger, trace = Ledger(), Trace((SpanFile(home / "spans.jsonl"),))
        writers = open_writers(cfg.log, home, ids=trace.ids)
        progress = Progress(cfg_steps, io.StringIO(), cfg.log.format, trace.ids)
        run = trace.begin("run")
        log = hooks.log_metrics(cfg, parts.schedules, writers, progress, ledger, trace)
        watched = [
            hooks.booked(log, "telemetry", ledger),
            hooks.booked(hooks.watch(cfg.log, writers, progress), "telemetry", ledger),
        ]

        def timed(wanted: list[loop.Hook], batches: Any) -> np.ndarray:
            """Milliseconds of a step: wall time, the thread's time."""
            fresh = state.replace(step=np.int32(0))
            began = np.array([time.perf_counter(), time.thread_time()])
            loop.run(idle, fresh, batches, wanted, host_steps)
            return 1e3 * (np.array([time.perf_counter(), time.thread_time()]) - began) / host_steps

        def added() -> np.ndarray:
            plain = timed([], itertools.repeat(batch))
            with ledger.within("step"):
                return timed(watched, waiting(itertools.repeat(batch), ledger)) - plain

        added()  # compiles what the hooks compute on the device (ternary health), and fills the windows
        took, busy = np.transpose([added() for _ in range(blocks)]).tolist()
        trace.end(run)
        writers.close()
        written = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    cost = statistics.median(took)
    return {
        "telemetry_ms": {"median": cost, "min": min(took), "max": max(took)},
        "thread_ms": statistics.median(busy),
        "step_ms": real, "share": cost / real, "budget": BUDGET, "every_steps": cfg.log.every_steps,
        "bytes_per_step": written / (host_steps * (blocks + 1)), "metrics": len(shapes),
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "log": json.loads(json.dumps(vars(cfg.log))),
    }  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """The record for people."""
    cost, share = record["telemetry_ms"], record["share"]
    return (
        f"telemetry {cost['median']:.3f} ms per step ({cost['min']:.3f} to {cost['max']:.3f}; of the thread's time "
        f"{record['thread_ms']:.3f}), "
        f"{100 * share:.2f}% of a step of {record['step_ms']:.1f} ms "
        f"({'within' if share <= record['budget'] else 'ABOVE'} the budget of {100 * record['budget']:.0f}%), "
        f"{record['bytes_per_step']:.0f} bytes written per step"
    )
