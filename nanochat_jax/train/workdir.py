"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax import files
from nanochat_jax.config import ConfigError
from nanochat_jax.data.text import FULL, UNWRITABLE


class UnwritableError(OSError):
    """A file that a run cannot do without could not be written. The message says where, and why."""


@contextlib.contextmanager
def written(place: Path) -> Iterator[None]:
    """Say which directory is on a disk that is full or read-only: a write that fails names no file.

    Raises: UnwritableError, one sentence, if what is inside fails for such a disk; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _unwritable(place, error) from error


def _unwritable(place: Path, error: OSError) -> UnwritableError:
    return UnwritableError(
        f"{place} cannot be written ({error.strerror}); the same command goes on once it can"
    )


@contextlib.contextmanager
def held(home: Path) -> Iterator[None]:
    """Keep a workdir for this process; made if it is not there.

    The lock is the system's (flock) and ends with the process, in whatever way it ends: the file that stays
    behind means nothing. A file system without locks is trusted.
    Raises: ConfigError if another process holds the workdir, or nothing can be written there; UnwritableError
    if its disk is full.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = open(home / ".lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        if error.errno in FULL:
            raise _unwritable(home, error) from error
        raise ConfigError(
            f"the workdir {home} cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            raise ConfigError(
                f"{home} is in use by another run{f' (process {owner})' if owner else ''}; wait for it, or "
                "choose another --workdir"
            ) from None
        except OSError:  # no locks here
            yield
            return
        with written(home):
            file.truncate(0)
            # Past the buffer, which would fail again when it is closed.
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
            files.sweep(home)
        yield
