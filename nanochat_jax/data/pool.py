"""A pool of threads that prepares samples, and a policy for slow ones, on top of Grain.

After MinatoLoader (arXiv:2509.10712): a slow sample must not hold up the fast ones behind it. Here
the order is the caller's promise, and comes in three strengths:
    strict      samples come in order; a window of them is in work, so that a slow one has time.
    declared    costs are known beforehand, and slow samples come `delay` places later. The order is
                a function of the costs (`Declared`): the same in every run, on every host, seekable.
    completion  whatever is done first comes first. Every sample comes once, none is more than
                `max_late` places late, and a journal remembers the order, to resume and to replay.
Work starts in the order of priorities, by threads: transforms must let go of the interpreter lock
(numpy, tokenizers, reading). In completion order a sample that took longer than most is set aside
between two of its stages, and finished by a share of the threads.

Unlike the paper's printed pseudo-code, a stage is never applied twice, and unlike its artifact no
sample is lost; "longer than most" is max(75th percentile, 2 * median), so that a quarter of equal
samples is not called slow.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import grain
import numpy as np

from nanochat_jax.data.sources import DataError

Stages = Sequence[Callable[[Any], Any]]

CHUNK = 128  # places of a declared order that are computed at once
WARM = 32  # samples before the first guess of what takes long
RECENT = 256  # samples that the guess is made of


def slow(costs: np.ndarray) -> np.ndarray:
    """bool [n]: which samples cost more than most, by max(75th percentile, 2 * median)."""
    return costs > max(np.percentile(costs, 75), 2 * np.median(costs))


class Declared:
    """Order in which slow samples come `delay` places later: element e is the base index at place e.

    The order of all i by (i + delay if slow(i) else i, i), computed only where it is asked for.
    Args: is_slow: of a base index. No sample comes more than `delay` places early or late.
    """

    def __init__(self, is_slow: Callable[[int], bool], delay: int):
        self.is_slow, self.delay = is_slow, delay
        self.chunk = lru_cache(8)(self._chunk)

    def __getitem__(self, place: int) -> int:
        return int(self.chunk(place // CHUNK)[place % CHUNK])

    def _chunk(self, index: int) -> np.ndarray:
        first, last, delay = index * CHUNK, (index + 1) * CHUNK, self.delay
        begin = max(0, first - 2 * delay)  # flags as far as they matter
        flags = np.array([self.is_slow(i) for i in range(begin, last + 2 * delay)], bool)
        before = np.concatenate([[0], np.cumsum(flags)])  # slow samples in [begin, begin + k)
        base = np.arange(max(0, first - delay), last + delay)
        at = base - begin
        behind = base - (before[at] - before[np.maximum(at - delay + 1, 0)])
        ahead = base + delay - (before[at + delay] - before[at])
        places = np.where(flags[at], ahead, behind)
        out = np.empty(CHUNK, np.int64)
        inside = (places >= first) & (places < last)
        out[places[inside] - first] = base[inside]
        return out


def read_journal(path: Path, first: int, count: int) -> np.ndarray:
    """Base indices at the places first, first + 1, ... of a journal, int64 [count].

    A journal holds base index minus place of every sample, two bytes each.
    Raises: DataError if it ends before.
    """
    try:
        moved = np.fromfile(path, "<i2", count, offset=2 * first)
    except OSError as error:
        raise DataError(f"cannot read the order of samples in {path}: {error}") from None
    if len(moved) < count:
        size = path.stat().st_size // 2
        raise DataError(f"{path} knows the order of {size} samples, expected at least {first + count}")
    return moved + np.arange(first, first + count)


def state_at(path: Path, emitted: int, max_late: int, window: int) -> dict[str, Any]:
    """State of a completion-order iterator after `emitted` samples, from its journal.

    Raises: DataError if the journal is too short or of other settings.
    """
    first = max(0, emitted - max_late - window)
    known = read_journal(path, first, emitted - first) if emitted else np.zeros(0, np.int64)
    coming = int(known.max()) + 1 if len(known) else 0
    old = max(0, emitted - max_late)  # all before have been emitted
    pending = sorted(set(range(old, coming)) - set(known.tolist()))
    moved = known - np.arange(first, emitted)
    if len(pending) != coming - emitted or (moved >= window).any() or (moved < -max_late).any():
        raise DataError(f"{path} is no journal of data.pool.max_late = {max_late} and window = {window}")
    return {"next": coming, "pending": pending, "emitted": emitted}


class Pool(grain.IterDataset):
    """Samples prepared by a pool of threads; see the head of this file for the orders.

    Args: samples: random access, samples[k] is called in a thread; element k of the order "strict",
    base index k of "completion". stages: applied to each sample one after the other. priority:
    "strict": the lower, the earlier its work starts among the next `window + reach` samples (with
    `Declared`: its elements, and its delay as reach). window: samples in work or waiting. journal:
    "completion": file that receives the order.
    Iterators have Grain's states: {"next_index"} for strict, {"next", "pending", "emitted"} for
    completion: what is pending is prepared again.
    """

    def __init__(
        self,
        samples: Any,
        workers: int,
        window: int,
        *,
        stages: Stages = (),
        completion: bool = False,
        priority: Callable[[int], int] = int,
        reach: int = 0,
        max_late: int = 256,
        journal: Path | None = None,
    ):
        super().__init__()
        if workers < 1 or window <= reach:
            raise ValueError(f"workers {workers} must be at least 1, window {window} above reach {reach}")
        self.samples, self.workers, self.window, self.stages = samples, workers, window, tuple(stages)
        self.completion, self.priority, self.reach = completion, priority, reach
        self.max_late, self.journal = max_late, journal

    def __iter__(self) -> "PoolIterator":
        return PoolIterator(self)


class PoolIterator(grain.DatasetIterator):
    """See `Pool`. For one consumer. Threads start with the first sample and end with `close`."""

    def __init__(self, pool: Pool):
        super().__init__()
        self.pool = pool
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._times: deque[float] = deque(maxlen=RECENT)
        self._limit = float("inf")  # seconds after which a sample is set aside
        self._log: BinaryIO | None = None
        self._begin(0, (), 0)

    def _begin(self, coming: int, pending: Sequence[int], emitted: int) -> None:
        self._emitted, self._coming = emitted, coming
        self._ahead: list[tuple[int, int]] = []  # heap of (priority, k): next samples, not begun
        self._fresh: deque[int] = deque(pending)  # begun by nobody
        self._aside: deque[tuple[int, int, Any, float]] = deque()  # (k, stage, value, seconds so far)
        self._late_busy = 0  # threads at work on what was set aside
        self._open = set(pending)  # in work or done, not emitted
        self._done: dict[int, tuple[Any, BaseException | None]] = {}
        self._stopped = False

    # --- the consumer's side

    def __next__(self) -> Any:
        self._assert_not_closed()
        with self._change:
            self._fill()
            while (k := self._choose()) is None:
                if self._stopped:  # closed by another thread
                    raise ValueError("the pool was closed while a sample was awaited")
                self._change.wait()
            value, error = self._done.pop(k)
            if error is None:
                self._open.remove(k)
                self._emit(k)
                self._fill()
            else:
                self._done[k] = value, error  # asked again, it fails again
        if error is not None:
            raise error
        return value

    def _choose(self) -> int | None:
        """The sample whose turn it is, once it is done."""
        if not self.pool.completion:
            return self._emitted if self._emitted in self._done else None
        oldest = min(self._open)
        if oldest in self._done or self._emitted - oldest >= self.pool.max_late:
            return oldest if oldest in self._done else None
        return min(self._done, default=None)

    def _emit(self, k: int) -> None:
        if self.pool.completion and self.pool.journal:
            if self._log is None:
                self._log = open(self.pool.journal, "ab", buffering=0)  # noqa: SIM115 - closed by _stop
                self._log.truncate(2 * self._emitted)  # what came after is not part of this run
            self._log.write(np.array(k - self._emitted, "<i2").tobytes())
        self._emitted += 1

    def _fill(self) -> None:
        """Give the threads what there is room for in the window."""
        pool, before = self.pool, len(self._fresh)
        if pool.completion:
            while len(self._open) < pool.window:
                self._fresh.append(self._coming)
                self._open.add(self._coming)
                self._coming += 1
        else:
            while self._coming < self._emitted + pool.window + pool.reach:
                heapq.heappush(self._ahead, (pool.priority(self._coming), self._coming))
                self._coming += 1
            while self._ahead and len(self._open) < pool.window:
                k = heapq.heappop(self._ahead)[1]
                self._fresh.append(k)
                self._open.add(k)
        while len(self._threads) < pool.workers:
            self._threads.append(threading.Thread(target=self._work, daemon=True, name="sample"))
            self._threads[-1].start()
        if len(self._fresh) > before:
            self._change.notify_all()

    # --- the threads' side

    def _take(self) -> tuple[int, int, Any, float, bool] | None:
        """(k, stage, value, seconds, was it set aside), or None if there is nothing to do."""
        own = max(1, self.pool.workers // 4)  # threads for what was set aside, and for what was not
        most = own if self._fresh else max(1, self.pool.workers - own)
        if self._aside and self._late_busy < most:
            self._late_busy += 1
            return *self._aside.popleft(), True
        return (self._fresh.popleft(), -1, None, 0.0, False) if self._fresh else None

    def _work(self) -> None:
        while True:
            with self._change:
                while (task := self._take()) is None and not self._stopped:
                    self._change.wait()
                if self._stopped:
                    return
            assert task
            k, stage, value, spent, late = task
            result: tuple[Any, BaseException | None] | None = None
            begun, took = time.monotonic(), 0.0
            try:
                while stage < len(self.pool.stages):
                    value = self.pool.samples[k] if stage < 0 else self.pool.stages[stage](value)
                    stage += 1
                    took = spent + time.monotonic() - begun
                    if took > self._limit and not late and stage < len(self.pool.stages):
                        break
                else:
                    result = value, None
            except BaseException as error:  # is the consumer's
                result = None, error
            with self._change:
                self._late_busy -= late
                if result is None:
                    self._aside.append((k, stage, value, took))
                else:
                    self._done[k] = result
                    self._learn(spent + time.monotonic() - begun)
                self._change.notify_all()

    def _learn(self, seconds: float) -> None:
        """Keep the limit at max(75th percentile, 2 * median) of recent samples."""
        self._times.append(seconds)
        if self.pool.completion and len(self._times) >= WARM and len(self._times) % 8 == 0:
            self._limit = float(max(np.percentile(self._times, 75), 2 * np.median(self._times)))

    # --- Grain's protocol

    def get_state(self) -> dict[str, Any]:
        with self._change:
            if not self.pool.completion:
                return {"next_index": self._emitted}
            return {"next": self._coming, "pending": sorted(self._open), "emitted": self._emitted}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        if self.pool.completion:
            self._begin(state["next"], state["pending"], state["emitted"])
        else:
            self._begin(state["next_index"], (), state["next_index"])

    def _stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._log:
            self._log.close()
            self._log = None

    def close(self) -> None:
        """End the threads, after the samples they are at."""
        if not self._closed:
            super().close()
            self._stop()
