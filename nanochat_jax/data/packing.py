"""Documents to rows of fixed length: concatenated and cut, or (conversations) each whole in one row.

Concatenated: row i holds the tokens i*L .. i*L + L of the concatenated split, and targets are the same tokens one
later: shifted here and nowhere else. No token is padding and none is lost, except the last partial
row and the very first token, which nothing precedes. On source code, packing whole documents
instead would crop most of them away.

Whole: a conversation that was cut in two would lose the question to its answer, so rows are filled with
whole ones, best fit, the longest first; what is left of a row is padding, and only what is longer than a
row loses its end. Targets are shifted here as well, and nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.stored import Stored

Ids = np.ndarray | Stored  # whatever has a length, and slices that are arrays


class Layout(NamedTuple):
    """Whole documents in rows: row i holds documents order[first[i]:first[i + 1]]."""

    order: np.ndarray  # int64 [documents]
    first: np.ndarray  # int64 [rows + 1]


def rows(count: int, seq_len: int) -> int:
    """Full rows in a split of `count` tokens."""
    return max(0, (count - 1) // seq_len)


def window(ids: Ids, offsets: np.ndarray, index: int, seq_len: int, isolate: bool) -> dict[str, np.ndarray]:
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
    own = ids[start : start + seq_len + 1]
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
        "tokens": own[:-1].astype(np.int32), "targets": own[1:].astype(np.int32), "weights": weights,
        "segments": segments, "positions": positions,
    }  # fmt: skip


def best_fit(offsets: np.ndarray, seq_len: int) -> Layout:
    """Put each document into the fullest row that has room for it, the longest documents first.

    A document of n tokens takes n - 1 places (its last one is a target only), and at most a row.
    Args: offsets: int64 [documents + 1], increasing.
    Returns: the layout; documents of a row are in their order, and rows in that of their first documents.
    """
    places = np.minimum(np.diff(offsets) - 1, seq_len)
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows by the places that are left
    some = 0  # bit r: there is a row with r places left
    rows: list[list[int]] = []
    for document in np.argsort(-places, kind="stable").tolist():
        need = int(places[document])
        if fitting := some >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(document)
        with_room[room - need].append(row)
        some |= 1 << (room - need)
    rows = sorted(sorted(row) for row in rows)
    order = np.array([document for row in rows for document in row], np.int64)
    return Layout(order, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def cut_off(offsets: np.ndarray, seq_len: int) -> tuple[int, int]:
    """(documents that are longer than a row, tokens at their ends that no whole row has as a target)."""
    over = np.diff(offsets) - 1 - seq_len
    return int((over > 0).sum()), int(over[over > 0].sum())


def whole(
    ids: Ids,
    offsets: np.ndarray,
    layout: Layout,
    index: int,
    seq_len: int,
    isolate: bool,
    learned: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Row `index` of a layout.

    Args: as `window`; learned: (tokens of a document [n]) -> bool [n], those that have weight 1 as targets.
    Returns: as `window`. Padding is token 0 of segment 0 with weight 0; without `isolate` all documents are
    segment 1, and positions count through.
    Raises: IndexError if there is no such row.
    """
    count = len(layout.first) - 1
    if not 0 <= index < count:
        raise IndexError(f"row {index} of {count}")
    row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "segments")}
    weights, positions, at = np.zeros(seq_len, np.float32), np.arange(seq_len, dtype=np.int32), 0
    members = layout.order[layout.first[index] : layout.first[index + 1]]
    for segment, document in enumerate(members.tolist(), 1):
        own = ids[offsets[document] : min(offsets[document + 1], offsets[document] + seq_len + 1)]
        place = slice(at, at + len(own) - 1)
        row["tokens"][place], row["targets"][place] = own[:-1], own[1:]
        weights[place] = learned(own)[1:]
        row["segments"][place] = segment if isolate else 1
        if isolate:
            positions[place] = np.arange(len(own) - 1)
        at = place.stop
    return row | {"weights": weights, "positions": positions}
