"""The pool: orders that are promised, samples that come once, states that resume."""

import dataclasses
import threading
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.config import DataConfig
from nanochat_jax.data import pipeline, pool, shards
from nanochat_jax.data.sources import DataError


class Sleepy:
    """Sample k is k, after a while that depends on it."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __getitem__(self, k):
        time.sleep(self.seconds(k))
        return k


def mixed(k):
    return 0.012 if k % 5 == 1 else 0.0005


def take(stream, count):
    return [next(stream) for _ in range(count)]


def run(count, state=None, samples=None, workers=4, window=16, **options):
    """Some elements, and the state after them."""
    stream = iter(pool.Pool(samples or Sleepy(mixed), workers, window, **options))
    try:
        if state:
            stream.set_state(state)
        return take(stream, count), stream.get_state()
    finally:
        stream.close()


# --- declared order


def by_definition(flags, delay, count):
    """Sort all by (place, index), where slow ones have a later place."""
    keys = sorted((i + delay * bool(flags[i]), i) for i in range(len(flags)))
    return [i for _, i in keys][:count]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 40))
def test_declared_order_is_the_sorted_one(seed, share, delay):
    flags = np.random.default_rng(seed).random(1000) < share
    order = pool.Declared(lambda i: bool(flags[i]), delay)
    expected = by_definition(flags, delay, 600)
    assert order[pool.CHUNK + 7] == expected[pool.CHUNK + 7]  # from anywhere
    found = [order[p] for p in range(600)]
    assert found == expected
    assert max(abs(i - p) for p, i in enumerate(found)) <= delay


def test_slow_is_a_question_of_ratio():
    assert not pool.slow(np.ones(100)).any()  # a quarter of equal samples is not slow
    costs = np.r_[np.ones(80), np.full(20, 11.0)]
    assert pool.slow(costs).sum() == 20
    assert not pool.slow(np.linspace(1, 1.9, 100)).any()


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_declared_order_does_not_depend_on_threads(workers):
    flags = [k % 5 == 1 for k in range(400)]
    order = pool.Declared(lambda i: i % 5 == 1, 6)
    samples = pipeline._Reordered(Sleepy(mixed), order)
    found, state = run(80, samples=samples, workers=workers, priority=order.__getitem__, reach=6)
    assert found == by_definition(flags, 6, 80) and state == {"next_index": 80}
    rest, _ = run(40, state, samples, workers, priority=order.__getitem__, reach=6)
    assert rest == by_definition(flags, 6, 120)[80:]


def test_work_on_slow_samples_starts_at_their_own_place():
    """Deferral gives a slow sample time: it is begun before fast ones that come earlier."""
    begun, lock = [], threading.Lock()

    class Noting:
        def __getitem__(self, k):
            with lock:
                begun.append(k)
            return k

    order = pool.Declared(lambda i: i % 8 == 2, 6)
    samples = pipeline._Reordered(Noting(), order)
    run(30, samples=samples, workers=1, window=13, priority=order.__getitem__, reach=6)
    assert begun == sorted(begun)


# --- strict order


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 30), st.integers(0, 30))
def test_strict_order_is_the_order(workers, window, first, second):
    found, state = run(first, workers=workers, window=window)
    rest, _ = run(second, state, workers=workers, window=window)
    assert found + rest == list(range(first + second))


def test_grain_accepts_the_state():
    """Grain's own check: after any number of elements, a restored iterator goes on as the first one."""

    class Short(Sleepy):
        def __getitem__(self, k):
            return {"x": np.full(2, k)}

    batches = pool.Pool(Short(None), 3, 8).batch(4)
    limited = grain.experimental.LimitIterDataset(batches, count=6)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


# --- completion order


@settings(max_examples=12)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(2, 5), st.integers(2, 20))
def test_every_sample_comes_once_over_any_restarts(cuts, workers, window):
    found, state = [], None
    for cut in cuts:
        part, state = run(cut, state, workers=workers, window=window, completion=True, max_late=50)
        found += part
        assert state["emitted"] == len(found) and len(state["pending"]) <= window
    assert len(set(found)) == len(found)
    # What has not come is what the state says is pending, or not begun.
    assert sorted([*found, *state["pending"]]) == list(range(state["next"]))


def test_fast_samples_overtake_slow_ones_up_to_the_bound():
    found, _ = run(300, workers=4, window=64, completion=True, max_late=9)
    late = [place - k for place, k in enumerate(found)]
    assert 0 < max(late) <= 9 and min(late) > -64


