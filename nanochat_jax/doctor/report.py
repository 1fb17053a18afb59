"""Run all checks in order, and show what they found."""

import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

from nanochat_jax.config import Config
from nanochat_jax.doctor import checks, child, machine
from nanochat_jax.doctor.checks import Finding

SHOWN = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
# Doctor must start beside a running job: jax would reserve three quarters of each card.
SPARING = "XLA_PYTHON_CLIENT_PREALLOCATE"


def command(question: str, environment: dict[str, str], **extra: str) -> list[str]:
    """How to start a child; `extra` variables that the user has set keep their values."""
    added = {SPARING: "false"} | extra
    words = [f"{name}={value}" for name, value in added.items() if name not in environment]
    return ["env", *words, sys.executable, "-m", "nanochat_jax.doctor.child", question]


def examine(
    cfg: Config,
    output: Path,
    cache: Path,
    programs: Path,
    environment: dict[str, str],
    limit: float,
    root: Path = machine.ROOT,
) -> list[Finding]:
    """All findings. jax runs in child processes only.

    Args: output: where runs are written. cache: of corpora. programs: of compiled programs.
    environment: variables that the user has set. limit: seconds for each child.
    """
    processor, cards = machine.processor(root), machine.nvidia_cards(root)
    seen = child.ask(command("devices", environment), limit)
    on_cpu = seen.get("platform") == "cpu"
    found = [
        checks.packages(checks.installed(), platform.python_version()),
        checks.devices(seen, machine.nvidia_driver(root), cards, cfg.mesh),
    ]
    if "failure" not in seen:  # else the others would only fail, or hang, in the same way
        found.append(checks.kernels(child.ask(command("kernels", environment), limit)))
        sums, again = child.ask(command("all_reduce", environment), limit), None
        if not sums.get("right") and seen["platform"] == "gpu" and "NCCL_P2P_DISABLE" not in environment:
            again = child.ask(command("all_reduce", environment, NCCL_P2P_DISABLE="1"), limit)
        found.append(checks.all_reduce(sums, again))
    return [
        *found,
        checks.memory(machine.memory(root)),
        checks.disk("disk", output, cfg.ckpt.min_free_gb),
        checks.disk("cache_disk", cache, 1.0),
        checks.compilation_cache(programs),
        checks.threads(processor, on_cpu),
        checks.numa(machine.nodes(root), cards, processor.allowed, on_cpu),
    ]


def failed(findings: list[Finding]) -> bool:
    """Whether training will not work."""
    return any(finding.status == "fail" for finding in findings)


def record(findings: list[Finding], environment: dict[str, str]) -> dict[str, Any]:
    """All findings and the environment variables that matter, as JSON."""
    rows = {f.name: {k: v for k, v in dataclasses.asdict(f).items() if k != "name"} for f in findings}
    return {"ok": not failed(findings), "findings": rows, "environment": environment}


def text(findings: list[Finding]) -> str:
    """A line for each finding, advice below it."""
    lines = []
    for finding in findings:
        lines.append(f"{SHOWN[finding.status]} {finding.name:<17} {finding.text}")
        lines += [f"     {'':<17} -> {finding.advice}"] * bool(finding.advice)
    return "\n".join(lines)
