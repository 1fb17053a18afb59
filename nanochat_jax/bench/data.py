"""How long the device waits for data when samples cost very different times, by loader.

A step is a sleep, a sample's cost is a sleep: the waiting is real and no processor is needed, so
that the loaders are compared and not the machine. Protocol: for each distribution of costs and each
seed, every loader delivers the same STEPS batches; idle = time in next() / wall time, over all steps
and without the first WARM_UP. The median over seeds counts; the range is shown.
"""

import itertools
import json
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grain
import numpy as np

from nanochat_jax.data import pool

BATCH, WORKERS, STEP = 8, 8, 0.040  # samples, threads, seconds of one step
LOAD = 0.75  # mean cost of a batch / (workers * step): what the workers can do is 1
STEPS, WARM_UP = 150, 30
WINDOW, DELAY, MAX_LATE = 64, 32, 256
CAP = 1.5  # seconds: no sample costs more
BAR, PLAIN = 0.02, 0.25  # less idle than this, where plain in-order prefetch shows so much


def _two_point(random: np.random.Generator, count: int) -> np.ndarray:
    return np.where(random.random(count) < 0.2, 11.0, 1.0)


# What a sample costs, in any unit: 20% take 11 times as long (as in the paper's speech data), ...
COSTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "equal": lambda random, count: np.ones(count),
    "two_point": _two_point,
    "lognormal": lambda random, count: random.lognormal(0.0, 1.5, count),
    "pareto": lambda random, count: random.pareto(1.5, count) + 1.0,
}


def costs(kind: str, seed: int, count: int) -> np.ndarray:
    """Seconds of each sample [count]; the mean is what LOAD says, and none is above CAP."""
    made = COSTS[kind](np.random.default_rng(seed), count)
    mean = LOAD * WORKERS * STEP / BATCH
    for _ in range(5):  # cutting the tail lowers the mean
        made = np.minimum(made * mean / made.mean(), CAP)
    return made


class _Sleep:
    """Sample k takes its time; its value is k."""

    def __init__(self, seconds: np.ndarray):
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, k: int) -> int:
        if k < len(self.seconds):
            time.sleep(self.seconds[k])
        return int(k)


def _batch_owned(samples: _Sleep) -> Iterator[Any]:
    """As PyTorch's DataLoader: a worker makes a whole batch, batches come in order, two ahead a worker."""
    with ThreadPoolExecutor(WORKERS) as threads:
        made: deque = deque()
        for first in itertools.count(0, BATCH):
            made.append(threads.submit(lambda first=first: [samples[first + i] for i in range(BATCH)]))
            if len(made) >= 2 * WORKERS:
                yield made.popleft().result()


