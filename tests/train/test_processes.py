"""Several processes on this machine train one model: the same losses, one record, and no loss when one dies.

Really started, over Gloo. They share a directory of compiled programs, so that most start quickly.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import checkpoint, cli
from nanochat_jax.train import program

pytestmark = pytest.mark.multiprocess
CONFIG = """
from nanochat_jax.config import defaults

def get_config():
    config = defaults()
    config.model.update(vocab_size=300, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=32, unroll=1)
    config.data.update(source="TEXT", tokenizer="bytes", seq_len=16, batch=8, val_percent=10, workers=1)
    config.opt.matrix.name = "adamw"
    config.opt.schedule.warmup_steps = 4
    config.train.update(steps=STEPS, microbatches=2)
    config.eval.update(every_steps=20, batches=2, sample_tokens=0)
    config.log.every_steps = 1
    config.ckpt.every_steps = 10
    return config
"""
STEPS = 60
WAIT = 400  # seconds; the machine may be busy with other things
BOUND = 60  # seconds until all processes of a run have ended when one was lost


class Runs:
    """Starts processes, remembers them, ends them."""

    def __init__(self, root: Path):
        self.root, self.started = root, []
        text = root / "text"
        text.mkdir()
        for i in range(40):
            (text / f"{i}.txt").write_text("".join(f"def f{i}_{j}(x): return x + {j}\n" for j in range(20)))
        self.config = root / "few.py"
        self.config.write_text(CONFIG.replace("TEXT", str(text)).replace("STEPS", str(STEPS)))
        self.env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
            "JAX_PLATFORMS": "cpu", "NANOCHAT_JAX_HOME": str(root / "home"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }  # fmt: skip

    def command(self, home: Path, *extra: str) -> list[str]:
        return [
            sys.executable, "-m", "nanochat_jax.train", f"--config={self.config}", f"--workdir={home}", *extra,
        ]  # fmt: skip

    def launch(self, command: list[str], count: int, own: dict[int, list[str]] | None = None) -> list:
        """`count` processes of a command, each with its place; `own`: words of single ones."""
        address, children = f"127.0.0.1:{free_port()}", []
        for i in range(count):
            places = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]
            words = [*command, *(places if count > 1 else []), *(own or {}).get(i, [])]
            children.append(self.child(words, self.env))
        return children

    def child(self, words: list[str], env: dict[str, str]) -> subprocess.Popen:
        log = self.root / f"{len(self.started)}.log"
        with open(log, "w") as out:
            child = subprocess.Popen(words, env=env, stderr=out, stdout=subprocess.PIPE, text=True)
        child.log = log  # type: ignore[attr-defined]
        self.started.append(child)
        return child

    def train(self, home: Path, count: int, *extra: str) -> list[str]:
        """A whole run that must succeed; the logs of its processes."""
        children = self.launch(self.command(home, *extra), count)
        logs = [ended(child)[1] for child in children]
        assert [child.returncode for child in children] == [0] * count, logs
        return logs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(child, seconds=WAIT):
    """(standard output, standard error) of a process that ends in time, without the greetings of Gloo."""
    outputs = child.communicate(timeout=seconds)[0], child.log.read_text()
    return tuple("".join(line for line in text.splitlines(True) if "[Gloo]" not in line) for text in outputs)


def wait_for(child, what):
    """Until the process has written a line, or there is a checkpoint in the directory `what`."""
    there = (
        (lambda: checkpoint.latest_step(what))
        if isinstance(what, Path)
        else (lambda: what in child.log.read_text())
    )
    patience = time.monotonic() + WAIT
    while not there():
        assert child.poll() is None and time.monotonic() < patience, child.log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("processes"))
    yield made
    for child in made.started:
        if child.poll() is None:
            child.kill()
        child.communicate()


def losses(home):
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss/next_token"]) for row in rows if "loss/next_token" in row]
    assert [step for step, _ in found] == sorted({step for step, _ in found})  # each once, in order
    return dict(found)


@pytest.fixture(scope="module")
def alone(runs):
    """The run as one process."""
    runs.train(runs.root / "alone", 1)
    return runs.root / "alone"


@pytest.fixture(scope="module")
def stopped(runs, alone):
    """Two processes; process 1 is told to stop after a few steps. (workdir, children, logs)."""
    home = runs.root / "two"
    children = runs.launch(runs.command(home, "--config.mesh.data=2"), 2)
    wait_for(children[0], "step 5/")
    children[1].send_signal(signal.SIGTERM)
    return home, children, [ended(child)[1] for child in children]


def test_sigterm_to_one_stops_all_at_the_same_step_with_a_checkpoint(stopped):
    home, children, logs = stopped
    assert [child.returncode for child in children] == [130, 130], logs
    step = json.loads((home / "result.json").read_text())["step"]
    assert 5 <= step < STEPS and f"stopped at step {step}: interrupted" in logs[0]
    assert checkpoint.latest_step(home / "ckpt") == step


def test_only_process_0_speaks_and_writes(stopped):
    home, _, logs = stopped
    assert "process 0 of 2 (flags or variables): waiting up to 300 s for process 0 at 127.0.0.1:" in logs[0]
    assert "device: 2 x cpu (cpu) of 2 processes" in logs[0]
    first, *signal_caught = logs[1].splitlines()
    assert first.startswith("process 1 of 2 (flags or variables): waiting")
    assert [line for line in signal_caught if "SIGTERM caught" not in line] == []
    assert len(list((home / "tb").glob("events*"))) == 1
    record = json.loads((home / "manifest.json").read_text())
    assert record["processes"] == 2 and len(record["starts"]) == 1
    assert not list(home.glob(".joined*"))
    saved = home / "ckpt" / str(checkpoint.latest_step(home / "ckpt"))
    assert {path.name for path in saved.rglob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.parametrize(("count", "mesh"), [(1, {}), (4, {"data": 2, "tensor": 2})])
def test_what_two_saved_others_continue_to_the_same_losses(runs, alone, stopped, count, mesh):
    home = runs.root / f"continued-by-{count}"
    shutil.copytree(stopped[0], home)
    logs = runs.train(home, count, *(f"--config.mesh.{axis}={n}" for axis, n in mesh.items()))
    step = json.loads((stopped[0] / "result.json").read_text())["step"]
    assert f"continuing at step {step}" in logs[0]
    want, got = losses(alone), losses(home)
    assert list(want) == list(range(1, STEPS + 1))
    assert set(want) - set(got) <= {
        step
    }  # metrics come one step late: those of the last before a stop are lost
    np.testing.assert_allclose(list(got.values()), [want[step] for step in got], rtol=1e-5)
    one, other = (json.loads((h / "result.json").read_text()) for h in (alone, home))
    assert other["eval"]["eval/loss"] == pytest.approx(one["eval"]["eval/loss"], rel=1e-5)
    assert other["eval"]["eval/tokens"] == one["eval"]["eval/tokens"]


@pytest.mark.slow
def test_the_default_optimizer_samples_and_profiles(runs):
    """What costs too much to compile for the tests above: Muon shares its matrices over the processes."""
    extra = [
        "--config.opt.matrix.name=muon", "--config.model.layers=2", "--config.train.steps=8",
        "--config.eval.sample_tokens=3", "--config.log.profile_steps=(3,4)",
    ]  # fmt: skip
    one, two = runs.root / "muon-alone", runs.root / "muon-two"
    texts = [runs.train(one, 1, *extra)[0], runs.train(two, 2, *extra, "--config.mesh.fsdp=2")[0]]
    want, got = losses(one), losses(two)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    samples = [[line for line in text.splitlines() if line.startswith("sample |")] for text in texts]
    assert samples[0] == samples[1] and samples[0]
    assert len(list((two / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_with_a_message_and_a_checkpoint(runs, victim):
    home = runs.root / f"killed-{victim}"
    children = runs.launch(runs.command(home, "--config.mesh.data=2", "--config.train.steps=100000"), 2)
    wait_for(children[0], home / "ckpt")
    children[victim].kill()
    began, other = time.monotonic(), children[1 - victim]
    text = ended(other, BOUND)[1]
    assert time.monotonic() - began < BOUND
    if victim:
        assert other.returncode == 70, text
        assert "error: another process was lost (" in text and "is intact; the same command" in text
    else:  # process 0 is also where jax coordinates; its own message may come first
        assert other.returncode and ("another process was lost" in text or "another task died" in text)
    cfg = cli.get_config(str(runs.config), **{"train.steps": 100000})
    with checkpoint.Checkpointer(cfg.ckpt, home / "ckpt") as checkpoints:
        _, state, _, origin = program.start_state(cfg, home, checkpoints, "must")
    assert int(state.step) >= 10 and "continuing" in origin


@pytest.mark.slow
def test_a_frozen_process_counts_as_lost(runs):
    """Its connections stay open, so that only the missing heartbeats tell."""
    home = runs.root / "frozen"
    limit = ["--config.mesh.data=2", "--config.train.steps=100000", "--heartbeat_timeout=10"]
    children = runs.launch(runs.command(home, *limit), 2)
    wait_for(children[0], home / "ckpt")
    children[1].send_signal(signal.SIGSTOP)
    text = ended(children[0], BOUND)[1]
    assert children[0].returncode and ("another process was lost" in text or "another task died" in text)
    assert checkpoint.latest_step(home / "ckpt") >= 10


def test_another_config_in_one_process_is_refused(runs):
    children = runs.launch(
        runs.command(runs.root / "mixed", "--config.mesh.data=2"), 2, {1: ["--config.seed=1"]}
    )
    for i, child in enumerate(children):
        assert "has a config or a version of jax unlike those of process 0" in ended(child)[1], i
        assert child.returncode == 70


def test_who_waits_in_vain_says_for_whom(runs):
    words = runs.command(runs.root / "vain", "--config.mesh.data=2", "--join_timeout=3")
    child = runs.child([*words, "--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1"], runs.env)
    text = ended(child)[1]
    assert child.returncode == 70 and text.count("\n") == 2, text
    assert "error: the 2 processes did not meet at 127.0.0.1:9 within 3 s" in text


LAUNCHERS = {
    "Slurm": lambda i, port: {
        "SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_TASKS_PER_NODE": "2",
    },
    "Open MPI": lambda i, port: {
        "OMPI_MCA_orte_hnp_uri": f"{4096 * (port - 61440)}.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
    "torchrun": lambda i, port: {
        "WORLD_SIZE": "2", "RANK": str(i), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_detected(runs, launcher):
    """By the environment that they leave; the processes really meet."""
    port = 61440 + free_port() % 4096
    script = [sys.executable, str(Path(__file__).parents[1] / "processes_child.py"), "meet"]
    children = [runs.child(script, runs.env | LAUNCHERS[launcher](i, port)) for i in range(2)]
    assert [json.loads(ended(child)[0]) for child in children] == [[launcher, 2, [0, 1]]] * 2


def test_rows_and_agreements(runs):
    """Four processes on every mesh: the data are disjoint and complete; host values agree."""
    script = [sys.executable, str(Path(__file__).parents[1] / "processes_child.py"), "agree", str(runs.root)]
    children = runs.launch(script, 4)
    results = []
    for child in children:
        out, text = ended(child)
        assert child.returncode == 0, text
        results.append(json.loads(out))
    for mesh, (_, count) in results[0]["shards"].items():
        shares = {tuple(result["shards"][mesh]): result["rows"][mesh] for result in results}
        assert sorted(shares) == [(i, count) for i in range(count)]
        assert sorted(row for own in shares.values() for row in own) == list(range(8))
    assert [count for _, count in results[0]["shards"].values()] == [4, 4, 4, 2, 1]
    for me, result in enumerate(results):
        assert result["agreed"] == [10, 10, 11, 12, 13]
        other, same, unseen, seen, fault, none = result["problems"]
        assert other == "PeerError: process 2 of 4 has a test unlike those of process 0"
        assert unseen.startswith("PeerError: process 3 does not see the ")
        assert fault == ("ValueError: fault of 1" if me == 1 else "KeyError: 'others'")
        assert same == seen == none == ""
