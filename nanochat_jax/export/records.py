"""What a run recorded about itself, without paths and names of the machine's owner."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nanochat_jax.export.variants import ExportError

DROPPED = {"config", "trace_id", "span_id"}  # of each metrics line


@dataclasses.dataclass(frozen=True)
class Records:
    """config.json, manifest.json, result.json and metrics.jsonl of a run; empty where a file is missing."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric."""
        return [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]

    def evaluation(self) -> dict[str, Any]:
        """The last scores, with their step; {} if the run was never scored."""
        scores = self.result.get("eval") or {}
        return scores if "eval/loss" in scores else {}


def read(workdir: Path) -> Records:
    """Read a run's records. Raises: ExportError for a file that is damaged."""
    files = [_json(workdir / f"{name}.json") for name in ("config", "manifest", "result")]
    path, rows = workdir / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            if isinstance(row, dict) and "step" in row:
                rows.append({key: value for key, value in row.items() if key not in DROPPED})
    return Records(*files, rows)  # type: ignore[arg-type]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error}") from None
    return found if isinstance(found, dict) else {}


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of training with directories of the machine shortened to their last part."""
    out = json.loads(json.dumps(config))
    out["workdir"] = ""
    for group, key in (
        ("ckpt", "init_from"),
        ("data", "source"),
        ("data", "tokenizer"),
        ("data", "reference"),
    ):
        value = out.get(group, {}).get(key)
        if isinstance(value, str):
            out[group][key] = shortened(value)
    return out


def shortened(value: str) -> str:
    """An absolute path's last part; anything else as it is."""
    return Path(value).name if value.startswith(("/", "~")) or value[1:3] == ":\\" else value


def provenance(records: Records) -> dict[str, Any]:
    """Where the weights come from: versions, source commit, devices, data hashes, and the state's hash."""
    m, data = records.manifest, records.manifest.get("data", {})
    out = {name: m[name] for name in ("packages", "python", "platform", "cpu", "git", "devices") if name in m}
    if data:
        out["data"] = {
            "source": shortened(str(data.get("source", ""))), "sha256": data.get("sha256"),
            "counts": data.get("counts"), "tokenizer_sha256": data.get("tokenizer_sha256"),
        }  # fmt: skip
    out["starts"] = [{k: s[k] for k in ("time", "git", "devices") if k in s} for s in m.get("starts", [])]
    kept = ("step", "tokens", "state_sha256", "seconds")
    return out | {name: records.result[name] for name in kept if name in records.result}
