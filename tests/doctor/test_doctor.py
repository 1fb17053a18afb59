"""Findings and their advice; children that hang or crash; the command as typed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_machine import two_sockets

from nanochat_jax import cli
from nanochat_jax.config import Config, MeshConfig
from nanochat_jax.doctor import checks, child, machine, report
from nanochat_jax.kernels import attention

CPU = {"platform": "cpu", "runtime": "cpu", "devices": [{"id": 0, "kind": "cpu"}]}
GPU = {
    "platform": "gpu",
    "runtime": "cuda",
    "devices": [{"id": i, "kind": "A card", "limit_gib": 17.5 + i, "in_use_gib": 0.0} for i in range(2)],
}
HANGS = {"failure": "timeout", "text": "no answer within 3 s"}
SUM = {"devices": 2, "right": True, "ms": 10.0, "mib": 16.0}


# --- children


@pytest.mark.multiprocess
def test_a_child_that_hangs_is_ended_with_its_children(tmp_path):
    path = tmp_path / "pids"
    script = 'sleep 60 & echo $! $$ > "$0"; wait'
    began = time.monotonic()
    answer = child.ask(["sh", "-c", script, str(path)], 2)
    assert answer == {"failure": "timeout", "text": "no answer within 2 s"} and time.monotonic() - began < 30
    for pid in path.read_text().split():
        assert ended(int(pid))


def ended(pid):
    """Whether a process has gone, or is only waiting for its parent to notice."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended with signal SIGSEGV: no message"),
        ("raise ValueError('why')", "ended with status 1: ValueError: why"),
        ("print('no json')", "ended with status 0: no message"),
        ("pass", "ended with status 0: no message"),
        ("print('{}'); raise SystemExit(4)", "ended with status 4: no message"),
    ],
)
def test_a_child_that_crashes_is_told(script, text):
    assert child.ask([sys.executable, "-c", script], 60) == {"failure": "crash", "text": text}


@pytest.mark.multiprocess
def test_the_last_line_is_the_answer():
    script = "print('noise'); print('{\"a\": [1]}')"
    assert child.ask([sys.executable, "-c", script], 60) == {"a": [1]}


def test_kernels_on_this_device_are_right():
    answer = child.kernels()
    assert answer["kernels"]["attention.cudnn"] == {"refused": "needs an NVIDIA GPU"}
    assert {"attention.blocked", "attention.reference", "integer.int8"} <= set(answer["kernels"])
    assert all("broken" not in result for result in answer["kernels"].values())
    assert answer["integer"] in ("int8", "bfloat16", "float32")


def test_a_wrong_kernel_is_noticed(monkeypatch):
    def wrong(q, k, v, *rest):
        return v * float("nan")

    monkeypatch.setitem(attention.IMPLS, "wrong", wrong)
    monkeypatch.setitem(attention.IMPLS, "crash", lambda *a: 1 / 0)
    answer = child.kernels()
    assert answer["kernels"]["attention.wrong"] == {"broken": "differs by nan"}
    assert answer["kernels"]["attention.crash"] == {"broken": "ZeroDivisionError: division by zero"}
    finding = checks.kernels(answer)
    assert finding.status == "fail" and finding.text.startswith("broken: attention.wrong (differs by nan)")


def test_all_reduce_over_eight_devices():
    answer = child.all_reduce()
    assert (answer["devices"], answer["right"]) == (8, True)


# --- findings


@pytest.mark.parametrize(
    ("versions", "status", "advice"),
    [
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "ok", ""),
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, "warn", "jaxlib differ from jax 0.10.2"),
        (
            {"jax": "1", "jaxlib": "1", "jax-cuda12-plugin": "2"},
            "warn",
            "jax-cuda12-plugin differ from jax 1",
        ),
        (
            {"jax": "1", "jaxlib": "1", "jax-cuda12-plugin": "1", "jax-cuda13-plugin": "1"},
            "warn",
            "keep one of jax-cuda12-plugin, jax-cuda13-plugin",
        ),
    ],
)
def test_packages(versions, status, advice):
    finding = checks.packages(versions, "3.11")
    assert finding.status == status and advice in finding.advice and bool(advice) == bool(finding.advice)


