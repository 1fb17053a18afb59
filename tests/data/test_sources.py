"""Sources: a fixed order, every skip counted, damaged and missing data named."""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax.config import DataConfig
from nanochat_jax.data import sources
from nanochat_jax.data.sources import DataError, MissingExtra

TEXTS = [
    f'fn main() {{ println!("{i}"); }} // number {i}, and some more words to be long enough\n'
    for i in range(5)
]


def config(source, **changes):
    return DataConfig(source=str(source), **changes)


def texts(source, skipped=None, **changes):
    return [d.text for d in sources.documents(config(source, **changes), skipped)]


def write(root, **files):
    """Files by name; "__" stands for "/"."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "tree", **{"b.rs": TEXTS[1], "a__z.rs": TEXTS[0], "c.rs": TEXTS[2]})


def test_documents_come_in_sorted_order_with_names(tree):
    made = list(sources.documents(config(tree)))
    assert [(d.name, d.text) for d in made] == [
        (os.path.join("a", "z.rs"), TEXTS[0]), ("b.rs", TEXTS[1]), ("c.rs", TEXTS[2]),
    ]  # fmt: skip


def test_directories_files_and_globs(tree, monkeypatch):
    assert texts(tree / "b.rs") == TEXTS[1:2]
    assert texts(tree / "*.rs") == TEXTS[1:3]
    assert texts(tree / "**" / "*.rs") == TEXTS[:3]
    monkeypatch.setenv("HOME", str(tree))
    assert texts("~/*.rs") == TEXTS[1:3]


def test_hidden_files_and_caches_are_no_documents(tree):
    write(tree, **{".git__config": TEXTS[3], ".hidden.rs": TEXTS[4]})
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "x.py").write_text(TEXTS[4])
    assert texts(tree) == TEXTS[:3]


def test_skips_are_counted_by_reason(tree):
    write(
        tree, **{
            "d_bytes.rs": b"\xff\xfe" * 100, "d_copy.rs": TEXTS[0], "d_line.rs": "x" * 1001 + "\n",
            "d_long.rs": "y 12345678\n" * 100_000, "d_short.rs": "s" * 63, "e_64.rs": "s" * 64,
            "f_line.rs": "x" * 1000 + "\n", "g_wide.rs": "é" * 1000,
        }
    )  # fmt: skip
    skipped = Counter()
    names = [d.name for d in sources.documents(config(tree), skipped)]
    assert names == [os.path.join("a", "z.rs"), "b.rs", "c.rs", "e_64.rs", "f_line.rs", "g_wide.rs"]
    assert skipped == {"undecodable": 1, "duplicate": 1, "long line": 1, "long": 1, "short": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_counted(tree):
    (tree / "b.rs").chmod(0)
    skipped = Counter()
    assert texts(tree, skipped) == [TEXTS[0], TEXTS[2]] and skipped == {"unreadable": 1}


def test_a_file_that_vanishes_is_counted(tree, monkeypatch):
    root, found = sources.files(str(tree))
    monkeypatch.setattr(sources, "files", lambda source: (root, [*found, root / "gone.rs"]))
    skipped = Counter()
    assert texts(tree, skipped) == TEXTS[:3] and skipped == {"unreadable": 1}


@pytest.mark.parametrize("unit", ["line of prose number {i}\n", "ü{i} ", "😀日本{i}"])
def test_long_prose_is_cut_and_nothing_is_lost(tmp_path, unit):
    book = "".join(unit.format(i=i) for i in range(150_000))
    (tmp_path / "book.txt").write_text(book)
    skipped = Counter()
    pieces = texts(tmp_path / "book.txt", skipped)
    assert "".join(pieces) == book and len(pieces) > 1 and not skipped
    assert all(len(piece.encode()) <= sources.MAX_BYTES for piece in pieces)
    if "\n" in unit:
        assert all(piece.endswith("\n") for piece in pieces)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": book}))
    assert texts(tmp_path / "rows.jsonl") == pieces


def test_max_bytes_is_a_cap(tree):
    size = len(TEXTS[0])
    assert texts(tree, max_bytes=2 * size) == TEXTS[:2]
    assert texts(tree, max_bytes=2 * size - 1) == TEXTS[:1]
    assert texts(tree, max_bytes=1) == []


# --- tables


def test_json_lines(tmp_path):
    lines = [json.dumps({"body": t, "id": i}) for i, t in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write("\n".join(lines))
    assert texts(tmp_path / "a.jsonl", text_key="body") == TEXTS
    assert texts(tmp_path / "b.jsonl.gz", text_key="body") == TEXTS
    names = [d.name for d in sources.documents(config(tmp_path / "a.jsonl", text_key="body"))]
    assert len(set(names)) == len(TEXTS)
    both = Counter()
    assert texts(tmp_path, both, text_key="body") == TEXTS and both == {"duplicate": len(TEXTS)}


def test_rows_without_usable_text_are_counted(tmp_path):
    rows = [None, 5, "short", "half a pair \ud800" * 10, TEXTS[0]]
    data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(data + b'{"text": "' + b"\xff\xfe" * 50 + b'"}\n')
    skipped = Counter()
    assert texts(tmp_path / "a.jsonl", skipped) == TEXTS[:1]
    assert skipped == {"no text": 2, "short": 1, "undecodable": 2}


def test_damaged_json_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}) + "\n{oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not JSON"):
        texts(path)
    path.write_text(json.dumps({"body": "x", "id": 1}))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 has no field 'text' \(data.text_key\); fields: body, id"
    ):
        texts(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"has no field 'text' .*; fields: list"):
        texts(path)
    zipped = tmp_path / "b.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 50).encode())
    zipped.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is truncated or damaged"):
        texts(zipped)
    zipped.write_bytes(b"plain text, no gzip")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is no gzip file"):
        texts(zipped)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the 'data' extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the 'data' extra")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "n": range(6)}), path, row_group_size=2)
    skipped = Counter()
    assert texts(path, skipped) == TEXTS and skipped == {"no text": 1}
    with pytest.raises(
        DataError, match=r"a\.parquet has no column 'body' \(data.text_key\); columns: text, n"
    ):
        texts(path, text_key="body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        texts(path)


@pytest.mark.interop
def test_datasets_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the 'data' extra is not installed")
    for split in ("train", "test"):
        rows = TEXTS if split == "train" else TEXTS[:2]
        write(tmp_path / "set", **{f"{split}.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in rows)})
    source = f"hf:{tmp_path / 'set'}"
    assert texts(source) == TEXTS and texts(f"{source}:test") == TEXTS[:2]
    with pytest.raises(DataError, match=r"has no field 'body' .*; fields: text"):
        texts(source, text_key="body")
    with pytest.raises(DataError, match="cannot be read: "):
        texts(f"{source}:nosuchsplit")


# --- datasets through a stand-in for the library


class FakeHub:
    """Has `load_dataset` and remembers its arguments."""

    def __init__(self, rows):
        self.rows, self.asked = rows, None

    def load_dataset(self, name, configuration, split, streaming):
        self.asked = (name, configuration, split, streaming)
        yield from self.rows


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:a/b", ("a/b", None, "train", True)),
        ("hf:a/b:valid", ("a/b", None, "valid", True)),
        ("hf:a/b:rust:valid", ("a/b", "rust", "valid", True)),
        ("hf:a/b:rust:", ("a/b", "rust", "train", True)),
    ],
)
def test_dataset_names_and_splits(monkeypatch, source, asked):
    hub = FakeHub([{"text": t} for t in TEXTS])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert texts(source) == TEXTS and hub.asked == asked


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a/b:c:d:e"])
def test_malformed_dataset_names_are_refused(source):
    with pytest.raises(DataError, match=r"expected hf:<name>, hf:<name>:<split> or"):
        sources.discover(source)


def test_dataset_failures_name_the_source(monkeypatch):
    class Broken(FakeHub):
        def load_dataset(self, name, configuration, split, streaming):
            raise ConnectionError("cannot reach the hub\nmany more lines")

    monkeypatch.setitem(sys.modules, "datasets", Broken([]))
    with pytest.raises(DataError, match=r"'hf:a/b' cannot be read: ConnectionError: cannot reach the hub$"):
        texts("hf:a/b")


@pytest.mark.parametrize(("source", "module"), [("hf:a/b", "datasets"), ("x.parquet", "pyarrow.parquet")])
def test_missing_packages_name_the_extra(tmp_path, monkeypatch, source, module):
    write(tmp_path, **{"x.parquet": "x"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra, match=r"""^this needs the 'data' extra: pip install "nanochat_jax\[data\]"$"""
    ):
        texts(source)
    assert MissingExtra.exit_code == 3 and issubclass(MissingExtra, ImportError)


# --- places


def test_the_standard_library_is_found_without_installed_packages():
    root, found = sources.files("stdlib")
    names = {str(path.relative_to(root)) for path in found}
    assert {"abc.py", os.path.join("json", "decoder.py")} <= names and len(found) > 500
    assert found == sorted(found) and not any("site-packages" in path.parts for path in found)


def test_rust_sources_are_found_where_tools_put_them(tmp_path):
    home, system, cargo = tmp_path / "home", tmp_path / "system", tmp_path / "cargo"
    paths = [
        home / ".rustup/toolchains/stable/lib/rustlib/src", home / ".cargo/registry/src",
        system / "usr/src/rustc-1.63.0", system / "usr/share/cargo/registry",
    ]  # fmt: skip
    for path in (*paths, cargo / "registry/src"):
        path.mkdir(parents=True)
    assert sources.rust_roots(home, system) == [path.resolve() for path in paths]
    elsewhere = sources.rust_roots(home, system, cargo)
    assert (cargo / "registry/src").resolve() in elsewhere and paths[1].resolve() not in elsewhere


def test_rust_documents(tmp_path, monkeypatch):
    write(tmp_path, **{"serde__src__lib.rs": TEXTS[0], "serde__Cargo.toml": TEXTS[1]})
    monkeypatch.setattr(sources, "rust_roots", lambda: [tmp_path])
    assert texts("rust") == TEXTS[:1]


def test_missing_sources_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"matches no file; expected stdlib, rust, conversations, hf:<dataset>.*looked from"
    ):
        texts(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="matches no file"):
        sources.discover(str(tmp_path / "empty"))
    monkeypatch.setattr(sources, "rust_roots", lambda: [tmp_path])
    with pytest.raises(
        DataError, match=r"no Rust sources.*looked in .*apt install rust-src.*rustup component add"
    ):
        texts("rust")


# --- fingerprints


def test_the_fingerprint_follows_names_sizes_and_times(tree):
    first = sources.discover(str(tree))
    assert sources.discover(str(tree)) == first
    os.utime(tree / "b.rs", ns=(1, 1))
    touched = sources.discover(str(tree))
    (tree / "b.rs").rename(tree / "bb.rs")
    renamed = sources.discover(str(tree))
    (tree / "bb.rs").unlink()
    assert len({first, touched, renamed, sources.discover(str(tree))}) == 4


def test_the_fingerprint_of_a_dataset(tree):
    assert sources.discover("hf:a/b") == sources.discover("hf:a/b") != sources.discover("hf:a/b:test")
    local = sources.discover(f"hf:{tree}")
    (tree / "new.jsonl").write_text("{}")
    assert sources.discover(f"hf:{tree}") != local


# --- token files


def header(count, magic=sources.LLM_C_MAGIC, version=1):
    top = np.zeros(sources.LLM_C_HEADER, "<i4")
    top[:3] = magic, version, count
    return top.tobytes()


IDS = np.arange(500) % 260


@pytest.mark.parametrize(
    ("name", "content", "sidecar", "expected"),
    [
        ("a.u16", IDS.astype("<u2").tobytes(), None, ("<u2", 0, 500)),
        ("a.u32", IDS.astype("<u4").tobytes(), None, ("<u4", 0, 500)),
        ("a.bin", IDS.astype("<u4").tobytes(), {"dtype": "uint32", "n_tokens": 500}, ("<u4", 0, 500)),
        ("a.bin", header(500) + IDS.astype("<u2").tobytes(), None, ("<u2", 1024, 500)),
    ],
)
def test_token_files_state_their_width(tmp_path, name, content, sidecar, expected):
    path = tmp_path / name
    path.write_bytes(content)
    if sidecar:
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar))
    file = sources.token_file(path)
    assert (file.dtype, file.skip, file.count) == expected


@pytest.mark.parametrize(
    ("name", "content", "sidecar", "message"),
    [
        ("a.bin", bytes(100), None, r"16 or 32 bits a token\? Name the file .u16 or .u32, or write a\.bin\."),
        ("a.u16", bytes(101), None, "expected a whole number of tokens of 2 bytes .* got 101 bytes"),
        ("a.u32", bytes(102), None, "whole number of tokens of 4 bytes"),
        ("a.u16", b"", None, "truncated or of another format"),
        ("a.bin", header(500) + bytes(998), None, "expected 500 tokens of 2 bytes after 1024 .*got 998"),
        ("a.bin", header(500, version=7) + bytes(1000), None, "header version 7 is unknown; expected 1"),
        ("a.bin", bytes(100), {"dtype": "uint8"}, r'expected .*"uint16" or "uint32".*KeyError'),
        ("a.bin", bytes(100), [], r'a\.bin\.json: expected'),
        ("a.bin", bytes(100), {"dtype": "uint16", "n_tokens": 51}, "expected 51 tokens of 2 bytes"),
    ],
)  # fmt: skip
def test_damaged_token_files_are_named(tmp_path, name, content, sidecar, message):
    path = tmp_path / name
    path.write_bytes(content)
    if sidecar is not None:
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar))
    with pytest.raises(DataError, match=message):
        sources.token_file(path)
    with pytest.raises(DataError, match="no such file"):
        sources.token_file(Path("none.u16"))
