"""Several processes as one run: what they must agree on, and what happens when one is lost.

All processes run the same programs in the same order; so whatever decides which program comes next (is it
time to save? is the checkpoint intact? has a signal arrived?) must be one value for all. With one process
every agreement is the identity. Nothing imports jax before it is called.
"""

import contextlib
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.config import ConfigError

EXIT_LOST = 70  # of a process that ended because another one was lost
HIDDEN_SECONDS = 10.0  # that a file may stay unseen by other machines (caches of network file systems)


class PeerError(RuntimeError):
    """Another process of the run was lost, or sees other things than this one."""

    exit_code = EXIT_LOST


def count() -> int:
    """Processes of the run."""
    import jax

    return jax.process_count()


def first() -> bool:
    """Whether this is process 0, which alone writes what is not a checkpoint, and talks to the user."""
    import jax

    return jax.process_index() == 0


def gather(value: int) -> list[int]:
    """The value of every process, in order; in 0..2^31-1. All must call it."""
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    return [int(v) for v in multihost_utils.process_allgather(np.int32(value)).reshape(-1)]


def agreed(value: int) -> int:
    """The value of process 0, in 0..2^31-1. All must call it."""
    return gather(value)[0]


def alike(what: str, digest: str) -> None:
    """Check that all processes see the same.

    Args: what: for the message. digest: hexadecimal; its first 7 digits are compared.
    Raises: PeerError, in every process, that names the first one that differs.
    """
    values = gather(int(digest[:7], 16))
    if others := [i for i, value in enumerate(values) if value != values[0]]:
        raise PeerError(f"process {others[0]} of {len(values)} has {what} unlike those of process 0")


def together(problem: Exception | None, others: Exception) -> None:
    """Raise in all processes if one has a problem: its own in those that have one, else `others`."""
    troubled = any(gather(int(problem is not None)))
    if problem is not None:
        raise problem
    if troubled:
        raise others


def barrier() -> None:
    """Wait until all are here."""
    gather(0)


def whole(array: Any) -> Any:
    """The values of an array that may lie on the devices of several processes. All must call it."""
    import jax
    import numpy as np

    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def require_shared(directory: Path) -> None:
    """Check that all processes see the same directory, by a file of process 0.

    Raises: PeerError in every process if one does not see it.
    """
    if count() == 1:
        return
    mark = directory / f".joined.{agreed(time.time_ns() % 2**31)}"
    if first():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    patience = time.monotonic() + HIDDEN_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < patience:
        time.sleep(0.1)
    missing = [i for i, value in enumerate(gather(int(seen))) if not value]
    if first():
        mark.unlink(missing_ok=True)
    if missing:
        raise PeerError(
            f"process {missing[0]} does not see the {directory} of process 0: the workdir must be on storage "
            "that all machines share, under one path"
        )


# What jax, Gloo, NCCL and the coordination service say when a connection ends.
LOSS = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|coordinat|heartbeat|barrier|socket closed|UNAVAILABLE|"
    r"DEADLINE_EXCEEDED|another task",
    re.IGNORECASE,
)


@contextlib.contextmanager
def losses_reported(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a lost peer, which speak of sockets, into a PeerError. One process: nothing.

    Args: advice: makes what is added to the message.
    """
    try:
        yield
    except (RuntimeError, ValueError, TimeoutError, OSError) as error:
        if isinstance(error, (PeerError, ConfigError)) or count() == 1 or not LOSS.search(str(error)):
            raise
        raise PeerError(f"another process was lost ({first_line(error)}); {advice()}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag, read at step boundaries; the second stops now.

    Args: several: in a run of several processes SIGTERM is left to jax, which tells the others, and
    SIGINT becomes a SIGTERM.
    """

    def __init__(self, several: bool = False) -> None:
        self.requested, self._several = False, several
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: a handler may interrupt a print, whose buffer must not be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving; again to stop at once\n")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop_asked(interrupt: Interrupt) -> Callable[[], bool]:
    """A function to call once after every step: is this the step to stop at?

    With several processes a signal to any of them stops all at the same step, the one after the
    furthest; all must call the function equally often.
    """
    if count() == 1:
        return lambda: interrupt.requested
    from jax.experimental import multihost_utils

    calls = itertools.count(1)
    return lambda: bool(multihost_utils.reached_preemption_sync_point(next(calls)))
