"""The record of `bench inference` on an untrained run, and the verdicts about its bars."""

import dataclasses
import json

import jax
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.bench import inference
from nanochat_jax.config import Config, InferConfig, LoopConfig, ModelConfig
from nanochat_jax.inference import load
from nanochat_jax.model import transformer

MODEL = ModelConfig(
    vocab_size=300, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=16, loop=LoopConfig(count=2)
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A run's directory without a checkpoint: its parameters come from here."""
    tokenizers.byte_tokenizer().save(tmp_path / "tokenizer.json")
    params = params_lib.init_params(transformer.param_specs(MODEL), jax.random.key(0))
    params = params | {"head": jax.random.normal(jax.random.key(1), params["head"].shape)}
    monkeypatch.setattr(load, "load_params", lambda cfg, workdir: jax.device_put(params, jax.devices()[0]))
    return tmp_path


@pytest.mark.parametrize("drafts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_record_of_a_run(home, monkeypatch, drafts):
    most = 1 + drafts
    monkeypatch.setattr(inference, "ROWS", most)
    monkeypatch.setattr(inference, "server", lambda *words: {"skipped": "not here"})
    model = MODEL if drafts else dataclasses.replace(MODEL, loop=LoopConfig())
    cfg = Config(model=model, infer=InferConfig(capacity=96, draft_tokens=drafts, draft_loops=drafts))
    record = inference.inference(cfg, home, repeats=2, tokens=12)
    assert json.loads(json.dumps(record))["answer_tokens"] == 12
    lengths = (0, 1) if drafts else (0,)
    assert [(r["rows"], r["draft_tokens"]) for r in record["decode"]] == [
        (rows, n) for rows in (1, most) for n in lengths
    ]
    for row in record["decode"]:
        rate = row["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"] and row["compiles"] == 0
        assert len(row["accepted"]) == row["draft_tokens"]
    assert record["first_token_ms"]["median"] > 0
    named = [bar["what"] for bar in record["bars"]]
    assert named[:2] == ["first token of 64, ms", "compiles after warm-up"] and len(named) == 2 + 2 * drafts
    assert record["bars"][1]["met"]
    text = inference.table(record)
    assert "no --peer_python" in text and "not here" in text
    assert ("2 rows, full weights, 1 drafts" if drafts else "has neither layers of model.mtp") in text


def test_verdicts():
    rate = {"median": 100.0, "min": 90.0, "max": 110.0}
    row = {"rows": 1, "weights": "full", "draft_tokens": 0, "compiles": 0, "tokens_per_second": rate}
    record = {
        "weights": "full", "first_token_ms": {"median": 51.0}, "server": {"ms_per_token": {"median": 0.3}},
        "decode": [row, row | {"draft_tokens": 2, "tokens_per_second": rate | {"median": 94.0}, "compiles": 1}],
        "peer": {"decode": [{"rows": 1, "tokens_per_second": {"median": 77.0}}]},
    }  # fmt: skip
    found = {bar["what"]: (bar["value"], bar["met"]) for bar in inference.bars(record)}
    assert found == {
        "first token of 64, ms": (51.0, False), "compiles after warm-up": (1, False),
        "server, ms per token": (0.3, True), "times transformers, 1 rows": (100 / 77, False),
        "drafts against none, 1 rows, full": (0.94, False),
    }  # fmt: skip


def test_what_is_drafted():
    looped = Config(model=MODEL)
    assert inference.drafts_of(looped) == (4, 1) and inference.drafts_of(Config()) == (0, 0)
    mtp = dataclasses.replace(MODEL, mtp=dataclasses.replace(MODEL.mtp, depth=3))
    assert inference.drafts_of(Config(model=mtp)) == (3, 0)
    with pytest.raises(ValueError, match=r"needs a text of"):
        inference.prompts(tokenizers.byte_tokenizer(), 10**6, 10)


@pytest.mark.slow
def test_the_server_is_measured(home):
    pytest.importorskip("uvicorn")
    from nanochat_jax.inference import schedule

    words = tokenizers.load(home / "tokenizer.json")
    engine = schedule.Engine(
        MODEL, load.load_params(Config(), home), min(words.vocab_size, 300), 8, capacity=64, chunk=32
    )
    found = inference.server(engine, words, inference.prompts(words, 24, 24), 4)
    assert found["streams"] == 8 and found["ms_per_token"]["min"] <= found["ms_per_token"]["max"]


@pytest.mark.interop
def test_transformers_beside_it(home):
    import sys

    pytest.importorskip("transformers")
    words = tokenizers.load(home / "tokenizer.json")
    plain = dataclasses.replace(MODEL, loop=LoopConfig())
    params = params_lib.init_params(transformer.param_specs(plain), jax.random.key(0))
    first, given = inference.prompts(words, 8, 2), inference.prompts(words, 6, 16)
    # A rate is of the difference of two times: on a busy machine few tokens may seem to take less than none.
    found = inference.peer(Config(model=plain), params, words, sys.executable, first, given, 32, 1)
    assert [row["rows"] for row in found["decode"]] == [1, 8] and found["threads"] == 1
    assert all(row["tokens_per_second"]["min"] > 0 for row in found["decode"])
