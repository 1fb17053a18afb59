"""Numbers in a file that may be larger than memory: a slice is read when it is asked for.

Not a memory map. What is wrong with a mapped file while it is looked at (it was cut, its disk or its server
fails) the system tells by SIGBUS, which ends the process without a word; a read says it, and the run can save
its steps first. A read of a row costs as much as copying it out of the map.
"""

import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat_jax.data.sources import DataError


@dataclass(frozen=True)
class Stored:
    """Little-endian numbers [count] that begin after `skip` bytes of a file.

    The file is opened at the first read and stays open: replacing or deleting it changes nothing.
    """

    path: Path
    dtype: str
    count: int
    skip: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: slice) -> np.ndarray:
        """A slice of step 1, read-only. Raises: DataError if the file ends before it; OSError."""
        start, stop, step = key.indices(self.count)
        if step != 1:
            raise ValueError(f"numbers of a file are read one after the other, not with a step of {step}")
        width = np.dtype(self.dtype).itemsize
        raw = self._read(self.skip + start * width, max(0, stop - start) * width)
        return np.frombuffer(raw, self.dtype)

    @cached_property
    def _file(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _read(self, at: int, size: int) -> bytes:
        parts, missing = [], size
        while missing:  # the system may hand over less, 2 GiB at most
            part = os.pread(self._file, missing, at + size - missing)
            if not part:
                end = os.fstat(self._file).st_size
                raise DataError(f"{self.path} was cut while it was read: it ends after {end} bytes")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
