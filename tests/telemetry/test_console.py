"""Progress: the log line's fixed order, and a bar that never damages what was printed."""

import io
import json
import math

import pytest

from nanochat_jax.telemetry import console


def test_log_line_has_a_fixed_order():
    metrics = {
        "opt/grad_norm": 0.84, "loss/next_token": 3.70004, "perf/tokens_per_second": 5123.0,
        "opt/lr_matrix": 0.012, "data/wait_ms": 0.31, "perf/eta_seconds": 62.4, "perf/mfu": 0.487,
    }  # fmt: skip
    assert console.log_line(120, 400, metrics) == (
        "step 120/400 (30.0%) | loss 3.7000 | lr 1.20e-02 | gnorm 0.84 | 5.1k tok/s | mfu 48.7% | "
        "data 0.3 ms | eta 1m02s"
    )


def test_numbers_for_people():
    assert [console.si(n) for n in (3, 1234, 5.2e6, 7e9)] == ["3", "1.2k", "5.2M", "7.0B"]
    assert [console.si(n) for n in (999, 999_960, -1500, 2e13)] == ["999", "1.0M", "-1.5k", "20.0T"]
    assert [console.duration(s) for s in (-1, 59.6, 3599.7, math.inf, math.nan)] == [
        "0s",
        "1m00s",
        "1h00m",
        "?",
        "?",
    ]
    assert [console.duration(s) for s in (5, 62, 3723)] == ["5s", "1m02s", "1h02m"]


def test_absent_and_broken_values():
    assert console.log_line(1, 0, {}) == "step 1/0 (100.0%)"
    broken = {"loss/next_token": math.nan, "perf/eta_seconds": math.inf, "perf/tokens_per_second": math.inf}
    assert console.log_line(1, 2, broken) == "step 1/2 (50.0%) | loss nan | infT tok/s | eta ?"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows after these characters: carriage return and newline are obeyed."""
    lines, column = [""], 0
    for char in text:
        if char == "\r":
            column = 0
        elif char == "\n":
            lines, column = [*lines, ""], 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + char + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_the_bar_keeps_printed_lines_whole():
    stream = Terminal()
    progress = console.Progress(10, stream)
    progress.bar(5, 3.0)
    assert screen(stream.getvalue()) == ["[###############...............] 5/10 eta 3s"]
    progress.print("a")
    progress.bar(6, None)
    progress.bar(7, 100.0)
    progress.bar(7, None)
    progress.line(8, {"loss/next_token": 1.0})
    progress.bar(12, None)  # more than the total
    assert screen(stream.getvalue()) == ["a", "step 8/10 (80.0%) | loss 1.0000", "[" + "#" * 30 + "] 12/10"]


@pytest.mark.parametrize("columns", [3, 12, 20, 40])
def test_the_bar_never_wraps(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    console.Progress(1000, stream).bar(999, 3600.0)
    assert len(screen(stream.getvalue())[0]) < columns


def test_there_is_no_bar_and_no_control_character_in_a_file():
    stream = io.StringIO()
    progress = console.Progress(10, stream)
    progress.bar(5, 3.0)
    progress.print("line")
    assert stream.getvalue() == "line\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_reader_that_has_gone_does_not_stop_the_run(error):
    class Gone(Terminal):
        def write(self, text):
            raise error

    progress = console.Progress(10, Gone())
    progress.bar(5, 3.0)
    progress.line(5, {})


def test_json_lines_instead_of_text():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = console.Progress(10, stream, "json", lambda: {"trace_id": "t", "span_id": "s"})
    progress.bar(1, 2.0)  # nothing: a bar is no line
    progress.line(5, {"loss/next_token": 3.5, "opt/grad_norm": float("nan")})
    progress.print("warning: two\nlines", "checkpoint", "warning", step=5)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["step"], first["steps"], first["loss/next_token"]) == ("step", 5, 10, 3.5)
    assert first["opt/grad_norm"] is None and (first["trace_id"], first["span_id"]) == ("t", "s")
    assert (second["event"], second["level"], second["msg"]) == (
        "checkpoint",
        "warning",
        "warning: two\nlines",
    )
