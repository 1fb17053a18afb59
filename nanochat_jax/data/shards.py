"""Documents to token files on disk, once, and back as arrays.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import chat, files
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import compiles, encode, sources
from nanochat_jax.data import text as texts
from nanochat_jax.data.sources import DataError, RemoteError
from nanochat_jax.data.stored import Stored
from nanochat_jax.data.workers import WorkerError

try:
    import fcntl
except ImportError:  # Windows: every process then works alone, and the first result stays
    fcntl = None

VERSION = 2  # of the files and of the filters: raise it to have everything prepared again
TRAINING_BYTES = 8_000_000  # text that the tokenizer is trained on, spread over the corpus
HASHED_BYTES = 64 << 20  # files up to this size have their SHA-256 checked at every opening
ENDS = 1 << 20  # tokens looked at on both ends of larger files

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tokens:
    """A split: token ids [n], read when they are asked for, and document offsets [documents + 1], in memory
    from the first use on.

    Picklable: what was read is dropped, and files are opened again on the other side.
    """

    path: Path
    dtype: str
    count: int
    skip: int  # bytes before the first token
    offsets_path: Path

    @cached_property
    def ids(self) -> Stored:
        """uint16 or uint32 [n]; slices of it are arrays."""
        return Stored(self.path, self.dtype, self.count, self.skip)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document i is ids[offsets[i]:offsets[i + 1]]."""
        made = np.fromfile(self.offsets_path, "<i8")
        made.flags.writeable = False
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


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
        return digest([entry["sha256"] for entry in self.manifest["files"].values()])

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's record says about its data."""
        return {"sha256": self.sha256, "directory": self.directory.name, **self.manifest}


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
    tokenizer = tokenizer_name(cfg, vocab_size)
    about = text_request(cfg)
    request = about | {"tokenizer": tokenizer}
    link = cache_dir / "requests" / f"{digest(request)[:20]}.json"
    directory = _follow(link, cache_dir)
    if directory is None:
        with _workplace(cache_dir, about, report) as work:
            directory = _follow(link, cache_dir)  # another process may have made it meanwhile
            if directory is None:
                if file := _token_file(cfg):
                    made = _from_tokens(cfg, file, work, report)
                else:
                    made = _from_text(cfg, vocab_size, cache_dir, work, report)
                directory = _publish(made, cache_dir)
                files.write_json(link, {"directory": directory.name, "request": request})
            shutil.rmtree(work, ignore_errors=True)
    return open_corpus(directory, vocab_size, verify)


def gathered(cfg: DataConfig, cache_dir: Path, report: Report) -> texts.Text:
    """The documents of `cfg.source`, kept for the `prepare` that follows. Raises: as `prepare`."""
    with _workplace(cache_dir, text_request(cfg), report) as work:
        texts.gather(cfg, work, report)
        return texts.opened(work, cfg.kind)


def text_request(cfg: DataConfig) -> dict[str, Any]:
    """What determines the text, as far as it can be known without reading it. Raises: as `prepare`."""
    request: dict[str, Any] = {
        "version": VERSION, "source": cfg.source, "text_key": cfg.text_key, "max_bytes": cfg.max_bytes,
        "val_percent": cfg.val_percent,
    }  # fmt: skip
    if file := _token_file(cfg):
        request["fingerprint"] = [file.path.stat().st_mtime_ns, *map(str, vars(file).values())]
    else:
        request["fingerprint"] = sources.discover(cfg.source)
    if cfg.verify_every_n_examples:
        request["verify"] = compiles.request(cfg)
    if cfg.kind != "text":
        request["kind"] = cfg.kind
    return request


def _token_file(cfg: DataConfig) -> sources.TokenFile | None:
    if not cfg.source.startswith("tokens:"):
        return None
    return sources.token_file(Path(cfg.source.removeprefix("tokens:")).expanduser().absolute())


@contextlib.contextmanager
def _workplace(cache_dir: Path, about: dict[str, Any], report: Report) -> Iterator[Path]:
    """The directory in which a text is gathered and encoded, for one process at a time.

    What a killed process left in it, or one on a full disk, is used.
    """
    name = digest(about)[:20]
    (cache_dir / "requests").mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / "requests" / f"{name}.lock", report) as locked:
        work = cache_dir / (f"{name}.partial" if locked else f"{name}.{os.getpid()}.partial")
        work.mkdir(exist_ok=True)
        try:
            yield work
        except (RemoteError, WorkerError):
            raise  # the same command goes on from there
        except Exception as error:
            if not isinstance(error, OSError) or error.errno not in texts.UNWRITABLE:  # from there, too
                shutil.rmtree(work, ignore_errors=True)  # the reason must be mended, and then all may differ
            raise


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def tokenizer_name(cfg: DataConfig, vocab_size: int) -> str:
    """What determines the tokenizer besides the text. Raises: ConfigError, DataError."""
    if cfg.tokenizer in tokenizers.SPLITS:
        if cfg.source.startswith("tokens:"):
            raise ConfigError(
                "a token file needs its tokenizer: set data.tokenizer to a tokenizer.json, or to bytes"
            )
        least = tokenizers.byte_tokenizer().vocab_size
        if vocab_size < least:
            raise ConfigError(
                f"'model.vocab_size' = {vocab_size} must be at least {least}: bytes and special tokens"
            )
        return f"{cfg.tokenizer}:{vocab_size}"
    if cfg.tokenizer != "bytes" and not Path(cfg.tokenizer).expanduser().is_file():
        raise ConfigError(
            f"'data.tokenizer' must be bpe, bpe3, bytes or a tokenizer.json, got '{cfg.tokenizer}'"
        )
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


