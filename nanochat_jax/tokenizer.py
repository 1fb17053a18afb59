"""Text to token ids and back: byte-level BPE (Hugging Face `tokenizers`), or plain bytes.

Any bytes round-trip: text is cut by a split pattern, its UTF-8 bytes are mapped to 256 printable
characters, and BPE merges those. Special tokens exist by name only: `encode` never turns text that
looks like one into its id, so a document cannot forge a chat turn.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

BOS = "<|bos|>"  # starts every document
SPECIAL = (
    BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|system_start|>", "<|system_end|>", "<|tool_start|>", "<|tool_end|>", "<|pad|>",
)  # fmt: skip
# What other projects call the token that separates documents, in order of preference.
BOS_NAMES = (BOS, "<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>")

# What a token may span: a contraction; letters with at most one leading symbol; one or two digits;
# a run of symbols with the line breaks behind it; line breaks with their indentation; blanks.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer that is trained here may be called. bpe3 cuts digits into threes, as Llama 3 does: llama.cpp
# knows that rule, and no rule for pairs (see export.tokenization.pre).
SPLITS = {"bpe": SPLIT, "bpe3": SPLIT.replace(r"\p{N}{1,2}", r"\p{N}{1,3}")}

# Text that normalizers, prefixes and trimming would change.
PROBE = "A  b\u00e9e\u0301 \u4f60\U0001f600\x00\r\n\t 12345 \u00a0\n "

# Python's "surrogateescape" decodes a byte that is not UTF-8 to one of these code points.
_ESCAPED = re.compile("([\udc80-\udcff]+)")


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the others are shifted up to 256 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]


_CHARACTER = _byte_characters()
_BYTE = {character: byte for byte, character in enumerate(_CHARACTER)}


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. Made by `train`, `byte_tokenizer` and `load`.

    core: encodes text; it knows no special token.
    special: ids of the special tokens by name.
    definition: the tokenizer.json, special tokens included.
    """

    core: tokenizers.Tokenizer
    special: Mapping[str, int]
    definition: str

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; every id is below it."""
        return max(*self.core.get_vocab(with_added_tokens=False).values(), *self.special.values()) + 1

    @cached_property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self.special[next(name for name in BOS_NAMES if name in self.special)]

    def special_id(self, name: str) -> int:
        """Id of a special token. Raises: KeyError naming the known ones."""
        if name not in self.special:
            raise KeyError(f"no special token '{name}'; known: {', '.join(self.special)}")
        return self.special[name]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are ordinary characters.

        Surrogates that stand for bytes ("surrogateescape", as in sys.argv) become those bytes.
        Raises: UnicodeEncodeError for other surrogates: they have no UTF-8.
        """
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except TypeError:  # what tokenizers raises for a surrogate
            return self.encode_bytes(text.encode(errors="surrogateescape"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts without surrogates, in parallel threads."""
        return [e.ids for e in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of arbitrary bytes; `decode_bytes` gives them back.

        Stretches of valid UTF-8 are encoded as text, the other bytes one id each.
        """
        ids: list[int] = []
        for part in _ESCAPED.split(data.decode(errors="surrogateescape")):
            if _ESCAPED.match(part):
                ids += [self._byte_ids[byte] for byte in part.encode(errors="surrogateescape")]
            elif part:
                ids += self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Raw bytes of ids; special tokens give their names. Raises: ValueError for an unknown id."""
        table, found = self._bytes, []
        for index in ids:
            if not 0 <= index < len(table):
                raise ValueError(f"token id {index} is out of range: expected 0..{len(table) - 1}")
            found.append(table[index])
        return b"".join(found)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self, rows: int = 0) -> np.ndarray:
        """int32 [max(rows, vocab_size)]: raw bytes of each token, 0 for special tokens and beyond the vocabulary.

        rows: of a model's padded table.
        """
        special = set(self.special.values())
        sizes = [0 if i in special else len(b) for i, b in enumerate(self._bytes)]
        return np.array(sizes + [0] * (rows - len(sizes)), np.int32)

    @cached_property
    def sha256(self) -> str:
        """Hash of the definition."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write tokenizer.json, which Hugging Face's libraries read too."""
        Path(path).write_text(self.definition, encoding="utf-8")

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        names = {index: name for name, index in self.special.items()}
        for text, index in self.core.get_vocab(with_added_tokens=False).items():
            if index not in names:
                table[index] = bytes(_BYTE[character] for character in text)
        for index, name in names.items():
            table[index] = name.encode()
        return table

    @cached_property
    def _byte_ids(self) -> list[int]:
        vocab = self.core.get_vocab(with_added_tokens=False)
        return [vocab[character] for character in _CHARACTER]


def train(texts: Iterable[str], vocab_size: int, split: str = SPLIT) -> Tokenizer:
    """Train byte-level BPE; deterministic in the texts and their order.

    Args: vocab_size: ids at most, special tokens and the 256 bytes included; a small text gives
    fewer, because a merge must be seen twice. split: what a token may span, one of SPLITS.
    Raises: ValueError if vocab_size leaves no room for the bytes.
    """
    least = len(SPECIAL) + 256
    if vocab_size < least:
        raise ValueError(f"vocabulary of {vocab_size} is too small: {least} ids are bytes and special tokens")
    core = _untrained(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return _build(core.to_str(), "the trained tokenizer")


def byte_tokenizer() -> Tokenizer:
    """One id per byte, after the special tokens: no training."""
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    vocab |= {character: len(SPECIAL) + byte for byte, character in enumerate(_CHARACTER)}
    core = _untrained(models.BPE(vocab=vocab, merges=[]))
    core.add_special_tokens(list(SPECIAL))
    return _build(core.to_str(), "the byte tokenizer")


def load(path: Path) -> Tokenizer:
    """Load a byte-level tokenizer.json: one that `save` wrote, or GPT-2's and its relatives.

    Raises: ValueError if the file is not one, if it cannot encode every byte or would alter the
    text, or if no special token can start a document.
    """
    try:
        definition = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from None
    return _build(definition, str(path))


def _build(definition: str, where: str) -> Tokenizer:
    """Check a tokenizer.json and take its special tokens out of the part that encodes text."""
    try:
        parsed: dict[str, Any] = json.loads(definition)
        special = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        # The table of added tokens would match them inside text. Their ids stay taken.
        core = tokenizers.Tokenizer.from_str(json.dumps(parsed | {"added_tokens": []}))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{where} is not a tokenizer.json: {type(error).__name__}: {error}") from None
    vocab = core.get_vocab(with_added_tokens=False)
    missing = [byte for byte, character in enumerate(_CHARACTER) if character not in vocab]
    if missing:
        raise ValueError(f"{where} is not a byte-level tokenizer: it lacks {len(missing)} of the 256 bytes")
    taken = set(special.values())
    foreign = [text for text, i in vocab.items() if i not in taken and not _BYTE.keys() >= set(text)]
    if foreign:
        raise ValueError(f"{where}: token {foreign[0]!r} is neither bytes nor a special token")
    if not any(name in special for name in BOS_NAMES):
        raise ValueError(
            f"{where} has no token to start documents with: expected one of {', '.join(BOS_NAMES)}, "
            f"got {', '.join(special) or 'no special token'}"
        )
    core.no_truncation()
    core.no_padding()
    built = Tokenizer(core, special, definition)
    probe = PROBE + "".join(special)
    ids = built.encode(probe)
    if built.decode(ids) != probe or not taken.isdisjoint(ids):
        raise ValueError(f"{where} alters text: {built.decode(ids)!r} instead of {probe!r}")
    return built


def _untrained(model: models.Model, split: str = SPLIT) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core
