"""The compile filter: what compiles stays, nothing runs, counts are kept over interruptions."""

import dataclasses
import shutil
import time
from collections import Counter

import pytest

from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import compiles, mixture, shards, sources, text
from nanochat_jax.data.sources import DataError, Place, Tally

RUSTC = pytest.mark.skipif(not shutil.which("rustc"), reason="needs rustc")
PAD = "# what follows is here to make this file long enough to be a document, and nothing else\n"


def good(i):
    return f"{PAD}def f{i}():\n    return {i}\n"


def bad(i):
    return f"{PAD}def f{i}(:\n    return {i}\n"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02}.py").write_text(bad(i) if i % 5 == 2 else good(i))
    (root / "notes.md").write_text("prose (is never compiled " * 10)
    return root


def config(source, **changes):
    return DataConfig(
        source=str(source),
        **{"verify_every_n_examples": 1, "tokenizer": "bytes", "val_percent": 20} | changes,
    )


def documents(cfg):
    tally = Tally(Counter(), Counter(), [])
    return [d.text for d in sources.documents(cfg, tally=tally)], tally


def test_only_files_that_compile_stay(tree):
    found, tally = documents(config(tree))
    assert found[:-1] == [good(i) for i in range(20) if i % 5 != 2] and "prose" in found[-1]
    assert tally.skipped == {"does not compile": 4}
    assert tally.checks == {"seen": 20, "checked": 20, "compiled": 16} and len(tally.rejected) == 4


@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_nth_file_is_checked(tree, every):
    found, tally = documents(config(tree, verify_every_n_examples=every))
    checked = list(range(0, 20, every))
    failed = [i for i in checked if i % 5 == 2]
    assert tally.checks == {"seen": 20, "checked": len(checked), "compiled": len(checked) - len(failed)}
    assert found[:-1] == [bad(i) if i % 5 == 2 else good(i) for i in range(20) if i not in failed]


def test_off_is_absent(tree):
    cfg = config(tree, verify_every_n_examples=0)
    found, tally = documents(cfg)
    assert len(found) == 21 and not tally.checks and not tally.skipped


def test_too_low_a_rate_refuses_the_source(tree):
    assert documents(config(tree, min_compile_rate=0.8))[0]
    with pytest.raises(
        DataError,
        match=r"16 of 20 checked files compile, a share of 0.800, expected at least data.min_compile_rate = 0.81",
    ):
        documents(config(tree, min_compile_rate=0.81))


def test_the_corpus_says_what_was_checked(tree, tmp_path):
    lines = []
    made = shards.prepare(config(tree), 300, tmp_path / "cache", lines.append)
    assert made.manifest["checks"] == {"seen": 20, "checked": 20, "compiled": 16}
    assert made.manifest["skipped"] == {"does not compile": 4}
    assert "16 of 20 checked files compile" in lines[-1]
    assert (
        shards.prepare(config(tree, verify_every_n_examples=0), 300, tmp_path / "cache").sha256 != made.sha256
    )


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_an_interrupted_filter_goes_on(tree, tmp_path, monkeypatch, stop):
    """Counts, rejects and documents are those of an undisturbed run, and no file is compiled twice."""
    monkeypatch.setattr(text, "RECORD_CHECKS", 3)
    (tree / "99.py").write_text(bad(2))  # a copy of a rejected file is no candidate
    whole = shards.prepare(config(tree, verify_every_n_examples=2), 300, tmp_path / "whole")
    read = sources.documents

    def dying(cfg, **kwargs):
        for index, document in enumerate(read(cfg, **kwargs)):
            if index == stop:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(sources, "documents", dying)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(config(tree, verify_every_n_examples=2), 300, tmp_path / "cut")
    places = []
    monkeypatch.setattr(sources, "documents", lambda cfg, **k: places.append(k["start"]) or read(cfg, **k))
    made = shards.prepare(config(tree, verify_every_n_examples=2), 300, tmp_path / "cut")
    assert made.sha256 == whole.sha256 and made.manifest == whole.manifest
    assert (places[0] > Place()) == (stop > 6)  # the first record is written after six files


