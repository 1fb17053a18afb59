"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.config import ConfigError


@contextlib.contextmanager
def held(home: Path) -> Iterator[None]:
    """Keep a workdir for this process; made if it is not there.

    The lock is the system's (flock) and ends with the process, in whatever way it ends: the file that stays
    behind means nothing. A file system without locks is trusted.
    Raises: ConfigError if another process holds the workdir, or nothing can be written there.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = open(home / ".lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
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
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
