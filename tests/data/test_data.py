"""Sources, token files, packing and the pipeline: nothing lost, nothing repeated, any bytes, any host."""

import gzip
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing, pipeline, shards, sources
from nanochat_jax.data.sources import DataError

TEXT = "fn main() {{ println!(\"{i}\"); }} // number {i}, and some more words to be long enough\n"


def folder(tmp_path, count=30):
    root = tmp_path / "corpus"
    if root.exists():  # rewriting the files would make them newer, and so another corpus
        return root
    root.mkdir()
    for i in range(count):
        (root / f"{i:03}.rs").write_text(TEXT.format(i=i) * (1 + i % 5))
    return root


def config(root, **changes):
    return DataConfig(**{"source": str(root), "tokenizer": "bytes", "seq_len": 16, "batch": 4, "val_percent": 10} | changes)


def corpus(tmp_path, **changes):
    return shards.prepare(config(folder(tmp_path), **changes), 300, tmp_path / "cache")


# --- tokenizer


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_round_trip(data):
    tokenizer = tokenizers.byte_tokenizer()
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.token_bytes()[ids].sum() == len(data)


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train([TEXT.format(i=i) for i in range(200)] + ["def f(x):\n    return x\r\n" * 9], 400)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=100))
def test_bpe_round_trips_and_counts_bytes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes()[ids].sum() == len(text.encode())


def test_bpe_is_deterministic_and_survives_a_file(bpe, tmp_path):
    again = tokenizers.train([TEXT.format(i=i) for i in range(200)] + ["def f(x):\n    return x\r\n" * 9], 400)
    assert again.sha256 == bpe.sha256 and bpe.vocab_size <= 400
    bpe.save(tmp_path / "t.json")
    assert tokenizers.load(tmp_path / "t.json").sha256 == bpe.sha256
    assert bpe.decode_bytes(bpe.encode_bytes(b"\xff\xfe\x00abc")) == b"\xff\xfe\x00abc"


def test_text_cannot_forge_special_tokens(bpe):
    for tokenizer in (bpe, tokenizers.byte_tokenizer()):
        ids = tokenizer.encode("hello <|bos|> <|user_start|> 😀 日本")
        assert min(ids) >= len(tokenizers.SPECIAL)
        assert tokenizer.decode(ids) == "hello <|bos|> <|user_start|> 😀 日本"
        assert [tokenizer.special_id(name) for name in tokenizers.SPECIAL] == list(range(len(tokenizers.SPECIAL)))
        assert not tokenizer.token_bytes()[: len(tokenizers.SPECIAL)].any()


def test_tokenizer_errors(tmp_path, bpe):
    with pytest.raises(ValueError, match="vocabulary of 100 is too small"):
        tokenizers.train(["x"], 100)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizer.json"):
        tokenizers.load(tmp_path / "bad.json")
    with pytest.raises(KeyError, match="no special token '<|eos|>'"):
        bpe.special_id("<|eos|>")
    with pytest.raises(ValueError, match="out of range"):
        bpe.decode([10**6])


# --- sources


def test_skips_are_counted(tmp_path):
    root = folder(tmp_path, 3)
    (root / "a.rs").write_bytes(b"\xff\xfe" * 100)
    (root / "b.rs").write_text("short")
    (root / "c.rs").write_text("x" * 5000)
    (root / "d.rs").write_text("y " * 600_000)
    (root / "e.rs").write_text((root / "000.rs").read_text())
    skipped = Counter()
    names = [d.name for d in sources.documents(config(root), skipped)]
    assert names == ["000.rs", "001.rs", "002.rs"]
    assert skipped == {"undecodable": 1, "short": 1, "long line": 1, "long": 1, "duplicate": 1}


def test_json_lines_parquet_and_limits(tmp_path):
    texts = [TEXT.format(i=i) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps({"body": t + "!"}) + "\n" for t in texts))
    assert [d.text for d in sources.documents(config(tmp_path / "a.jsonl"))] == texts
    body = config(tmp_path / "b.jsonl.gz", text_key="body")
    assert [d.text for d in sources.documents(body)] == [t + "!" for t in texts]
    assert len(list(sources.documents(config(tmp_path / "a.jsonl", max_bytes=200)))) == 2
    with pytest.raises(DataError, match=r"a.jsonl:1 has no field 'body' .*fields: text"):
        list(sources.documents(config(tmp_path / "a.jsonl", text_key="body")))
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1 is not JSON"):
        list(sources.documents(config(tmp_path / "bad.jsonl")))
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the 'data' extra")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    assert [d.text for d in sources.documents(config(tmp_path / "c.parquet"))] == texts
    with pytest.raises(DataError, match="has no column 'body'"):
        list(sources.documents(config(tmp_path / "c.parquet", text_key="body")))


