"""Progress for people: a live bar on a terminal, one greppable line per interval always."""

import contextlib
import math
import shutil
import sys
from typing import Any, TextIO

from nanochat_jax.telemetry.logs import Ids, json_line, no_ids

# metric, label, format; a field whose metric is absent is left out
FIELDS = (
    ("loss/next_token", "loss", lambda v: f"{v:.4f}"),
    ("eval/bpb", "bpb", lambda v: f"{v:.4f}"),
    ("opt/lr_matrix", "lr", lambda v: f"{v:.2e}"),
    ("opt/grad_norm", "gnorm", lambda v: f"{v:.2f}"),
    ("perf/tokens_per_second", "", lambda v: f"{si(v)} tok/s"),
    ("perf/mfu", "mfu", lambda v: f"{100 * v:.1f}%"),
    ("perf/memory_gib", "mem", lambda v: f"{v:.1f} GiB"),
    ("data/wait_ms", "data", lambda v: f"{v:.1f} ms"),
    ("perf/eta_seconds", "eta", lambda v: duration(v)),
)


def si(number: float) -> str:
    """1234 -> 1.2k."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.99995 * limit:  # else 999960 would read 1000.0k
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """62 -> 1m02s; "?" if unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def log_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """`step 120/400 (30.0%) | loss 3.8123 | lr 1.20e-02 | ...`, in a fixed order."""
    parts = [f"step {step}/{total} ({100 * step / max(total, 1):.1f}%)"]
    parts += [f"{label} {show(metrics[name])}".strip() for name, label, show in FIELDS if name in metrics]
    return " | ".join(parts)


class Progress:
    """Writes log lines, and between them a bar if the stream is a terminal.

    A stream that cannot be written to any more (its reader has gone) loses the text, not the run.

    Args: style: "text", or "json" for one object per line and no bar. ids: trace and span id of the
    moment, for JSON lines.
    """

    def __init__(self, total: int, stream: TextIO | None = None, style: str = "text", ids: Ids = no_ids):
        self.total, self.stream, self._ids = total, stream or sys.stderr, ids
        self._json = style == "json"
        self._live = self.stream.isatty() and not self._json
        self._shown = 0  # characters of the bar on the screen

    def line(self, step: int, metrics: dict[str, float]) -> None:
        """Print the line of an interval."""
        if self._json:
            self._object("step", "info", {"step": step, "steps": self.total, **metrics})
        else:
            self.print(log_line(step, self.total, metrics))

    def print(self, text: str, event: str = "note", level: str = "info", **fields: Any) -> None:
        """Print a line in the bar's place; the bar comes back below it.

        Args: event, level, fields: what a JSON line says beside the text.
        """
        if self._json:
            self._object(event, level, {"msg": text, **fields})
        else:
            self._put(self._blank() + text + "\n")

    def _object(self, event: str, level: str, fields: dict[str, Any]) -> None:
        self._put(json_line(event, level, self._ids(), fields) + "\n")

    def bar(self, step: int, eta_seconds: float | None) -> None:
        """Redraw the bar; nothing happens when the stream is not a terminal."""
        if not self._live:
            return
        eta = "" if eta_seconds is None else f" eta {duration(eta_seconds)}"
        label = f" {step}/{self.total}{eta}"
        columns = shutil.get_terminal_size().columns
        width = max(0, min(30, columns - len(label) - 3))  # a bar that wraps could not be redrawn
        filled = round(width * min(step / max(self.total, 1), 1.0))
        text = f"[{'#' * filled}{'.' * (width - filled)}]{label}"[: columns - 1]
        self._put(self._blank() + text)
        self._shown = len(text)

    def _blank(self) -> str:
        """What wipes the bar from the screen."""
        shown, self._shown = self._shown, 0
        return f"\r{' ' * shown}\r" if shown else ""

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self.stream.write(text)
            self.stream.flush()