def _grain(samples: _Sleep, ahead: int) -> Iterator[Any]:
    """Grain's threads: samples in order, `ahead` of them prefetched."""
    options = grain.ReadOptions(num_threads=WORKERS, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(samples).to_iter_dataset(options).batch(BATCH)
    with closing(iter(dataset)) as stream:
        yield from stream


def _pool(samples: Any, window: int = WINDOW, **options: Any) -> Iterator[Any]:
    dataset = pool.Pool(samples, WORKERS, window, **options).batch(BATCH)
    with closing(iter(dataset)) as stream:
        yield from stream


class _InOrder:
    """Samples at the places of an order."""

    def __init__(self, samples: _Sleep, order: pool.Declared):
        self.samples, self.order = samples, order

    def __getitem__(self, place: int) -> int:
        return self.samples[self.order[place]]


def _declared(samples: _Sleep, window: int = WINDOW, delay: int = DELAY) -> Iterator[Any]:
    late = pool.slow(samples.seconds)
    order = pool.Declared(lambda k: k < len(late) and bool(late[k]), delay)
    return _pool(_InOrder(samples, order), window, priority=order.__getitem__, reach=delay)


class _Numbers:
    def __getitem__(self, k: int) -> int:
        return k


def _staged(samples: _Sleep) -> Iterator[Any]:
    """Completion order, the cost in four stages between which a slow sample may be set aside."""

    def quarter(k: int) -> int:
        if k < len(samples):
            time.sleep(samples.seconds[k] / 4)
        return k

    return _pool(_Numbers(), completion=True, max_late=MAX_LATE, stages=(quarter,) * 4)


LOADERS: dict[str, Callable[[_Sleep], Iterator[Any]]] = {
    "batch_owned": _batch_owned,
    "in_order": lambda samples: _grain(samples, 2 * BATCH),
    "in_order_64": lambda samples: _grain(samples, WINDOW),
    "strict": _pool,
    "declared": _declared,
    "declared_far": lambda samples: _declared(samples, 4 * WINDOW, 4 * DELAY),
    "completion": lambda samples: _pool(samples, completion=True, max_late=MAX_LATE),
    "completion_staged": _staged,
}
# The loaders as a person would name them.
NAMES = {
    "batch_owned": "workers own batches, 2 each ahead (PyTorch-like)",
    "in_order": "plain in-order prefetch (Grain), 16 samples",
    "in_order_64": "the same, 64 samples",
    "strict": "pool, strict order, window 64",
    "declared": f"pool, declared order, window 64, delay {DELAY}",
    "declared_far": f"the same, window {4 * WINDOW}, delay {4 * DELAY}",
    "completion": "pool, completion order",
    "completion_staged": "pool, completion order, 4 stages",
}


def idle(loader: str, kind: str, seed: int, steps: int = STEPS) -> dict[str, float]:
    """One run. Returns: shares "all" and "warm", and "moved": the furthest a sample came from its place."""
    seconds = costs(kind, seed, steps * BATCH)
    stream, waits, moved = LOADERS[loader](_Sleep(seconds)), [], 0
    begun = time.perf_counter()
    ends = []
    for step in range(steps):
        asked = time.perf_counter()
        batch = np.asarray(next(stream))
        waits.append(time.perf_counter() - asked)
        moved = max(moved, int(np.abs(batch - np.arange(step * BATCH, (step + 1) * BATCH)).max()))
        time.sleep(STEP)
        ends.append(time.perf_counter())
    stream.close()  # type: ignore[attr-defined]
    warm = min(WARM_UP, steps // 2)
    return {
        "all": sum(waits) / (ends[-1] - begun),
        "warm": sum(waits[warm:]) / (ends[-1] - ends[warm - 1]),
        "moved": moved,
    }


def data(
    seeds: tuple[int, ...] = (0, 1, 2), kinds: tuple[str, ...] = tuple(COSTS), steps: int = STEPS
) -> dict[str, Any]:
    """Measure all loaders. Returns a JSON-able record; "passed" says whether the bar was met."""
    runs = [
        {"costs": kind, "loader": loader, "seed": seed, **idle(loader, kind, seed, steps)}
        for kind in kinds
        for seed in seeds
        for loader in LOADERS
    ]
    record = {
        "protocol": {
            "batch": BATCH, "workers": WORKERS, "step_s": STEP, "load": LOAD, "steps": steps,
            "warm_up": WARM_UP, "window": WINDOW, "delay": DELAY, "max_late": MAX_LATE, "cap_s": CAP,
            "seeds": seeds,
        },
        "rows": rows(runs), "runs": runs, "bar": {"idle": BAR, "where_in_order_shows": PLAIN},
        "python": platform.python_version(), "grain": grain.__version__,
    }  # fmt: skip
    return json.loads(json.dumps(record | {"passed": passed(record["rows"])}))


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and range over seeds for each distribution and loader."""
    found = []
    for kind, loader in dict.fromkeys((run["costs"], run["loader"]) for run in runs):
        own = [run for run in runs if (run["costs"], run["loader"]) == (kind, loader)]
        row: dict[str, Any] = {"costs": kind, "loader": loader, "moved": max(run["moved"] for run in own)}
        for share in ("all", "warm"):
            values = [run[share] for run in own]
            row[share] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        found.append(row)
    return found


def passed(table: list[dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """For each distribution on which plain in-order prefetch idles PLAIN or more: does a pool meet BAR?

    By the best of the pool's orders; over all steps ("all", the cold start included) and "warm".
    """
    orders, found = ("declared", "declared_far", "completion", "completion_staged"), {}
    for share in ("all", "warm"):
        by = {(row["costs"], row["loader"]): row[share]["median"] for row in table}
        hard = [kind for kind in COSTS if by.get((kind, "in_order"), 0.0) >= PLAIN]
        best = {kind: min(by[kind, name] for name in orders if (kind, name) in by) for kind in hard}
        found[share] = {kind: value < BAR for kind, value in best.items()}
    return found


def table(record: dict[str, Any]) -> str:
    """The record for people: idle shares in percent, cold start included | without it."""
    kinds = list(dict.fromkeys(row["costs"] for row in record["rows"]))
    by = {(row["costs"], row["loader"]): row for row in record["rows"]}
    lines = [f"{'loader':<50}" + "".join(f"{kind:>16}" for kind in kinds)]
    for loader, name in NAMES.items():
        cells = (by[kind, loader] for kind in kinds)
        shown = (f"{100 * c['all']['median']:.1f} | {100 * c['warm']['median']:.1f}" for c in cells)
        lines.append(f"{name:<50}" + "".join(f"{cell:>16}" for cell in shown))
    for share, when in (("all", "with the cold start"), ("warm", "without it")):
        for kind, met in record["passed"][share].items():
            lines.append(f"{kind}, {when}: under {100 * BAR:.0f}% idle {'is met' if met else 'is NOT met'}")
    return "\n".join(lines)
