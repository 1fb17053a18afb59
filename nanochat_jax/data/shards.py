"""Documents to token files on disk, once, and back as memory-mapped arrays.

A prepared corpus is a directory: tokenizer.json, one raw little-endian token file and one int64
offsets file per split, and manifest.json with sizes, hashes, counts and skips. Its name is a hash
of the content it was made from; `requests/` remembers which settings and file times led to it, so
that a second start need not read the text. The work is done in stages under a lock, each recorded
when whole: an interrupted preparation continues, and nothing unfinished is ever opened.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import sources
from nanochat_jax.data.sources import DataError

try:
    import fcntl
except ImportError:  # Windows: every process then works alone, and the first result stays
    fcntl = None

VERSION = 2  # of the files and of the filters: raise it to have everything prepared again
TRAINING_BYTES = 8_000_000  # text that the tokenizer is trained on, spread over the corpus
BLOCK_BYTES = 4_000_000  # text encoded between two records of progress
HASHED_BYTES = 64 << 20  # files up to this size have their SHA-256 checked at every opening
ENDS = 1 << 20  # tokens looked at on both ends of larger files

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tokens:
    """A split: token ids [n] and document offsets [documents + 1], memory-mapped on first use.

    Picklable: the maps are dropped and opened again on the other side.
    """

    path: Path
    dtype: str
    count: int
    skip: int  # bytes before the first token
    offsets_path: Path
    _maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ids(self) -> np.ndarray:
        """uint16 or uint32 [n]."""
        if "ids" not in self._maps:
            self._maps["ids"] = np.asarray(np.memmap(self.path, self.dtype, "r", self.skip, (self.count,)))
        return self._maps["ids"]

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]."""
        if "offsets" not in self._maps:
            self._maps["offsets"] = np.asarray(np.memmap(self.offsets_path, "<i8", "r"))
        return self._maps["offsets"]

    def __getstate__(self) -> dict[str, Any]:
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
        """Content hash of the tokenizer and both splits."""
        return _digest([entry["sha256"] for entry in self.manifest["files"].values()])


def prepare(
    cfg: DataConfig,
    vocab_size: int,
    cache_dir: Path,
    progress: Report | None = None,
    verify: bool = False,
) -> Corpus:
    """Load the corpus of `cfg` from the cache, or make it.

    Several processes may call this at once: one works, the others wait for its result.
    Args: vocab_size: ids that the model has room for; a trained tokenizer gets at most as many.
    cache_dir: directory of prepared corpora. progress: receives lines for the user.
    verify: compare the SHA-256 of large files too.
    Raises: DataError for empty or damaged data; ConfigError if the tokenizer needs more ids.
    """
    report = progress or (lambda line: None)
    request = {
        "version": VERSION, "source": cfg.source, "tokenizer": _tokenizer_name(cfg, vocab_size),
        "text_key": cfg.text_key, "max_bytes": cfg.max_bytes, "val_percent": cfg.val_percent,
    }  # fmt: skip
    file = None
    if cfg.source.startswith("tokens:"):
        file = sources.token_file(Path(cfg.source.removeprefix("tokens:")).expanduser().absolute())
        request["fingerprint"] = [file.path.stat().st_mtime_ns, *map(str, vars(file).values())]
    else:
        request["fingerprint"] = sources.discover(cfg.source)
    name = _digest(request)[:20]
    link = cache_dir / "requests" / f"{name}.json"
    directory = _follow(link, cache_dir)
    if directory is None:
        link.parent.mkdir(parents=True, exist_ok=True)
        with _lock(link.with_suffix(".lock"), report) as locked:
            directory = _follow(link, cache_dir)  # another process may have made it meanwhile
            if directory is None:
                work = cache_dir / (f"{name}.partial" if locked else f"{name}.{os.getpid()}.partial")
                directory = _make(cfg, vocab_size, file, cache_dir, work, report)
                _write_json(link, {"directory": directory.name, "request": request})
    return open_corpus(directory, vocab_size, verify)


def _make(
    cfg: DataConfig,
    vocab_size: int,
    file: sources.TokenFile | None,
    cache_dir: Path,
    work: Path,
    report: Report,
) -> Path:
    """Make a corpus in `work` and publish it; what a killed process left in `work` is used."""
    work.mkdir(exist_ok=True)
    try:
        if file:
            made = _from_tokens(cfg, file, work, report)
        else:
            made = _from_text(cfg, vocab_size, cache_dir, work, report)
        directory = _publish(made, cache_dir)
    except Exception:
        shutil.rmtree(work, ignore_errors=True)  # the reason must be mended, and then all may differ
        raise
    shutil.rmtree(work, ignore_errors=True)
    return directory


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def _follow(link: Path, cache_dir: Path) -> Path | None:
    """The corpus that a request led to earlier, if it is still there."""
    try:
        directory = cache_dir / json.loads(link.read_text())["directory"]
    except (OSError, ValueError, KeyError):
        return None
    return directory if (directory / "manifest.json").exists() else None


