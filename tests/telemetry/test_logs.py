"""JSON log lines: valid, dated, with ids, whatever is logged."""

import datetime
import json
import logging
import math
import sys

import pytest

from nanochat_jax.telemetry import logs


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line():
    ids = {"trace_id": "a", "span_id": "b"}
    line = logs.json_line(
        "step", "info", ids, {"step": 3, "a": 1.5, "b": math.nan, "c": -math.inf, "t": "x\ny"}
    )
    row = strict(line)
    when = datetime.datetime.fromisoformat(row.pop("ts"))
    assert when.utcoffset() == datetime.timedelta(0)
    assert abs((datetime.datetime.now(datetime.UTC) - when).total_seconds()) < 60
    assert "\n" not in line and row == {
        "level": "info", "event": "step", "trace_id": "a", "span_id": "b", "step": 3, "a": 1.5, "b": None,
        "c": None, "t": "x\ny", "nonfinite": ["b", "c"],
    }  # fmt: skip


def test_finite_fields_pass_as_they_are():
    fields = {"a": 1.0, "b": "nan"}
    assert logs.finite(fields) is fields


def test_what_goes_through_logging():
    formatter = logs.JsonFormatter(lambda: {"trace_id": "t"})
    try:
        raise KeyError("why")
    except KeyError:
        record = logging.LogRecord("a.b", logging.WARNING, "", 0, "%d%%", (5,), sys.exc_info())
    row = strict(formatter.format(record))
    assert (row["event"], row["level"], row["logger"], row["msg"]) == ("log", "warning", "a.b", "5%")
    assert (row["trace_id"], row["exc_type"], row["exc_msg"]) == ("t", "KeyError", "'why'")
    assert "Traceback" in row["stack"]
