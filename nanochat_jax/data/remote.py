"""Files behind a URL (gs://, s3://, memory://, file://), through fsspec.

Only `listing` and `items` know that there is a network: what a reader yields from an opened file is
read again from the same place after a failure, a few times, so that a dropped connection neither
loses a row nor repeats one.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

Item = TypeVar("Item")

PAUSES = (1.0, 4.0, 15.0)  # seconds before each further attempt
STAMPS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")


class RemoteFile(NamedTuple):
    """A file in a listing. `stamp` changes when the file does, as far as its store tells."""

    url: str
    size: int
    stamp: str


def is_remote(source: str) -> bool:
    """Whether a source is a URL."""
    return "://" in source


def listing(url: str) -> list[RemoteFile]:
    """Files of a directory (without hidden ones), a file or a glob behind a URL, sorted by name.

    Raises: ImportError if the protocol needs a package that is missing; ValueError for an unknown
    protocol; OSError (or what its transport raises) if the store does not answer.
    """
    system, path = fsspec.core.url_to_fs(url)
    path = str(path)
    if any(character in path for character in "*?["):
        found = system.glob(path, detail=True)
    elif system.isdir(path):
        found = system.find(path, detail=True)
    else:
        found = {path: system.info(path)} if system.exists(path) else {}
    root = path.rstrip("/")
    return [
        RemoteFile(system.unstrip_protocol(name), int(info.get("size") or 0), _stamp(info))
        for name, info in sorted(found.items())
        if info["type"] == "file" and "/." not in name.removeprefix(root)
    ]


def _stamp(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in STAMPS if info.get(key)), ""))


def items(
    url: str, read: Callable[[BinaryIO], Iterator[Item]], start: int, fatal: tuple[type[Exception], ...]
) -> Iterator[Item]:
    """`read(opened file)` from item `start` on; after a failure again, from the item that is due.

    Args: read: yields the same items every time. fatal: errors that reading again will not mend.
    Raises: whatever the last attempt raised.
    """
    done, pauses = start, iter(PAUSES)
    while True:
        try:
            with fsspec.open(url, "rb") as content:
                for index, item in enumerate(read(content)):
                    if index < done:
                        continue
                    yield item
                    done += 1
            return
        except fatal:
            raise
        except Exception:  # transports raise what they like
            pause = next(pauses, None)
            if pause is None:
                raise
            time.sleep(pause)
