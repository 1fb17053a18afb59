"""Where metrics go: JSON lines and TensorBoard. Receives Python floats, knows no jax.

A writer that fails (full disk, unwritable directory) is switched off with one warning: losing a
plot must not lose a run.
"""

import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Protocol

from nanochat_jax.config import LogConfig

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A sink of metrics and texts by step."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...
    def text(self, step: int, tag: str, value: str) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line: step, time (UTC seconds), metrics; NaN and infinity become null.

    Lines of steps after `resume_step` (of a run that was killed after its last checkpoint) are
    dropped at opening, so that curves do not double back.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        row: dict = {"step": step, "time": round(time.time(), 3)}
        row |= {name: None if name in bad else value for name, value in metrics.items()}
        if bad:
            row["nonfinite"] = bad
        self._append(row)

    def text(self, step: int, tag: str, value: str) -> None:
        """Append a line with the text under its tag."""
        self._append({"step": step, "time": round(time.time(), 3), tag: value})

    def _append(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Whole lines of the file; a last line cut by a crash is dropped."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class TensorBoard:
    """Event files for TensorBoard, without TensorFlow."""

    def __init__(self, directory: Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        # purge_step hides points of a killed run that lie after the restored step.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)
        self._open = True

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one scalar per finite metric. Raises: ValueError after close (tensorboardX would
        silently start another file)."""
        self._check()
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, tag: str, value: str) -> None:
        """Add a text, shown verbatim."""
        self._check()
        self._writer.add_text(tag, "    " + value.replace("\n", "\n    "), step)  # a Markdown code block

    def _check(self) -> None:
        if not self._open:
            raise ValueError("this TensorBoard writer is closed")

    def close(self) -> None:
        """Write everything out; closing twice is harmless."""
        if self._open:
            self._open = False
            self._writer.close()


class Multi:
    """Several writers as one; one that raises is dropped with a warning."""

    def __init__(self, writers: list[Writer]):
        self._writers = list(writers)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write to all."""
        self._each(lambda writer: writer.write(step, metrics))

    def text(self, step: int, tag: str, value: str) -> None:
        """Write to all."""
        self._each(lambda writer: writer.text(step, tag, value))

    def close(self) -> None:
        """Close all."""
        self._each(lambda writer: writer.close())

    def _each(self, call) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except OSError as error:
                self._writers.remove(writer)
                log.warning("%s is switched off for this run: %s", type(writer).__name__, error)


def open_writers(cfg: LogConfig, workdir: Path, resume_step: int = 0) -> Multi:
    """The writers of a run: metrics.jsonl, and tb/ if log.tensorboard."""
    makers = [lambda: JsonLines(workdir / "metrics.jsonl", resume_step)]
    if cfg.tensorboard:
        makers.append(lambda: TensorBoard(workdir / "tb", resume_step))
    writers: list[Writer] = []
    for make in makers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # tensorboardX's own imports
                writers.append(make())
        except OSError as error:
            log.warning("metrics: %s", error)
    return Multi(writers)
