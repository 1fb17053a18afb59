"""Claims: files that say which process of this machine works on what.

A claim names its processes by id and start time, so that an id given out again is not taken for the
old process, and nothing else. It holds while any of them runs; a claim whose processes are all gone
is taken over. Claims of one directory change under a lock, so that two processes that see the same
stale claim do not both take it. Other machines' processes are not seen: a directory of claims belongs
to one machine.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax import files


def started(pid: int) -> str | None:
    """When a process started, in the system's own unit; "" if unknown, None if it no longer runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it runs, for somebody else
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""  # no /proc here
    return None if fields[0] in "ZX" else fields[19]  # proc(5): state, then starttime


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system releases when the process ends in whatever way."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take(path: Path) -> bool:
    """Claim for this process; False if a running process holds the claim (this one included)."""
    with locked(path.parent):
        if any(since is not None and started(pid) == since for pid, since in _holders(path)):
            return False
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(file, "w") as out:
            json.dump([[os.getpid(), started(os.getpid())]], out)
        return True


def share(path: Path, pid: int) -> None:
    """Add a child to this process's claim: should the parent die, the claim holds while the child runs."""
    with locked(path.parent):
        files.write_json(path, [*_holders(path), [pid, started(pid)]])


def release(path: Path) -> None:
    """Give up this process's claim; another's stays."""
    with locked(path.parent):
        if any(pid == os.getpid() for pid, _ in _holders(path)):
            path.unlink()


def _holders(path: Path) -> list[list]:
    try:
        return [[int(pid), since] for pid, since in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []  # absent, or cut by a crash
