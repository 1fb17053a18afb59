"""Documents to rows of fixed length: concatenate, then cut.

Row i holds the tokens i*L .. i*L + L of the concatenated split, and targets are the same tokens one
later: shifted here and nowhere else. No token is padding and none is lost (except the last partial
row). On source code, packing whole documents instead would crop most of them away.
"""

import numpy as np


def rows(count: int, seq_len: int) -> int:
    """Full rows in a split of `count` tokens."""
    return max(0, (count - 1) // seq_len)


def window(
    ids: np.ndarray, offsets: np.ndarray, index: int, seq_len: int, isolate: bool
) -> dict[str, np.ndarray]:
    """Row `index` of a split.

    Args: ids: [n] tokens. offsets: int64 [documents + 1], increasing, from 0 to n. isolate:
    documents get their own segment and positions, and the first token of a document is no target.
    Returns: the fields of types.Batch, each [seq_len]: tokens, targets, segments, positions int32,
    weights float32.
    """
    start = index * seq_len
    piece = np.asarray(ids[start : start + seq_len + 1], np.int32)
    positions = np.arange(seq_len, dtype=np.int32)
    segments = np.ones(seq_len, np.int32)
    weights = np.ones(seq_len, np.float32)
    if isolate:
        first, last = np.searchsorted(offsets, [start, start + seq_len], side="right")
        cuts = offsets[first:last] - start  # document starts inside (start, start + seq_len]
        weights[cuts - 1] = 0.0  # the token before a start cannot know what comes
        cuts = cuts[cuts < seq_len]
        segments[cuts] = 1
        segments = np.cumsum(np.where(np.isin(positions, cuts), 1, 0)).astype(np.int32) + 1
        begins = np.concatenate([[0], cuts])[segments - 1]
        positions = (positions - begins).astype(np.int32)
    return {
        "tokens": piece[:-1], "targets": piece[1:], "weights": weights,
        "segments": segments, "positions": positions,
    }  # fmt: skip