@contextlib.contextmanager
def _lock(path: Path, report: Report) -> Iterator[bool]:
    """Hold a file lock (the system drops it if the process dies). Yields whether there is one."""
    if fcntl is None:
        yield False
        return
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            report("waiting for another process that prepares the same data")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield True


def _publish(made: Path, cache_dir: Path) -> Path:
    """Rename a finished corpus to its content hash; if an equal one is there, that one stays."""
    target = cache_dir / made.name
    if made == target:
        return target
    if target.exists() and not (target / "manifest.json").exists():
        shutil.rmtree(target)  # somebody deleted a part by hand
    try:
        os.rename(made, target)
    except OSError:
        if not (target / "manifest.json").exists():
            raise
    return target


def _tokenizer_name(cfg: DataConfig, vocab_size: int) -> str:
    """What determines the tokenizer besides the text. Raises: ConfigError, DataError."""
    if cfg.tokenizer == "bpe":
        if cfg.source.startswith("tokens:"):
            raise ConfigError(
                "a token file needs its tokenizer: set data.tokenizer to a tokenizer.json, or to bytes"
            )
        least = tokenizers.byte_tokenizer().vocab_size
        if vocab_size < least:
            raise ConfigError(
                f"'model.vocab_size' = {vocab_size} must be at least {least}: bytes and special tokens"
            )
        return f"bpe:{vocab_size}"
    if cfg.tokenizer != "bytes" and not Path(cfg.tokenizer).expanduser().is_file():
        raise ConfigError(f"'data.tokenizer' must be bpe, bytes or a tokenizer.json, got '{cfg.tokenizer}'")
    known = _given_tokenizer(cfg)
    if known.vocab_size > vocab_size:
        raise ConfigError(
            f"'model.vocab_size' = {vocab_size} is less than the {known.vocab_size} ids of the tokenizer "
            f"'{cfg.tokenizer}'"
        )
    return known.sha256


def _given_tokenizer(cfg: DataConfig) -> tokenizers.Tokenizer:
    if cfg.tokenizer == "bytes":
        return tokenizers.byte_tokenizer()
    try:
        return tokenizers.load(Path(cfg.tokenizer).expanduser())
    except ValueError as error:
        raise DataError(str(error)) from None


