"""Sources behind URLs: fsspec's memory store, and stores that fail."""

import dataclasses
import gzip
import io
import json
import sys
from collections import Counter

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nanochat_jax.config import DataConfig
from nanochat_jax.data import remote, shards, sources
from nanochat_jax.data.sources import DataError, MissingExtra, RemoteError

TEXTS = [
    f'fn main() {{ println!("{i}"); }} // number {i}, and more words to be long enough 日本\n'
    for i in range(24)
]


@pytest.fixture
def bucket(monkeypatch):
    """memory://bucket with a file of code, rows in JSONL, gzip and Parquet, and what must be left out."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the 'data' extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the 'data' extra")
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    store = fsspec.filesystem("memory")
    lines = ["\n".join(json.dumps({"text": t}) for t in TEXTS[a:b]) for a, b in ((1, 8), (8, 16))]
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS[16:]}), table, row_group_size=3)
    content = {
        "a/code.rs": TEXTS[0].encode(), "b.jsonl": lines[0].encode(), "c.jsonl.gz": gzip.compress(lines[1].encode()),
        "d.parquet": table.getvalue(), ".hidden/e.rs": b"x" * 100, "f/.hidden.rs": b"y" * 100,
    }  # fmt: skip
    for name, raw in content.items():
        store.pipe(f"/bucket/{name}", raw)
    yield store
    store.rm("/bucket", recursive=True)


def config(source="memory://bucket", **changes):
    return DataConfig(source=source, **changes)


def texts(cfg, **kwargs):
    return [d.text for d in sources.documents(cfg, **kwargs)]


def test_directories_files_and_globs(bucket):
    assert texts(config()) == TEXTS
    assert texts(config("memory://bucket/b.jsonl")) == TEXTS[1:8]
    assert texts(config("memory://bucket/*.jsonl*")) == TEXTS[1:16]
    assert texts(config("memory://bucket/**/*.rs"))[:1] == TEXTS[:1]
    names = [d.name for d in sources.documents(config())]
    assert names[0].startswith("memory://") and names[0].endswith("/bucket/a/code.rs")
    assert names[1].endswith("/bucket/b.jsonl:0")


def test_the_same_files_on_disk_are_the_same_corpus(bucket, tmp_path):
    """The path through a URL and the path through the file system make the same bytes."""
    bucket.get("/bucket", str(tmp_path / "local"), recursive=True)
    cfg = config(tokenizer="bytes", val_percent=20)
    far = shards.prepare(cfg, 300, tmp_path / "far")
    near = shards.prepare(dataclasses.replace(cfg, source=str(tmp_path / "local")), 300, tmp_path / "near")
    url = shards.prepare(
        dataclasses.replace(cfg, source=f"file://{tmp_path / 'local'}"), 300, tmp_path / "url"
    )
    assert far.directory.name == near.directory.name == url.directory.name
    assert far.sha256 == near.sha256 == url.sha256


def test_a_known_corpus_is_not_read_again_and_a_changed_one_is(bucket, tmp_path, monkeypatch):
    cfg = config(tokenizer="bytes", val_percent=20)
    first = shards.prepare(cfg, 300, tmp_path)
    documents = sources.documents
    monkeypatch.setattr(sources, "documents", lambda *a, **k: pytest.fail("read again"))
    assert shards.prepare(cfg, 300, tmp_path).sha256 == first.sha256
    monkeypatch.setattr(sources, "documents", documents)
    bucket.pipe("/bucket/g.rs", b"fn g() {} // " + b"g" * 80)
    assert shards.prepare(cfg, 300, tmp_path).sha256 != first.sha256


@pytest.mark.parametrize("start", [(0, 0), (0, 1), (1, 3), (1, 7), (2, 5), (3, 0), (3, 4), (4, 0)])
def test_reading_goes_on_from_any_place(bucket, start):
    expected = [d.text for d in sources.documents(config()) if d.after > start]
    assert texts(config(), start=sources.Place(*start)) == expected


class Flaky(MemoryFileSystem):
    """The memory store, whose connections break after some bytes."""

    protocol = "flaky"
    breaks = 0
    after = 300

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        opened = super()._open(path, mode, **kwargs)
        raw = opened.read()

        class Broken(io.BytesIO):
            def read(self, size=-1):
                # What would reach beyond `after` fails while breaks are left.
                end = self.tell() + size if size >= 0 else len(raw)
                if end > Flaky.after and Flaky.breaks > 0:
                    Flaky.breaks -= 1
                    raise ConnectionResetError("peer went away")
                return super().read(size)

            def readline(self, size=-1):
                if self.tell() > Flaky.after and Flaky.breaks > 0:
                    Flaky.breaks -= 1
                    raise ConnectionResetError("peer went away")
                return super().readline(size)

            __next__ = None

            def __iter__(self):
                return iter(self.readline, b"")

        return Broken(raw)


@pytest.fixture
def flaky(bucket):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    yield Flaky
    Flaky.breaks = 0


@pytest.mark.parametrize("name", ["b.jsonl", "c.jsonl.gz", "d.parquet"])
def test_a_broken_connection_loses_and_repeats_nothing(flaky, name):
    expected = texts(config(f"memory://bucket/{name}"))
    flaky.breaks = 2
    skipped = Counter()
    assert texts(config(f"flaky://bucket/{name}"), skipped=skipped) == expected
    assert not skipped, "rows came twice"
    assert flaky.breaks == 0, "nothing broke, so nothing was tested"


def test_a_dead_connection_keeps_what_was_read(flaky, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat_jax.data.text.RECORD_BYTES", 200)
    cfg = config("flaky://bucket", tokenizer="bytes", val_percent=20)
    flaky.breaks = 3
    with pytest.raises(
        RemoteError, match=r"flaky://.*b.jsonl cannot be read: ConnectionResetError: peer went away"
    ):
        shards.prepare(cfg, 300, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.partial/reading.json"))
    read, items = [], remote.items
    monkeypatch.setattr(
        remote,
        "items",
        lambda url, read_, start, fatal: read.append((url, start)) or items(url, read_, start, fatal),
    )
    lines = []
    made = shards.prepare(cfg, 300, tmp_path / "cache", lines.append)
    assert not any("code.rs" in url for url, _ in read) and read[0][1] > 0, "it began at the beginning"
    assert any("continuing after" in line for line in lines)
    whole = shards.prepare(config(tokenizer="bytes", val_percent=20), 300, tmp_path / "whole")
    assert made.sha256 == whole.sha256


def test_damage_is_not_taken_for_a_broken_connection(bucket, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (1e6,))  # would wait for ever
    bucket.pipe("/bucket/b.jsonl", b'{"text": "a"\n')
    with pytest.raises(DataError, match=r"memory://.*b.jsonl:1 is not JSON"):
        texts(config())
    bucket.pipe("/bucket/b.jsonl", b"")
    bucket.pipe("/bucket/d.parquet", b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"d.parquet is not a readable Parquet file"):
        texts(config())
    bucket.pipe("/bucket/c.jsonl.gz", b"no gzip at all, but long enough")
    with pytest.raises(DataError, match=r"c.jsonl.gz is no gzip file"):
        texts(config())


def test_what_cannot_be_found(bucket, monkeypatch):
    with pytest.raises(DataError, match="'memory://bucket/none' matches no file"):
        sources.discover("memory://bucket/none")
    with pytest.raises(DataError, match=r"'nowhere://x': .*[Pp]rotocol"):
        sources.discover("nowhere://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"'s3://bucket/x': .*s3fs.*nanochat_jax\[remote\]"):
        sources.discover("s3://bucket/x")

    def broken(*args, **kwargs):
        raise PermissionError("forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "isdir", broken)
        with pytest.raises(RemoteError, match="cannot be listed: PermissionError: forbidden"):
            sources.discover("memory://bucket")


def test_long_code_is_not_downloaded(bucket, monkeypatch):
    bucket.pipe("/bucket/b.jsonl", b"")
    bucket.pipe("/bucket/long.rs", b"x" * (sources.MAX_BYTES + 1))
    skipped = Counter()
    found = [d.text for d in sources.documents(config(), skipped)]
    assert skipped["long"] == 1 and TEXTS[0] in found
