"""What a run was: enough to make it again, and to notice that it is not the same run."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from nanochat_jax import files
from nanochat_jax.config import Config, to_dict

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "nanochat_jax",
)

# Settings that a run may change when it is continued; everything else would make it another run.
FREE = (
    "workdir", "train.steps", "opt.schedule.rewarm_steps", "data.workers", "data.prefetch", "data.tokenize_workers", "mesh", "ckpt", "eval", "log",
    "infer", "train.loss_chunk", "model.remat", "model.unroll", "opt.skip_nonfinite", "name",
    "train.check_replicas_steps", "train.stall_seconds", "train.stall_exit",
)  # fmt: skip
# Where a run started from is part of what it is; a continued run would ignore another value.
FIXED = ("ckpt.init_from",)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 1}} -> {"model.dim": 1}; lists become tuples, as JSON has none."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = json.loads(json.dumps(value))
    return out


def may_change(key: str) -> bool:
    """Whether a continued run may have another value of this setting than the run so far."""
    return key not in FIXED and any(key == free or key.startswith(free + ".") for free in FREE)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences that make a continued run another run, as "key: old -> new".

    Args: nested settings, as `config.to_dict` or config.json have them. A setting that one side
    lacks, because an older version did not know it, counts as its default there.
    """
    default = flat(to_dict(Config()))
    before, after = default | flat(old), default | flat(new)
    keys = [k for k in before | after if before.get(k) != after.get(k) and not may_change(k)]
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys]


def write(workdir: Path, cfg: Config, facts: dict[str, Any]) -> None:
    """Write manifest.json and config.json (which --config=<workdir>/config.json reads back).

    Args: facts: devices, data, command line and overrides. `starts` lists every start of the run,
    the earlier ones included: its time (UTC) and what may differ from one to the next.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "manifest.json"
    starts = []
    if path.exists():
        try:
            starts = list(json.loads(path.read_text())["starts"])
        except (ValueError, KeyError, TypeError):
            starts = []  # damaged: the new record replaces it
    git = _git()
    start = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "git": git}
    start |= {name: facts[name] for name in ("command", "overrides", "devices") if name in facts}
    config = to_dict(cfg)
    record = {
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "git": git,
        **facts,
        "starts": [*starts, start],
    }
    files.write_json(path, record, sync=True)
    files.write_json(workdir / "config.json", config, sync=True)


def write_result(workdir: Path, facts: dict[str, Any]) -> None:
    """Write result.json: where the run ended, its scores, and the SHA-256 of its state."""
    kept = {name: value for name, value in facts.items() if name not in ("config", "anomaly")}
    files.write_json(workdir / "result.json", kept, sync=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _git() -> dict[str, Any] | None:
    """Commit of the source tree that this package runs from, if it is one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=5
            )
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