@dataclass(frozen=True)
class _Text:
    """The documents of a source, gathered in one file."""

    raw: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [documents + 1]
    held_out: np.ndarray  # bool [documents]

    def __getitem__(self, index: int) -> str:
        return self.raw[self.offsets[index] : self.offsets[index + 1]].tobytes().decode()

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each document."""
        return np.diff(self.offsets)


def _from_text(cfg: DataConfig, vocab_size: int, cache_dir: Path, work: Path, report: Report) -> Path:
    """Make a corpus of documents in `work`. Returns its directory, named by content."""
    if not (work / "text.json").exists():
        report(f"reading {cfg.source}")
        _gather(cfg, work, report)
    facts = json.loads((work / "text.json").read_text())
    key = {
        "version": VERSION, "text": facts["sha256"], "val_percent": cfg.val_percent,
        "tokenizer": _tokenizer_name(cfg, vocab_size),
    }  # fmt: skip
    name = _digest(key)[:20]
    if (cache_dir / name / "manifest.json").exists():
        return cache_dir / name  # other names or times, same content
    out = work / name
    out.mkdir(exist_ok=True)
    text = _Text(
        np.memmap(work / "text.bin", np.uint8, "r"),
        np.fromfile(work / "text.offsets", "<i8"),
        np.fromfile(work / "text.val", bool),
    )
    tokenizer = _tokenizer(cfg, vocab_size, text, out, report)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    counts = _encode(tokenizer, text, dtype, out, work / "progress.json", report)
    splits = {
        name: {
            "file": f"{name}.bin", "skip": 0, "tokens": counts[name], "documents": int(part.sum()),
            "bytes": int(text.sizes[part].sum()),
        }
        for name, part in (("train", ~text.held_out), ("val", text.held_out))
    }  # fmt: skip
    _finish(out, tokenizer, dtype, splits, {"key": key, "source": cfg.source, "skipped": facts["skipped"]})
    skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["skipped"].items())) or "none"
    report(f"{len(text.held_out)} documents, {sum(counts.values())} tokens; skipped: {skipped}")
    return out


def _gather(cfg: DataConfig, work: Path, report: Report) -> None:
    """Copy the documents into text.bin, text.offsets and text.val (held out?); text.json when whole.

    Reading twice (for the tokenizer, then to encode) must not mean downloading twice, and the
    corpus need not fit into memory.
    """
    skipped: Counter = Counter()
    digest, offsets, held_out = hashlib.sha256(), [0], []
    with open(work / "text.bin", "wb") as out:
        for document in sources.documents(cfg, skipped):
            raw = document.text.encode()
            own = hashlib.sha256(raw).digest()
            digest.update(own)
            out.write(raw)
            offsets.append(offsets[-1] + len(raw))
            held_out.append(int.from_bytes(own[:8], "big") % 100 < cfg.val_percent)
    if not held_out:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "nothing found"
        cap = f" within data.max_bytes = {cfg.max_bytes}" if cfg.max_bytes else ""
        raise DataError(f"data.source '{cfg.source}' has no usable document{cap}; skipped: {reasons}")
    if len(held_out) == 1:
        report(f"only one document: its last {cfg.val_percent}% is held out")
        offsets, held_out = _cut(work / "text.bin", cfg.val_percent), [False, True]
    elif len(set(held_out)) == 1:
        report(f"only {len(held_out)} documents: the last one is held out")
        held_out = [False] * (len(held_out) - 1) + [True]
    np.array(offsets, "<i8").tofile(work / "text.offsets")
    np.array(held_out, bool).tofile(work / "text.val")
    _write_json(work / "text.json", {"sha256": digest.hexdigest(), "skipped": dict(skipped)})


def _cut(path: Path, percent: int) -> list[int]:
    """Offsets that cut one text in two after a line, or else between two characters."""
    raw = path.read_bytes()
    near = len(raw) - max(1, len(raw) * percent // 100)
    cut = raw.rfind(b"\n", 0, near) + 1
    if not cut:
        cut = next(n for n in range(near, -1, -1) if raw[n] & 0xC0 != 0x80)
    return [0, cut, len(raw)]


def _tokenizer(
    cfg: DataConfig, vocab_size: int, text: _Text, out: Path, report: Report
) -> tokenizers.Tokenizer:
    """Train on a part of the training split, or load what an interrupted preparation has trained."""
    path = out / "tokenizer.json"
    if path.exists():
        return tokenizers.load(path)
    if cfg.tokenizer != "bpe":
        tokenizer = _given_tokenizer(cfg)
    else:
        learned = np.flatnonzero(~text.held_out)
        learned = learned[:: -(-int(text.sizes[learned].sum()) // TRAINING_BYTES)]
        size = text.sizes[learned].sum() / 1e6
        report(f"training a tokenizer of {vocab_size} ids on {size:.1f} MB")
        tokenizer = tokenizers.train((text[i] for i in learned), vocab_size)
    partial = path.with_name("tokenizer.tmp")
    tokenizer.save(partial)
    os.replace(partial, path)
    return tokenizer


def _encode(
    tokenizer: tokenizers.Tokenizer, text: _Text, dtype: str, out: Path, record: Path, report: Report
) -> dict[str, int]:
    """Write BOS + tokens of every document, and offsets. Returns tokens per split.

    Works in blocks and goes on after the last block that `record` calls whole.
    """
    total, ends = len(text.held_out), {"train": 0, "val": 0}
    names = [f"{split}.{kind}" for split in ends for kind in ("bin", "offsets")]
    done, sizes = 0, dict.fromkeys(names, 0)
    if record.exists():
        done, ends, sizes = (json.loads(record.read_text())[key] for key in ("done", "ends", "sizes"))
        report(f"continuing after {done} of {total} documents")
    with contextlib.ExitStack() as stack:
        outs = {name: stack.enter_context(open(out / name, "ab")) for name in names}
        for name, handle in outs.items():
            handle.truncate(sizes[name])  # what came after the last record may be half a block
            if not sizes[name] and name.endswith("offsets"):
                handle.write(np.zeros(1, "<i8").tobytes())
        while done < total:
            after = int(np.searchsorted(text.offsets, text.offsets[done] + BLOCK_BYTES, "right")) - 1
            block = range(done, max(done + 1, after))
            for index, ids in zip(block, tokenizer.encode_batch([text[i] for i in block]), strict=True):
                split = "val" if text.held_out[index] else "train"
                outs[f"{split}.bin"].write(np.array([tokenizer.bos_id, *ids], dtype).tobytes())
                ends[split] += len(ids) + 1
                outs[f"{split}.offsets"].write(np.array(ends[split], "<i8").tobytes())
            for handle in outs.values():
                handle.flush()
                os.fsync(handle.fileno())
            done = block.stop
            sizes = {name: os.fstat(handle.fileno()).st_size for name, handle in outs.items()}
            _write_json(record, {"done": done, "ends": ends, "sizes": sizes})
    return ends


def _from_tokens(cfg: DataConfig, file: sources.TokenFile, work: Path, report: Report) -> Path:
    """Describe a token file made elsewhere; it stays where it is. Its end is held out."""
    report(f"reading {file.path}")
    tokenizer = _given_tokenizer(cfg)
    ids = np.memmap(file.path, file.dtype, "r", file.skip, (file.count,))
    pieces = (np.flatnonzero(ids[i : i + ENDS] == tokenizer.bos_id) + i for i in range(0, file.count, ENDS))
    starts = np.concatenate(list(pieces))  # of documents
    cut = file.count - max(1, file.count * cfg.val_percent // 100)
    near = starts[(starts >= cut) & (starts <= (cut + file.count) // 2)]
    cut = int(near[0]) if len(near) else cut  # at the start of a document if one is near
    if not cut:
        raise DataError(f"{file.path}: {file.count} tokens are too few to hold out {cfg.val_percent}%")
    content = _describe(file.path)
    key = {"version": VERSION, "path": str(file.path), "cut": cut, "tokenizer": tokenizer.sha256} | content
    out = work / _digest(key)[:20]
    out.mkdir(exist_ok=True)
    tokenizer.save(out / "tokenizer.json")
    splits, width = {}, np.dtype(file.dtype).itemsize
    for name, begin, end in (("train", 0, cut), ("val", cut, file.count)):
        inside = starts[(starts > begin) & (starts < end)]
        (np.concatenate([[begin], inside, [end]]).astype("<i8") - begin).tofile(out / f"{name}.offsets")
        splits[name] = {
            "file": str(file.path), "skip": file.skip + begin * width, "tokens": end - begin,
            "documents": len(inside) + 1,
        }  # fmt: skip
    facts = {"key": key, "source": cfg.source, "skipped": {}}
    _finish(out, tokenizer, file.dtype, splits, facts, {str(file.path): content})
    return out


def _finish(
    out: Path,
    tokenizer: tokenizers.Tokenizer,
    dtype: str,
    splits: dict,
    facts: dict,
    outside: dict | None = None,
) -> None:
    """Write the manifest: from now on the directory is a corpus."""
    for leftover in out.glob("*.tmp"):  # of a killed process
        leftover.unlink()
    names = sorted(p.name for p in out.iterdir() if p.name != "manifest.json")
    inside = {name: _describe(out / name) for name in names}
    counts = {
        name: {key: split[key] for key in ("documents", "tokens", "bytes") if key in split}
        for name, split in splits.items()
    }
    manifest = facts | {
        "dtype": dtype, "counts": counts, "splits": splits, "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256, "files": inside | (outside or {}),
    }  # fmt: skip
    _write_json(out / "manifest.json", manifest)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as content:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def open_corpus(directory: Path, vocab_size: int, verify: bool = False) -> Corpus:
    """Open a prepared corpus.

    Args: vocab_size: ids that the model has room for. verify: compare the SHA-256 of every file;
    without it files over HASHED_BYTES are known by their size and their ends.
    Raises: DataError naming the file if one is missing, truncated, altered or foreign.
    """
    rebuild = f"delete {directory} to prepare it again"
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        recorded, splits, dtype = manifest["files"], manifest["splits"], manifest["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory / 'manifest.json'} is unreadable ({type(error).__name__}: {error}); {rebuild}"
        ) from None
    for name, expected in recorded.items():
        path = directory / name
        if not path.exists():
            raise DataError(f"{path} is missing; {rebuild}")
        size = path.stat().st_size
        if size != expected["size"]:
            raise DataError(f"{path}: expected {expected['size']} bytes, got {size}; {rebuild}")
        if (verify or size <= HASHED_BYTES) and _describe(path)["sha256"] != expected["sha256"]:
            raise DataError(f"{path} was altered: its SHA-256 differs from the manifest; {rebuild}")
    tokenizer = tokenizers.load(directory / "tokenizer.json")
    opened = {
        name: Tokens(directory / s["file"], dtype, s["tokens"], s["skip"], directory / f"{name}.offsets")
        for name, s in splits.items()
    }
    for tokens in opened.values():
        _check_tokens(tokens, min(vocab_size, tokenizer.vocab_size), rebuild)
    return Corpus(directory, tokenizer, opened["train"], opened["val"], manifest)


def _check_tokens(tokens: Tokens, vocab_size: int, advice: str) -> None:
    """Look at both ends: a wrong width, a foreign file or other offsets show at once."""
    largest = max(int(end.max()) for end in (tokens.ids[:ENDS], tokens.ids[-ENDS:]))
    if largest >= vocab_size:
        raise DataError(
            f"{tokens.path} holds token {largest}, expected ids below {vocab_size}: another tokenizer or "
            f"another width; {advice}"
        )
    offsets = tokens.offsets
    if offsets[0] != 0 or offsets[-1] != tokens.count or not (np.diff(offsets) > 0).all():
        raise DataError(f"{tokens.offsets_path} does not belong to {tokens.path}; {advice}")
