"""Where the wall time of a run goes: every second belongs to exactly one kind of activity."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

# step: training, which is what a run is for. The shares of all kinds add up to 1.
KINDS = ("step", "compile", "data", "checkpoint", "eval", "telemetry", "profile", "other")
PAUSES = ("checkpoint", "eval", "profile")  # between steps; they do not slow a step
T = TypeVar("T")


class Ledger:
    """Books the passing time on the innermost `within` that is open, and on "other" outside of all.

    Args: clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._open = ["other"]
        self._since = clock()

    def _book(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """Book what follows on `kind`. Raises: KeyError for an unknown kind."""
        self._seconds[kind]  # a mistake is told here, not at the next booking
        self._book()
        self._open.append(kind)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def doing(self) -> str:
        """The kind that time is booked on at this moment; other threads may ask."""
        return self._open[-1]

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind up to now."""
        self._book()
        return dict(self._seconds)

    def paused(self) -> float:
        """Seconds spent in evaluation, saving and profiling up to now."""
        now = self.seconds()
        return sum(now[kind] for kind in PAUSES)


def waiting(items: Iterator[T], ledger: Ledger) -> Iterator[T]:
    """Pass items on; the time until each one is there is booked on "data"."""
    while True:
        with ledger.within("data"):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Metrics "goodput/<kind>", each kind's share of the wall time, and "goodput/wall_seconds"."""
    wall = sum(seconds.values())
    found = {f"goodput/{kind}": value / wall if wall else 0.0 for kind, value in seconds.items()}
    return found | {"goodput/wall_seconds": wall}


def line(seconds: dict[str, float]) -> str:
    """`goodput 91.2% | compile 4.0% | ...`, without the kinds that took no time."""
    parts = shares(seconds)
    rest = [kind for kind in KINDS[1:] if parts[f"goodput/{kind}"] >= 0.0005]
    return " | ".join(
        [
            f"goodput {100 * parts['goodput/step']:.1f}%",
            *(f"{kind} {100 * parts[f'goodput/{kind}']:.1f}%" for kind in rest),
        ]
    )
