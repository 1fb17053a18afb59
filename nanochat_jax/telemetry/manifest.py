"""What a run was: enough to make it again, and to notice that it is not the same run."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

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
    "workdir", "train.steps", "opt.schedule", "data.workers", "data.prefetch", "mesh", "ckpt", "eval", "log",
    "infer", "train.loss_chunk", "model.remat", "model.unroll", "opt.skip_nonfinite", "name",
)  # fmt: skip


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 1}} -> {"model.dim": 1}; lists become tuples, as JSON has none."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = json.loads(json.dumps(value))
    return out


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences that make a continued run another run, as "key: old -> new"."""
    before, after = flat(old), flat(new)
    keys = [k for k in after if before.get(k) != after[k]]
    fixed = [k for k in keys if not any(k == free or k.startswith(free + ".") for free in FREE)]
    return [f"{k}: {before.get(k)!r} -> {after[k]!r}" for k in fixed]


def write(workdir: Path, cfg: Config, facts: dict[str, Any]) -> None:
    """Write manifest.json and config.json (which --config=<workdir>/config.json reads back).

    Args: facts: devices, data, command line and overrides. A resumed run keeps the earlier starts.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "manifest.json"
    starts = []
    if path.exists():
        try:
            starts = json.loads(path.read_text())["starts"]
        except (ValueError, KeyError):
            starts = []  # damaged by a crash of an older version: the new record replaces it
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    config = to_dict(cfg)
    record = {
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "git": _git(),
        **facts,
        "starts": [*starts, now],
    }
    _replace(path, record)
    _replace(workdir / "config.json", config)


def write_result(workdir: Path, facts: dict[str, Any]) -> None:
    """Write result.json: where the run ended, its scores, and the SHA-256 of its state."""
    _replace(workdir / "result.json", {name: value for name, value in facts.items() if name != "config"})


def _replace(target: Path, content: dict[str, Any]) -> None:
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(target)


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
