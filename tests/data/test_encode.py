"""Tokenization by processes: the same bytes for any number of them, and after any death."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import DataConfig
from nanochat_jax.data import encode, shards, text, workers

COUNT = 30
CODE = '''
import sys, time
from pathlib import Path
from nanochat_jax.config import DataConfig
from nanochat_jax.data import encode, shards
encode.BLOCK_BYTES = 600
record = encode.write_json
def slowly(path, value):
    """Every block is recorded slowly, so that a kill finds the preparation in the middle."""
    record(path, value)
    time.sleep(0.3)
encode.write_json = slowly
cfg = DataConfig(source=sys.argv[1], val_percent=20, tokenize_workers=2)
shards.prepare(cfg, 300, Path(sys.argv[2]))
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_BYTES", 600)
    root = tmp_path / "tree"
    root.mkdir()
    for i in range(COUNT):
        (root / f"{i:03}.rs").write_text(f"fn f{i}() {{ let wörd = {i * 77}; }} // 日本 😀\n" * (2 + i % 7))
    return root


def config(tree, count):
    return DataConfig(source=str(tree), val_percent=20, tokenize_workers=count)


def prepare(tree, count, cache):
    return shards.prepare(config(tree, count), 300, tree.parent / cache)


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_blocks_are_runs_of_documents_up_to_a_size(monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_BYTES", 10)
    offsets = np.array([0, 4, 9, 10, 40, 41, 45, 55])
    found = encode.blocks(offsets)
    assert found == [range(3), range(3, 4), range(4, 6), range(6, 7)]
    assert encode.blocks(np.array([0])) == []


@pytest.mark.multiprocess
def test_any_number_of_processes_gives_the_same_bytes(tree):
    alone = prepare(tree, 0, "alone")
    for count in (1, 3):
        made = prepare(tree, count, f"by{count}")
        assert contents(made.directory) == contents(alone.directory)
        assert not list(made.directory.parent.glob("*.partial"))


def test_the_ids_of_a_worker_are_those_of_the_threads(tree):
    """One text at a time, as workers encode, against batches, as the first process does."""
    texts = [path.read_text() for path in sorted(tree.iterdir())]
    made = tokenizers.train(texts, 300)
    assert [made.encode(t) for t in texts] == made.encode_batch(texts)


@pytest.mark.multiprocess
def test_a_worker_imports_neither_jax_nor_grain(tree):
    code = "import sys; import nanochat_jax.data.workers; print(sorted(m for m in ('jax', 'grain', 'flax') if m in sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


@pytest.mark.multiprocess
def test_killed_in_the_middle_and_started_again(tree, child_env):
    """kill -9 of the preparing process: its workers end, and the second start makes the same bytes."""
    whole = prepare(tree, 0, "alone")
    cache = tree.parent / "killed"
    command = [sys.executable, "-c", CODE, str(tree), str(cache)]
    child = subprocess.Popen(command, env=child_env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    made = "*.partial/*.records"
    while sum(path.read_text().count("\n") for path in cache.glob(f"{made}/ledger.jsonl")) < 3 or not list(
        cache.glob(f"{made}/progress.json")
    ):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    below = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert below, "no worker was found"
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.01)
    lines = []
    again = shards.prepare(config(tree, 2), 300, cache, lines.append)
    assert contents(again.directory) == contents(whole.directory)
    assert any("continuing after" in line for line in lines)


@pytest.fixture
def work(tree, tmp_path):
    """A gathered text and a tokenizer, as `shards` has them when it calls `workers`."""
    place = tmp_path / "work"
    (place / "records").mkdir(parents=True)
    text.gather(config(tree, 1), place, lambda line: None)
    tokenizers.byte_tokenizer().save(place / "tokenizer.json")
    return place


def run(work, count=1, stop=None):
    due = list(enumerate(encode.blocks(text.opened(work).offsets)))
    made = workers.encoded(due, "<u2", work, work / "records", work / "tokenizer.json", count)
    found = []
    for block in made:
        found.append(block)
        if len(found) == stop:
            break
    made.close()
    return found


@pytest.mark.multiprocess
def test_whole_blocks_are_used_again_and_damaged_ones_are_not(work, monkeypatch):
    whole = run(work)
    records = work / "records"
    for path in records.iterdir():
        path.unlink()
    run(work, stop=2)
    lines = filter(None, (records / "ledger.jsonl").read_text().splitlines())
    ledger = [json.loads(line)["block"] for line in lines]
    left = sorted(records.glob("*.block"))
    kept = [path for path in left if int(path.stem) in ledger]
    assert len(kept) >= 2, "nothing was made ahead, so nothing can be used again"
    raw = kept[0].read_bytes()
    kept[0].write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    asked, ask = [], workers._ask
    monkeypatch.setattr(
        workers, "_ask", lambda child, line: asked.append(int(line.split()[0])) or ask(child, line)
    )
    with open(records / "ledger.jsonl", "a") as out:
        out.write('{"block": 2, "docu')  # torn by a crash
    again = run(work)
    assert int(kept[0].stem) in asked and not {int(path.stem) for path in kept[1:]} & set(asked)
    for made, expected in zip(again, whole, strict=True):
        np.testing.assert_array_equal(made.tokens, expected.tokens)
        np.testing.assert_array_equal(made.lengths, expected.lengths)


@pytest.mark.multiprocess
def test_a_worker_that_dies_is_replaced(work, monkeypatch):
    whole, ask, died = run(work), workers._ask, []

    def deadly(child, line):
        if line.startswith("3 ") and len(died) < 2:
            died.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)
        return ask(child, line)

    monkeypatch.setattr(workers, "_ask", deadly)
    for path in (work / "records").iterdir():
        path.unlink()
    again = run(work, 2)
    assert len(set(died)) == 2
    assert all((a.tokens == b.tokens).all() for a, b in zip(again, whole, strict=True))


@pytest.mark.multiprocess
def test_a_block_that_kills_every_worker_is_named(work, monkeypatch):
    ask = workers._ask
    monkeypatch.setattr(
        workers, "_ask", lambda child, line: os.kill(child.pid, signal.SIGKILL) or ask(child, line)
    )
    with pytest.raises(
        workers.WorkerError, match=r"died 3 times on block 0 \(documents 0 to \d+\), last with status -9"
    ):
        run(work)


@pytest.mark.multiprocess
def test_an_error_in_a_worker_is_told(work):
    whole = (work / "text.bin").read_bytes()
    (work / "text.bin").write_bytes(b"\xff" + whole[1:])
    with pytest.raises(workers.WorkerError, match="block 0: UnicodeDecodeError"):
        run(work)
