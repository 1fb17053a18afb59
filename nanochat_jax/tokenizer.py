"""Text to token ids and back: byte-level BPE (Hugging Face `tokenizers`), or plain bytes.

Any bytes round-trip: text is cut by a split pattern, its UTF-8 bytes are mapped to 256 printable
characters, and BPE merges those. Special tokens exist by name only: `encode` never turns text that
looks like one into its id, so a document cannot forge a chat turn.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

BOS = "<|bos|>"  # starts every document
SPECIAL = (
    BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|system_start|>", "<|system_end|>", "<|tool_start|>", "<|tool_end|>",
)  # fmt: skip

# What a token may span: a contraction; letters with at most one leading symbol; one or two digits;
# a run of symbols with the line breaks behind it; line breaks with their indentation; blanks.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    """A loaded tokenizer. Ids 0..len(SPECIAL)-1 are the special tokens."""

    core: tokenizers.Tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.core.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self.special_id(BOS)

    def special_id(self, name: str) -> int:
        """Id of a special token. Raises: KeyError naming the known ones."""
        if name not in SPECIAL:
            raise KeyError(f"no special token '{name}'; known: {', '.join(SPECIAL)}")
        return SPECIAL.index(name)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are ordinary characters."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        return [e.ids for e in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of arbitrary bytes, valid UTF-8 or not; `decode_bytes` gives them back."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return [self._byte_ids[byte] for byte in data]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Raw bytes of ids; special tokens give their names. Raises: ValueError for an unknown id."""
        table = self._bytes
        try:
            return b"".join(table[i] for i in ids)
        except IndexError:
            raise ValueError(f"token id out of range: expected less than {len(table)}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; incomplete UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: raw bytes of each token, 0 for special tokens."""
        return np.array([0] * len(SPECIAL) + [len(b) for b in self._bytes[len(SPECIAL) :]], np.int32)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's definition."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self.core.save(str(path))

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for text, index in self.core.get_vocab().items():
            special = index < len(SPECIAL)
            table[index] = text.encode() if special else bytes(_BYTE[c] for c in text)
        return table

    @cached_property
    def _byte_ids(self) -> list[int]:
        vocab = self.core.get_vocab()
        return [vocab[character] for character in _CHARACTER]


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE; deterministic in the texts and their order.

    Args: vocab_size: ids at most, special tokens and the 256 bytes included.
    Raises: ValueError if vocab_size leaves no room for the bytes.
    """
    least = len(SPECIAL) + 256
    if vocab_size < least:
        raise ValueError(f"vocabulary of {vocab_size} is too small: {least} ids are bytes and special tokens")
    core = _core(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return _without_matching(core)


def byte_tokenizer() -> Tokenizer:
    """One id per byte, after the special tokens: no training, 265 ids."""
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    vocab |= {character: len(SPECIAL) + byte for byte, character in enumerate(_CHARACTER)}
    return Tokenizer(_core(models.BPE(vocab=vocab, merges=[])))


def load(path: Path) -> Tokenizer:
    """Load a tokenizer.json written by `save`.

    Raises: ValueError if the file is not one: special tokens or bytes are missing.
    """
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    vocab = core.get_vocab()
    wrong = [name for i, name in enumerate(SPECIAL) if vocab.get(name) != i]
    if wrong or any(character not in vocab for character in _CHARACTER):
        raise ValueError(f"{path} lacks {wrong or 'byte tokens'}: not a tokenizer of this project")
    return _without_matching(core)


def _core(model: models.Model) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _without_matching(core: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer without its table of special tokens, which would match them inside text.

    Their ids stay taken in the model's vocabulary, where text only ever reaches merges of bytes.
    """
    description = json.loads(core.to_str())
    description["added_tokens"] = []
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))
