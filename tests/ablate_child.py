"""Stands in for `python -m nanochat_jax.train` and for the measurement of speed: writes what they would.

    python ablate_child.py <journal> train|probe [arguments]

Its own arguments: --bpb=F (of seed 0; every further seed adds 0.01), --status=N, --first_status=N (of the
first start only), --crash=N (leave nothing), --wait=FILE (run until it exists, or SIGTERM), --step_ms=F. Every start is a line of
the journal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

journal, kind = Path(sys.argv[1]), sys.argv[2]
given = dict(word[2:].split("=", 1) for word in sys.argv[3:])


def note(what):
    with journal.open("a") as file:
        file.write(json.dumps({"what": what, "kind": kind, "pid": os.getpid(), **given}) + "\n")


note("start")
if kind == "probe":
    print(json.dumps({"step_ms": {"median": float(given["step_ms"])}, "tokens_per_second": 1.0}))
    sys.exit(0)

if "crash" in given:
    sys.exit(int(given["crash"]))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
workdir, seed = Path(given["workdir"]), int(given["config.seed"])
workdir.mkdir(parents=True, exist_ok=True)
again = (workdir / "manifest.json").exists()
manifest = {
    "git": {"commit": "0123456789abcdef"}, "packages": {"jax": "1.2.3"}, "cpu": "a CPU",
    "devices": {"kind": "cpu", "platform": given.get("platform", "cpu")}, "starts": [{"time": "now"}],
}  # fmt: skip
(workdir / "manifest.json").write_text(json.dumps(manifest))
if given.get("wait"):
    while not Path(given["wait"]).exists() and not stopped:
        time.sleep(0.02)
status = int(given.get("status", 0)) if again else int(given.get("first_status", given.get("status", 0)))
stop = "interrupted" if stopped else "diverged" if status == 1 else ""
steps = int(given.get("config.train.steps", 20))
rows = [
    {"step": 0, "config": "text"},
    {"step": steps // 2, "loss/next_token": 3.0, "perf/tokens_per_second": 100.0, "perf/step_ms": 10.0, "perf/memory_gib": 0.5},
    {"step": steps // 2, "eval/bpb": 2.0},
    {"step": steps, "loss/next_token": 2.0, "perf/tokens_per_second": 300.0, "perf/step_ms": 30.0, "perf/memory_gib": 0.25},
]  # fmt: skip
(workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
scores = {"eval/bpb": float(given.get("bpb", 1.5)) + 0.01 * seed, "eval/loss": 2.0} if not stop else {}
if status in (0, 1):
    (workdir / "result.json").write_text(
        json.dumps({"step": steps, "tokens": 8 * steps, "eval": scores, "stop": stop})
    )
note("end")
sys.exit(130 if stopped else status)
