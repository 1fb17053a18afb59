"""The doctor's findings: one function for each subject, pure in what it is told.

A finding is "ok", "warn" (works, but slowly or not for long) or "fail" (training will not work).
"""

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_jax.config import MeshConfig
from nanochat_jax.doctor import machine
from nanochat_jax.doctor.machine import Node, Processor

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu", "flax", "optax",
    "orbax-checkpoint", "grain", "numpy", "tokenizers", "tensorboardX", "nanochat_jax",
)  # fmt: skip
LITTLE_GIB = 2.0  # host memory below which a tiny run swaps
LOW_DISK_GIB = 20.0
P2P = "cards without peer-to-peer access hang here: set NCCL_P2P_DISABLE=1"


@dataclass(frozen=True)
class Finding:
    """What was found about one subject. advice: what to do about it, "" if nothing. facts: for --json."""

    name: str
    status: str
    text: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def installed() -> dict[str, str]:
    """Version of each known package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def packages(versions: Mapping[str, str], python: str) -> Finding:
    """Versions, and whether jaxlib and the device plugin are of jax's release."""
    facts = {"python": python, **versions}
    text = f"Python {python}, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    plugins = [name for name in versions if name.startswith("jax-")]
    of_release = ["jaxlib", *plugins]
    wrong = [name for name in of_release if name in versions and versions[name] != versions.get("jax")]
    if wrong:
        advice = f"install one release of all: {', '.join(wrong)} differ from jax {versions.get('jax')}"
        return Finding("packages", "warn", text, advice, facts)
    if len(plugins) > 1:
        return Finding("packages", "warn", text, f"keep one of {', '.join(plugins)}", facts)
    return Finding("packages", "ok", text, "", facts)


def devices(answer: Mapping[str, Any], driver: str, cards: Mapping[str, int], mesh: MeshConfig) -> Finding:
    """What jax sees, against the cards on the bus and the mesh of the config."""
    facts = dict(answer) | {"nvidia_driver": driver, "nvidia_cards": dict(cards)}
    if "failure" in answer:
        why = "jax did not start" if answer["failure"] == "crash" else "jax hangs while it starts"
        advice = "see whether nvidia-smi answers" if driver else "look at JAX_PLATFORMS"
        return Finding("devices", "fail", f"{why}: {answer['text']}", advice, facts)
    rows = answer["devices"]
    text = f"{len(rows)} x {rows[0]['kind']} ({answer['platform']})"
    if "limit_gib" in rows[0]:
        text += f", {min(row['limit_gib'] for row in rows):.1f} GiB usable each"
    text += f", NVIDIA driver {driver}" if driver else ""
    needed = mesh.data * mesh.fsdp * mesh.tensor
    if cards and answer["platform"] == "cpu":
        if driver:
            extra = "cuda13" if int(driver.split(".")[0]) >= 580 else "cuda12"
            advice = f'pip install "nanochat_jax[{extra}]", or unset JAX_PLATFORMS, to use the graphics card'
        else:
            advice = "an NVIDIA card is on the bus, but its kernel module is not loaded: install the driver"
        return Finding("devices", "warn", text, advice, facts)
    if needed > len(rows) and answer["platform"] != "cpu":
        advice = f"the config's mesh needs {needed} devices; lower mesh.data, mesh.fsdp or mesh.tensor"
        return Finding("devices", "fail", text, advice, facts)
    return Finding("devices", "ok", text, "", facts)


def kernels(answer: Mapping[str, Any]) -> Finding:
    """Which kernel implementations run here and give the right result."""
    if "failure" in answer:
        return Finding("kernels", "fail", answer["text"], "report this with --json", dict(answer))
    results: dict[str, dict[str, Any]] = answer["kernels"]
    fit = [f"{name} {result['ms']:.2f} ms" for name, result in results.items() if "ms" in result]
    broken = [f"{name} ({result['broken']})" for name, result in results.items() if "broken" in result]
    text = f"{', '.join(fit) or 'none'}; integer products by {answer['integer']}"
    if broken:
        advice = "report this with --json"
        return Finding("kernels", "fail", f"broken: {', '.join(broken)}; {text}", advice, dict(answer))
    return Finding("kernels", "ok", text, "", dict(answer))


def all_reduce(answer: Mapping[str, Any], workaround: Mapping[str, Any] | None = None) -> Finding:
    """Whether devices can add up their arrays.

    Args: workaround: the answer of a second try with NCCL_P2P_DISABLE=1, if there was one.
    """
    facts = dict(answer) | ({"with NCCL_P2P_DISABLE=1": dict(workaround)} if workaround else {})
    if "failure" in answer or not answer["right"]:
        wrong = "failure" not in answer
        text = "the sum over devices is wrong" if wrong else answer["text"]
        if workaround and workaround.get("right"):
            text += "; with NCCL_P2P_DISABLE=1 it works"
            return Finding("all_reduce", "fail", text, "export NCCL_P2P_DISABLE=1", facts)
        return Finding("all_reduce", "fail", text, f"{P2P}; NCCL_DEBUG=INFO tells more", facts)
    if answer["devices"] == 1:
        return Finding("all_reduce", "ok", "one device: nothing to add up", "", facts)
    speed = answer["mib"] / 1024 / (1e-3 * answer["ms"])
    text = f"{answer['mib']:.0f} MiB over {answer['devices']} devices in {answer['ms']:.1f} ms ({speed:.1f} GiB/s)"
    return Finding("all_reduce", "ok", text, "", facts)