PYTHON = [
    (b"x = 1\n", True), (b"x = \n", False), (b"\xef\xbb\xbfx = 1\n", True), (b"x = '\xff'\n", False),
    (b"a\0b", False), (b"(" * 5000, False), (b"x = " + b"-" * 100_000 + b"1", False), (b"x is 1\n", True),
    (b"raise SystemExit(3)\n", True), (b"while True: pass\n", True), (b"# coding: nonsense\nx = 1\n", False),
]  # fmt: skip


@pytest.mark.parametrize(("code", "expected"), PYTHON)
def test_python(code, expected):
    """Whatever it is, it ends with an answer, and is never run."""
    assert compiles.COMPILERS["python"](code) is expected


RUST = [
    ("pub fn f() -> i32 { 1 }", True), ("pub fn f() -> i32 { \"a\" }", False), ("fn main() { unused_variable; }", False),
    ("fn main() { let x = 1; }", True), ("use serde::Serialize;", False), ("mod elsewhere;", False), ("\0", False),
    ("pub fn f() { std::process::exit(7) }", True), ("#![crate_type = \"bin\"] fn main() { loop {} }", True),
    ("async fn f() {}", True),
]  # fmt: skip


@RUSTC
@pytest.mark.slow
@pytest.mark.parametrize(("code", "expected"), RUST)
def test_rust(code, expected):
    assert compiles.COMPILERS["rust"](code.encode()) is expected


@RUSTC
@pytest.mark.slow
def test_a_compiler_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(compiles, "SECONDS", 1)
    endless = "pub const fn f(n: u64) -> u64 { let mut i = 0; while i < n { i += 1; } i }\n#[allow(long_running_const_eval)]\npub const X: u64 = f(u64::MAX);"
    begun = time.monotonic()
    assert compiles.COMPILERS["rust"](endless.encode()) is False
    assert time.monotonic() - begun < 30


@RUSTC
@pytest.mark.slow
def test_rust_files_are_filtered(tmp_path):
    pad = "// what follows is here to make this file long enough to be a document\n"
    (tmp_path / "a.rs").write_text(f"{pad}pub fn f() -> i32 {{ 1 }}")
    (tmp_path / "b.rs").write_text(f"{pad}pub fn f() -> i32 {{ true }}")
    found, tally = documents(config(tmp_path))
    assert len(found) == 1 and found[0].endswith("{ 1 }") and tally.checks["compiled"] == 1


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.rs").write_text(
        "pub fn f() -> i32 { 1 } // and more to be long enough, and more to be long enough"
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    compiles.available.cache_clear()
    compiles._rustc.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"data.verify_every_n_examples needs rustc for files of Rust: install it"
        ):
            documents(config(tmp_path))
    finally:
        compiles.available.cache_clear()
        compiles._rustc.cache_clear()


def test_rows_have_the_language_they_are_said_to_have(tmp_path):
    import json

    rows = [good(0), bad(1), good(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows))
    assert documents(config(tmp_path))[0] == rows
    assert documents(config(tmp_path, row_language="python"))[0] == [good(0), good(2)]
    names = {
        "a/b.rs": "rust",
        "b.py": "python",
        "c.txt:3": "",
        "c.jsonl:3": "python",
        "d.md": "",
        "x.parquet:0": "python",
    }
    assert {name: compiles.language_of(name, "python") for name in names} == names


def test_parts_of_a_mixture_are_judged_apart(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(5):
        (other / f"{i}.py").write_text(good(100 + i))
    mix = (("good", str(other), 1.0), ("mixed", str(tree), 1.0))
    cfg = dataclasses.replace(config("stdlib"), mix=mix, min_compile_rate=0.9)
    with pytest.raises(DataError, match=r"data.mix part 'mixed': .*16 of 20 checked files compile"):
        mixture.prepare(cfg, 300, tmp_path / "cache")
