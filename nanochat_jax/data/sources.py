"""Where documents come from: source trees on this machine, files, datasets.

`discover(cfg)` says cheaply what a source consists of (names, sizes, times), `documents(cfg)` reads
it: in one fixed order, with every skipped document counted by reason.
"""

import glob
import gzip
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.config import DataConfig

MIN_BYTES, MAX_BYTES = 64, 1_000_000  # of a document
MAX_LINE = 1000  # characters; longer lines are data or generated code


class DataError(ValueError):
    """The data is missing, empty or damaged. The message says what to do."""


class MissingExtra(ImportError):
    """An optional package is needed. The message names the extra to install."""

    exit_code = 3


@dataclass(frozen=True)
class Document:
    """One text with a name for messages."""

    name: str
    text: str


def need(module: str, extra: str):
    """Import an optional module. Raises: MissingExtra."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(f'this needs the {extra!r} extra: pip install "nanochat_jax[{extra}]"') from None


def rust_roots(home: Path | None = None, system: Path = Path("/")) -> list[Path]:
    """Directories that hold Rust sources on this machine: toolchains, cargo's registry, Debian's trees."""
    home = home or Path.home()
    patterns = [
        (home, ".rustup/toolchains/*/lib/rustlib/src"),
        (home, ".cargo/registry/src"),
        (system, "usr/src/rustc-*"),
        (system, "usr/share/cargo/registry"),
        (system, "usr/lib/rustlib/src"),
    ]
    found = (path for base, pattern in patterns for path in sorted(base.glob(pattern)) if path.is_dir())
    return list(dict.fromkeys(path.resolve() for path in found))


def _stdlib() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return root, [p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts)]


def _rust() -> tuple[Path, list[Path]]:
    roots = rust_roots()
    files = [path for root in roots for path in root.rglob("*.rs")]
    if not files:
        raise DataError(
            "no Rust sources on this machine; install some: `apt install rust-src` or "
            "`rustup component add rust-src`, or crates such as `apt install librust-serde-dev`, "
            "or set data.source to a path or glob"
        )
    return Path("/"), files


PLACES: dict[str, Callable[[], tuple[Path, list[Path]]]] = {"stdlib": _stdlib, "rust": _rust}


def files(source: str) -> tuple[Path, list[Path]]:
    """(root, sorted files) of a named place, a directory, a file or a glob.

    Raises: DataError if nothing matches.
    """
    if source in PLACES:
        root, found = PLACES[source]()
    elif Path(source).is_dir():
        root, found = Path(source), [p for p in Path(source).rglob("*") if p.is_file()]
    else:
        root, found = Path("."), [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise DataError(
            f"data.source '{source}' matches no file; expected {', '.join(PLACES)}, hf:<dataset>, "
            "tokens:<file>, a directory, a file or a glob"
        )
    return root, found


def discover(source: str) -> str:
    """Fingerprint of a source without reading it: names, sizes and modification times.

    The same fingerprint means that prepared tokens can be used again. For hf: sources it is the name.
    """
    if source.startswith("hf:"):
        return hashlib.sha256(source.encode()).hexdigest()
    digest = hashlib.sha256()
    for path in files(source)[1]:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def documents(cfg: DataConfig, skipped: Counter | None = None) -> Iterator[Document]:
    """Documents of `cfg.source` in one fixed order.

    Args: cfg: source, text_key, max_bytes. skipped: receives counts of "undecodable", "short",
    "long", "long line", "duplicate" and "no text" documents.
    Raises: DataError if nothing is found; MissingExtra for Parquet or hf: without their packages.
    """
    skipped = Counter() if skipped is None else skipped
    seen: set[bytes] = set()
    total = 0
    for name, raw in _raw(cfg):
        reason, text = _check(raw)
        if not reason:
            digest = hashlib.sha256(text.encode()).digest()
            reason = "duplicate" if digest in seen else ""
            seen.add(digest)
        if reason:
            skipped[reason] += 1
            continue
        total += len(text.encode())
        if cfg.max_bytes and total > cfg.max_bytes:
            return
        yield Document(name, text)


def _check(raw: bytes | str | None) -> tuple[str, str]:
    """(reason to skip or "", text)."""
    if raw is None:
        return "no text", ""
    size = len(raw)
    if size < MIN_BYTES:
        return "short", ""
    if size > MAX_BYTES:
        return "long", ""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:
        return "undecodable", ""
    if max(map(len, text.split("\n"))) > MAX_LINE:
        return "long line", ""
    return "", text


def _raw(cfg: DataConfig) -> Iterator[tuple[str, bytes | str | None]]:
    if cfg.source.startswith("hf:"):
        yield from _hub(cfg.source[3:], cfg.text_key)
        return
    root, found = files(cfg.source)
    for path in found:
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        reader = next((r for suffix, r in READERS.items() if path.name.endswith(suffix)), None)
        if reader is None:
            yield name, path.read_bytes()
        else:
            for index, text in enumerate(reader(path, cfg.text_key)):
                yield f"{name}:{index}", text


def _json_lines(path: Path, key: str) -> Iterator[str | None]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from None
            yield _field(row, key, f"{path}:{number}")


def _parquet(path: Path, key: str) -> Iterator[str | None]:
    table = need("pyarrow.parquet", "data").ParquetFile(path)
    if key not in table.schema_arrow.names:
        raise DataError(
            f"{path} has no column '{key}' (data.text_key); columns: {', '.join(table.schema_arrow.names)}"
        )
    for batch in table.iter_batches(columns=[key]):
        yield from batch.column(0).to_pylist()


def _hub(name: str, key: str) -> Iterator[tuple[str, str | None]]:
    """Rows of `datasets.load_dataset`; `name` is "dataset" or "dataset:split" (default train)."""
    datasets = need("datasets", "data")
    dataset, _, split = name.partition(":")
    for index, row in enumerate(datasets.load_dataset(dataset, split=split or "train", streaming=True)):
        yield f"{name}:{index}", _field(row, key, f"{name} row {index}")


def _field(row: dict, key: str, where: str) -> str | None:
    if not isinstance(row, dict) or key not in row:
        known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field '{key}' (data.text_key); fields: {known}")
    return row[key]


READERS = {".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".parquet": _parquet}