def memory(sizes: Mapping[str, float]) -> Finding:
    """Free host memory; GiB."""
    if not sizes:
        return Finding("memory", "ok", "unknown: this system has no /proc/meminfo")
    total = min(sizes["total"], sizes.get("limit", float("inf")))
    text = f"{sizes['available']:.1f} of {total:.1f} GiB free"
    text += " (limited by a control group)" * ("limit" in sizes)
    if sizes["available"] < LITTLE_GIB:
        return Finding("memory", "warn", text, "end other programs; a run may be killed", dict(sizes))
    return Finding("memory", "ok", text, "", dict(sizes))


def disk(name: str, directory: Path, reserve_gib: float) -> Finding:
    """Free space where runs, or corpora and compiled programs, are written.

    Args: reserve_gib: below it no checkpoint is saved (ckpt.min_free_gb).
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    text, facts = f"{free:.1f} GiB free for {directory}", {"directory": str(directory), "free_gib": free}
    if not os.access(place, os.W_OK):
        return Finding(name, "fail", f"{directory} cannot be written", f"own or change {place}", facts)
    if free < reserve_gib:
        return Finding(name, "fail", text, "free some: checkpoints will not be saved", facts)
    if free < LOW_DISK_GIB:
        return Finding(name, "warn", text, "a checkpoint takes up to 12 bytes for each weight", facts)
    return Finding(name, "ok", text, "", facts)


def compilation_cache(directory: Path) -> Finding:
    """Programs kept from earlier runs."""
    files = [path for path in directory.glob("*") if path.is_file()] if directory.is_dir() else []
    size = 0
    for path in files:
        try:
            size += path.stat().st_size
        except OSError:  # another run has just replaced it
            continue
    count = sum(path.name.endswith("-cache") for path in files)
    text = f"{count} programs, {size / 2**20:.0f} MiB in {directory}" if count else f"empty ({directory})"
    facts = {"directory": str(directory), "programs": count, "mib": size / 2**20}
    if size > 20 * 2**30:
        return Finding("compilation_cache", "warn", text, f"delete old files in {directory}", facts)
    return Finding("compilation_cache", "ok", text, "", facts)


def threads(p: Processor, on_cpu: bool) -> Finding:
    """Hardware threads that the process may use, and how XLA's CPU backend will use them."""
    if not p.cpus:
        return Finding("threads", "ok", "unknown: this system has no /sys/devices/system/cpu")
    text = f"{p.model or 'processor'}: {p.sockets} sockets, {p.cores} cores, {len(p.cpus)} threads"
    text += f"; this process may use {len(p.allowed)}" * (p.allowed != p.cpus)
    facts = {
        "model": p.model, "sockets": p.sockets, "cores": p.cores, "threads": len(p.cpus),
        "allowed": list(p.allowed), "quota": p.quota if p.quota < float("inf") else None,
    }  # fmt: skip
    if p.quota < len(p.allowed):
        advice = (
            f"a control group grants {p.quota:g} of {len(p.allowed)} CPUs: threads beyond it are paused; bind "
            f"with: taskset -c {machine.show_cpus(p.first_threads[: max(1, int(p.quota))])} python -m ..."
        )
        return Finding("threads", "warn", text, advice, facts)
    if on_cpu and len(p.allowed) > len(p.first_threads):
        advice = (
            "two threads of a core share its multipliers; measure one for each core: "
            f"taskset -c {machine.show_cpus(p.first_threads)} python -m ..."
        )
        return Finding("threads", "ok", text, advice, facts)
    return Finding("threads", "ok", text, "", facts)


def numa(
    nodes: tuple[Node, ...], cards: Mapping[str, int], allowed: tuple[int, ...], on_cpu: bool
) -> Finding:
    """Memory attached to each socket; advice where the process may run on several nodes."""
    usable = [node for node in nodes if set(node.cpus) & set(allowed)]
    facts = {
        "nodes": [
            {"index": n.index, "cpus": machine.show_cpus(n.cpus), "total_gib": n.total_gib, "free_gib": n.free_gib}
            for n in nodes
        ],
        "cards": dict(cards),
    }  # fmt: skip
    if len(usable) < 2:
        return Finding(
            "numa", "ok", "one node: all memory is equally near" if nodes else "unknown", "", facts
        )
    text = "; ".join(
        f"node {n.index}: CPUs {machine.show_cpus(n.cpus)}, {n.free_gib:.0f} of {n.total_gib:.0f} GiB free"
        for n in usable
    )
    near = {index for index in cards.values() if index in {n.index for n in usable}}
    if near and not on_cpu:
        if len(near) > 1:
            return Finding("numa", "ok", text, "cards lie on several nodes: bind nothing", facts)
        best = next(n for n in usable if n.index in near)
        why = "the card's own node is nearest to it"
    else:
        best = max(usable, key=lambda n: n.free_gib)
        why = "threads that read the other socket's memory wait for it"
    line = f"numactl --cpunodebind={best.index} --membind={best.index} python -m nanochat_jax.train ..."
    spread = "" if near and not on_cpu else " (a model that needs all sockets: numactl --interleave=all)"
    return Finding("numa", "warn", text, f"{why}; measure: {line}{spread}", facts)
