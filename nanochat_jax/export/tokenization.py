"""The tokenizer as transformers and llama.cpp read it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from nanochat_jax import chat
from nanochat_jax.export import folder
from nanochat_jax.export.variants import ExportError
from nanochat_jax.tokenizer import SPLIT, Tokenizer

# Split pattern of tokenizer.json -> name that llama.cpp has for it. The first differs from the second in
# the digits that a token may span; see `pre`. "smaug-bpe" is "llama-bpe" without the shortcut of taking
# a word that is a token as that token, whatever the merges give.
DIGITS = re.compile(r"(?<=\|)\\p\{N\}(\{1,\d\}|\+)?(?=\|)")
GPT4_STYLE = DIGITS.sub("#", SPLIT)
PRE = {r"\p{N}{1,3}": "smaug-bpe", r"\p{N}": "qwen2"}
CONTRACTIONS = {r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|": r"'(?i:[sdmt]|ll|ve|re)|"}  # ways to write the same


@dataclasses.dataclass(frozen=True)
class Ids:
    """Ids with a meaning. eos: what ends an answer, in order of preference."""

    bos: int
    eos: tuple[int, ...]
    pad: int | None


def ids(tokenizer: Tokenizer) -> Ids:
    """The special ids of a tokenizer: an answer ends with its turn, or where another document starts."""
    end = [tokenizer.special[name] for name in ("<|assistant_end|>",) if name in tokenizer.special]
    return Ids(tokenizer.bos_id, (*end, tokenizer.bos_id), tokenizer.special.get("<|pad|>"))


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja template, if the tokenizer has the tokens of turns."""
    return chat.TEMPLATE if chat.supports(tokenizer) else None


def write(target: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, for chat vocabularies, chat_template.jinja.

    tokenizer.json is ours with a post-processor that starts every text with the token that starts
    documents, as in training. Args: context: tokens that the model was trained on at once.
    """
    names = {index: name for name, index in tokenizer.special.items()}
    special, bos = ids(tokenizer), names[tokenizer.bos_id]
    definition: dict[str, Any] = json.loads(tokenizer.definition)
    first, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, first], "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [special.bos], "tokens": [bos]}},
    }  # fmt: skip
    folder.write_json(target / "tokenizer.json", definition)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": names[special.eos[0]],
        "model_max_length": context, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if special.pad is not None:
        settings["pad_token"] = names[special.pad]
    folder.write_json(target / "tokenizer_config.json", settings)
    if template := chat_template(tokenizer):
        (target / "chat_template.jinja").write_text(template + "\n", encoding="utf-8")


def pre(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of the rule that cuts text before merging.

    llama.cpp knows fixed rules only. Ours differs from one of them in cutting digits into pairs, which
    changes nothing where no token holds two digits.
    Raises: ExportError if no rule gives the same tokens.
    """
    definition = json.loads(tokenizer.definition)
    merges, parts = definition["model"]["merges"], definition["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    if not merges:
        return "smaug-bpe"  # single bytes, however the text is cut
    if [p["type"] for p in parts] == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    pattern = parts[0].get("pattern", {}).get("Regex", "") if parts[0].get("type") == "Split" else ""
    for written, ours in CONTRACTIONS.items():
        pattern = pattern.replace(written, ours)
    if len(parts) == 2 and DIGITS.sub("#", pattern) == GPT4_STYLE:
        found = DIGITS.search(pattern)
        if found and found[0] in PRE:
            return PRE[found[0]]
        if not _digit_pairs(tokenizer):
            return "smaug-bpe"
        raise ExportError(
            "GGUF: llama.cpp has no rule that cuts digits into pairs, as this tokenizer does, and "
            f"{_digit_pairs(tokenizer)} of its tokens hold several digits, so that numbers would get other ids; "
            "train with data.tokenizer = bpe3, or export without --gguf"
        )
    raise ExportError(
        "GGUF: llama.cpp has no rule for this tokenizer's split pattern; known are GPT-2's, Llama 3's and "
        "Qwen 2's. Export without --gguf"
    )


def _digit_pairs(tokenizer: Tokenizer) -> int:
    """Tokens that hold a digit and another character."""
    special = set(tokenizer.special.values())
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i not in special)
    return sum(len(text) > 1 and any(c.isnumeric() for c in text) for text in texts)


def gguf_tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens in id order, their types, and the merges, as GGUF lists them.

    Args: size: rows of the model's table; ids without a token get a placeholder.
    """
    normal, control, unused = 1, 3, 5
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [unused] * size
    for text, index in tokenizer.core.get_vocab(with_added_tokens=False).items():
        tokens[index], types[index] = text, normal
    for text, index in tokenizer.special.items():
        tokens[index], types[index] = text, control
    merges = json.loads(tokenizer.definition)["model"]["merges"]
    return tokens, types, [m if isinstance(m, str) else " ".join(m) for m in merges]
