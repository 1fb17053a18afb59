"""The safetensors format on NumPy arrays: a streaming writer, and a reader that trusts nothing.

Eight bytes with the length of the header, the header as JSON (padded with spaces to a multiple of 8),
then the tensors' bytes without holes. Nothing in a file is executed.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype("u1"), "I8": np.dtype("i1"),
}  # fmt: skip
MAX_HEADER = 100 * 2**20  # bytes, as in the official reader


def write(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]) -> int:
    """Write tensors one by one, so that one at a time is in memory.

    Args: tensors: (name, key of DTYPES, shape, function that gives the array).
    Returns: bytes of tensor data. Raises: ValueError for a repeated name, a wrong array, or values that
    are not finite.
    """
    plan, header, begin = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for name, kind, shape, _ in plan:
        if name in header:
            raise ValueError(f"tensor {name} is written twice")
        end = begin + math.prod(shape) * DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}  # type: ignore[assignment]
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, kind, shape, get in plan:
            value = get()
            if value.shape != tuple(shape):
                raise ValueError(f"tensor {name} has shape {value.shape}, expected {tuple(shape)}")
            wide = value if value.dtype.kind in "fiu" else value.astype(np.float32)
            if wide.dtype.kind == "f" and not np.isfinite(wide).all():
                raise ValueError(f"tensor {name} has values that are not finite")
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(value.astype(DTYPES[kind], copy=False))
            if kind == "F16" and not np.isfinite(stored).all():
                raise ValueError(f"tensor {name} has values that float16 cannot hold")
            file.write(stored.reshape(-1).view(np.uint8).data)  # no copy: the tables are large
    return begin


def read(path: Path) -> Mapping[str, np.ndarray]:
    """All tensors of a file, as memory-mapped arrays.

    Raises: ValueError naming the file and what is wrong with it; nothing beyond its size is allocated.
    """
    size = path.stat().st_size

    def wrong(what: str) -> ValueError:
        return ValueError(f"{path.name} is not a safetensors file: {what}")

    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise wrong(f"{size} bytes, at least 8 expected")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise wrong(f"its header would have {length} bytes")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            items = [(n, i["dtype"], tuple(i["shape"]), tuple(i["data_offsets"])) for n, i in header.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise wrong(f"header: {type(error).__name__}: {error}") from None
    found, data = {}, np.memmap(path, np.uint8, "r") if size > 8 + length else np.zeros(size, np.uint8)
    for name, kind, shape, offsets in items:
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)) and len(offsets) == 2
        if kind not in DTYPES or not whole:
            raise wrong(f"tensor {name}: dtype {kind}, shape {shape}, offsets {offsets}")
        begin, end = offsets
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize or end > size - 8 - length:
            raise wrong(f"tensor {name}: {end - begin} bytes at {begin} for {kind} {shape}")
        found[name] = data[8 + length + begin : 8 + length + end].view(DTYPES[kind]).reshape(shape)
    return found