@pytest.mark.interop
def test_hub_datasets_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets", reason="the 'data' extra is not installed")
    texts = [TEXT.format(i=i) for i in range(4)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert [d.text for d in sources.documents(config(f"hf:{tmp_path / 'set'}"))] == texts


def test_missing_sources_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="matches no file; expected stdlib, rust, hf:<dataset>"):
        sources.files(str(tmp_path / "nothing"))
    monkeypatch.setattr(sources, "rust_roots", lambda: [])
    with pytest.raises(DataError, match="apt install rust-src.*rustup component add rust-src"):
        sources.files("rust")
    with pytest.raises(sources.MissingExtra, match=r'this needs the .data. extra: pip install "nanochat_jax\[data\]"'):
        sources.need("no_such_module_at_all", "data")


def test_rust_sources_are_found_where_tools_put_them(tmp_path):
    home, system = tmp_path / "home", tmp_path / "system"
    for path in (
        home / ".rustup/toolchains/stable/lib/rustlib/src", home / ".cargo/registry/src",
        system / "usr/src/rustc-1.63.0", system / "usr/share/cargo/registry",
    ):  # fmt: skip
        path.mkdir(parents=True)
    assert len(sources.rust_roots(home, system)) == 4


def test_stdlib_is_there():
    _, found = sources.files("stdlib")
    assert len(found) > 500 and not any("site-packages" in p.parts for p in found)


# --- token files


def test_second_preparation_is_the_same_and_reads_nothing(tmp_path, monkeypatch):
    first = corpus(tmp_path)
    monkeypatch.setattr(sources, "documents", lambda *a: pytest.fail("read again"))
    second = corpus(tmp_path)
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.train.ids, second.train.ids)


def test_every_document_is_stored_whole(tmp_path):
    made = corpus(tmp_path)
    documents = {d.text for d in sources.documents(config(folder(tmp_path)))}
    stored = set()
    for split in (made.train, made.val):
        for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            ids = split.ids[start:end]
            assert ids[0] == made.tokenizer.bos_id
            stored.add(made.tokenizer.decode(ids[1:]))
    assert stored == documents and made.val.count > 0


def test_a_changed_file_makes_a_new_corpus(tmp_path):
    first = corpus(tmp_path)
    (tmp_path / "corpus" / "000.rs").write_text(TEXT.format(i=999) * 3)
    assert shards.prepare(config(tmp_path / "corpus"), 300, tmp_path / "cache").sha256 != first.sha256


def test_damage_is_named(tmp_path):
    made = corpus(tmp_path)
    path = made.directory / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"train.bin has \d+ bytes, expected \d+; delete .* to prepare it again"):
        corpus(tmp_path)
    path.write_bytes(b"\xff\xff" + whole[2:])
    with pytest.raises(DataError, match="train.bin holds token 65535, but the vocabulary has 266 ids"):
        corpus(tmp_path)
    flipped = bytearray(whole)
    flipped[40] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="train.bin was altered"):
        shards.open_corpus(made.directory, 300, verify=True)
    path.unlink()
    with pytest.raises(DataError, match="train.bin has None bytes"):
        corpus(tmp_path)


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_encode", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        corpus(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_empty_corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "a.rs").write_text("tiny")
    with pytest.raises(DataError, match=r"has no usable document \(1 short\)"):
        shards.prepare(config(root), 300, tmp_path / "cache")


@pytest.mark.parametrize("header", [False, True])
def test_token_files_of_others(tmp_path, header):
    ids = (np.arange(5000) % 260).astype("<u2")
    path = tmp_path / "tokens.bin"
    top = np.zeros(256, "<i4")
    top[:3] = shards.LLM_C_MAGIC, 1, len(ids)
    path.write_bytes((top.tobytes() if header else b"") + ids.tobytes())
    made = shards.prepare(config(f"tokens:{path}"), 300, tmp_path)
    np.testing.assert_array_equal(np.concatenate([made.train.ids, made.val.ids]), ids)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="header says|no whole number"):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path)


