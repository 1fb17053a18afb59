"""Tell when no step ends any more, with the stacks of all threads: a worker, disk, device or peer that
hangs looks like a program that has nothing to say.

Only time that a step should not take counts: compiling, evaluating and profiling may last. Nothing here
waits for the threads that it tells of: the report is made by a thread of its own, first into a file.
"""

import contextlib
import faulthandler
import io
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.telemetry.writers import append_line
from nanochat_jax.train.loop import Hook
from nanochat_jax.types import TrainState

log = logging.getLogger(__name__)
EXIT_STALLED = 71  # of a process that ended itself because no step ended
USUAL_STEPS = 10  # a step may take so many times the median
REMEMBERED = 64  # steps that the median is made of
LONG = ("compile", "eval", "profile")  # kinds of activity (`goodput.KINDS`) that may take any time
WORDS = {"data": "waiting for data", "step": "in a step", "checkpoint": "saving", "telemetry": "in telemetry"}


class Stall(NamedTuple):
    """No step has ended for `seconds` since step `step`; `usual` is the median of steps, NaN if unknown."""

    step: int
    seconds: float
    usual: float
    doing: str

    def __str__(self) -> str:
        usual = "" if math.isnan(self.usual) else f" (usually {self.usual:.3g} s)"
        return f"stalled: no step has ended for {self.seconds:.3g} s{usual}, {WORDS.get(self.doing, 'outside of steps')}"


@contextlib.contextmanager
def watching(
    seconds: float, first: int, doing: Callable[[], str], report: Callable[[Stall], None]
) -> Iterator[Hook]:
    """Watch the steps inside of the block, by a thread.

    Args: seconds: limit; ten times the median of steps if that is more; 0 = do not watch. first: steps
    done before. doing: the kind of activity at this moment, called by the thread. report: what to do at a
    stall, called by the thread, once until a further step ends.
    Yields: a hook of the loop, to be called after every step.
    """
    # Replaced as a whole, so that the thread never sees half of it: (calls, steps done, seconds of steps).
    seen: tuple[int, int, tuple[float, ...]] = (0, first, ())
    ended = threading.Event()

    def hook(done: int, state: TrainState, metrics: dict[str, float]) -> None:
        nonlocal seen
        calls, before, times = seen
        # The first step that is heard of was compiled as well.
        took = (metrics["perf/step_ms"] / 1e3,) if calls > 1 and "perf/step_ms" in metrics else ()
        seen = calls + 1, done or before, (*times, *took)[-REMEMBERED:]

    def watch() -> None:
        # Short looks, each of which counts for little: a process that was stopped, or a machine that
        # slept, did not stall.
        look = min(1.0, seconds / 8)
        calls, idle, told = -1, 0.0, False
        while not ended.wait(look):
            kind, now = doing(), seen
            if now[0] != calls:
                calls, idle, told = now[0], 0.0, False
            elif kind not in LONG:
                idle += look
            usual = statistics.median(now[2]) if now[2] else math.nan
            limit = seconds if math.isnan(usual) else max(seconds, USUAL_STEPS * usual)
            if idle >= limit and not told:
                told = True
                report(Stall(now[1], idle, usual, kind))

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    if seconds:
        thread.start()
    try:
        yield hook
    finally:
        ended.set()
        if seconds:
            thread.join()


def reporter(
    home: Path,
    process: int,
    tell: Callable[[str, int], None],
    leave: bool,
    advice: Callable[[], str],
    end: Callable[[int], None] = os._exit,
) -> Callable[[Stall], None]:
    """What to do at a stall: stacks to <home>/stacks.txt, a line to metrics.jsonl, a line to the user.

    In this order, because the thread that hangs may hold what the next one needs.
    Args: process: number of this process; the others than 0 write stacks.<process>.txt, and nothing else.
    tell: prints a text about a step. leave: end the process then, with status 71. advice: says what a
    restart will find, for `leave`.
    """
    path = home / ("stacks.txt" if process == 0 else f"stacks.{process}.txt")

    def report(stall: Stall) -> None:
        text = f"{stall}; stacks of all threads: {_stacks(path, stall)}"
        if process == 0:
            with contextlib.suppress(OSError):
                append_line(home / "metrics.jsonl", stall.step, {"anomaly": text})
            tell(f"{text}{f'; ending ({advice()})' if leave else ''}", stall.step)
        if leave:
            end(EXIT_STALLED)

    return report


def _stacks(path: Path, stall: Stall) -> str:
    """Append the stacks of all threads to a file, else to stderr; says where they are."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} step {stall.step} {stall}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        return str(path)
    except OSError as error:
        with contextlib.suppress(io.UnsupportedOperation, OSError):
            faulthandler.dump_traceback(all_threads=True)
        return f"on stderr ({error})"
