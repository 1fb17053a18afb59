"""Documents of a source, gathered in one file, once: text.bin, text.offsets, text.val, text.json.

Reading twice (for the tokenizer, then to encode) must not mean downloading or compiling twice, and
the corpus need not fit into memory. The way is recorded every few megabytes: an interrupted
gathering goes on where it was.
"""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import files
from nanochat_jax.config import DataConfig
from nanochat_jax.data import sources, turns
from nanochat_jax.data.sources import DataError

RECORD_BYTES = 4_000_000  # text gathered between two records
RECORD_CHECKS = 200  # or files compiled
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what the system says of a disk that takes no more
UNWRITABLE = FULL | {errno.EROFS}  # and of one that takes nothing

Report = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """The documents of a source."""

    raw: np.ndarray  # uint8 [bytes]
    offsets: np.ndarray  # int64 [documents + 1]
    held_out: np.ndarray  # bool [documents]
    kind: str = "text"  # data.kind

    def __getitem__(self, index: int) -> str:
        return self.raw[self.offsets[index] : self.offsets[index + 1]].tobytes().decode()

    def plain(self, index: int) -> str:
        """A document's text, for a tokenizer to be trained on."""
        return turns.plain(self[index], self.kind)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each document."""
        return np.diff(self.offsets)


def opened(work: Path, kind: str = "text") -> Text:
    """What `gather` has written."""
    return Text(
        np.memmap(work / "text.bin", np.uint8, "r"),
        np.fromfile(work / "text.offsets", "<i8"),
        np.fromfile(work / "text.val", bool),
        kind,
    )


def gather(cfg: DataConfig, work: Path, report: Report) -> dict[str, Any]:
    """Copy the documents of a source into `work`, unless they are there.

    Returns: "sha256" of the documents in order, "skipped" and "checks" by reason.
    Raises: DataError if there is no usable document, and whatever `sources.documents` raises.
    """
    facts = work / "text.json"
    if not facts.exists():
        report(f"reading {cfg.source}")
        _gather(cfg, work, report)
        (work / "reading.json").unlink(missing_ok=True)
    return json.loads(facts.read_text())


def _gather(cfg: DataConfig, work: Path, report: Report) -> None:
    sizes, rejected, place, tally = _earlier(work)
    if sizes:
        report(f"continuing after {len(sizes)} documents")
    own = _digests(work / "text.bin", sizes)
    seen, total, recorded = {*own, *rejected}, sum(sizes), (sum(sizes), tally.checks["checked"])
    with open(work / "text.bin", "ab") as out, open(work / "text.sizes", "ab") as lengths:
        documents = sources.documents(cfg, start=place, seen=seen, tally=tally, total=total)
        for document in documents:
            raw = document.text.encode()
            own.append(hashlib.sha256(raw).digest())
            out.write(raw)
            sizes.append(len(raw))
            lengths.write(np.array(len(raw), "<i8").tobytes())
            total += len(raw)
            if total - recorded[0] >= RECORD_BYTES or tally.checks["checked"] - recorded[1] >= RECORD_CHECKS:
                recorded = total, tally.checks["checked"]
                out.flush()
                lengths.flush()
                _record(work, total, len(sizes), document.after, tally)
    held_out = [int.from_bytes(digest[:8], "big") % 100 < cfg.val_percent for digest in own]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) if sizes else np.zeros(1)
    if not held_out:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(tally.skipped.items())) or "nothing found"
        cap = f" within data.max_bytes = {cfg.max_bytes}" if cfg.max_bytes else ""
        raise DataError(f"data.source '{cfg.source}' has no usable document{cap}; skipped: {reasons}")
    if len(held_out) == 1 and cfg.kind == "chat":
        raise DataError(f"data.source '{cfg.source}' has one conversation, and one must be held out")
    if len(held_out) == 1:
        report(f"only one document: its last {cfg.val_percent}% is held out")
        offsets, held_out = _cut(work / "text.bin", cfg.val_percent), [False, True]
    elif len(set(held_out)) == 1:
        report(f"only {len(held_out)} documents: the last one is held out")
        held_out = [False] * (len(held_out) - 1) + [True]
    np.array(offsets, "<i8").tofile(work / "text.offsets")
    np.array(held_out, bool).tofile(work / "text.val")
    facts = {"sha256": hashlib.sha256(b"".join(own)).hexdigest(), "skipped": dict(tally.skipped)}
    files.write_json(work / "text.json", facts | ({"checks": dict(tally.checks)} if tally.checks else {}))


def _record(work: Path, size: int, documents: int, place: sources.Place, tally: sources.Tally) -> None:
    """Say how far the files are whole."""
    value = {
        "bytes": size, "documents": documents, "place": place, "skipped": tally.skipped,
        "checks": tally.checks, "rejected": [digest.hex() for digest in tally.rejected],
    }  # fmt: skip
    files.write_json(work / "reading.json", value)


def _earlier(work: Path) -> tuple[list[int], list[bytes], sources.Place, sources.Tally]:
    """(sizes of documents, digests of rejected ones, place, tally) of an interrupted gathering.

    What was written after its last record is cut off.
    """
    try:
        known = json.loads((work / "reading.json").read_text())
        whole = {"text.bin": known["bytes"], "text.sizes": 8 * known["documents"]}
        if any((work / name).stat().st_size < size for name, size in whole.items()):
            raise OSError("the record was kept and what it speaks of was not")
    except (OSError, ValueError):
        known = {"bytes": 0, "documents": 0, "place": (0, 0), "skipped": {}, "checks": {}, "rejected": []}
        whole = {"text.bin": 0, "text.sizes": 0}
    sizes = []
    for name, size in whole.items():
        with open(work / name, "ab") as content:
            content.truncate(size)
    if known["documents"]:
        sizes = np.fromfile(work / "text.sizes", "<i8").tolist()
    rejected = [bytes.fromhex(digest) for digest in known["rejected"]]
    tally = sources.Tally(Counter(known["skipped"]), Counter(known["checks"]), list(rejected))
    return sizes, rejected, sources.Place(*known["place"]), tally


def _digests(path: Path, sizes: list[int]) -> list[bytes]:
    """SHA-256 of each document in a file."""
    with open(path, "rb") as content:
        return [hashlib.sha256(content.read(size)).digest() for size in sizes]


def _cut(path: Path, percent: int) -> list[int]:
    """Offsets that cut one text in two after a line, or else between two characters."""
    raw = path.read_bytes()
    near = len(raw) - max(1, len(raw) * percent // 100)
    cut = raw.rfind(b"\n", 0, near) + 1
    if not cut:
        cut = next(n for n in range(near, -1, -1) if raw[n] & 0xC0 != 0x80)
    return [0, cut, len(raw)]
