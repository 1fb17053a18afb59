"""Documents to rows of fixed length: concatenate, then cut.

Row i holds the tokens i*L .. i*L + L of the concatenated split, and targets are the same tokens one
later: shifted here and nowhere else. No token is padding and none is lost, except the last partial
row and the very first token, which nothing precedes. On source code, packing whole documents
instead would crop most of them away.
"""

import numpy as np


def rows(count: int, seq_len: int) -> int:
    """Full rows in a split of `count` tokens."""
    return max(0, (count - 1) // seq_len)


def window(
    ids: np.ndarray, offsets: np.ndarray, index: int, seq_len: int, isolate: bool
) -> dict[str, np.ndarray]:
    """Row `index` of a split.

    Args: ids: [n] tokens. offsets: int64 [documents + 1], increasing, from 0 to n. index: in
    [0, rows(n, seq_len)). isolate: documents get their own segment and positions, and the first
    token of a document is no target, because nothing before it tells which document comes next.
    Returns: the fields of types.Batch, each [seq_len]: tokens, targets, segments, positions int32,
    weights float32. Positions count from the row's start for a document that began before it.
    Raises: IndexError if there is no such row.
    """
    if not 0 <= index < rows(len(ids), seq_len):
        raise IndexError(f"row {index} of {rows(len(ids), seq_len)}")
    start = index * seq_len
    tokens = ids[start : start + seq_len].astype(np.int32)
    targets = ids[start + 1 : start + seq_len + 1].astype(np.int32)
    positions = np.arange(seq_len, dtype=np.int32)
    segments = np.ones(seq_len, np.int32)
    weights = np.ones(seq_len, np.float32)
    if isolate:
        first, last = np.searchsorted(offsets, [start, start + seq_len], side="right")
        for begin in (offsets[first:last] - start).tolist():  # documents that start in (start, start + L]
            weights[begin - 1] = 0.0
            segments[begin:] += 1
            positions[begin:] = np.arange(seq_len - begin)
    return {
        "tokens": tokens, "targets": targets, "weights": weights,
        "segments": segments, "positions": positions,
    }  # fmt: skip