def test_the_journal_tells_the_order_and_any_state_in_it(tmp_path):
    path = tmp_path / "order.bin"
    options = {"completion": True, "max_late": 12, "window": 16}
    found, _ = run(200, journal=path, **options)
    assert pool.read_journal(path, 0, 200).tolist() == found and path.stat().st_size == 400
    np.testing.assert_array_equal(pool.read_journal(path, 50, 10), found[50:60])
    for emitted in (0, 1, 57, 130, 200):
        told = pool.state_at(path, emitted, 12, 16)
        first = found[:emitted]
        assert told["next"] == max(first, default=-1) + 1 and told["emitted"] == emitted
        assert told["pending"] == sorted(set(range(told["next"])) - set(first))
    # A restart from the middle forgets what came later, and every sample comes once all the same.
    again, _ = run(100, pool.state_at(path, 57, 12, 16), journal=path, **options)
    known = pool.read_journal(path, 0, 157).tolist()
    assert known == found[:57] + again and len(set(known)) == 157 and path.stat().st_size == 314


def test_journals_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "order.bin"
    with pytest.raises(DataError, match=r"cannot read the order of samples in .*order.bin"):
        pool.read_journal(path, 0, 1)
    np.zeros(10, "<i2").tofile(path)
    with pytest.raises(DataError, match=r"order.bin knows the order of 10 samples, expected at least 11"):
        pool.state_at(path, 11, 5, 5)
    np.array([0, 20, -1], "<i2").tofile(path)
    assert pool.state_at(path, 3, 2, 21)["next"] == 22
    with pytest.raises(DataError, match=r"no journal of data.pool.max_late = 2 and window = 2"):
        pool.state_at(path, 3, 2, 2)


def test_a_sample_that_takes_long_is_set_aside_between_its_stages():
    """Each stage is applied once, in turn; fast samples pass while slow ones wait to be finished."""
    done, lock = [], threading.Lock()

    def stage(name, seconds):
        def apply(value):
            time.sleep(seconds(value[0]))
            with lock:
                done.append((value[0], name))
            return (*value, name)

        return apply

    class Start:
        def __getitem__(self, k):
            return (k,)

    slow = lambda k: 0.02 if k % 6 == 1 else 0.0005  # noqa: E731
    stages = (stage("a", slow), stage("b", slow), stage("c", lambda k: 0.0))
    found, _ = run(200, samples=Start(), stages=stages, completion=True, workers=4, window=32)
    assert all(value == (value[0], "a", "b", "c") for value in found)
    assert len({value[0] for value in found}) == 200
    per = {k: [name for j, name in done if j == k] for k in {v[0] for v in found}}
    assert all(names == ["a", "b", "c"] for names in per.values())
    # Some slow sample was set aside: others were finished between its first two stages.
    assert any(
        len([1 for j, name in done[done.index((k, "a")) : done.index((k, "b"))] if name == "c"]) > 5
        for k in per
        if k % 6 == 1 and k > 40
    )


def test_stages_keep_strict_order():
    found, _ = run(40, stages=(lambda k: k + 1, lambda k: 2 * k))
    assert found == [2 * (k + 1) for k in range(40)]


# --- threads and errors


@pytest.mark.parametrize("completion", [False, True])
def test_an_error_arrives_where_the_sample_would(completion):
    class Failing(Sleepy):
        def __getitem__(self, k):
            if k == 7:
                raise OSError("disk gone")
            return k

    stream = iter(pool.Pool(Failing(None), 1, 4, completion=completion, max_late=3))
    with pytest.raises(OSError, match="disk gone"):
        take(stream, 30)
    with pytest.raises(OSError, match="disk gone"):
        take(stream, 30)
    stream.close()
    with pytest.raises(ValueError, match="closed iterator"):
        next(stream)


def test_closing_ends_the_threads():
    before = threading.active_count()
    stream = iter(pool.Pool(Sleepy(mixed), 5, 8))
    next(stream)
    assert threading.active_count() == before + 5
    stream.close()
    stream.close()
    assert threading.active_count() == before


def test_closing_ends_a_wait():
    """Grain's prefetching thread may be waiting for a sample when its owner closes."""
    gate, errors = threading.Event(), []

    class Stuck:
        def __getitem__(self, k):
            gate.wait(20)
            return k

    stream = iter(pool.Pool(Stuck(), 1, 4))

    def wait():
        try:
            next(stream)
        except ValueError as error:
            errors.append(str(error))

    consumer = threading.Thread(target=wait)
    consumer.start()
    closing = threading.Thread(target=stream.close)
    while not stream._threads:
        time.sleep(0.001)
    closing.start()
    consumer.join(10)
    assert not consumer.is_alive() and "closed" in errors[0]
    gate.set()
    closing.join(10)
    assert not closing.is_alive()


def test_no_more_than_the_window_is_begun():
    begun = []

    class Noting(Sleepy):
        def __getitem__(self, k):
            begun.append(k)
            return k

    for completion in (False, True):
        begun.clear()
        stream = iter(pool.Pool(Noting(None), 3, 10, completion=completion))
        take(stream, 5)
        time.sleep(0.05)
        assert len(begun) <= 15
        stream.close()


