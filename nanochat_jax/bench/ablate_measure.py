"""What a run leaves behind -> the line of results.jsonl."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import config as config_lib
from nanochat_jax import optim
from nanochat_jax import params as params_lib
from nanochat_jax.model import transformer


def measured(workdir: Path, status: int, peak: int) -> dict[str, Any]:
    """Scores, speed and memory of a run that ended by itself.

    Args: workdir: with result.json, manifest.json, metrics.jsonl and config.json; what the last two
    would tell is None where they are absent. status: of the process. peak: its resident memory, bytes;
    it counts where the device has no memory of its own.
    """
    manifest, end = _json(workdir / "manifest.json"), _json(workdir / "result.json")
    scores, rows, config = end["eval"], metric_rows(workdir), _json(workdir / "config.json")
    speeds = [row["perf/tokens_per_second"] for row in rows]
    noted = [int(row["perf/memory_gib"] * 2**30) for row in rows]
    own = [peak] if manifest["devices"]["platform"] == "cpu" else []
    return {
        "bpb": scores.get("eval/bpb", math.nan), "loss": scores.get("eval/loss", math.nan),
        "bpb_loops": _by_loop(scores),
        "steps": end["step"], "tokens": end["tokens"], "stop": end["stop"] or status,
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "peak_bytes": max(noted + own, default=None),
        "state_bytes": state_bytes(config) if config else None,
        "seconds": training_seconds(rows) if rows else None,
        "commit": (manifest["git"] or {}).get("commit", "")[:12], "jax": manifest["packages"]["jax"],
        "device": manifest["devices"]["kind"], "cpu": manifest["cpu"], "time": manifest["starts"][0]["time"],
    }  # fmt: skip


def metric_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that hold training metrics, one for each interval of steps."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row.get("perf/tokens_per_second") is not None]


def training_seconds(rows: list[dict[str, Any]]) -> float:
    """Seconds of training steps, without compilation, evaluation and saving.

    The first step of a run, which compiles, is counted as long as the others of its interval.
    """
    steps = [0, *(row["step"] for row in rows)]
    return sum(
        1e-3 * row["perf/step_ms"] * (row["step"] - last) for row, last in zip(rows, steps[:-1], strict=True)
    )


def state_bytes(settings: dict[str, Any]) -> int:
    """Bytes of the optimizer's state (moments, projectors, counters) of a config.json; nothing is allocated."""
    cfg = config_lib.resolve(config_lib.from_json(settings))
    tx, _ = optim.build(cfg.opt, cfg.train.steps, seed=cfg.seed)
    specs = transformer.param_specs(cfg.model)
    state = jax.eval_shape(lambda key: tx.init(params_lib.init_params(specs, key)), jax.random.key(0))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _by_loop(scores: dict[str, float]) -> list[float]:
    """Bits per byte after 1, 2, ... loops, of a looped model."""
    name = "eval/bpb_loop_{}".format
    count = sum(key.startswith(name("")) for key in scores)
    return [scores[name(r + 1)] for r in range(count)]
