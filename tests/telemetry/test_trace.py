"""Spans: ids as W3C wants them, each inside its parent; the collector gets what the file gets."""

import http.server
import json
import logging
import re
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat_jax.telemetry import trace
from nanochat_jax.telemetry.trace import Exporter, SpanFile, Trace

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-03", True),  # what OpenTelemetry's SDK writes
        (f" 00-{TRACE}-{SPAN}-00\n", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{SPAN[1:]}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        ("", False),
    ],
)  # the examples of the recommendation, and their mistakes
def test_traceparent(text, valid):
    assert trace.parse_traceparent(text) == ((TRACE, SPAN) if valid else None)


def attributes(span):
    return {row["key"]: row["value"] for row in span["attributes"]}


def check_tree(spans, outer=""):
    """One trace, valid distinct ids, every parent known, children within their parents."""
    known = {span["spanId"]: span for span in spans}
    assert len(known) == len(spans) and len({span["traceId"] for span in spans}) == 1
    for span in spans:
        assert re.fullmatch("[0-9a-f]{32}", span["traceId"]) and re.fullmatch("[0-9a-f]{16}", span["spanId"])
        start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
        assert start <= end
        if span["parentSpanId"] != outer:
            parent = known[span["parentSpanId"]]
            assert int(parent["startTimeUnixNano"]) <= start and end <= int(parent["endTimeUnixNano"])


def test_a_run():
    spans = []
    t = Trace((spans.append,))
    assert t.ids() == {"trace_id": t.trace_id}
    run = t.begin("run", run="x", first_step=0, share=0.5, fresh=True)
    interval = t.begin("interval")
    with t.span("eval", step=5):
        inside = t.ids()["span_id"]
    t.end(interval, step=10)
    t.begin("interval")  # the run's end closes it
    t.end(run, last_step=12)
    t.end(run)
    assert [span["name"] for span in spans] == ["eval", "interval", "interval", "run"]
    check_tree(spans)
    assert [span["parentSpanId"] for span in spans] == [interval, run, run, ""]
    assert spans[0]["spanId"] == inside
    assert attributes(spans[3]) == {
        "run": {"stringValue": "x"}, "first_step": {"intValue": "0"}, "share": {"doubleValue": 0.5},
        "fresh": {"boolValue": True}, "last_step": {"intValue": "12"},
    }  # fmt: skip
    assert all("status" not in span for span in spans)


def test_a_started_program_continues_the_trace():
    spans = []
    t = Trace((spans.append,), f"00-{TRACE}-{SPAN}-01")
    with t.span("run"):
        pass
    assert (spans[0]["traceId"], spans[0]["parentSpanId"]) == (TRACE, SPAN)
    assert Trace((), "rubbish").trace_id != Trace().trace_id


def test_an_exception_is_the_status():
    spans = []
    t = Trace((spans.append,))
    with pytest.raises(ValueError, match="why"), t.span("eval"):
        raise ValueError("why")
    assert spans[0]["status"] == {"code": 2, "message": "ValueError: why"} and t.ids() == {
        "trace_id": t.trace_id
    }


@hypothesis.given(st.lists(st.integers(-1, 5), max_size=30))
def test_any_order_gives_a_tree(moves):
    """-1 begins a span; i >= 0 ends the i-th that was begun, open or not."""
    spans, begun = [], []
    t = Trace((spans.append,))
    root = t.begin("root")
    for move in moves:
        if move < 0:
            begun.append(t.begin("s"))
        elif move < len(begun):
            t.end(begun[move])
    t.end(root)
    assert len(spans) == len(begun) + 1 and spans[-1]["name"] == "root"
    check_tree(spans)


def test_a_clock_that_is_set_back(monkeypatch):
    spans, times = [], iter([1000, 400])
    monkeypatch.setattr(trace.time, "time_ns", lambda: next(times))
    t = Trace((spans.append,))
    t.end(t.begin("s"))
    assert spans[0]["endTimeUnixNano"] == "1000"


def test_the_file_holds_a_span_per_line_and_a_full_disk_is_told_once(tmp_path, caplog):
    t = Trace((SpanFile(tmp_path / "spans.jsonl"),))
    with t.span("a"), t.span("b"):
        pass
    rows = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["b", "a"]
    check_tree(rows)
    broken = Trace((SpanFile(tmp_path / "none" / "spans.jsonl"),))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            broken.end(broken.begin("a"))
    assert len(caplog.records) == 1 and "spans are no longer written" in caplog.text


@pytest.fixture
def collector():
    """(address, bodies that were posted to it)."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", bodies
        server.shutdown()
        thread.join()


def test_the_collector_gets_every_span(collector):
    address, bodies = collector
    spans = []
    exporter = Exporter(address, {"service.name": "nanochat_jax"})
    t = Trace((spans.append, exporter))
    for _ in range(3):
        with t.span("run"), t.span("eval", step=1):
            pass
    exporter.close()
    assert not exporter._thread.is_alive()
    assert all(headers["Content-Type"] == "application/json" for headers, _ in bodies)
    posted = []
    for _, body in bodies:
        (group,) = body["resourceSpans"]
        assert group["resource"]["attributes"] == [
            {"key": "service.name", "value": {"stringValue": "nanochat_jax"}}
        ]
        posted += group["scopeSpans"][0]["spans"]
    assert posted == spans and len(spans) == 6


def test_a_collector_that_is_not_there_costs_a_warning(caplog):
    exporter = Exporter("http://127.0.0.1:1/v1/traces", {})
    t = Trace((exporter,))
    with caplog.at_level(logging.WARNING):
        t.end(t.begin("a"))
        exporter.close()
        exporter._post([{}])
    assert len(caplog.records) == 1 and "spans are lost" in caplog.text


@pytest.mark.interop
def test_the_posted_form_is_the_protocols(collector):
    """opentelemetry-proto parses it; ids are hex in OTLP/JSON, base64 in plain protobuf JSON."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    import base64

    from google.protobuf import json_format

    address, bodies = collector
    exporter = Exporter(address, {"service.name": "nanochat_jax", "devices": 2})
    t = Trace((exporter,))
    with pytest.raises(ValueError), t.span("run", share=0.5, fresh=True), t.span("eval", step=1):
        raise ValueError("x")
    exporter.close()
    for _, body in bodies:
        for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            for key in ("traceId", "spanId", "parentSpanId"):
                span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
        request = json_format.ParseDict(body, service.ExportTraceServiceRequest())
        for span in request.resource_spans[0].scope_spans[0].spans:
            assert len(span.trace_id) == 16 and len(span.span_id) == 8
            assert span.end_time_unix_nano >= span.start_time_unix_nano > 0 and span.status.code == 2