def test_a_16_bit_file_read_as_32_bit_is_noticed(tmp_path):
    path = tmp_path / "tokens.u32"
    path.write_bytes((np.arange(5000) % 260).astype("<u2").tobytes())
    with pytest.raises(DataError, match="holds token .* but the vocabulary has 266 ids; check data.tokenizer"):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path)


# --- packing


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 17))
def test_packing_conserves_tokens_and_separates_documents(lengths, seq_len):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)])
    seen = []
    for i in range(packing.rows(len(ids), seq_len)):
        row = packing.window(ids, offsets, i, seq_len, True)
        seen.extend(row["tokens"])
        np.testing.assert_array_equal(row["targets"], ids[i * seq_len + 1 : i * seq_len + seq_len + 1])
        document = row["tokens"] // 1000
        assert np.array_equal(np.diff(row["segments"]) > 0, np.diff(document) > 0)
        assert np.array_equal(row["weights"] == 0, row["targets"] // 1000 != document)
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        assert np.all(row["positions"][starts] == 0) and np.all(np.diff(row["positions"])[np.diff(document) == 0] == 1)
        flat = packing.window(ids, offsets, i, seq_len, False)
        assert np.all(flat["segments"] == 1) and np.all(flat["weights"] == 1)
    np.testing.assert_array_equal(seen, ids[: len(seen)])


# --- pipeline


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_are_a_function_of_seed_and_step(tmp_path, workers):
    made = corpus(tmp_path)
    cfg = config(tmp_path / "corpus", workers=workers)
    stream = pipeline.batches(cfg, made, 7)
    for step in range(12):
        assert equal(next(stream), pipeline.batch_at(cfg, made, 7, step))
    stream.close()
    later = pipeline.batches(cfg, made, 7, start=500)
    assert equal(next(later), pipeline.batch_at(cfg, made, 7, 500))
    later.close()
    assert not equal(pipeline.batch_at(cfg, made, 7, 0), pipeline.batch_at(cfg, made, 8, 0))


def test_hosts_share_the_global_batch(tmp_path):
    made, cfg = corpus(tmp_path), config(tmp_path / "corpus")
    parts = [pipeline.batches(cfg, made, 0, 3, (i, 2)) for i in range(2)]
    got = [next(part) for part in parts]
    whole = pipeline.batch_at(cfg, made, 0, 3)
    assert all(np.array_equal(np.concatenate([g[n] for g in got]), whole[n]) for n in whole)
    with pytest.raises(DataError, match="multiple of the 3 data shards"):
        pipeline.batches(cfg, made, 0, 0, (0, 3)).__next__()


def test_epochs_are_different_permutations(tmp_path):
    made, cfg = corpus(tmp_path), config(tmp_path / "corpus", batch=1)
    rows = packing.rows(made.train.count, cfg.seq_len)

    def order(epoch):
        return [pipeline.batch_at(cfg, made, 0, epoch * rows + i)["tokens"].tobytes() for i in range(rows)]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) and first != second


def test_validation_covers_the_split_and_pads_the_end(tmp_path):
    made, cfg = corpus(tmp_path), config(tmp_path / "corpus")
    batches = pipeline.val_batches(cfg, made)
    rows = packing.rows(made.val.count, cfg.seq_len)
    assert sum(int(b["segments"].any(1).sum()) for b in batches) == rows
    assert all(b["tokens"].shape == (4, 16) for b in batches)
    assert len(pipeline.val_batches(cfg, made, 1)) == 1


def test_too_little_data(tmp_path):
    made = corpus(tmp_path)
    with pytest.raises(DataError, match="fewer than data.batch = 100000"):
        pipeline.batch_at(config(tmp_path / "corpus", batch=100000), made, 0, 0)
    with pytest.raises(DataError, match="less than one row of data.seq_len"):
        pipeline.val_batches(config(tmp_path / "corpus", seq_len=100000), made)


def test_tokens_are_picklable_without_their_maps(tmp_path):
    made = corpus(tmp_path)
    ids = np.array(made.train.ids)
    raw = pickle.dumps(made.train)
    assert len(raw) < 2000
    np.testing.assert_array_equal(pickle.loads(raw).ids, ids)
    assert isinstance(made.train.path, Path)
