"""The last metrics of a run for Prometheus, over HTTP on the loopback interface.

Metric `loss/next_token` becomes the gauge `nanochat_loss_next_token{run="..."}`; anomalies are
counted by kind. The name of a run is the only other label: steps and layers would make a new time
series each.
"""

import http.server
import math
import re
import threading
import time

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "nanochat_"


def metric_name(name: str) -> str:
    """`loss/next_token` -> `nanochat_loss_next_token`, in the alphabet that Prometheus allows."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def label(value: str) -> str:
    """A label's value with what the text format gives a meaning escaped."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def number(value: float) -> str:
    """A float in the text format, which knows NaN and infinities."""
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def exposition(run: str, metrics: dict[str, float], anomalies: dict[str, int]) -> str:
    """All metrics in Prometheus' text format.

    Args: metrics: by our names. anomalies: how often each kind was reported.
    """
    lines = []
    for name, value in sorted({metric_name(name): value for name, value in metrics.items()}.items()):
        lines += [f"# TYPE {name} gauge", f'{name}{{run="{label(run)}"}} {number(value)}']
    counter = f"{PREFIX}anomalies_total"
    lines += [f"# HELP {counter} Events that telemetry.anomaly reported.", f"# TYPE {counter} counter"]
    for kind, count in sorted(anomalies.items()):
        lines.append(f'{counter}{{run="{label(run)}",kind="{label(kind)}"}} {count}')
    return "\n".join(lines) + "\n"


class Prometheus:
    """A metric writer whose output is http://127.0.0.1:<port>/metrics.

    Args: run: value of the label `run`. port: 0 takes a free one; `port` then tells which.
    Raises: OSError if the port is taken.
    """

    def __init__(self, run: str, port: int):
        self._run, self._lock = run, threading.Lock()
        self._metrics: dict[str, float] = {}
        self._anomalies: dict[str, int] = {}
        # Loopback only: the page tells what the machine is doing, and has no password.
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _handler(self.page))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def page(self) -> str:
        """What is served."""
        with self._lock:
            return exposition(self._run, self._metrics, self._anomalies)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Replace the values of these metrics."""
        now = {"step": float(step), "last_step_timestamp_seconds": time.time()}
        with self._lock:
            self._metrics |= metrics | now

    def text(self, step: int, tag: str, value: str) -> None:
        """Count an anomaly under what stands before the colon; other texts are not for Prometheus."""
        if tag == "anomaly":
            kind = value.split(":")[0]
            with self._lock:
                self._anomalies[kind] = self._anomalies.get(kind, 0) + 1

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Stop serving; closing twice is harmless."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _handler(page) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client that connects and says nothing

        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "the metrics are at /metrics")
                return
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args) -> None:
            """A scrape every few seconds is no news."""

    return Handler
