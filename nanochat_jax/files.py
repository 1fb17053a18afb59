"""Files that are there whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A file beside `path` to be written, which takes its name in the end.

    Args: sync: wait for the disk before, so that even a power cut leaves the old file or the new one.
    Raises: OSError of the disk, and what is raised within; what was written is gone then.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(directory: Path) -> None:
    """Remove what killed processes left of files. No other process may be writing there."""
    for left in directory.glob("*.[0-9]*.tmp"):
        left.unlink(missing_ok=True)


def write_json(path: Path, value: Any, sync: bool = False) -> None:
    """Write an object as `replacing` does."""
    with replacing(path, sync) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
