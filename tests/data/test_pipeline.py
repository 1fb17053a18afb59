"""Batches: a function of (seed, step), whatever the hosts, threads and restarts."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing, pipeline, shards
from nanochat_jax.data.sources import DataError

CFG = DataConfig(tokenizer="bytes", seq_len=16, batch=4, val_percent=20)
FIELDS = {"tokens", "targets", "weights", "segments", "positions"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for i in range(30):
        (root / f"{i:03}.rs").write_text(
            f"fn f{i}() {{ {i * 77} }} // number {i}, long enough to count here\n" * (1 + i % 5)
        )
    return shards.prepare(change(source=str(root)), 300, tmp_path_factory.mktemp("cache"))


def change(**changes):
    return DataConfig(**(vars(CFG) | changes))


def assert_equal(made, expected):
    assert made.keys() == expected.keys() == FIELDS
    for name in FIELDS:
        np.testing.assert_array_equal(made[name], expected[name])
        assert made[name].dtype == expected[name].dtype


def take(count, *args, **kwargs):
    with pipeline.batches(*args, **kwargs) as stream:
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("prefetch", [1, 7])
def test_batches_do_not_depend_on_threads(corpus, workers, prefetch):
    for step, batch in enumerate(take(40, change(workers=workers, prefetch=prefetch), corpus, 7)):
        assert_equal(batch, pipeline.batch_at(CFG, corpus, 7, step))
        assert batch["tokens"].shape == (4, 16)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), start=st.integers(0, 10**9))
def test_seeking_equals_reading_on(corpus, seed, start):
    later = take(3, change(workers=1), corpus, seed, start)
    for step, batch in enumerate(later, start):
        assert_equal(batch, pipeline.batch_at(CFG, corpus, seed, step))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_in_order_make_up_the_global_batch(corpus, count):
    parts = [take(5, CFG, corpus, 3, 11, (index, count)) for index in range(count)]
    for step in range(5):
        whole = {name: np.concatenate([part[step][name] for part in parts]) for name in FIELDS}
        assert_equal(whole, pipeline.batch_at(CFG, corpus, 3, 11 + step))


def test_an_epoch_has_every_row_once_and_the_next_another_order(corpus):
    rows = packing.rows(corpus.train.count, CFG.seq_len)
    one = change(batch=1)
    assert pipeline.epoch_steps(one, corpus) == rows and pipeline.epoch_steps(CFG, corpus) == rows / 4
    ids, offsets = corpus.train.ids, corpus.train.offsets
    known = sorted(packing.window(ids, offsets, i, 16, True)["tokens"].tobytes() for i in range(rows))
    epochs = [
        [pipeline.batch_at(one, corpus, 0, epoch * rows + i)["tokens"].tobytes() for i in range(rows)]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == known for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_give_other_orders(corpus):
    orders = {pipeline.batch_at(CFG, corpus, seed, 0)["tokens"].tobytes() for seed in range(5)}
    assert len(orders) == 5


def test_without_shuffling_rows_come_in_order(corpus):
    rows = packing.rows(corpus.train.count, CFG.seq_len)
    for step, batch in enumerate(take(2 * rows // 4, change(shuffle=False), corpus, 0)):
        for at in range(4):
            index = (4 * step + at) % rows
            expected = packing.window(corpus.train.ids, corpus.train.offsets, index, 16, True)
            assert_equal({name: batch[name][at] for name in batch}, expected)


def test_isolation_is_passed_on(corpus):
    batch = pipeline.batch_at(change(isolate=False, batch=32), corpus, 0, 0)
    assert (batch["segments"] == 1).all() and (batch["weights"] == 1).all()
    isolated = pipeline.batch_at(change(batch=32), corpus, 0, 0)
    assert isolated["segments"].max() > 1 and (isolated["weights"] == 0).any()


def test_a_batch_may_be_changed_by_its_owner(corpus):
    before = pipeline.batch_at(CFG, corpus, 0, 0)
    first = take(1, change(workers=0), corpus, 0)[0]
    first["tokens"][:] = -1
    assert_equal(pipeline.batch_at(CFG, corpus, 0, 0), before)


def test_closing_stops_the_threads(corpus):
    before = threading.active_count()
    stream = pipeline.batches(change(workers=3), corpus, 0)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    stream.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert list(stream) == []
    pipeline.batches(CFG, corpus, 0).close()  # never begun


@pytest.mark.multiprocess
def test_another_process_makes_the_same_batches(corpus):
    code = (
        "import hashlib, sys; from pathlib import Path; from nanochat_jax.config import DataConfig; "
        "from nanochat_jax.data import pipeline, shards; "
        "corpus = shards.open_corpus(Path(sys.argv[1]), 300); "
        "cfg = DataConfig(tokenizer='bytes', seq_len=16, batch=4); "
        "print(hashlib.sha256(b''.join(pipeline.batch_at(cfg, corpus, 5, s)['tokens'].tobytes() "
        "for s in range(20))).hexdigest())"
    )
    here = b"".join(pipeline.batch_at(CFG, corpus, 5, step)["tokens"].tobytes() for step in range(20))
    child = subprocess.run(
        [sys.executable, "-c", code, str(corpus.directory)], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == hashlib.sha256(here).hexdigest()


# --- held-out batches


@pytest.mark.parametrize("batch", [1, 3, 4, 1000])
def test_held_out_batches_cover_the_split_in_order(corpus, batch):
    cfg = change(batch=batch)
    made = pipeline.val_batches(cfg, corpus)
    rows = packing.rows(corpus.val.count, 16)
    assert len(made) == -(-rows // batch)
    flat = {name: np.concatenate([b[name] for b in made]) for name in FIELDS}
    assert all(value.shape == (len(made) * batch, 16) for value in flat.values())
    for index in range(rows):
        expected = packing.window(corpus.val.ids, corpus.val.offsets, index, 16, True)
        assert_equal({name: flat[name][index] for name in FIELDS}, expected)
    for name in FIELDS:
        assert not flat[name][rows:].any()
    for first, again in zip(made, made, strict=True):  # as often as wanted
        assert_equal(first, again)


def test_held_out_batches_are_a_sequence(corpus):
    made = pipeline.val_batches(CFG, corpus)
    assert_equal(made[-1], made[len(made) - 1])
    assert len(made[:2]) == 2
    with pytest.raises(IndexError):
        made[len(made)]


def test_limited_held_out_batches_are_spread_over_the_split(corpus):
    made = pipeline.val_batches(CFG, corpus, 2)
    everything = pipeline.val_batches(change(batch=1), corpus)
    assert len(made) == 2
    assert_equal({n: v[:1] for n, v in made[0].items()}, everything[0])
    assert_equal({n: v[-1:] for n, v in made[1].items()}, everything[-1])
    assert len({row.tobytes() for b in made for row in b["tokens"]}) == 8
    assert len(pipeline.val_batches(CFG, corpus, 10**6)) == len(pipeline.val_batches(CFG, corpus))


# --- errors


def test_too_little_data(corpus):
    with pytest.raises(DataError, match=r"\d+ rows of data.seq_len = 16, fewer than data.batch = 100000"):
        pipeline.batches(change(batch=100000), corpus, 0)
    with pytest.raises(DataError, match=r"held-out split has .* less than one row of data.seq_len = 100000"):
        pipeline.val_batches(change(seq_len=100000), corpus)


@pytest.mark.parametrize(("shard", "start"), [((0, 3), 0), ((2, 2), 0), ((-1, 2), 0), ((0, 1), -1)])
def test_impossible_shards_and_starts(corpus, shard, start):
    with pytest.raises(ValueError, match="must be a"):
        pipeline.batches(CFG, corpus, 0, start, shard)


def test_nothing_here_calls_jax():
    """Data is made by threads on the host; a device call there would block or start a device."""
    for module in (pipeline, shards, packing):
        assert "import jax" not in Path(module.__file__).read_text()
