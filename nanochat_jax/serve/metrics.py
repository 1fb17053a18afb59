"""Counters, gauges and histograms of the server, in Prometheus' text format 0.0.4."""

import threading
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# name -> (kind, help)
KNOWN = {
    "requests_total": ("counter", "Answers by route and status."),
    "tokens_generated_total": ("counter", "Tokens of answers."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "reused_tokens_total": ("counter", "Tokens of prompts that a slot held already."),
    "cancelled_total": ("counter", "Requests whose client went away or did not read."),
    "rejected_total": ("counter", "Requests refused, by reason."),
    "unknown_fields_total": ("counter", "Fields of requests that nothing reads."),
    "ttft_seconds": ("histogram", "From a request to the first token of its answer."),
    "inter_token_seconds": ("histogram", "Between two tokens of an answer; those of one turn come together."),
    "request_seconds": ("histogram", "From a request to the end of its answer."),
    "queue_seconds": ("histogram", "From a request to the slot that serves it."),
    "active_slots": ("gauge", "Slots that are answering."),
    "queue_depth": ("gauge", "Requests that wait for a slot."),
    "kv_tokens": ("gauge", "Tokens in the caches of active slots."),
    "tokens_per_second": ("gauge", "Tokens of answers, over the last second with any."),
    "model_load_seconds": ("gauge", "Loading and compiling."),
    "loop_mean": ("gauge", "Loops per token, with early exit."),
    "spec_drafts": ("gauge", "Tokens drafted ahead in the last step."),
    "spec_acceptance": ("gauge", "Share of the drafts of each place that came true, lately."),
    "build_info": ("gauge", "1, with the version and model as labels."),
}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Metrics:
    """The values of KNOWN; all methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        self._counts = {
            name: [0] * (len(BUCKETS) + 1) for name, (kind, _) in KNOWN.items() if kind == "histogram"
        }
        self._sums = dict.fromkeys(self._counts, 0.0)

    def add(self, name: str, by: float = 1, **labels: str) -> None:
        """Count up."""
        with self._lock:
            row = self._values.setdefault(name, {})
            key = tuple(sorted(labels.items()))
            row[key] = row.get(key, 0) + by

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def get(self, name: str) -> float:
        """The sum over all labels."""
        with self._lock:
            return sum(self._values.get(name, {}).values())

    def observe(self, name: str, seconds: float) -> None:
        """Put a value into a histogram."""
        place = next((i for i, limit in enumerate(BUCKETS) if seconds <= limit), len(BUCKETS))
        with self._lock:
            self._counts[name][place] += 1
            self._sums[name] += seconds

    def page(self) -> str:
        """What /metrics answers."""
        lines = []
        with self._lock:
            for name, (kind, text) in KNOWN.items():
                full = f"nanochat_{name}"
                lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
                if kind == "histogram":
                    total = 0
                    for limit, count in zip((*map(str, BUCKETS), "+Inf"), self._counts[name], strict=True):
                        total += count
                        lines.append(f'{full}_bucket{{le="{limit}"}} {total}')
                    lines += [f"{full}_sum {self._sums[name]!r}", f"{full}_count {total}"]
                else:
                    rows = self._values.get(name) or ({} if name in LABELLED else {(): 0.0})
                    lines += [f"{full}{_labels(dict(key))} {value!r}" for key, value in sorted(rows.items())]
        return "\n".join(lines) + "\n"


LABELLED = ("requests_total", "rejected_total", "spec_acceptance", "build_info")


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    inner = ",".join(f'{key}="{escaped(value)}"' for key, value in labels.items())
    return f"{{{inner}}}" if inner else ""