def _from_text(cfg: DataConfig, vocab_size: int, cache_dir: Path, work: Path, report: Report) -> Path:
    """Make a corpus of documents in `work`. Returns its directory, named by content."""
    facts = texts.gather(cfg, work, report)
    key = {
        "version": VERSION, "text": facts["sha256"], "val_percent": cfg.val_percent,
        "tokenizer": tokenizer_name(cfg, vocab_size),
    } | ({"kind": cfg.kind} if cfg.kind != "text" else {})  # fmt: skip
    name = digest(key)[:20]
    if (cache_dir / name / "manifest.json").exists():
        return cache_dir / name  # other names or times, same content
    out = work / name
    out.mkdir(exist_ok=True)
    text = texts.opened(work, cfg.kind)
    tokenizer = _tokenizer(cfg, vocab_size, text, out, report)
    if cfg.kind == "chat" and not chat.supports(tokenizer):
        raise ConfigError(
            f"'data.tokenizer' = '{cfg.tokenizer}' has no marks for chat turns, such as <|user_start|>, which "
            "data.kind = 'chat' needs"
        )
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    records = work / f"{name}.records"
    records.mkdir(exist_ok=True)
    counts = encode.encode(tokenizer, text, dtype, out, work, records, report, cfg.tokenize_workers)
    splits = {
        name: {
            "file": f"{name}.bin", "skip": 0, "tokens": counts[name], "documents": int(part.sum()),
            "bytes": int(text.sizes[part].sum()) if cfg.kind == "text" else _said(out / f"{name}.bin", dtype, counts[name], tokenizer),
        }
        for name, part in (("train", ~text.held_out), ("val", text.held_out))
    }  # fmt: skip
    about = {"key": key, "source": cfg.source} | {n: facts[n] for n in ("skipped", "checks") if n in facts}
    _finish(out, tokenizer, dtype, splits, about)
    skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["skipped"].items())) or "none"
    checks = facts.get("checks", {})
    compiled = f"; {checks['compiled']} of {checks['checked']} checked files compile" if checks else ""
    report(f"{len(text.held_out)} documents, {sum(counts.values())} tokens; skipped: {skipped}{compiled}")
    return out


def _said(path: Path, dtype: str, count: int, tokenizer: tokenizers.Tokenizer) -> int:
    """Bytes of text in a file of conversations, whose stored form is longer."""
    sizes, ids = tokenizer.token_bytes(), Stored(path, dtype, count)
    return sum(int(sizes[ids[i : i + ENDS]].sum(dtype=np.int64)) for i in range(0, count, ENDS))


def _tokenizer(
    cfg: DataConfig, vocab_size: int, text: texts.Text, out: Path, report: Report
) -> tokenizers.Tokenizer:
    """Train on a part of the training split, or load what an interrupted preparation has trained."""
    path = out / "tokenizer.json"
    if path.exists():
        return tokenizers.load(path)
    if cfg.tokenizer not in tokenizers.SPLITS:
        tokenizer = _given_tokenizer(cfg)
    else:
        learned = np.flatnonzero(~text.held_out)
        learned = learned[:: -(-int(text.sizes[learned].sum()) // TRAINING_BYTES)]
        size = text.sizes[learned].sum() / 1e6
        report(f"training a tokenizer of {vocab_size} ids on {size:.1f} MB")
        rule = tokenizers.SPLITS[cfg.tokenizer]
        tokenizer = tokenizers.train((text.plain(i) for i in learned), vocab_size, rule)
    save_whole(path, tokenizer)
    return tokenizer


def save_whole(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a tokenizer whole or not at all."""
    with files.replacing(path) as partial:
        tokenizer.save(partial)


def _from_tokens(cfg: DataConfig, file: sources.TokenFile, work: Path, report: Report) -> Path:
    """Describe a token file made elsewhere; it stays where it is. Its end is held out."""
    report(f"reading {file.path}")
    tokenizer = _given_tokenizer(cfg)
    ids = Stored(file.path, file.dtype, file.count, file.skip)
    pieces = (np.flatnonzero(ids[i : i + ENDS] == tokenizer.bos_id) + i for i in range(0, file.count, ENDS))
    starts = np.concatenate(list(pieces))  # of documents
    cut = file.count - max(1, file.count * cfg.val_percent // 100)
    near = starts[(starts >= cut) & (starts <= (cut + file.count) // 2)]
    cut = int(near[0]) if len(near) else cut  # at the start of a document if one is near
    if not cut:
        raise DataError(f"{file.path}: {file.count} tokens are too few to hold out {cfg.val_percent}%")
    content = _describe(file.path)
    key = {"version": VERSION, "path": str(file.path), "cut": cut, "tokenizer": tokenizer.sha256} | content
    out = work / digest(key)[:20]
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
    files.sweep(out)
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
    files.write_json(out / "manifest.json", manifest)


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
