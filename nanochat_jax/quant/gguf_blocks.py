"""Packed ternary matrices as rows of GGUF's ternary blocks, and back, on NumPy arrays.

Both formats cut a row (one output, its inputs in order) into blocks of 256 with one float16 factor d
at the end; q = t + 1. TQ2_0, 66 bytes: byte 32 h + m of the first 64 holds inputs 128 h + m + 32 i in
bits 2i, 2i + 1 (h < 2, i < 4). TQ1_0, 54 bytes: five inputs in base 3 per byte, first input most
significant, stored as ceil(256 v / 243) so that multiplication instead of division takes them out:
bytes 0-31 hold inputs m + 32 i, bytes 32-47 inputs 160 + m + 16 i (i < 5), bytes 48-51 four inputs
240 + m + 4 i (i < 4) times 3. A block of zeros has d = 0.
Source: ggml's block_tq1_0 and block_tq2_0 (llama.cpp pull request 8151).
"""

from collections.abc import Callable

import numpy as np

from nanochat_jax.kernels.ternary import GROUP
from nanochat_jax.quant import pack as packs

# First input, inputs per digit, digits of the three runs of bytes of a TQ1_0 block.
_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))


def _tq2_bytes(q: np.ndarray) -> np.ndarray:
    parts = q.reshape(*q.shape[:-1], 2, 4, 32) << (2 * np.arange(4, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts, -2).reshape(*q.shape[:-1], 64)


def _tq2_digits(data: np.ndarray) -> np.ndarray:
    parts = data.reshape(*data.shape[:-1], 2, 1, 32) >> (2 * np.arange(4, dtype=np.uint8))[:, None]
    return (parts & 3).reshape(*data.shape[:-1], GROUP)


def _tq1_bytes(q: np.ndarray) -> np.ndarray:
    runs = []
    for start, width, digits in _RUNS:
        parts = q[..., start : start + width * digits].reshape(*q.shape[:-1], digits, width)
        powers = 3 ** (4 - np.arange(digits, dtype=np.uint16))
        value = np.sum(parts * powers[:, None], -2, dtype=np.uint16)
        runs.append(((value * np.uint32(256) + 242) // 243).astype(np.uint8))
    return np.concatenate(runs, -1)


def _tq1_digits(data: np.ndarray) -> np.ndarray:
    runs, first = [], 0
    for _, width, digits in _RUNS:
        part = data[..., None, first : first + width].astype(np.uint16)
        powers = 3 ** np.arange(digits, dtype=np.uint16)
        shifted = (part * powers[:, None]) & 255
        runs.append((shifted * 3 >> 8).astype(np.uint8).reshape(*data.shape[:-1], width * digits))
        first += width
    return np.concatenate(runs, -1)


# name -> (bytes of a block before d, digits -> bytes, bytes -> digits)
FORMATS: dict[str, tuple[int, Callable, Callable]] = {
    "TQ1_0": (52, _tq1_bytes, _tq1_digits),
    "TQ2_0": (64, _tq2_bytes, _tq2_digits),
}


def to_blocks(packed: packs.PackedTernary, name: str) -> np.ndarray:
    """Rows of blocks of a packed matrix.

    Args: packed: one matrix [m, n]. name: "TQ1_0" or "TQ2_0".
    Returns: uint8 [n, m / 256 * 54 or 66].
    Raises: ValueError if m is no multiple of 256, if a block would need several scales, or if a scale
    is no float16.
    """
    m, n = packed.shape
    if m % GROUP:
        raise ValueError(f"{name} needs inputs in multiples of {GROUP}, got {m}")
    scale = np.asarray(packed.scale, np.float32)
    if packed.grouped and m // scale.shape[0] % GROUP:
        raise ValueError(f"{name} has one scale per {GROUP} inputs, got one per {m // scale.shape[0]}")
    t, _ = packs.unpack(packed)
    q = (np.asarray(t).T + 1).astype(np.uint8).reshape(n, m // GROUP, GROUP)
    if packed.grouped:
        d = np.repeat(scale.T, m // GROUP // scale.shape[0], -1)
    else:
        d = np.broadcast_to(scale, q.shape[:2])
    d = np.where(np.all(q == 1, -1), np.float32(0), d)
    with np.errstate(over="ignore"):
        half = d.astype("<f2")
    if not np.array_equal(half.astype(np.float32), d):
        raise ValueError(f"{name} stores scales as float16, and {d[half != d].flat[0]:.9g} is none")
    data = FORMATS[name][1](q)
    return np.concatenate([data, half[..., None].view(np.uint8)], -1).reshape(n, -1)


def from_blocks(rows: np.ndarray, name: str) -> packs.PackedTernary:
    """Inverse of `to_blocks`: one scale per matrix where all blocks agree, else one per 256 inputs.

    Args: rows: uint8 [n, bytes]. Raises: ValueError for a wrong length or digits beyond 2.
    """
    size, _, digits = FORMATS[name]
    n, width = rows.shape
    if width % (size + 2) or not width:
        raise ValueError(f"rows of {name} have a multiple of {size + 2} bytes, got {width}")
    blocks = np.ascontiguousarray(rows, np.uint8).reshape(n, -1, size + 2)
    q = digits(blocks[..., :size])
    if np.any(q > 2):
        raise ValueError(f"{name}: digit 3 stands for no weight")
    d = np.ascontiguousarray(blocks[..., size:]).view("<f2")[..., 0].astype(np.float32)
    t = (q.astype(np.int8) - 1).reshape(n, -1).T
    some = np.any(q != 1, -1)
    used = np.unique(d[some])
    if len(used) > 1:
        return packs.pack(t, d.T[:, None, :])
    return packs.pack(t, (used if len(used) else np.zeros(1, np.float32))[:, None])
