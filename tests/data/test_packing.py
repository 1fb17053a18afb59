"""Packing: no token lost or repeated, documents separated, targets shifted once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data import packing

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def split(lengths):
    """Documents whose tokens say where they are: 1000 * (document + 1) + position."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint16)
    return ids, offsets


def all_rows(ids, offsets, seq_len, isolate):
    rows = [packing.window(ids, offsets, i, seq_len, isolate) for i in range(packing.rows(len(ids), seq_len))]
    return {name: np.array([row[name] for row in rows]).reshape(-1, seq_len) for name in NAMES}


NAMES = {
    "tokens": np.int32, "targets": np.int32, "weights": np.float32, "segments": np.int32,
    "positions": np.int32,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(2, 17), st.booleans())
def test_every_token_is_a_target_once_except_the_counted_ones(lengths, seq_len, isolate):
    ids, offsets = split(lengths)
    made = all_rows(ids, offsets, seq_len, isolate)
    count = packing.rows(len(ids), seq_len) * seq_len
    tail = len(ids) - 1 - count  # the last partial row
    assert 0 <= tail < seq_len
    np.testing.assert_array_equal(made["tokens"].ravel(), ids[:count])
    np.testing.assert_array_equal(made["targets"].ravel(), ids[1 : count + 1])
    learned = np.sort(made["targets"][made["weights"] == 1])
    firsts = ids[offsets[1:-1]][offsets[1:-1] <= count] if isolate else []
    expected = np.setdiff1d(ids[1 : count + 1], firsts)  # ids are unique and increasing
    np.testing.assert_array_equal(learned, expected)
    assert len(learned) + len(firsts) + tail + 1 == len(ids)
    assert set(np.unique(made["weights"])) <= {0.0, 1.0}


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(2, 17))
def test_segments_and_positions_follow_the_documents(lengths, seq_len):
    """Oracle: token by token, from the ids alone."""
    ids, offsets = split(lengths)
    made = all_rows(ids, offsets, seq_len, True)
    for row in range(len(made["tokens"])):
        segment, position, before = 0, 0, None
        for t, (token, target) in enumerate(
            zip(made["tokens"][row].tolist(), made["targets"][row].tolist(), strict=True)
        ):
            if token // 1000 != before:
                segment, position, before = segment + 1, 0, token // 1000
            assert made["segments"][row, t] == segment
            assert made["positions"][row, t] == position
            assert made["weights"][row, t] == (token // 1000 == target // 1000)
            position += 1


def test_a_row_by_hand():
    ids = np.array([0, 5, 6, 0, 7, 0, 0, 8, 9], np.uint16)
    row = packing.window(ids, np.array([0, 3, 5, 6, 9]), 0, 8, True)
    assert {name: value.tolist() for name, value in row.items()} == {
        "tokens": [0, 5, 6, 0, 7, 0, 0, 8],
        "targets": [5, 6, 0, 7, 0, 0, 8, 9],
        "weights": [1, 1, 0, 1, 0, 0, 1, 1],
        "segments": [1, 1, 1, 2, 2, 3, 4, 4],
        "positions": [0, 1, 2, 0, 1, 0, 0, 1],
    }


def test_without_isolation_a_row_is_one_document():
    ids, offsets = split([3, 4, 5])
    row = packing.window(ids, offsets, 0, 8, False)
    assert row["segments"].tolist() == [1] * 8 and row["weights"].tolist() == [1] * 8
    assert row["positions"].tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_types_and_no_views(dtype):
    """Rows are copies: batches must not pin or change what they are made of."""
    ids, offsets = split([20])
    ids = ids.astype(dtype)
    row = packing.window(ids, offsets, 1, 5, True)
    assert {name: value.dtype for name, value in row.items()} == {n: np.dtype(t) for n, t in NAMES.items()}
    assert not any(np.shares_memory(value, ids) for value in row.values())
    assert not np.shares_memory(row["tokens"], row["targets"])


def test_rows_and_their_limits():
    assert [packing.rows(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    ids, offsets = split([9])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            packing.window(ids, offsets, index, 4, True)
