"""Folders that appear whole or not at all, with checksums, and without secrets."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.export.variants import ExportError

SUMS = "SHA256SUMS"
# Access tokens by their fixed beginnings, private keys, and home directories.
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{32,}|AKIA[0-9A-Z]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY|/home/[a-z_]|/Users/[A-Za-z]|/root/"
)
TEXT = {".json", ".md", ".jinja", ".py", ".jsonl", ".txt", ""}


def need_free(out: Path, overwrite: bool = False, flag: str = "--out") -> None:
    """Raises: ExportError if `out`, which `flag` names, is a file, or not empty, unless overwrite."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; {flag} names a directory")
    if out.exists() and any(out.iterdir()) and not overwrite:
        instead = ", or --overwrite" if flag == "--out" else ""
        raise ExportError(f"{out} is not empty; choose another {flag}{instead}")


@contextlib.contextmanager
def whole(out: Path, overwrite: bool = False, flag: str = "--out") -> Iterator[Path]:
    """A temporary sibling of `out` to write into, which becomes `out` when the block ends well.

    On any error it is removed and `out` is what it was before. Raises: ExportError, see `need_free`.
    """
    out = out.expanduser().absolute()
    need_free(out, overwrite, flag)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """JSON with a final line break."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def files(folder: Path) -> list[Path]:
    """Files of a folder, sorted, links and the checksums left out."""
    found = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sorted(p for p in found if p.name != SUMS)


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads."""
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def changed(folder: Path) -> list[str]:
    """Files whose content is not what SHA256SUMS says, or that it does not list. Raises: ExportError."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ExportError(f"{folder} has no {SUMS}: it is no finished export") from None
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    here = {path.relative_to(folder).as_posix(): path for path in files(folder)}
    missing = listed.keys() ^ here.keys()
    return sorted(missing | {n for n in listed.keys() & here.keys() if sha256(here[n]) != listed[n]})


def secrets(folder: Path) -> list[str]:
    """`file: what was found` for text files that hold an access token, a key or a home directory."""
    found = []
    for path in files(folder):
        if path.suffix in TEXT and path.stat().st_size < 50 * 2**20:
            for match in SECRETS.finditer(path.read_bytes()):
                word = match[0][:8].decode(errors="replace")
                found.append(f"{path.relative_to(folder).as_posix()}: '{word}...'")
                break
    return found
