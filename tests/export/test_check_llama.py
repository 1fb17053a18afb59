"""What the comparison with llama.cpp demands, with a stand-in for it that computes with our own model."""

import types

import numpy as np
import pytest
from export_models import CASES, build

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.export import check, variants

BYTES = tokenizers.byte_tokenizer()


def stand_in(monkeypatch, cfg, params, error=0.0, wrong_from=None, other_ids=False):
    """A module `llama_cpp` whose model has our logits of 32 tokens, or, for other lengths, our greedy token."""
    full = cfg if cfg.quant == "full" else build_full(cfg)
    shown = variants.rounded(cfg, params)
    known = check.logits(full, shown, check.rows(cfg, 32)[:1])[0]
    ours = check.greedy(cfg, params, [BYTES.bos_id], check.GREEDY) if cfg.quant != "full" else []

    class Llama:
        def __init__(self, path, **given):
            assert given["logits_all"]

        def tokenize(self, data, add_bos, special):
            assert not add_bos and not special
            return [*BYTES.encode(data.decode()), *([0] if other_ids else [])]

        def reset(self):
            self.scores = np.zeros((256, cfg.vocab_size), np.float32)

        def eval(self, tokens):
            if tokens == check.rows(cfg, 32)[0].tolist():
                self.scores[:32] = known
                self.scores[:32, ::2] += error
            else:
                i = len(tokens) - 1
                self.scores[i, ours[i] if i != wrong_from else (ours[i] + 1) % cfg.vocab_size] = 1

    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(check.sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))


def build_full(cfg):
    return check.dataclasses.replace(cfg, quant="full")


def test_full_weights(monkeypatch, tmp_path):
    cfg, params = build({**CASES["qwen3"][1], "vocab_size": 270, "layers": 1})
    stand_in(monkeypatch, cfg, params)
    assert "differ by at most" in check.llama_cpp(tmp_path / "x", cfg, params, "f32", BYTES)
    stand_in(monkeypatch, cfg, params, error=0.1)
    with pytest.raises(check.CheckError, match="log-probabilities of x differ by 0"):
        check.llama_cpp(tmp_path / "x", cfg, params, "f32", BYTES)
    stand_in(monkeypatch, cfg, params, other_ids=True)
    with pytest.raises(check.CheckError, match="into other tokens"):
        check.llama_cpp(tmp_path / "x", cfg, params, "f32", BYTES)


@pytest.mark.slow
def test_ternary_weights_report_where_they_part(monkeypatch, tmp_path):
    cfg, params = build({**CASES["qwen3"][1], "vocab_size": 270, "layers": 1, "quant": "ternary"})
    stand_in(monkeypatch, cfg, params)
    assert "64 of 64 greedy tokens" in check.llama_cpp(tmp_path / "x", cfg, params, "tq2_0", BYTES)
    stand_in(monkeypatch, cfg, params, wrong_from=17)
    assert "17 of 64 greedy tokens" in check.llama_cpp(tmp_path / "x", cfg, params, "tq2_0", BYTES)


def test_without_llama_cpp_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in check.llama_cpp(tmp_path / "x", None, None, "f32", BYTES)
