"""Where documents come from: source trees on this machine, files, URLs, datasets, token files.

`discover(source)` says cheaply what a source consists of (names, sizes, times), `documents(cfg)`
reads it: in one fixed order, with every skipped document counted by reason, and from any place in
that order. Source code is taken file by file and filtered (if wanted by its compiler, see
`compiles`); prose and rows of tables are taken as they are, and cut if very long. With data.kind = "chat" rows are
conversations, see `turns`.
"""

import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nanochat_jax.config import DataConfig
from nanochat_jax.data import compiles, remote, turns

MIN_BYTES, MAX_BYTES = 64, 1_000_000  # of a document
MAX_LINE = 1000  # characters; longer lines in source files are data or generated code
PROSE = (".txt", ".md", ".rst")  # here a line may be a paragraph, and a file a book
PRUNED = ("__pycache__", "site-packages", "dist-packages")  # directories that are not entered
LLM_C_MAGIC, LLM_C_HEADER = 20240520, 256  # llm.c's and modded-nanogpt's token files: int32 values


class DataError(ValueError):
    """The data is missing, empty or damaged. The message says what to do."""


class RemoteError(DataError):
    """A remote source stopped answering. What was read so far stays, and is not read again."""


class MissingExtra(ImportError):  # noqa: N818 - it says what to install, not what failed
    """An optional package is needed. The message names the extra to install."""

    exit_code = 3


class Place(NamedTuple):
    """A place in a source: `item` items of file number `file` are behind it."""

    file: int = 0
    item: int = 0


@dataclass(frozen=True)
class Document:
    """One text with a name for messages, and the place behind it."""

    name: str
    text: str
    after: Place


class Tally(NamedTuple):
    """What `documents` has met so far, besides documents."""

    skipped: Counter  # documents by reason
    checks: Counter  # files of code: "seen", "checked", "compiled"
    rejected: list[bytes]  # SHA-256 of texts that did not compile


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids made elsewhere: `count` values of `dtype` after `skip` bytes."""

    path: Path
    dtype: str  # "<u2" or "<u4"
    skip: int
    count: int


def need(module: str, extra: str) -> Any:
    """Import an optional module. Raises: MissingExtra."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(f"this needs the '{extra}' extra: pip install \"nanochat_jax[{extra}]\"") from None


def rust_roots(
    home: Path | None = None, system: Path = Path("/"), cargo_home: Path | None = None
) -> list[Path]:
    """Directories that hold Rust sources: toolchains, cargo's downloads, Debian's trees.

    Args: home: where .rustup is. system: root of the file system. cargo_home: default home/.cargo.
    """
    home = home or Path.home()
    cargo_home = cargo_home or home / ".cargo"
    patterns = [
        (home, ".rustup/toolchains/*/lib/rustlib/src"),
        (cargo_home, "registry/src"),
        (cargo_home, "git/checkouts"),
        (system, "usr/src/rustc-*"),
        (system, "usr/share/cargo/registry"),
        (system, "usr/lib/rustlib/src"),
    ]
    found = (path for base, pattern in patterns for path in sorted(base.glob(pattern)) if path.is_dir())
    return list(dict.fromkeys(path.resolve() for path in found))


def _tree(root: Path, suffix: str = "") -> list[Path]:
    """Files under a directory, without hidden ones, caches and installed packages."""
    found = []
    for place, below, names in os.walk(root):
        below[:] = [n for n in below if not n.startswith(".") and n not in PRUNED]
        found += [Path(place, n) for n in names if n.endswith(suffix) and not n.startswith(".")]
    return found


def _stdlib() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, _tree(root, ".py")


def _rust() -> tuple[Path, list[Path]]:
    roots = rust_roots()
    found = [path for root in roots for path in _tree(root, ".rs")]
    if not found:
        looked = ", ".join(map(str, roots)) or "~/.rustup, ~/.cargo, /usr/src/rustc-*, /usr/share/cargo"
        raise DataError(
            f"no Rust sources on this machine (looked in {looked}); install some: `apt install rust-src` or "
            "`rustup component add rust-src`, or crates such as `apt install librust-serde-dev`, "
            "or set data.source to a directory or glob"
        )
    return Path("/"), found


def _conversations() -> tuple[Path, list[Path]]:
    return Path(__file__).parent, [Path(__file__).with_name("conversations.jsonl")]


