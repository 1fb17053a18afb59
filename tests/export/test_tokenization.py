"""The tokenizer for others: what starts a text, what ends an answer, which rules of llama.cpp fit."""

import json

import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import DataConfig
from nanochat_jax.data import shards
from nanochat_jax.export import tokenization
from nanochat_jax.export.variants import ExportError

TEXT = "def f(x):\n    return x + 1  # of the other ones\n" * 20


def with_pattern(digits, text, size=300):
    """A tokenizer trained with another rule for digits."""
    return tokenizers.train([text], size, tokenizers.SPLIT.replace(r"\p{N}{1,2}", digits))


def test_special_ids():
    ours = tokenizers.byte_tokenizer()
    found = tokenization.ids(ours)
    assert found.bos == ours.bos_id and found.pad == ours.special_id("<|pad|>")
    assert found.eos == (ours.special_id("<|assistant_end|>"), ours.bos_id)


def test_rules_of_llama_cpp():
    assert tokenization.pre(tokenizers.byte_tokenizer()) == "smaug-bpe"
    assert tokenization.pre(tokenizers.train([TEXT], 300)) == "smaug-bpe"  # no token holds two digits
    assert tokenization.pre(with_pattern(r"\p{N}{1,3}", "1234 " * 50 + TEXT)) == "smaug-bpe"
    assert tokenization.pre(with_pattern(r"\p{N}", TEXT)) == "qwen2"
    with pytest.raises(ExportError, match=r"cuts digits into pairs.*1 of its tokens hold several digits"):
        tokenization.pre(tokenizers.train(["12 " * 50], 268))
    with pytest.raises(ExportError, match="no rule for this tokenizer's split pattern"):
        tokenization.pre(with_pattern(r"\p{N}+|x", TEXT))


def test_gpt2_s_rule(tmp_path):
    core = json.loads(tokenizers.train([TEXT], 300).definition)
    core["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(core))
    assert tokenization.pre(tokenizers.load(path)) == "gpt-2"


def test_written_tokenizer_is_ours_again(tmp_path):
    ours = tokenizers.train([TEXT], 300)
    tokenization.write(tmp_path, ours, 32)
    again = tokenizers.load(tmp_path / "tokenizer.json")
    assert again.encode(TEXT) == ours.encode(TEXT) and again.special == ours.special
    import tokenizers as library

    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT).ids == [ours.bos_id, *ours.encode(TEXT)]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|assistant_end|>" and settings["clean_up_tokenization_spaces"] is False


def test_lists_for_gguf():
    ours = tokenizers.train([TEXT], 300)
    tokens, types, merges = tokenization.gguf_tokens(ours, ours.vocab_size + 2)
    assert tokens[-2:] == [f"[PAD{ours.vocab_size}]", f"[PAD{ours.vocab_size + 1}]"] and types[-2:] == [5, 5]
    assert [tokens[i] for i in ours.special.values()] == list(ours.special)
    assert len(merges) == ours.vocab_size - 256 - len(ours.special)
    for merge in merges:
        left, right = merge.split(" ")
        assert left + right in tokens


def test_no_chat_without_marks(tmp_path):
    core = json.loads(tokenizers.train([TEXT], 300).definition)
    core["added_tokens"] = core["added_tokens"][:1]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(core))
    assert tokenization.chat_template(tokenizers.load(path)) is None
    assert tokenization.chat_template(tokenizers.byte_tokenizer()) is not None
    assert tokenization.ids(tokenizers.load(path)).eos == (0,)


def test_a_corpus_with_digits_in_threes(tmp_path):
    """data.tokenizer = bpe3 makes another corpus than bpe, and llama.cpp can cut its texts alike."""
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"page {i} has 12345 lines and {i * 7919} words " * 9 for i in range(40)))
    made = {}
    for name in tokenizers.SPLITS:
        cfg = DataConfig(source=str(source), tokenizer=name, val_percent=50)
        made[name] = shards.prepare(cfg, 300, tmp_path / "cache", lambda line: None)
    assert made["bpe"].directory != made["bpe3"].directory
    ours = made["bpe3"].tokenizer
    assert ours.decode(ours.encode("123456")) == "123456" and tokenization.pre(ours) == "smaug-bpe"
    assert any(len(ours.decode([i])) == 3 and ours.decode([i]).isdigit() for i in ours.encode("12345"))
    with pytest.raises(ExportError, match=r"train with data\.tokenizer = bpe3"):
        tokenization.pre(made["bpe"].tokenizer)
