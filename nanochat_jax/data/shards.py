"""Documents to token files on disk, once, and back as memory-mapped arrays.

A prepared corpus is a directory: tokenizer.json, one raw little-endian token file and one int64
offsets file per split, and manifest.json with sizes, hashes, counts and skips. It is written under
a temporary name and renamed when whole, so an interrupted preparation leaves nothing that looks
finished, and its directory name is a hash of what it was made from.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import DataConfig
from nanochat_jax.data import sources
from nanochat_jax.data.sources import DataError

VERSION = 1
TRAINING_BYTES = 8_000_000  # text that the tokenizer is trained on, spread over the corpus
BATCH = 256  # documents encoded at once
LLM_C_MAGIC = 20240520  # header of llm.c and modded-nanogpt token files


@dataclass
class Tokens:
    """A split: token ids [n] and document offsets [documents + 1], memory-mapped on first use.

    Picklable: the maps are dropped and opened again on the other side.
    """

    path: Path
    dtype: str
    count: int
    skip: int = 0  # bytes of header
    _maps: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def ids(self) -> np.ndarray:
        """uint16 or uint32 [n]."""
        if "ids" not in self._maps:
            self._maps["ids"] = np.memmap(self.path, self.dtype, "r", self.skip, (self.count,))
        return self._maps["ids"]

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]."""
        if "offsets" not in self._maps:
            path = self.path.with_suffix(".offsets")
            known = path.exists()
            self._maps["offsets"] = np.fromfile(path, "<i8") if known else np.array([0, self.count], np.int64)
        return self._maps["offsets"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    directory: Path
    tokenizer: tokenizers.Tokenizer
    train: Tokens
    val: Tokens
    manifest: dict[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Content hash of both splits."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()


def prepare(
    cfg: DataConfig, vocab_size: int, cache: Path, report: Callable[[str], None] = lambda text: None
) -> Corpus:
    """Load the corpus of `cfg` from the cache, or make it.

    Args: vocab_size: ids of the tokenizer at most. cache: directory of prepared corpora.
    report: receives lines for the user.
    Raises: DataError for empty or damaged data.
    """
    if cfg.source.startswith("tokens:"):
        return _external(cfg, vocab_size)
    key = {
        "version": VERSION, "fingerprint": sources.discover(cfg.source), "source": cfg.source,
        "tokenizer": _tokenizer_name(cfg, vocab_size), "text_key": cfg.text_key,
        "max_bytes": cfg.max_bytes, "val_percent": cfg.val_percent,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    directory = cache / name
    if not (directory / "manifest.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        report(f"reading {cfg.source}")
        partial = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".partial", dir=cache))
        try:
            _write(cfg, vocab_size, key, partial, report)
            _publish(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return open_corpus(directory, vocab_size)


def _publish(partial: Path, directory: Path) -> None:
    """Rename into place; if another process was first, its equal result stays."""
    if directory.exists() and not (directory / "manifest.json").exists():
        shutil.rmtree(directory)  # the wreck of a manual deletion
    try:
        os.rename(partial, directory)
    except OSError:
        if not (directory / "manifest.json").exists():
            raise


def _tokenizer_name(cfg: DataConfig, vocab_size: int) -> str:
    if cfg.tokenizer in ("bpe", "bytes"):
        return f"{cfg.tokenizer}:{vocab_size if cfg.tokenizer == 'bpe' else 0}"
    path = Path(cfg.tokenizer)
    if not path.is_file():
        raise DataError(f"data.tokenizer '{cfg.tokenizer}' is neither bpe, bytes nor a tokenizer.json")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(cfg: DataConfig, vocab_size: int, key: dict, out: Path, report: Callable[[str], None]) -> None:
    skipped: Counter = Counter()
    found = list(sources.documents(cfg, skipped))
    if not found:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no documents"
        raise DataError(f"data.source '{cfg.source}' has no usable document ({reasons})")
    texts = [document.text for document in found]
    tokenizer = _tokenizer(cfg, vocab_size, texts, report)
    tokenizer.save(out / "tokenizer.json")
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for text in texts:
        held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < cfg.val_percent
        splits["val" if held_out else "train"].append(text)
    if not splits["val"] or not splits["train"]:  # a tiny corpus: hold out its last document
        splits = {"train": texts[:-1] or texts, "val": texts[-1:]}
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    counts = {name: _encode(tokenizer, part, dtype, out / f"{name}.bin") for name, part in splits.items()}
    manifest = {
        "key": key, "dtype": dtype, "counts": counts, "skipped": dict(skipped),
        "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256,
        "files": {p.name: _describe(p) for p in sorted(out.iterdir())},
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    report(
        f"{len(found)} documents, {sum(c['tokens'] for c in counts.values())} tokens; "
        f"skipped: {', '.join(f'{n} {r}' for r, n in sorted(skipped.items())) or 'none'}"
    )


def _tokenizer(cfg: DataConfig, vocab_size: int, texts: list[str], report) -> tokenizers.Tokenizer:
    if cfg.tokenizer == "bytes":
        return tokenizers.byte_tokenizer()
    if cfg.tokenizer != "bpe":
        return tokenizers.load(Path(cfg.tokenizer))
    stride = max(1, sum(map(len, texts)) // TRAINING_BYTES)
    sample = texts[::stride]
    report(f"training a tokenizer of {vocab_size} ids on {sum(map(len, sample)) / 1e6:.1f} MB")
    return tokenizers.train(sample, vocab_size)


def _encode(tokenizer: tokenizers.Tokenizer, texts: list[str], dtype: str, path: Path) -> dict[str, int]:
    """Write BOS + tokens of every document, and the offsets. Returns counts."""
    lengths, size = [0], 0
    with open(path, "wb") as out:
        for start in range(0, len(texts), BATCH):
            for ids in tokenizer.encode_batch(texts[start : start + BATCH]):
                np.array([tokenizer.bos_id, *ids], dtype).tofile(out)
                lengths.append(len(ids) + 1)
    size = sum(len(text.encode()) for text in texts)
    offsets = np.cumsum(lengths).astype("<i8")
    offsets.tofile(path.with_suffix(".offsets"))
    return {"documents": len(texts), "tokens": int(offsets[-1]), "bytes": size}


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as content:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def open_corpus(directory: Path, vocab_size: int, verify: bool = False) -> Corpus:
    """Open a prepared corpus.

    Args: vocab_size: ids that the model has room for. verify: also compare SHA-256 of every file.
    Raises: DataError naming the file if one is missing, truncated, altered or foreign.
    """
    rebuild = f"delete {directory} to prepare it again"
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        recorded, counts, dtype = manifest["files"], manifest["counts"], manifest["dtype"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory / 'manifest.json'} is unreadable ({error}); {rebuild}") from None
    for name, expected in recorded.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else None
        if size != expected["size"]:
            raise DataError(f"{path} has {size} bytes, expected {expected['size']}; {rebuild}")
        if verify and _describe(path)["sha256"] != expected["sha256"]:
            raise DataError(f"{path} was altered: its SHA-256 differs from the manifest; {rebuild}")
    tokenizer = tokenizers.load(directory / "tokenizer.json")
    splits = {name: Tokens(directory / f"{name}.bin", dtype, counts[name]["tokens"]) for name in ("train", "val")}
    for split in splits.values():
        _check_ids(split, min(vocab_size, tokenizer.vocab_size), rebuild)
    return Corpus(directory, tokenizer, splits["train"], splits["val"], manifest)


def _check_ids(tokens: Tokens, vocab_size: int, advice: str) -> None:
    """Look at the first and last million ids: a wrong dtype or a foreign file shows at once."""
    if not tokens.count:
        raise DataError(f"{tokens.path} holds no token; {advice}")
    ends = tokens.ids[: 1 << 20], tokens.ids[-(1 << 20) :]
    largest = max(int(end.max()) for end in ends)
    if largest >= vocab_size:
        raise DataError(f"{tokens.path} holds token {largest}, but the vocabulary has {vocab_size} ids; {advice}")


def _external(cfg: DataConfig, vocab_size: int) -> Corpus:
    """A token file made elsewhere: "tokens:<path>", headerless .u16/.bin or .u32, or llm.c's format.

    Its tokenizer is data.tokenizer (a tokenizer.json, or "bytes"); the last val_percent is held out.
    """
    path = Path(cfg.source.removeprefix("tokens:"))
    if not path.is_file():
        raise DataError(f"data.source '{cfg.source}': no such file")
    if cfg.tokenizer == "bpe":
        raise DataError("a token file needs its tokenizer: set data.tokenizer to a tokenizer.json, or to bytes")
    tokenizer = _tokenizer(cfg, vocab_size, [], lambda text: None)
    dtype, skip = ("<u4", 0) if path.suffix == ".u32" else ("<u2", 0)
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(3, np.int32)
    if header[0] == LLM_C_MAGIC:
        skip = 1024
        if int(header[2]) * 2 != size - skip:
            raise DataError(f"{path}: header says {header[2]} tokens, the file holds {(size - skip) / 2}")
    width = np.dtype(dtype).itemsize
    if (size - skip) % width:
        raise DataError(f"{path}: {size} bytes are no whole number of {dtype} tokens; name 32-bit files *.u32")
    count = (size - skip) // width
    val = max(1, count * cfg.val_percent // 100)
    train = Tokens(path, dtype, count - val, skip)
    held_out = Tokens(path, dtype, val, skip + (count - val) * width)
    for part in (train, held_out):
        _check_ids(part, min(vocab_size, tokenizer.vocab_size), "check data.tokenizer and the file's width")
    manifest = {
        "files": {path.name: _describe(path)}, "dtype": dtype, "skipped": {},
        "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256,
        "counts": {"train": {"documents": 1, "tokens": train.count}, "val": {"documents": 1, "tokens": val}},
    }  # fmt: skip
    return Corpus(path.parent, tokenizer, train, held_out, manifest)
