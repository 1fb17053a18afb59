"""The conversations that come with the package: whole, different, and their programs compile."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import nanochat_jax
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import DataConfig
from nanochat_jax.data import sources, turns

PATH = Path(nanochat_jax.__file__).parent / "data" / "conversations.jsonl"
ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
TALKS = [row["messages"] for row in ROWS]
PROGRAM = re.compile(r"```rust\n(.*?)```", re.S)


def test_the_named_source_is_this_file_and_all_of_it_is_usable():
    skipped = Counter()
    cfg = DataConfig(source="conversations", kind="chat", text_key="messages")
    read = [json.loads(d.text) for d in sources.documents(cfg, skipped)]
    assert read == TALKS and not skipped
    assert all(set(row) == {"messages"} for row in ROWS)
    assert all(set(message) == {"role", "content"} for talk in TALKS for message in talk)


def test_its_size():
    assert 300 <= len(TALKS) <= 600
    sizes = [sum(len(message["content"].encode()) for message in talk) for talk in TALKS]
    assert max(sizes) < 700 and sum(sizes) < 100_000
    assert sum(len(talk) > 3 for talk in TALKS) >= 20, "some have two turns"
    assert sum(talk[0]["role"] == "system" for talk in TALKS) >= 8


def test_each_says_something_of_its_own():
    asked = Counter(json.dumps(talk[:-1]).casefold() for talk in TALKS)
    assert [question for question, count in asked.items() if count > 1] == []
    assert not any(isinstance(turns.stored(talk), str) for talk in TALKS)


def test_no_text_spells_a_mark_and_all_is_plain():
    contents = [message["content"] for talk in TALKS for message in talk]
    assert not [text for text in contents for mark in tokenizers.SPECIAL if mark in text or "<|" in text]
    assert not [text for text in contents if text != text.strip() or not text.isascii() or "\t" in text]
    assert not [text for text in contents if text.count("```") % 2]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("rustc"), reason="no rustc here")
def test_its_programs_compile(tmp_path):
    programs = [code for talk in TALKS for m in talk for code in PROGRAM.findall(m["content"])]
    assert len(programs) > 40 and sum("fn main" in code for code in programs) > 40
    failed = []
    for index, code in enumerate(programs):
        path = tmp_path / f"p{index}.rs"
        path.write_text(code)
        kind = "bin" if "fn main" in code else "lib"
        command = ["rustc", "--edition=2021", f"--crate-type={kind}", "--emit=metadata", "-A", "dead_code"]
        done = subprocess.run(
            [*command, "-D", "warnings", "--out-dir", tmp_path, path], capture_output=True, text=True
        )
        if done.returncode:
            failed.append(f"{code}\n{done.stderr}")
    assert not failed, "\n".join(failed)
