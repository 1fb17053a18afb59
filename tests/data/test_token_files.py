"""Token files made elsewhere: opened where they lie, cut at documents, damage and mix-ups noticed."""

import json

import numpy as np
import pytest

from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import shards, sources
from nanochat_jax.data.sources import DataError


def config(source, **changes):
    return DataConfig(**{"source": source, "tokenizer": "bytes", "val_percent": 20} | changes)


IDS = np.concatenate([[0, *(10 + (np.arange(n) * 7) % 250)] for n in (300, 50, 400, 20, 230)])


@pytest.mark.parametrize("kind", ["u16", "u32", "llm.c", "sidecar"])
def test_token_files_of_others(tmp_path, kind, monkeypatch):
    path = tmp_path / {"u16": "a.u16", "u32": "a.u32"}.get(kind, "a.bin")
    content = IDS.astype("<u4" if kind == "u32" else "<u2").tobytes()
    if kind == "llm.c":
        top = np.zeros(sources.LLM_C_HEADER, "<i4")
        top[:3] = sources.LLM_C_MAGIC, 1, len(IDS)
        content = top.tobytes() + content
    elif kind == "sidecar":
        (tmp_path / "a.bin.json").write_text(json.dumps({"dtype": "uint16"}))
    path.write_bytes(content)
    made = shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache")
    np.testing.assert_array_equal(np.concatenate([made.train.ids[:], made.val.ids[:]]), IDS)
    starts = np.flatnonzero(IDS == 0)
    np.testing.assert_array_equal(
        made.train.offsets, [s for s in starts if s < made.train.count] + [made.train.count]
    )
    np.testing.assert_array_equal(
        made.val.offsets + made.train.count,
        sorted({made.train.count, *(s for s in starts if s >= made.train.count), len(IDS)}),
    )
    assert 0.1 < made.val.count / len(IDS) <= 0.21
    monkeypatch.setattr(shards, "_from_tokens", lambda *a: pytest.fail("read again"))
    assert shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache").sha256 == made.sha256
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"the file is truncated or of another format"):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache")


def test_token_files_start_held_out_data_at_a_document_if_one_is_near(tmp_path):
    ids = np.ones(1000, "<u2")
    ids[[0, 400, 830]] = 0
    ids.tofile(tmp_path / "a.u16")
    made = shards.prepare(config(f"tokens:{tmp_path / 'a.u16'}"), 300, tmp_path / "cache")
    assert made.train.count == 830 and made.train.offsets.tolist() == [0, 400, 830]
    assert made.val.offsets.tolist() == [0, 170]


@pytest.mark.parametrize(("source", "read_as"), [("<u2", "u32"), ("<u4", "u16")])
def test_a_file_read_with_the_wrong_width_is_noticed(tmp_path, source, read_as):
    ids = np.arange(5000) % 250 + (70_000 if source == "<u4" else 0)
    path = tmp_path / f"tokens.{read_as}"
    ids.astype(source).tofile(path)
    with pytest.raises(
        DataError, match=r"holds token \d+, expected ids below 266: another tokenizer or another width"
    ):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache")


def test_impossible_token_files(tmp_path):
    path = tmp_path / "a.u16"
    with pytest.raises(DataError, match="no such file"):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache")
    np.ones(1, "<u2").tofile(path)
    with pytest.raises(DataError, match="1 tokens are too few to hold out 20%"):
        shards.prepare(config(f"tokens:{path}"), 300, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"a token file needs its tokenizer: set data.tokenizer to"):
        shards.prepare(config(f"tokens:{path}", tokenizer="bpe"), 300, tmp_path / "cache")
