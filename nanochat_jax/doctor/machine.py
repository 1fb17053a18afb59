"""What /proc and /sys say about the processor, memory, NUMA nodes and graphics cards.

Pure functions of a root directory, so that a tree of files can stand for a machine. A file that is
absent (another system, a container that hides it) gives an empty answer, never an error.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
NVIDIA = "0x10de"  # PCI vendor
DISPLAY_CLASSES = ("0x0300", "0x0302")  # PCI classes of graphics cards with and without a screen


@dataclass(frozen=True)
class Node:
    """A NUMA node: its CPUs and memory (GiB)."""

    index: int
    cpus: tuple[int, ...]
    total_gib: float
    free_gib: float


@dataclass(frozen=True)
class Processor:
    """CPUs (hardware threads) of the machine, and those this process may use.

    cores: distinct (socket, core) pairs. quota: CPUs that a control group grants, inf if unlimited.
    """

    model: str
    cpus: tuple[int, ...]
    cores: int
    sockets: int
    allowed: tuple[int, ...]
    first_threads: tuple[int, ...]  # one CPU of each core that this process may use
    quota: float


def cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format: "0-2,8" -> (0, 1, 2, 8); "" -> ()."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)


def show_cpus(cpus: tuple[int, ...]) -> str:
    """The inverse of `cpu_list`: (0, 1, 2, 8) -> "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)


def processor(root: Path = ROOT) -> Processor:
    """CPUs, cores and sockets; empty where the kernel does not tell."""
    system = root / "sys/devices/system/cpu"
    cpus = cpu_list(_read(system / "online"))
    status = _read(root / "proc/self/status")
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
    allowed = tuple(c for c in cpu_list(match[1]) if c in cpus) if match else cpus
    places = {c: _place(system / f"cpu{c}/topology", c) for c in cpus}
    first = {places[c]: c for c in reversed(allowed)}
    model = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return Processor(
        model=model[1].strip() if model else "",
        cpus=cpus,
        cores=len(set(places.values())),
        sockets=len({socket for socket, _ in places.values()}),
        allowed=allowed,
        first_threads=tuple(sorted(first.values())),
        quota=_quota(root),
    )


def nodes(root: Path = ROOT) -> tuple[Node, ...]:
    """NUMA nodes that have CPUs, by index; () if the kernel knows none."""
    found = []
    for path in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cpus, sizes = cpu_list(_read(path / "cpulist")), _sizes(_read(path / "meminfo"))
        if cpus:
            total, free = sizes.get("MemTotal", 0.0), sizes.get("MemFree", 0.0)
            found.append(Node(int(path.name[4:]), cpus, total, free))
    return tuple(sorted(found, key=lambda node: node.index))


def memory(root: Path = ROOT) -> dict[str, float]:
    """GiB: "total", "available", "swap_used", and "limit" of the control group if there is one."""
    sizes = _sizes(_read(root / "proc/meminfo"))
    if not sizes:
        return {}
    found = {
        "total": sizes.get("MemTotal", 0.0),
        "available": sizes.get("MemAvailable", sizes.get("MemFree", 0.0)),
        "swap_used": sizes.get("SwapTotal", 0.0) - sizes.get("SwapFree", 0.0),
    }
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = _read(root / "sys/fs/cgroup/memory.current").strip()
        found["limit"] = int(limit) / 2**30
        left = (int(limit) - int(used or 0)) / 2**30
        found["available"] = min(found["available"], left)
    return found


def nvidia_driver(root: Path = ROOT) -> str:
    """Version of the loaded NVIDIA kernel module, e.g. "580.65.06"; "" if none is loaded."""
    match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _read(root / "proc/driver/nvidia/version"))
    return match[1] if match else ""


def nvidia_cards(root: Path = ROOT) -> dict[str, int]:
    """PCI address of each NVIDIA card -> its NUMA node (-1 if the board does not tell)."""
    found = {}
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind = _read(path / "class").strip()
        if _read(path / "vendor").strip() == NVIDIA and kind.startswith(DISPLAY_CLASSES):
            found[path.name] = int(_read(path / "numa_node").strip() or -1)
    return found


def _place(topology: Path, cpu: int) -> tuple[int, int]:
    """(socket, core) of a CPU; a core of its own where the kernel does not tell."""
    socket = _read(topology / "physical_package_id").strip() or "0"
    core = _read(topology / "core_id").strip() or str(cpu)
    return int(socket), int(core)


def _quota(root: Path) -> float:
    """CPUs that the control group (version 2) grants."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else float("inf")


def _sizes(text: str) -> dict[str, float]:
    """GiB of each "Name: 123 kB" line, also of "Node 0 Name: 123 kB"."""
    return {name: int(size) / 2**20 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
