"""Spans of a run (run > interval > checkpoint, eval), with W3C ids, as lines of OTLP/JSON.

A line of spans.jsonl is a span of the OpenTelemetry protocol's JSON form, so that the file can be
posted to a collector later, or each span while the run lasts (`Exporter`). No library is needed:
the form is a few fields. An interval is a span, a step is not: a span for each of a million steps
would tell nothing that the metrics do not.

Source: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

import contextlib
import json
import logging
import os
import queue
import re
import secrets
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
Sink = Callable[[dict[str, Any]], None]


def parse_traceparent(text: str) -> tuple[str, str] | None:
    """(trace id, span id) of a W3C traceparent, or None if it is not a valid one.

    Flags may be any two digits; version 00 has nothing after them, a later one may.
    """
    match = TRACEPARENT.fullmatch(text.strip())
    if not match or match[1] == "ff" or (match[1] == "00" and match[4]):
        return None
    trace, span = match[2], match[3]
    return None if not int(trace, 16) or not int(span, 16) else (trace, span)


class Trace:
    """Open spans of one run, the innermost last. Belongs to one thread.

    Args: sinks: receive each span when it ends. parent: a traceparent to continue (of the program
    that started this one); else, also if it is damaged, a new trace begins.
    """

    def __init__(self, sinks: tuple[Sink, ...] = (), parent: str = ""):
        outer = parse_traceparent(parent)
        self._sinks = sinks
        self.trace_id, self._outer = outer or (secrets.token_hex(16), "")
        self._open: list[dict[str, Any]] = []

    def begin(self, name: str, **attributes: Any) -> str:
        """Open a span inside the innermost one; returns its id."""
        span_id = secrets.token_hex(8)
        self._open.append({
            "traceId": self.trace_id, "spanId": span_id, "parentSpanId": self._parent(), "name": name, "kind": 1,
            "startTimeUnixNano": str(time.time_ns()), "attributes": _attributes(attributes),
        })  # fmt: skip
        return span_id

    def end(self, span_id: str, error: str = "", **attributes: Any) -> None:
        """End a span, and those inside of it that are still open. Unknown and ended ids are ignored."""
        if all(span["spanId"] != span_id for span in self._open):
            return
        while True:
            span = self._open.pop()
            last = span["spanId"] == span_id
            # The clock may be set back while a span is open; it must not end before it began.
            span["endTimeUnixNano"] = str(max(time.time_ns(), int(span["startTimeUnixNano"])))
            if last:
                span["attributes"] += _attributes(attributes)
                if error:
                    span["status"] = {"code": 2, "message": error}
            for sink in self._sinks:
                sink(span)
            if last:
                return

    @contextlib.contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[None]:
        """A span around a block; an exception that leaves it becomes its status."""
        span_id = self.begin(name, **attributes)
        try:
            yield
        except BaseException as error:
            self.end(span_id, error=f"{type(error).__name__}: {error}")
            raise
        self.end(span_id)

    def ids(self) -> dict[str, str]:
        """trace_id and span_id of the innermost open span, for log lines."""
        return {"trace_id": self.trace_id} | ({"span_id": self._parent()} if self._parent() else {})

    def _parent(self) -> str:
        return self._open[-1]["spanId"] if self._open else self._outer


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """OTLP's typed form; an integer is a string there, because JSON numbers end at 2^53."""
    kinds = {bool: "boolValue", int: "intValue", float: "doubleValue"}
    rows = []
    for key, value in values.items():
        kind = kinds.get(type(value), "stringValue")
        plain = value if kind in ("boolValue", "doubleValue") else str(value)
        rows.append({"key": key, "value": {kind: plain}})
    return rows


class SpanFile:
    """Appends spans to a file, one line each; a full disk ends the writing, not the run.

    The file is opened at the first span and closed with this object.
    """

    def __init__(self, path: Path):
        self._path, self._broken = path, False

    @cached_property
    def _file(self) -> int:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, file)
        return file

    def __call__(self, span: dict[str, Any]) -> None:
        if self._broken:
            return
        line = (json.dumps(span) + "\n").encode()
        try:
            while line:  # a disk that has room for a part of it takes that, and then refuses
                line = line[os.write(self._file, line) :]
        except OSError as error:
            self._broken = True
            log.warning("spans are no longer written: %s", error)


class Exporter:
    """Posts spans to a collector from a thread of its own (OTLP over HTTP, JSON).

    A collector that does not answer costs the spans and one warning, nothing else.
    Args: endpoint: e.g. http://127.0.0.1:4318/v1/traces. resource: attributes of the run.
    """

    def __init__(self, endpoint: str, resource: dict[str, Any]):
        self._endpoint, self._resource = endpoint, _attributes(resource)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(1000)
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def __call__(self, span: dict[str, Any]) -> None:
        with contextlib.suppress(queue.Full):  # the collector is slower than the run
            self._queue.put_nowait(span)

    def close(self, seconds: float = 5.0) -> None:
        """Post what is left, for at most `seconds`."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        done = False
        while not done:
            spans = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    spans.append(self._queue.get_nowait())
            done = None in spans
            if found := [span for span in spans if span is not None]:
                self._post(found)

    def _post(self, spans: list[dict[str, Any]]) -> None:
        scope = {"scope": {"name": "nanochat_jax"}, "spans": spans}
        body = {"resourceSpans": [{"resource": {"attributes": self._resource}, "scopeSpans": [scope]}]}
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self._endpoint, data, kind)
            urllib.request.urlopen(request, timeout=5).close()
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                log.warning("spans are lost, %s does not take them: %s", self._endpoint, error)
