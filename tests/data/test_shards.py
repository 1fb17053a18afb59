"""Prepared corpora: nothing lost, fast when known, continued when interrupted, damage named."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import encode, shards, sources
from nanochat_jax.data.sources import DataError

COUNT = 40


def text(i):
    return f"fn f{i}() {{ let wörd = {i * 77}; }} // 日本 😀\r\n" * (2 + i % 7)


def config(root, **changes):
    return DataConfig(**{"source": str(root), "tokenizer": "bytes", "val_percent": 20} | changes)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for i in range(COUNT):
        (root / f"{i:03}.rs").write_text(text(i), newline="")
    return root


def prepare(tree, progress=None, verify=False, vocab_size=300, **changes):
    cache = tree.parent / "cache"
    return shards.prepare(config(tree, **changes), vocab_size, cache, progress, verify)


def stored(made, tokens):
    """Texts of a split, as its offsets cut it."""
    ids, offsets, bos = tokens.ids[:], tokens.offsets, made.tokenizer.bos_id
    found = []
    for start, end in itertools.pairwise(offsets):
        assert ids[start] == bos and bos not in ids[start + 1 : end]
        found.append(made.tokenizer.decode(ids[start + 1 : end]))
    return found


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def no_partial(cache):
    return not list(cache.glob("*.partial"))


# --- content


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_stored_whole_in_the_split_its_hash_says(tree, tokenizer):
    made = prepare(tree, tokenizer=tokenizer)
    expected = {"train": [], "val": []}
    for i in range(COUNT):
        digest = hashlib.sha256(text(i).encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % 100 < 20
        expected["val" if held_out else "train"].append(text(i))
    assert stored(made, made.train) == expected["train"] and stored(made, made.val) == expected["val"]
    for name, tokens in (("train", made.train), ("val", made.val)):
        size = sum(len(t.encode()) for t in expected[name])
        assert made.tokenizer.token_bytes()[tokens.ids[:]].sum() == size
        assert made.manifest["counts"][name] == {
            "documents": len(expected[name]), "tokens": tokens.count, "bytes": size,
        }  # fmt: skip
    assert made.train.ids[:].dtype == np.uint16 and made.manifest["tokenizer_sha256"] == made.tokenizer.sha256
    assert no_partial(made.directory.parent)


def test_a_new_document_does_not_move_the_others_between_splits(tree):
    before = prepare(tree)
    held_out = set(stored(before, before.val))
    (tree / "000a.rs").write_text(text(1000), newline="")
    after = prepare(tree)
    assert set(stored(after, after.val)) - {text(1000)} == held_out
    assert after.sha256 != before.sha256 and after.directory != before.directory


@pytest.mark.parametrize(("count", "train", "val"), [(2, 1, 1), (3, 2, 1)])
def test_few_documents_still_have_both_splits(tree, count, train, val):
    for path in sorted(tree.iterdir())[count:]:
        path.unlink()
    lines = []
    made = prepare(tree, lines.append, val_percent=1)
    assert (len(stored(made, made.train)), len(stored(made, made.val))) == (train, val)
    assert f"only {count} documents: the last one is held out" in lines


@pytest.mark.parametrize("unit", ["line {i}\n", "日本{i} "])
def test_the_end_of_a_single_document_is_held_out(tmp_path, unit):
    book = "".join(unit.format(i=i) for i in range(2000))
    (tmp_path / "book.txt").write_text(book)
    lines = []
    made = prepare(tmp_path / "book.txt", lines.append, val_percent=10)
    train, val = stored(made, made.train) + stored(made, made.val)
    assert train + val == book and 0.08 < len(val.encode()) / len(book.encode()) < 0.12
    assert "\n" not in unit or train.endswith("\n")
    assert any("only one document" in line for line in lines)


def test_skips_are_reported_and_recorded(tree):
    (tree / "bad.rs").write_bytes(b"\xff" * 100)
    (tree / "copy.rs").write_text(text(0), newline="")
    lines = []
    made = prepare(tree, lines.append)
    assert made.manifest["skipped"] == {"undecodable": 1, "duplicate": 1}
    assert f"{COUNT} documents" in lines[-1] and "skipped: 1 duplicate, 1 undecodable" in lines[-1]


def test_an_empty_corpus_says_what_was_looked_at(tree):
    with pytest.raises(DataError, match=r"tree' has no usable document within data.max_bytes = 1; skipped: "):
        prepare(tree, max_bytes=1)
    for path in tree.iterdir():
        path.write_text("short")
    with pytest.raises(DataError, match=rf"tree' has no usable document; skipped: {COUNT} short"):
        prepare(tree)
    assert no_partial(tree.parent / "cache")


def test_the_tokenizer_learns_from_a_bounded_part_of_the_training_split(tree, monkeypatch):
    monkeypatch.setattr(shards, "TRAINING_BYTES", 2000)
    learned = []
    train = tokenizers.train

    def spy(texts, *rest):
        learned.extend(texts)
        return train(iter(learned), *rest)

    monkeypatch.setattr(tokenizers, "train", spy)
    made = prepare(tree, tokenizer="bpe")
    assert 0 < sum(len(t.encode()) for t in learned) <= 2500
    assert set(learned) <= set(stored(made, made.train))


def test_a_real_corpus(tmp_path):
    cfg = DataConfig(max_bytes=2_000_000, val_percent=5)
    made = shards.prepare(cfg, 1024, tmp_path)
    size = made.tokenizer.token_bytes()[made.train.ids[:]].sum()
    assert size == made.manifest["counts"]["train"]["bytes"] > 1_000_000
    assert 2.0 < size / made.train.count < 5.0 and made.tokenizer.vocab_size == 1024


@pytest.mark.slow
def test_large_vocabularies_take_32_bits(tree, tmp_path):
    parsed = json.loads(tokenizers.byte_tokenizer().definition)
    entry, first = parsed["added_tokens"][0], tokenizers.byte_tokenizer().vocab_size
    parsed["added_tokens"] += [entry | {"id": i, "content": f"<|{i}|>"} for i in range(first, 66_000)]
    (tmp_path / "t.json").write_text(json.dumps(parsed))
    made = prepare(tree, tokenizer=str(tmp_path / "t.json"), vocab_size=70_000)
    assert made.train.ids[:].dtype == np.uint32 and made.tokenizer.vocab_size == 66_000
    small = prepare(tree)
    np.testing.assert_array_equal(made.train.ids[:], small.train.ids[:])


# --- the cache


def forbid(monkeypatch, *names):
    for module, name in names:
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))


def test_a_known_corpus_is_opened_without_reading_the_text(tree, monkeypatch):
    first = prepare(tree)
    forbid(monkeypatch, (sources, "documents"), (shards, "_from_text"))
    lines = []
    second = prepare(tree, lines.append)
    assert second.sha256 == first.sha256 and second.directory == first.directory and not lines
    np.testing.assert_array_equal(second.train.ids[:], first.train.ids[:])


def test_other_times_or_places_with_equal_content_are_the_same_corpus(tree, monkeypatch):
    first = prepare(tree)
    os.utime(tree / "000.rs", ns=(1, 1))
    forbid(monkeypatch, (encode, "encode"), (shards, "_tokenizer"))
    assert prepare(tree).directory == first.directory
    moved = shutil.copytree(tree, tree.parent / "moved")
    assert prepare(moved).directory == first.directory
    assert len(list((tree.parent / "cache" / "requests").glob("*.json"))) == 3


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": "bpe"}, {"val_percent": 40}, {"max_bytes": 3000}],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_matter_make_another_corpus(tree, change):
    assert prepare(tree, **change).directory != prepare(tree).directory


def test_settings_that_do_not_matter_make_the_same_corpus(tree, monkeypatch):
    first = prepare(tree)
    forbid(monkeypatch, (sources, "documents"))
    assert (
        prepare(tree, seq_len=32, batch=2, isolate=False, shuffle=False, workers=0).directory
        == first.directory
    )


def test_a_changed_file_is_noticed(tree):
    first = prepare(tree)
    (tree / "000.rs").write_text(text(999), newline="")
    second = prepare(tree)
    assert second.sha256 != first.sha256
    assert text(999) in stored(second, second.train) + stored(second, second.val)


# --- interruptions and company


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9, 17])
def test_an_interrupted_preparation_continues(tree, monkeypatch, stop):
    """Stopped at any write to the disk, the second attempt gives the bytes of an undisturbed one."""
    monkeypatch.setattr(encode, "BLOCK_BYTES", 1000)
    whole = shards.prepare(config(tree, tokenizer="bpe"), 300, tree.parent / "undisturbed")
    calls, encoded = iter(range(1, 1000)), []
    fsync, encode_batch = os.fsync, tokenizers.Tokenizer.encode_batch

    def dying(handle):
        if next(calls) == stop:
            raise KeyboardInterrupt
        fsync(handle)

    monkeypatch.setattr(os, "fsync", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree, tokenizer="bpe")
    with pytest.raises(DataError, match=r"manifest\.json is unreadable"):
        shards.open_corpus(next((tree.parent / "cache").glob("*.partial")), 300)
    monkeypatch.setattr(os, "fsync", fsync)
    forbid(monkeypatch, (sources, "documents"), (tokenizers, "train"))
    monkeypatch.setattr(
        tokenizers.Tokenizer,
        "encode_batch",
        lambda self, texts: encoded.extend(texts) or encode_batch(self, texts),
    )
    made = prepare(tree, tokenizer="bpe")
    assert contents(made.directory) == contents(whole.directory)
    blocks = (stop - 1) // 4  # each block syncs four files, then is recorded
    assert (len(encoded) < COUNT) == (blocks > 0)
    assert no_partial(made.directory.parent)


def test_what_a_crash_left_after_the_last_record_is_dropped(tree, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_BYTES", 1000)
    whole = shards.prepare(config(tree), 300, tree.parent / "undisturbed")
    record = encode.write_json

    def dying(path, value):
        record(path, value)
        if path.name == "progress.json" and value["done"] > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(encode, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree)
    monkeypatch.setattr(encode, "write_json", record)
    for path in (tree.parent / "cache").glob("*.partial/*/*.*"):
        if path.suffix != ".json":
            path.write_bytes(path.read_bytes() + b"half a block")
        (path.parent / "manifest.json.1.tmp").write_text("{")
    assert contents(prepare(tree).directory) == contents(whole.directory)


def test_an_interruption_while_reading_reads_again(tree, monkeypatch):
    documents = sources.documents

    def dying(cfg, **kwargs):
        for index, document in enumerate(documents(cfg, **kwargs)):
            if index == 7:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(sources, "documents", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(tree)
    monkeypatch.setattr(sources, "documents", documents)
    made = prepare(tree)
    assert len(stored(made, made.train)) + len(stored(made, made.val)) == COUNT


def test_a_failure_leaves_nothing_behind(tree, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode", failing)
        with pytest.raises(OSError, match="Input/output"):
            prepare(tree)
    assert no_partial(tree.parent / "cache")
    assert prepare(tree).train.count


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_leaves_what_was_gathered(tree, monkeypatch, reason):
    def failing(*args, **kwargs):
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode", failing)
        with pytest.raises(OSError, match=os.strerror(reason)):
            prepare(tree)
    told = []
    made = prepare(tree, told.append)
    assert not any(line.startswith("reading") for line in told)  # not gathered again
    assert len(stored(made, made.train)) + len(stored(made, made.val)) == COUNT
    assert no_partial(tree.parent / "cache")


@pytest.mark.multiprocess
def test_several_processes_at_once(tree):
    """One works, the others wait: every one gets the same corpus, and the text is read once."""
    code = (
        "import sys; from pathlib import Path; from nanochat_jax.config import DataConfig; "
        "from nanochat_jax.data import shards; "
        "c = shards.prepare(DataConfig(source=sys.argv[1], val_percent=20), 400, Path(sys.argv[2]), print); "
        "print('sha', c.sha256)"
    )
    cache = tree.parent / "cache"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tree), str(cache)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({out.splitlines()[-1] for out in outputs}) == 1
    assert "".join(outputs).count(f"reading {tree}") == 1
    assert len([p for p in cache.iterdir() if p.name != "requests"]) == 1
    shards.open_corpus(next(p for p in cache.iterdir() if p.name != "requests"), 400, verify=True)


def test_a_preparation_waits_for_the_one_under_way(tree):
    made = prepare(tree)
    link = next((tree.parent / "cache" / "requests").glob("*.json"))
    link.unlink()
    shutil.rmtree(made.directory)
    waiting, results = threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(prepare(tree, lambda line: waiting.set())))
    lock = next((tree.parent / "cache" / "requests").glob("*.lock"))
    with shards._lock(lock, pytest.fail):
        thread.start()
        assert waiting.wait(20)
        thread.join(0.3)
        assert thread.is_alive() and not made.directory.exists() and no_partial(tree.parent / "cache")
    thread.join(20)
    assert results[0].sha256 == made.sha256


def test_without_file_locks_the_first_result_stays(tree, monkeypatch):
    """Where the system has no flock, processes work apart and only one rename succeeds."""
    monkeypatch.setattr(shards, "fcntl", None)
    make, made = shards._from_text, []

    def meanwhile(cfg, vocab_size, cache_dir, work, report):
        out = make(cfg, vocab_size, cache_dir, work, report)
        made.append(shutil.copytree(out, cache_dir / out.name))  # another process was first
        return out

    monkeypatch.setattr(shards, "_from_text", meanwhile)
    result = prepare(tree)
    assert [result.directory] == made and no_partial(result.directory.parent)


# --- damage


DAMAGE = {
    "truncated": lambda raw: raw[:-2],
    "longer": lambda raw: raw + b"\0\0",
    "flipped": lambda raw: raw[:8] + bytes([raw[8] ^ 1]) + raw[9:],
    "missing": None,
}


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.offsets", "tokenizer.json"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"expected \d+ bytes, got \d+"),
        ("longer", r"expected \d+ bytes, got \d+"),
        ("flipped", "was altered: its SHA-256 differs from the manifest"),
        ("missing", "is missing"),
    ],
)
def test_damage_is_named_with_the_way_out(tree, name, kind, message):
    made = prepare(tree)
    path = made.directory / name
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(
        DataError, match=rf"{name}.* {message}; delete .*{made.directory.name} to prepare it again"
    ):
        prepare(tree)
    shutil.rmtree(made.directory)
    assert prepare(tree).sha256 == made.sha256


def test_large_files_are_known_by_their_ends_unless_verified(tree, monkeypatch):
    monkeypatch.setattr(shards, "HASHED_BYTES", -1)
    made = prepare(tree)
    path = made.directory / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(DAMAGE["flipped"](whole))
    prepare(tree)
    with pytest.raises(DataError, match=r"train\.bin was altered"):
        prepare(tree, verify=True)
    path.write_bytes(b"\xff\xff" + whole[2:])
    with pytest.raises(DataError, match=r"train.bin holds token 65535, expected ids below 266"):
        prepare(tree)
    path.write_bytes(whole)
    offsets = made.directory / "train.offsets"
    swapped = np.fromfile(offsets, "<i8")
    swapped[1:3] = swapped[2:0:-1]
    swapped.tofile(offsets)
    with pytest.raises(DataError, match=r"train\.offsets does not belong to .*train\.bin"):
        prepare(tree)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_named(tree, content):
    made = prepare(tree)
    (made.directory / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is unreadable .*delete"):
        prepare(tree)


def test_a_corpus_without_manifest_is_made_again(tree):
    made = prepare(tree)
    (made.directory / "manifest.json").unlink()
    assert prepare(tree).sha256 == made.sha256


# --- tokenizers and settings


def test_a_given_tokenizer_is_used(tree, tmp_path):
    given = tokenizers.train((text(i) for i in range(COUNT)), 290)
    given.save(tmp_path / "given.json")
    made = prepare(tree, tokenizer=str(tmp_path / "given.json"))
    assert made.tokenizer.sha256 == given.sha256
    with pytest.raises(
        ConfigError, match=r"'model.vocab_size' = 280 is less than the 290 ids of the tokenizer"
    ):
        prepare(tree, tokenizer=str(tmp_path / "given.json"), vocab_size=280)


def test_impossible_tokenizers(tree, tmp_path):
    with pytest.raises(ConfigError, match=r"'model.vocab_size' = 265 must be at least 266"):
        prepare(tree, tokenizer="bpe", vocab_size=265)
    with pytest.raises(ConfigError, match=r"'model.vocab_size' = 265 is less than the 266 ids"):
        prepare(tree, vocab_size=265)
    with pytest.raises(
        ConfigError, match=r"'data.tokenizer' must be bpe, bpe3, bytes or a tokenizer.json, got 'bpee'"
    ):
        prepare(tree, tokenizer="bpee")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json"):
        prepare(tree, tokenizer=str(tmp_path / "bad.json"))


def test_tokens_are_picklable_also_after_a_read(tree):
    made = prepare(tree)
    ids, before = made.train.ids[:], repr(made.train)
    raw = pickle.dumps(made.train)
    assert len(raw) < 2000
    again = pickle.loads(raw)
    np.testing.assert_array_equal(again.ids[:], ids)
    np.testing.assert_array_equal(again.offsets, made.train.offsets)
    assert repr(again) == repr(made.train) == before and again == made.train
    with pytest.raises(ValueError, match="read-only"):
        made.train.ids[:][0] = 1
