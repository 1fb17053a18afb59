"""Numbers in a file that may be larger than memory: a slice is read when it is asked for.

Not a memory map. What is wrong with a mapped file while it is looked at (it was cut, its disk or its server
fails) the system tells by SIGBUS, which ends the process without a word; a read says it, and the run can save
its steps first. Reading needs a POSIX system (pread), as training does.
"""

import os
import weakref
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.sources import DataError

AT_ONCE = 1 << 30  # bytes that one read asks for: macOS refuses 2 GiB


@dataclass(frozen=True)
class Stored:
    """Little-endian numbers [count] that begin after `skip` bytes of a file.

    The file is opened at the first read and stays open: replacing or deleting it changes nothing. A copy, or
    what is unpickled, opens it again.
    """

    path: Path
    dtype: str
    count: int
    skip: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: slice) -> np.ndarray:
        """A slice of step 1, read-only. Raises: TypeError, ValueError for another key; DataError if the file ends
        before it; OSError that names the file."""
        if not isinstance(key, slice):
            raise TypeError(f"numbers of a file are read in slices, got {key!r}")
        start, stop, step = key.indices(self.count)
        if step != 1:
            raise ValueError(f"numbers of a file are read one after the other, not with a step of {step}")
        width = np.dtype(self.dtype).itemsize
        raw = self._read(self.skip + start * width, max(0, stop - start) * width)
        return np.frombuffer(raw, self.dtype)

    @cached_property
    def _file(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def _read(self, at: int, size: int) -> bytes:
        parts, missing = [], size
        while missing:  # the system may hand over less
            try:
                part = os.pread(self._file, min(missing, AT_ONCE), at + size - missing)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not part:
                end = os.fstat(self._file).st_size
                raise DataError(f"{self.path} was cut while it was read: it ends after {end} bytes")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
