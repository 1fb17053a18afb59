"""Facts from /proc and /sys: read from trees of files that stand for machines."""

import os
import platform

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat_jax.doctor import machine


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def two_sockets(root, cards=(), allowed="0-7"):
    """Two sockets of two cores of two threads; CPU c and c + 4 share a core."""
    files = {
        "sys/devices/system/cpu/online": "0-7\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{allowed}\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A processor\n",
        "proc/meminfo": "MemTotal:       67108864 kB\nMemFree: 1048576 kB\nMemAvailable: 33554432 kB\n"
        "SwapTotal: 2097152 kB\nSwapFree: 1048576 kB\n",
    }
    for cpu in range(8):
        place = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{place}/physical_package_id": f"{cpu % 4 // 2}\n", f"{place}/core_id": f"{cpu % 2}\n"}
    for node, (cpus, free) in enumerate((("0-1,4-5", 4), ("2-3,6-7", 20))):
        place = f"sys/devices/system/node/node{node}"
        sizes = f"Node {node} MemTotal: {32 * 2**20} kB\nNode {node} MemFree: {free * 2**20} kB\n"
        files |= {f"{place}/cpulist": f"{cpus}\n", f"{place}/meminfo": sizes}
    for index, node in enumerate(cards):
        place = f"sys/bus/pci/devices/0000:{index}1:00.0"
        files |= {
            f"{place}/vendor": "0x10de\n",
            f"{place}/class": "0x030200\n",
            f"{place}/numa_node": f"{node}\n",
        }
    return tree(root, files)


def test_sockets_cores_and_threads(tmp_path):
    p = machine.processor(two_sockets(tmp_path))
    assert (p.model, p.sockets, p.cores, len(p.cpus), p.quota) == ("A processor", 2, 4, 8, float("inf"))
    assert p.allowed == tuple(range(8)) and p.first_threads == (0, 1, 2, 3)


def test_a_bound_process_knows_its_threads(tmp_path):
    p = machine.processor(two_sockets(tmp_path, allowed="2,6-7"))
    assert p.allowed == (2, 6, 7) and p.first_threads == (2, 7) and len(p.cpus) == 8


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", float("inf")), ("150000 100000\n", 1.5), ("", float("inf"))]
)
def test_quota(tmp_path, text, quota):
    assert machine.processor(tree(tmp_path, {"sys/fs/cgroup/cpu.max": text})).quota == quota


def test_nodes_and_cards(tmp_path):
    root = two_sockets(tmp_path, cards=(1, -1))
    assert [(n.index, n.cpus, n.total_gib, n.free_gib) for n in machine.nodes(root)] == [
        (0, (0, 1, 4, 5), 32.0, 4.0),
        (1, (2, 3, 6, 7), 32.0, 20.0),
    ]
    tree(
        root / "sys/bus/pci/devices/0000:ff:00.0", {"vendor": "0x10de\n", "class": "0x040300\n"}
    )  # its sound
    tree(root / "sys/bus/pci/devices/0000:fe:00.0", {"vendor": "0x8086\n", "class": "0x030000\n"})
    assert machine.nvidia_cards(root) == {"0000:01:00.0": 1, "0000:11:00.0": -1}


def test_memory_and_its_limit(tmp_path):
    root = two_sockets(tmp_path)
    assert machine.memory(root) == {"total": 64.0, "available": 32.0, "swap_used": 1.0}
    limits = {"sys/fs/cgroup/memory.max": f"{8 * 2**30}\n", "sys/fs/cgroup/memory.current": f"{6 * 2**30}\n"}
    assert machine.memory(tree(root, limits)) == {
        "total": 64.0, "available": 2.0, "swap_used": 1.0, "limit": 8.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("", ""),
    ],
)  # fmt: skip
def test_driver(tmp_path, text, version):
    assert machine.nvidia_driver(tree(tmp_path, {"proc/driver/nvidia/version": text})) == version


def test_an_empty_tree_is_no_error(tmp_path):
    p = machine.processor(tmp_path)
    assert (p.cpus, p.allowed, p.cores, p.sockets, p.model) == ((), (), 0, 0, "")
    assert machine.nodes(tmp_path) == () and machine.memory(tmp_path) == {}
    assert machine.nvidia_driver(tmp_path) == "" and machine.nvidia_cards(tmp_path) == {}


@pytest.mark.skipif(platform.system() != "Linux", reason="needs /proc")
def test_this_machine_agrees_with_the_standard_library():
    p = machine.processor()
    assert set(p.allowed) == os.sched_getaffinity(0) and len(p.cpus) == os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory()["total"] == pytest.approx(pages / 2**30, rel=1e-6)


@hypothesis.given(st.sets(st.integers(0, 300)))
def test_cpu_lists_round_trip(cpus):
    text = machine.show_cpus(tuple(cpus))
    assert machine.cpu_list(text) == tuple(sorted(cpus))
    assert text.count(",") + 1 <= max(1, len(cpus))


def test_cpu_lists_as_the_kernel_writes_them():
    assert machine.cpu_list("0-2,8\n") == (0, 1, 2, 8) and machine.show_cpus((8, 0, 1, 2)) == "0-2,8"