@pytest.mark.parametrize(
    ("answer", "driver", "cards", "mesh", "status", "said"),
    [
        (CPU, "", {}, MeshConfig(), "ok", "1 x cpu (cpu)"),
        (CPU, "", {}, MeshConfig(data=4), "ok", "1 x cpu"),  # the CPU pretends to be four
        (CPU, "580.65.06", {"a": 0}, MeshConfig(), "warn", "nanochat_jax[cuda13]"),
        (CPU, "550.54.15", {"a": 0}, MeshConfig(), "warn", "nanochat_jax[cuda12]"),
        (CPU, "", {"a": 0}, MeshConfig(), "warn", "install the driver"),
        (GPU, "550.54.15", {"a": 0}, MeshConfig(data=2), "ok", "2 x A card (gpu), 17.5 GiB usable each"),
        (GPU, "550.54.15", {"a": 0}, MeshConfig(data=2, fsdp=2), "fail", "the config's mesh needs 4 devices"),
        (HANGS, "550.54.15", {"a": 0}, MeshConfig(), "fail", "hangs while it starts: no answer within 3 s"),
        ({"failure": "crash", "text": "x"}, "", {}, MeshConfig(), "fail", "did not start: x"),
    ],
)
def test_devices(answer, driver, cards, mesh, status, said):
    finding = checks.devices(answer, driver, cards, mesh)
    assert finding.status == status and said in f"{finding.text} {finding.advice}"


@pytest.mark.parametrize(
    ("answer", "again", "status", "advice"),
    [
        (SUM, None, "ok", ""),
        (SUM | {"devices": 1}, None, "ok", ""),
        (SUM | {"right": False}, None, "fail", checks.P2P),
        (HANGS, None, "fail", checks.P2P),
        (HANGS, HANGS, "fail", checks.P2P),
        (HANGS, SUM, "fail", "export NCCL_P2P_DISABLE=1"),
    ],
)
def test_all_reduce(answer, again, status, advice):
    finding = checks.all_reduce(answer, again)
    assert (
        finding.status == status
        and finding.advice.startswith(advice)
        and bool(advice) == bool(finding.advice)
    )


def test_memory():
    assert checks.memory({}).status == "ok"
    assert checks.memory({"total": 64.0, "available": 32.0}).text == "32.0 of 64.0 GiB free"
    little = checks.memory({"total": 64.0, "available": 1.0, "limit": 8.0})
    assert little.status == "warn" and little.text.startswith("1.0 of 8.0 GiB free (limited")


def test_disk_speaks_of_the_nearest_directory_that_exists(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 30 * 2**30})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: usage if place == tmp_path else None)
    assert checks.disk("disk", tmp_path / "a/b", 1.0).status == "ok"
    assert checks.disk("disk", tmp_path, 40.0).status == "fail"
    usage.free = 10 * 2**30
    assert checks.disk("disk", tmp_path, 1.0).status == "warn"
    monkeypatch.setattr(checks.os, "access", lambda place, mode: False)
    assert "cannot be written" in checks.disk("disk", tmp_path, 1.0).text


def test_compilation_cache(tmp_path):
    assert checks.compilation_cache(tmp_path / "none").text.startswith("empty")
    (tmp_path / "jit_step-1a-cache").write_bytes(bytes(2**20))
    (tmp_path / "jit_step-1a-atime").write_bytes(bytes(8))
    assert checks.compilation_cache(tmp_path).text.startswith("1 programs, 1 MiB in ")


def test_threads(tmp_path):
    p = machine.processor(two_sockets(tmp_path))
    finding = checks.threads(p, on_cpu=True)
    assert "2 sockets, 4 cores, 8 threads" in finding.text and "taskset -c 0-3 python" in finding.advice
    assert checks.threads(p, on_cpu=False).advice == ""
    bound = machine.processor(two_sockets(tmp_path, allowed="1,3"))
    assert "this process may use 2" in checks.threads(bound, True).text
    assert checks.threads(bound, True).advice == ""
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("100000 100000")
    short = checks.threads(machine.processor(tmp_path), True)
    assert short.status == "warn" and "grants 1 of 2 CPUs" in short.advice and "taskset -c 1 " in short.advice