@pytest.mark.parametrize(("workers", "window", "reach"), [(0, 4, 0), (2, 0, 0), (2, 4, 4)])
def test_impossible_pools(workers, window, reach):
    with pytest.raises(ValueError, match="must be at least 1"):
        pool.Pool(Sleepy(mixed), workers, window, reach=reach)


# --- in the pipeline

FIELDS = {"tokens", "targets", "weights", "segments", "positions"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for i in range(30):
        (root / f"{i:03}.rs").write_text(f"fn f{i}() {{}} // {'x' * 60}\n" * (1 + 12 * (i % 4 == 0)))
    return shards.prepare(config(source=str(root)), 300, tmp_path_factory.mktemp("cache"))


def config(source="x", **order):
    policy = dataclasses.replace(DataConfig().pool, **order)
    return DataConfig(
        source=source, tokenizer="bytes", seq_len=48, batch=4, val_percent=20, workers=3, pool=policy
    )


def batches(cfg, corpus, count, start=0, shard=(0, 1), **options):
    with pipeline.batches(cfg, corpus, 3, start, shard, **options) as stream:
        return [next(stream) for _ in range(count)]


def rows(found):
    return [row.tobytes() for batch in found for row in batch["tokens"]]


@pytest.mark.parametrize("count", [1, 2])
def test_declared_batches_are_a_function_of_seed_and_step(corpus, count):
    cfg = config(order="declared", delay=5, window=12)
    strict = [pipeline.batch_at(config(), corpus, 3, step) for step in range(30)]
    expected = [pipeline.batch_at(cfg, corpus, 3, step) for step in range(30)]
    assert rows(expected) != rows(strict), "no row was late, so nothing was tested"
    parts = [batches(cfg, corpus, 15, 11, (index, count)) for index in range(count)]
    for step in range(15):
        for name in FIELDS:
            whole = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(whole, expected[11 + step][name])
    # The same rows, none of them more than `delay` places away.
    assert sorted(rows(expected)[:200]) != rows(strict)[:200]
    assert set(rows(strict)[:100]) <= set(rows(expected)[:105])


def test_costs_may_be_given(corpus):
    costs = np.zeros(len(pipeline._order(config(), corpus, 3)[1]))
    cfg = config(order="declared", delay=5, window=12)
    assert rows(batches(cfg, corpus, 10, costs=costs)) == rows(batches(config(), corpus, 10))


def test_completion_order_resumes_and_replays(corpus, tmp_path):
    cfg = config(order="completion", window=10, max_late=20)
    slow = lambda row: time.sleep(0.004 * (row["tokens"][0] % 5 == 0)) or row  # noqa: E731
    path = tmp_path / "data_order.bin"
    first = batches(cfg, corpus, 12, journal=path, stages=(slow,))
    second = batches(cfg, corpus, 8, 7, journal=path, stages=(slow,))  # step 7 is where a checkpoint was
    seen = rows(first)[:28] + rows(second)
    strict = rows(pipeline.batch_at(config(), corpus, 3, step) for step in range(60))
    order = pool.read_journal(path, 0, 60)
    assert len(set(order.tolist())) == 60 and [strict[i] for i in order] == seen
    # Repeated from the journal: the same rows, from any step on.
    again = config(order="completion", window=10, replay=str(path))
    assert rows(batches(again, corpus, 15)) == seen
    assert rows(batches(again, corpus, 5, 10)) == seen[40:]
    with pytest.raises(DataError, match=r"knows the order of \d+ rows, and they are through"):
        batches(again, corpus, 100)
    with pytest.raises(ValueError, match="completion order needs a journal"):
        batches(cfg, corpus, 1)


def test_each_host_has_its_journal(corpus, tmp_path):
    cfg = config(order="completion", window=6, max_late=9)
    parts = [batches(cfg, corpus, 10, 0, (index, 2), journal=tmp_path / "o.bin") for index in (0, 1)]
    names = [f"o.{index}-of-2.bin" for index in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    strict = [rows(batches(config(), corpus, 30, 0, (index, 2))) for index in (0, 1)]
    again = config(order="completion", window=6, replay=str(tmp_path / "o.bin"))
    for index in (0, 1):
        order = pool.read_journal(tmp_path / names[index], 0, 20)
        assert [strict[index][i] for i in order] == rows(parts[index])
        assert rows(batches(again, corpus, 10, 0, (index, 2))) == rows(parts[index])


def test_stages_are_applied_in_strict_order_too(corpus):
    double = lambda row: row | {"tokens": 2 * row["tokens"]}  # noqa: E731
    for made, plain in zip(
        batches(config(), corpus, 6, stages=(double,)), batches(config(), corpus, 6), strict=True
    ):
        np.testing.assert_array_equal(made["tokens"], 2 * plain["tokens"])