PLACES: dict[str, Callable[[], tuple[Path, list[Path]]]] = {
    "stdlib": _stdlib, "rust": _rust, "conversations": _conversations
}  # fmt: skip


def files(source: str) -> tuple[Path, list[Path]]:
    """(root, sorted files) of a named place, a directory (without hidden files), a file or a glob.

    Raises: DataError if nothing matches.
    """
    place = Path(source).expanduser()
    if source in PLACES:
        root, found = PLACES[source]()
    elif place.is_dir():
        root, found = place, _tree(place)
    else:
        root, found = Path("."), [Path(p) for p in glob.glob(str(place), recursive=True)]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise DataError(
            f"data.source '{source}' matches no file; expected {', '.join(PLACES)}, hf:<dataset>, "
            f"tokens:<file>, a directory, a file or a glob (looked from {Path.cwd()})"
        )
    return root, found


def discover(source: str) -> str:
    """Fingerprint of a source without reading it: names, sizes and modification times.

    The same fingerprint means that prepared tokens can be used again. A dataset that is not on this
    machine is known by its name only.
    Raises: DataError if nothing matches; RemoteError; MissingExtra.
    """
    digest = hashlib.sha256()
    if remote.is_remote(source):
        for entry in _listing(source):
            digest.update(f"{entry.url}\0{entry.size}\0{entry.stamp}\n".encode())
        return digest.hexdigest()
    if source.startswith("hf:"):
        dataset = _dataset(source)[0]
        if not Path(dataset).exists():
            return hashlib.sha256(source.encode()).hexdigest()
        source = dataset
    for path in files(source)[1]:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _listing(source: str) -> list[remote.RemoteFile]:
    """Files behind a URL. Raises: DataError, RemoteError, MissingExtra."""
    try:
        found = remote.listing(source)
    except ImportError as error:
        raise MissingExtra(
            f"'{source}': {error}; packages for gs:// and s3:// come with the 'remote' extra: "
            'pip install "nanochat_jax[remote]"'
        ) from None
    except ValueError as error:
        raise DataError(f"'{source}': {error}") from None
    except Exception as error:  # transports raise what they like
        raise RemoteError(f"'{source}' cannot be listed: {_first_line(error)}") from error
    if not found:
        raise DataError(f"'{source}' matches no file")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def documents(
    cfg: DataConfig,
    skipped: Counter | None = None,
    *,
    start: Place | None = None,
    seen: set[bytes] | None = None,
    tally: Tally | None = None,
    total: int = 0,
) -> Iterator[Document]:
    """Documents of `cfg.source` in one fixed order, each content once.

    To go on behind a document, give its `after` as start, the SHA-256 of all earlier and rejected
    texts as seen, the tally as it was then, and the bytes of the earlier documents as total.
    Args: cfg: source, kind, text_key, max_bytes, verify_every_n_examples, min_compile_rate, row_language.
    skipped: receives counts of documents by reason: "unreadable", "undecodable", "short", "long",
    "long line", "duplicate", "no text", "does not compile", and of conversations those of `turns`. tally: receives those, and more.
    Raises: DataError if nothing is found, a file is damaged or too few files compile; RemoteError;
    MissingExtra for Parquet, hf: and URLs without their packages.
    """
    tally = tally or Tally(Counter() if skipped is None else skipped, Counter(), [])
    items = _distinct(_raw(cfg, start or Place()), set() if seen is None else seen)
    for after, name, raw, outcome in compiles.outcomes(cfg, items, tally.checks["seen"]):
        compiles.count(outcome, tally.checks)
        if isinstance(raw, str) or outcome == compiles.FAILED:
            tally.skipped[raw if isinstance(raw, str) else compiles.FAILED] += 1
            if isinstance(raw, bytes):
                tally.rejected.append(hashlib.sha256(raw).digest())
            continue
        total += len(raw)
        if cfg.max_bytes and total > cfg.max_bytes:
            break
        yield Document(name, raw.decode(), after)
    if problem := compiles.too_few(cfg, tally.checks):
        raise DataError(problem)


# What readers yield: a name, and the UTF-8 bytes or the reason why there are none; and with places.
_Raw = Iterator[tuple[str, bytes | str]]
_Items = Iterator[tuple[Place, str, bytes | str]]