@pytest.mark.parametrize(
    ("cards", "allowed", "on_cpu", "status", "advice"),
    [
        ((), "0-7", True, "warn", "--cpunodebind=1 --membind=1"),  # the node with more free memory
        ((0,), "0-7", True, "warn", "--cpunodebind=1 --membind=1"),
        (
            (0,),
            "0-7",
            False,
            "warn",
            "the card's own node is nearest to it; measure: numactl --cpunodebind=0",
        ),
        ((1,), "0-7", False, "warn", "measure: numactl --cpunodebind=1"),
        ((0, 0), "0-7", False, "warn", "--cpunodebind=0"),
        ((0, 1), "0-7", False, "ok", "bind nothing"),
        ((-1,), "0-7", False, "warn", "--cpunodebind=1"),  # a board that does not tell
        ((), "2,6", True, "ok", ""),  # bound already
    ],
)
def test_numa(tmp_path, cards, allowed, on_cpu, status, advice):
    root = two_sockets(tmp_path, cards, allowed)
    finding = checks.numa(
        machine.nodes(root), machine.nvidia_cards(root), machine.processor(root).allowed, on_cpu
    )
    assert finding.status == status and advice in finding.advice and bool(advice) == bool(finding.advice)


# --- the whole


def examined(monkeypatch, tmp_path, answers, environment=()):
    asked = []

    def ask(command, limit):
        asked.append(command)
        answer = answers[command[-1]]
        return answer.pop(0) if isinstance(answer, list) else answer

    monkeypatch.setattr(child, "ask", ask)
    found = report.examine(
        Config(),
        tmp_path,
        tmp_path,
        tmp_path / "xla",
        dict.fromkeys(environment, "x"),
        3.0,
        two_sockets(tmp_path),
    )
    return found, asked


KERNELS = {"kernels": {"attention.reference": {"ms": 1.0, "error": 0.0}}, "integer": "int8"}


def test_a_hanging_all_reduce_is_tried_again_without_peer_access(monkeypatch, tmp_path):
    answers = {"devices": GPU, "kernels": KERNELS, "all_reduce": [HANGS, SUM]}
    found, asked = examined(monkeypatch, tmp_path, answers)
    assert "NCCL_P2P_DISABLE=1" in asked[-1] and "NCCL_P2P_DISABLE=1" not in asked[-2]
    assert report.failed(found) and "FAIL all_reduce" in report.text(found)
    assert "-> export NCCL_P2P_DISABLE=1" in report.text(found)
    record = json.loads(json.dumps(report.record(found, {"A": "b"})))
    assert not record["ok"] and record["findings"]["all_reduce"]["text"].startswith("no answer within 3 s")
    assert record["environment"] == {"A": "b"} and len(record["findings"]) == len(found)


def test_what_the_user_set_stays(monkeypatch, tmp_path):
    answers = {"devices": GPU, "kernels": KERNELS, "all_reduce": HANGS}
    found, asked = examined(monkeypatch, tmp_path, answers, ("NCCL_P2P_DISABLE", report.SPARING))
    assert len(asked) == 3 and not any("=" in word for command in asked for word in command)
    assert report.failed(found)


def test_nothing_more_is_asked_when_jax_does_not_start(monkeypatch, tmp_path):
    found, asked = examined(monkeypatch, tmp_path, {"devices": HANGS})
    assert len(asked) == 1 and report.failed(found) and {f.name for f in found} >= {"memory", "numa", "disk"}


@pytest.mark.multiprocess
def test_the_command(child_env, tmp_path):
    command = [sys.executable, "-m", "nanochat_jax.doctor", "--json", "--config=smoke"]
    env = child_env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(result.stdout)
    assert record["ok"] and record["findings"]["all_reduce"]["facts"]["devices"] == 2
    assert record["environment"]["XLA_FLAGS"] == env["XLA_FLAGS"]
    assert {row["status"] for row in record["findings"].values()} <= {"ok", "warn"}


@pytest.mark.multiprocess
def test_the_command_fails_where_nothing_can_train(child_env, tmp_path):
    env = child_env | {"JAX_PLATFORMS": "nothing"}
    command = [sys.executable, "-m", "nanochat_jax.doctor"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 3 and "FAIL devices" in result.stdout and "Traceback" not in result.stderr


def test_the_doctor_is_a_room():
    assert "doctor" in cli.ROOMS
