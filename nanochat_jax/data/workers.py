"""Processes that tokenize: blocks of text in, files of tokens out. Both sides are in this file.

A worker reads lines "block start stop" and answers each with a line of JSON once the block's file is
whole. It imports numpy and the tokenizer, nothing else, and ends when its input does, so also when
the process that started it is killed. A worker that dies is replaced and its block is done again.
"""

import collections
import contextlib
import hashlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax import files
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data import turns

ATTEMPTS = 3  # to encode one block, before the preparation fails
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nanochat_jax.data import workers; workers.serve(*sys.argv[2:])"


class WorkerError(ValueError):
    """A block of text cannot be tokenized by a worker process. The same command goes on from there."""


class Block(NamedTuple):
    """Tokens of a run of documents, BOS included, and the number of each."""

    tokens: np.ndarray  # [n]
    lengths: np.ndarray  # int64 [documents]


def packed(documents: list[list[int]], bos: int, dtype: str) -> Block:
    """Token ids of documents as one block."""
    tokens = np.array([i for ids in documents for i in (bos, *ids)], dtype)
    return Block(tokens, np.array([len(ids) + 1 for ids in documents], np.int64))


def encoded(
    due: list[tuple[int, range]],
    dtype: str,
    work: Path,
    folder: Path,
    tokenizer: Path,
    count: int,
    kind: str = "text",
) -> Iterator[Block]:
    """Blocks (index, documents) of work/text.bin in order, made by `count` processes. Close it after use.

    Whole blocks that an interrupted call has left in `folder` are not made again.
    Raises: WorkerError.
    """
    ledger = folder / "ledger.jsonl"
    known = _read_ledger(ledger)
    words = [json.dumps(sys.path), str(tokenizer), str(work), str(folder), dtype, kind]
    command = [sys.executable, "-c", START, *words]
    idle: queue.Queue[subprocess.Popen[str] | None] = queue.Queue()
    writing = threading.Lock()
    for _ in range(count):
        idle.put(None)

    def made(index: int, block: range) -> dict[str, Any]:
        """Have a block made, by whichever worker is free."""
        if index in known and _intact(folder, known[index]):
            return known[index]
        child = idle.get()
        try:
            for _ in range(ATTEMPTS):
                if child is None or child.poll() is not None:
                    _stop(child)
                    child = subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    )
                answer = _ask(child, f"{index} {block.start} {block.stop}\n")
                if "error" in answer:
                    raise WorkerError(f"block {index}: {answer['error']}")
                if answer:
                    with writing:
                        log.write(json.dumps(answer) + "\n")
                        log.flush()
                    return answer
            status = child.returncode if child else None
            raise WorkerError(
                f"a tokenization process died {ATTEMPTS} times on block {index} (documents {block.start} to "
                f"{block.stop - 1}), last with status {status}"
            )
        finally:
            idle.put(child)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(ledger, "a"))
        log.write("\n")  # the last line may be torn
        stack.callback(_end, idle)
        threads = ThreadPoolExecutor(count)
        stack.callback(threads.shutdown, cancel_futures=True)
        rest, waiting = iter(due), collections.deque()
        for index, block in rest:
            waiting.append(threads.submit(made, index, block))
            if len(waiting) >= 3 * count:
                break
        while waiting:
            entry = waiting.popleft().result()
            yield _read(folder, entry, dtype)
            _path(folder, entry["block"]).unlink()  # the reader came back, so it has recorded the block
            for index, block in rest:
                waiting.append(threads.submit(made, index, block))
                break


def _ask(child: subprocess.Popen, line: str) -> dict[str, Any]:
    """A worker's answer; {} if it died."""
    try:
        child.stdin.write(line)  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        answer = child.stdout.readline()  # type: ignore[union-attr]
    except OSError:
        answer = ""
    if not answer.endswith("\n"):
        _stop(child)
        return {}
    return json.loads(answer)


def _end(idle: "queue.Queue[subprocess.Popen[str] | None]") -> None:
    """End all workers: none holds anything unfinished that counts."""
    while not idle.empty():
        _stop(idle.get())


def _stop(child: subprocess.Popen | None) -> None:
    if child:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # what was written and not read is lost, as it may be
                pipe.close()  # type: ignore[union-attr]


def _path(folder: Path, block: int) -> Path:
    return folder / f"{block:06}.block"


def _read_ledger(path: Path) -> dict[int, dict[str, Any]]:
    """Whole blocks; a torn last line does not count."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                found[entry["block"]] = entry
    return found


def _intact(folder: Path, entry: dict[str, Any]) -> bool:
    try:
        with open(_path(folder, entry["block"]), "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == entry["sha256"]
    except OSError:
        return False


def _read(folder: Path, entry: dict[str, Any], dtype: str) -> Block:
    raw = _path(folder, entry["block"]).read_bytes()
    split = 8 * entry["documents"]
    return Block(np.frombuffer(raw[split:], dtype), np.frombuffer(raw[:split], "<i8"))


def serve(tokenizer: str, work: str, folder: str, dtype: str, kind: str) -> None:
    """The worker: encode the blocks that standard input names, until it ends.

    A block's file holds the number of tokens of each document (int64), then the tokens.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    loaded = tokenizers.load(Path(tokenizer))
    encode = turns.encoder(loaded, kind)
    raw = np.memmap(Path(work) / "text.bin", np.uint8, "r")
    offsets = np.memmap(Path(work) / "text.offsets", "<i8", "r")
    for line in sys.stdin:
        index, start, stop = map(int, line.split())
        try:
            texts = (raw[offsets[i] : offsets[i + 1]].tobytes().decode() for i in range(start, stop))
            made = packed([encode(text) for text in texts], loaded.bos_id, dtype)
            content = made.lengths.astype("<i8").tobytes() + made.tokens.tobytes()
            path = _path(Path(folder), index)
            with files.replacing(path) as partial:
                partial.write_bytes(content)
            answer = {
                "block": index, "documents": len(made.lengths), "sha256": hashlib.sha256(content).hexdigest()
            }  # fmt: skip
        except Exception as error:  # the other side decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