def _distinct(items: _Items, seen: set[bytes]) -> _Items:
    """Texts that are no UTF-8, too short or there already become reasons."""
    for after, name, raw in items:
        if isinstance(raw, bytes):
            digest = hashlib.sha256(raw).digest()
            try:
                raw.decode()
            except UnicodeDecodeError:
                raw = "undecodable"
            else:
                if len(raw) < MIN_BYTES or digest in seen:
                    raw = "short" if len(raw) < MIN_BYTES else "duplicate"
                else:
                    seen.add(digest)
        yield after, name, raw


def _raw(cfg: DataConfig, start: Place) -> _Items:
    """Every item from `start` on, with the place behind it."""
    count, read = _parts(cfg)
    for file in range(start.file, count):
        first = start.item if file == start.file else 0
        for item, (name, raw) in enumerate(read(file, first), first + 1):
            yield Place(file, item), name, raw


def _parts(cfg: DataConfig) -> tuple[int, Callable[[int, int], _Raw]]:
    """(number of files, what reads file i from item k on)."""
    if remote.is_remote(cfg.source):
        listed = _listing(cfg.source)
        return len(listed), lambda file, first: _remote_file(listed[file], cfg, first)
    if cfg.source.startswith("hf:"):
        return 1, lambda file, first: itertools.islice(_hub(cfg), first, None)
    root, found = files(cfg.source)
    return len(found), lambda file, first: itertools.islice(_local_file(root, found[file], cfg), first, None)


def _local_file(root: Path, path: Path, cfg: DataConfig) -> _Raw:
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    try:
        with path.open("rb") as content:
            yield from _contents(content, path.stat().st_size, name, str(path), cfg)
    except OSError:
        yield name, "unreadable"


def _remote_file(entry: remote.RemoteFile, cfg: DataConfig, first: int) -> _Raw:
    def read(content: BinaryIO) -> _Raw:
        return _contents(content, entry.size, entry.url, entry.url, cfg)

    try:
        yield from remote.items(entry.url, read, first, (DataError, MissingExtra))
    except (DataError, MissingExtra):
        raise
    except Exception as error:  # transports raise what they like
        raise RemoteError(
            f"{entry.url} cannot be read: {_first_line(error)}; the same command goes on from there"
        ) from error


def _contents(content: BinaryIO, size: int, name: str, where: str, cfg: DataConfig) -> _Raw:
    """Items of one opened file. Args: name: of its documents. where: it, for messages."""
    reader = next((r for suffix, r in READERS.items() if where.endswith(suffix)), None)
    if reader:
        rows = reader(content, cfg.text_key, where)
        yield from ((f"{name}:{index}", raw) for index, row in enumerate(rows) for raw in _row(row, cfg))
    elif cfg.kind == "chat":
        yield name, "no table"
    elif where.endswith(PROSE):
        yield from ((f"{name}:{index}", raw) for index, raw in enumerate(_pieces(content)))
    else:
        yield name, _code(content, size)


def _code(content: BinaryIO, size: int) -> bytes | str:
    """Content of a file of code, or why it is not wanted."""
    if size > MAX_BYTES:
        return "long"
    raw = content.read()
    lines = raw.decode(errors="replace").split("\n")
    return "long line" if max(map(len, lines)) > MAX_LINE else raw


def _row(text: Any, cfg: DataConfig) -> Iterator[bytes | str]:
    """The text of a table's row, in pieces of at most MAX_BYTES; of a conversation what is stored, in one."""
    if cfg.kind == "chat":
        raw = turns.stored(text)
        yield "long" if len(raw) > MAX_BYTES else raw
        return
    if not isinstance(text, str):
        yield "no text"
        return
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        yield "undecodable"
        return
    if len(raw) <= MAX_BYTES:
        yield raw
    else:
        yield from _pieces(io.BytesIO(raw))


def _pieces(content: BinaryIO) -> Iterator[bytes]:
    """Cut a long text after line ends (or at least between characters), every MAX_BYTES or less."""
    while piece := content.read(MAX_BYTES):
        if len(piece) == MAX_BYTES:
            cut = piece.rfind(b"\n") + 1 or next(
                (n for n in range(len(piece) - 1, len(piece) - 5, -1) if piece[n] & 0xC0 != 0x80), len(piece)
            )
            content.seek(cut - len(piece), io.SEEK_CUR)
            piece = piece[:cut]
        yield piece


