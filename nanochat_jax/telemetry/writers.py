"""Where metrics go: JSON lines and TensorBoard. Receives Python floats, knows no jax.

A writer that fails (full disk, unwritable directory) is switched off with one warning: losing a
plot must not lose a run.
"""

import contextlib
import json
import logging
import math
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nanochat_jax import files
from nanochat_jax.config import LogConfig
from nanochat_jax.telemetry.logs import Ids, finite, no_ids
from nanochat_jax.telemetry.prometheus import Prometheus

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A sink of metrics and texts by step."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...
    def text(self, step: int, tag: str, value: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line: step, time (UTC seconds), ids, metrics; NaN and infinity become null.

    Args: path: the file. resume_step: last step of the restored state; lines of later steps (of a
    run that was killed after its last checkpoint) are dropped, so that curves do not double back.
    0 starts an empty file. ids: trace and span id of the moment.
    """

    def __init__(self, path: Path, resume_step: int = 0, ids: Ids = no_ids):
        self._ids = ids
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(path, resume_step if resume_step else -1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line."""
        self._append(step, finite(metrics))

    def text(self, step: int, tag: str, value: str) -> None:
        """Append a line with the text under its tag."""
        self._append(step, {tag: value})

    def _append(self, step: int, fields: dict[str, Any]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **self._ids(), **fields}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Nothing waits: every line is written at once."""
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()


def truncate_after(path: Path, step: int) -> None:
    """Replace a file of JSON lines, atomically, by its lines up to and including `step`.

    Lines that are no JSON object with a step (the last one, cut by a crash) are dropped too.
    """
    old = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept = [line for line in old.split("\n")[:-1] if _step_of(line) <= step]
    with files.replacing(path) as partial:
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def append_line(path: Path, step: int, fields: dict[str, Any]) -> None:
    """Append a line to the file of a `JsonLines`, from a thread other than its own, which may hang in it.

    One write to the end of the file: the lines of both stay whole. Raises: OSError.
    """
    row = {"step": step, "time": round(time.time(), 3), **finite(fields)}
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, (json.dumps(row, allow_nan=False) + "\n").encode())
    finally:
        os.close(file)


def _step_of(line: str) -> float:
    """The step of a JSON line; infinity for a damaged one, which no limit admits."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class TensorBoard:
    """Event files for TensorBoard, without TensorFlow.

    Writes records in the caller's thread: tensorboardX's SummaryWriter hands them to a thread over
    a queue of ten, and when that thread dies of a full disk the next write waits for ever. It also
    names files by the second, so that a quick restart would overwrite its predecessor.

    Args: directory: of the event files. resume_step: last step of the restored state; points after
    it are hidden. 0 hides nothing.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tensorboardX's own imports
            from tensorboardX import summary
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter
        self._summary, self._proto = summary, event_pb2
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        unique = f"{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"
        self._records = RecordWriter(str(directory / f"events.out.tfevents.{unique}"))
        self._open, self._tags = True, dict[str, str]()
        self._event(0, file_version="brain.Event:2")
        if resume_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(resume_step + 1, session_log=start)
        self.flush()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one scalar per finite metric, all in one record. Raises: ValueError after close."""
        summary = self._proto.Event().summary
        for name, value in metrics.items():
            if math.isfinite(value):
                summary.value.add(tag=self._tag(name), simple_value=value)
        if summary.value:
            self._event(step, summary=summary)
            self.flush()

    def text(self, step: int, tag: str, value: str) -> None:
        """Add a text, shown verbatim. Raises: ValueError after close."""
        verbatim = "    " + value.replace("\n", "\n    ")  # a Markdown code block
        self._event(step, summary=self._summary.text(tag, verbatim))
        self.flush()

    def _tag(self, name: str) -> str:
        """The name in the alphabet that TensorBoard allows."""
        if name not in self._tags:
            self._tags[name] = self._summary.scalar(name, 0.0).value[0].tag
        return self._tags[name]

    def _event(self, step: int, **content: Any) -> None:
        if not self._open:
            raise ValueError("this TensorBoard writer is closed")
        event = self._proto.Event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand everything to the operating system."""
        file = self._records._writer
        if self._open and file:
            # The file's flush and not the record writer's (tensorboardX 2.6.5), which also waits for
            # the disk: milliseconds per interval, and seconds on a network file system.
            file.flush()

    def close(self) -> None:
        """Write everything out; closing twice is harmless."""
        if self._open:
            self._open = False
            self._records.close()


class Multi:
    """Several writers as one; one that raises OSError is closed and dropped with a warning."""

    def __init__(self, writers: list[Writer]):
        self._writers = list(writers)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write to all."""
        self._each(lambda writer: writer.write(step, metrics))

    def text(self, step: int, tag: str, value: str) -> None:
        """Write to all."""
        self._each(lambda writer: writer.text(step, tag, value))

    def flush(self) -> None:
        """Flush all."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Close all."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except OSError as error:
                self._writers.remove(writer)
                log.warning("%s is switched off for this run: %s", type(writer).__name__, error)
                with contextlib.suppress(OSError):  # closing writes what is left, which fails again
                    writer.close()


def open_writers(
    cfg: LogConfig, workdir: Path, resume_step: int = 0, run: str = "run", ids: Ids = no_ids
) -> Multi:
    """The writers of a run: metrics.jsonl, tb/ if log.tensorboard, a page if log.prometheus_port.

    Args: resume_step: last step of the restored state; 0 for a new run. run: its name. ids: trace
    and span id of the moment.
    """
    makers: list[Callable[[], Writer]] = [lambda: JsonLines(workdir / "metrics.jsonl", resume_step, ids)]
    if cfg.tensorboard:
        makers.append(lambda: TensorBoard(workdir / "tb", resume_step))
    if cfg.prometheus_port:
        makers.append(lambda: Prometheus(run, cfg.prometheus_port))
    writers: list[Writer] = []
    for make in makers:
        try:
            writers.append(make())
        except OSError as error:
            log.warning("metrics: %s", error)
    return Multi(writers)