def _json_lines(content: BinaryIO, key: str, where: str) -> Iterator[Any]:
    with gzip.open(content) if where.endswith(".gz") else nullcontext(content) as opened:
        try:
            for number, line in enumerate(opened, 1):
                if not line.strip():
                    continue
                try:
                    # Bytes that are not UTF-8 stay visible and are counted as undecodable later.
                    row = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
                except ValueError as error:
                    raise DataError(f"{where}:{number} is not JSON: {error}") from None
                yield _field(row, key, f"{where}:{number}")
        except gzip.BadGzipFile as error:
            raise DataError(f"{where} is no gzip file: {error}") from None
        except (EOFError, zlib.error) as error:
            raise DataError(f"{where} is truncated or damaged: {error}") from None


def _parquet(content: BinaryIO, key: str, where: str) -> Iterator[Any]:
    parquet, lib = need("pyarrow.parquet", "data"), need("pyarrow.lib", "data")
    # Behind a URL an OSError may be the network's, and reading again may help.
    damage = (lib.ArrowException,) if remote.is_remote(where) else (lib.ArrowException, OSError)
    try:
        with parquet.ParquetFile(content) as table:
            names = table.schema_arrow.names
            if key not in names:
                raise DataError(f"{where} has no column '{key}' (data.text_key); columns: {', '.join(names)}")
            for batch in table.iter_batches(columns=[key]):
                yield from batch.column(0).to_pylist()
    except damage as error:
        raise DataError(f"{where} is not a readable Parquet file: {error}") from None


def _dataset(source: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of "hf:name", "hf:name:split" or "hf:name:configuration:split"."""
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError(
            f"data.source '{source}': expected hf:<name>, hf:<name>:<split> or hf:<name>:<config>:<split>"
        )
    return name, (rest[0] or None) if len(rest) == 2 else None, (rest[-1] if rest else "") or "train"


def _hub(cfg: DataConfig) -> _Raw:
    """Rows of `datasets.load_dataset`, streamed; a local directory of files works too."""
    datasets, source = need("datasets", "data"), cfg.source
    name, configuration, split = _dataset(source)
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
        for index, row in enumerate(rows):
            for raw in _row(_field(row, cfg.text_key, f"{source} row {index}"), cfg):
                yield f"{name}:{index}", raw
    except DataError:
        raise
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise DataError(f"data.source '{source}' cannot be read: {_first_line(error)}") from error


def _field(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field '{key}' (data.text_key); fields: {known}")
    return row[key]


READERS = {".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".parquet": _parquet}


def token_file(path: Path) -> TokenFile:
    """Describe a file of token ids.

    The width is stated by llm.c's header, by the suffix .u16 or .u32, or by "dtype" ("uint16" or
    "uint32") in a file of the same name with .json added; it is never guessed. Little-endian.
    Raises: DataError if the file is missing, empty, of unknown width, or not as long as it says.
    """
    if not path.is_file():
        raise DataError(f"data.source 'tokens:{path}': no such file")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", LLM_C_HEADER)
    sidecar = path.with_name(path.name + ".json")
    stated: dict[str, Any] = {}
    if len(header) == LLM_C_HEADER and header[0] == LLM_C_MAGIC:
        if header[1] != 1:
            raise DataError(f"{path}: header version {header[1]} is unknown; expected 1")
        dtype, skip, stated = "<u2", header.nbytes, {"n_tokens": int(header[2])}
    elif sidecar.is_file():
        try:
            stated = json.loads(sidecar.read_text())
            dtype, skip = {"uint16": "<u2", "uint32": "<u4"}[stated["dtype"]], 0
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{sidecar}: expected {{"dtype": "uint16" or "uint32"}}, got {type(error).__name__}: {error}'
            ) from None
    elif path.suffix in (".u16", ".u32"):
        dtype, skip = f"<u{int(path.suffix[2:]) // 8}", 0
    else:
        raise DataError(
            f"{path}: 16 or 32 bits a token? Name the file .u16 or .u32, or write {sidecar.name} "
            'with {"dtype": "uint16"}'
        )
    width = np.dtype(dtype).itemsize
    count = (size - skip) // width
    if (size - skip) % width or stated.get("n_tokens", count) != count or not count:
        raise DataError(
            f"{path}: expected {stated.get('n_tokens', 'a whole number of')} tokens of {width} bytes after "
            f"{skip} bytes of header, got {size - skip} bytes; the file is truncated or of another format"
        )
    return TokenFile(path, dtype, skip, count)
