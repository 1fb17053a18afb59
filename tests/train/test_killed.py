"""The train command killed at random moments, and on disks that fail it; see docs/faults.md.

`KILLS=50 pytest tests/train/test_killed.py -k many` is the long form of the slow job's eight kills;
`KILLED_REPORT=<file>` writes what they cost.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from nanochat_jax import checkpoint

# Every start costs five seconds; the fast suite kills by --verify_resume (test_system).
pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
EVERY = 5  # steps from one checkpoint to the next
WAIT = 900  # seconds; the machine may be busy with other things
MOMENTS = ("step", "save", "start")


class Kill(NamedTuple):
    """One child: what was aimed at, the last step that it printed, the checkpoint that it left (-1: none),
    whether the kill fell into a save."""

    aim: str
    printed: int
    kept: int
    in_save: bool

    @property
    def again(self) -> int:
        """Steps to be done again."""
        return max(0, self.printed - max(self.kept, 0))


class Runs:
    """Commands that share prepared data and compiled programs."""

    def __init__(self, root: Path, steps: int):
        self.root, self.steps, self.begins = root, steps, 4.0  # seconds until steps are made, roughly
        self.env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")} | {
            "JAX_PLATFORMS": "cpu", "NANOCHAT_JAX_HOME": str(root / "home"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip

    def command(self, home: Path, *extra: str) -> list[str]:
        return [
            sys.executable, "-m", "nanochat_jax.train", "--config=configs/smoke.py", f"--workdir={home}",
            f"--config.train.steps={self.steps}", "--config.data.max_bytes=600000", "--config.eval.every_steps=0",
            "--config.eval.sample_tokens=0", "--config.log.every_steps=1", f"--config.ckpt.every_steps={EVERY}",
            "--config.ckpt.every_minutes=0", "--config.ckpt.min_free_gb=0", *extra,
        ]  # fmt: skip

    def start(self, home: Path, *extra: str, within: tuple[str, ...] = ()) -> tuple[subprocess.Popen, Path]:
        """(the running command, the file of its stderr). within: a command that runs it."""
        log = self.root / f"{home.name}.{len(list(self.root.glob('*.log')))}.log"
        with open(log, "w") as out:
            return subprocess.Popen([*within, *self.command(home, *extra)], env=self.env, stderr=out), log

    def finish(self, home: Path, *extra: str) -> str:
        """A start that must succeed; its stderr."""
        child, log = self.start(home, *extra)
        assert child.wait(WAIT) == 0, log.read_text()
        return log.read_text()

    def kill(self, home: Path, aim: str, rng: random.Random) -> Kill:
        """Start, and kill at a random moment: in a step, around a save, or while starting."""
        before, ckpt = checkpoint.latest_step(home / "ckpt"), home / "ckpt"
        child, log = self.start(home)
        began = time.monotonic()
        # Of several saves, or the run would for ever be killed in the first one after its start.
        wanted = (before or 0) + rng.randint(1, 4 * EVERY)

        def reached() -> bool:
            return printed(log) >= wanted and (aim == "step" or any(ckpt.glob("*.orbax-checkpoint-tmp*")))

        if aim == "start":
            time.sleep(rng.uniform(0, self.begins))
        else:
            while not reached():
                assert child.poll() is None and time.monotonic() < began + WAIT, log.read_text()
                time.sleep(0.001)
            self.begins = time.monotonic() - began
            time.sleep(rng.uniform(0, 0.05))
        child.kill()
        assert child.wait() == -signal.SIGKILL, f"it ended before it was killed: {log.read_text()}"
        after = checkpoint.latest_step(ckpt)
        told = log.read_text()
        assert "DAMAGED" not in told and "in use by another run" not in told
        if "output:" in told:  # it found what the one before had left
            assert ("starting from scratch" if before is None else f"continuing at step {before}\n") in told
        assert before is None or (after is not None and after >= before)
        # Before its first step it may not yet have removed what the one before left.
        in_save = printed(log) > 0 and any(ckpt.glob("*.orbax-checkpoint-tmp*"))
        return Kill(aim, printed(log), -1 if after is None else after, in_save)


def printed(log: Path) -> int:
    """The last step whose line is in the log."""
    steps = [
        line for line in log.read_text().splitlines(True) if line.startswith("step ") and line.endswith("\n")
    ]
    return int(steps[-1].split("/")[0].removeprefix("step ")) if steps else 0


def rows(home: Path) -> dict[int, tuple]:
    """Loss, gradient norm and update norm of each step."""
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "loss/total" in line]
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))  # each once, in order
    return {r["step"]: (r["loss/total"], r["opt/grad_norm"], r["opt/update_norm"]) for r in found}


def killed(root: Path, steps: int, kills: int) -> list[Kill]:
    """Kill a run `kills` times, let it end, and compare it with one that was left alone."""
    runs, rng = Runs(root, steps), random.Random(kills)
    alone, home = root / "alone", root / "killed"
    runs.finish(alone)
    done = [runs.kill(home, MOMENTS[i % len(MOMENTS)], rng) for i in range(kills)]
    _report(done)
    runs.finish(home)
    one, other = (json.loads((h / "result.json").read_text()) for h in (alone, home))
    for name in ("state_sha256", "data_position", "eval"):
        assert one[name] == other[name]
    want, got = rows(alone), rows(home)
    assert list(want) == list(range(1, steps + 1))
    # The line of a step is written when the next one runs: a kill right after a commit loses that of its step.
    assert set(want) - set(got) <= {kill.kept for kill in done}
    assert got == {step: want[step] for step in got}
    for kill in done:  # since the newest checkpoint, which may have been under way while the next was due
        assert kill.again <= 2 * EVERY, kill
    return done


def test_killed_many_times(tmp_path):
    """Each kill costs a start, seven seconds of CPU. What is drawn depends on the number of kills only."""
    kills = int(os.environ.get("KILLS", "8"))
    done = killed(tmp_path, max(40, 12 * kills), kills)
    assert sum(kill.in_save for kill in done) >= kills // 10


def _report(done: list[Kill]) -> None:
    """What the kills cost, into the file of KILLED_REPORT."""
    if report := os.environ.get("KILLED_REPORT"):
        worked = [kill.again for kill in done if kill.printed]
        facts = {
            "kills": len(done), "in_save": sum(kill.in_save for kill in done),
            "aims": Counter(kill.aim for kill in done), "while_starting": len(done) - len(worked),
            "steps_again_max": max(worked), "steps_again_median": statistics.median(worked),
            "steps_again": sum(worked), "steps_reached": done[-1].kept, "all": done,
        }  # fmt: skip
        Path(report).write_text(json.dumps(facts, indent=1))


# --- disks: token files, full and read-only file systems


def same_end(one: Path, other: Path) -> None:
    ends = [json.loads((home / "result.json").read_text()) for home in (one, other)]
    for name in ("state_sha256", "data_position", "eval"):
        assert ends[0][name] == ends[1][name]
    assert rows(one) == rows(other)


def test_a_token_file_that_is_cut_while_it_is_read(tmp_path):
    """Under a running command: a sentence, no SIGBUS, and nothing is lost."""
    runs = Runs(tmp_path, 200)
    runs.finish(tmp_path / "alone")
    shard = next((tmp_path / "home").rglob("train.bin"))
    child, log = runs.start(tmp_path / "run")
    while printed(log) < 2 * EVERY:
        assert child.poll() is None, log.read_text()
        time.sleep(0.01)
    os.truncate(shard, 1000)
    assert child.wait(WAIT) == 1, log.read_text()
    last, step = log.read_text().splitlines()[-1], checkpoint.latest_step(tmp_path / "run" / "ckpt")
    assert last == (
        f"error: stopped at step {step}, which is saved: the data failed (DataError: {shard} was cut while it was "
        "read: it ends after 1000 bytes); the same command continues this run"
    )
    child, log = runs.start(tmp_path / "run")
    assert child.wait(WAIT) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"error: {shard}: expected ") and last.endswith("to prepare it again")
    shutil.rmtree(shard.parent)
    assert f"continuing at step {step}\n" in runs.finish(tmp_path / "run")
    same_end(tmp_path / "alone", tmp_path / "run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Of 40 steps, with one that was left alone in <root>/alone."""
    made = Runs(tmp_path_factory.mktemp("disks"), 40)
    made.finish(made.root / "alone")
    return made


class Disk(NamedTuple):
    """A file system in a mount namespace of its own."""

    enter: tuple[str, ...]  # what runs a command there
    inside: Path  # where it is mounted
    outside: Path  # the same place, seen from here


@pytest.fixture
def mounted(tmp_path):
    """mounted(command, place): do a mount, with "$place"; skips where that is not allowed."""
    keepers = []

    def mount(command: str, place: Path) -> Disk:
        own, join = ["--mount"], ["--mount"]
        if os.geteuid():
            own, join = ["--user", "--map-root-user", *own], ["--user", "--preserve-credentials", *join]
        if not shutil.which("unshare") or not shutil.which("nsenter"):
            pytest.skip("this machine has no unshare and nsenter (util-linux)")
        place.mkdir()
        keeper = subprocess.Popen(
            ["unshare", *own, "sh", "-c", f"{command} && echo mounted && exec cat"], text=True,
            env=os.environ | {"place": str(place)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert keeper.stdout
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip(f"this machine allows no mounts: {keeper.communicate()[1].strip()}")
        keepers.append(keeper)
        pid = str(keeper.pid)
        return Disk(("nsenter", *join, f"--target={pid}"), place, Path(f"/proc/{pid}/root{place}"))

    yield mount
    for keeper in keepers:
        keeper.communicate()  # its end of input; the mount ends with it


def fill(disk: Path) -> None:
    """Take all the space that is left, and the inodes if their number is limited."""
    with open(disk / "ballast", "ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for i in range(4000):
            (disk / f"ballast.{i}").touch()


def empty(disk: Path) -> None:
    for path in disk.glob("ballast*"):
        path.unlink()


def test_a_disk_that_is_full_in_the_middle_of_a_save(runs, tmp_path, mounted):
    """Filled by somebody else while the command is halted in a save."""
    disk = mounted('mount -t tmpfs -o size=64m tmpfs "$place"', tmp_path / "disk")
    home, ckpt = disk.outside / "run", disk.outside / "run" / "ckpt"
    child, log = runs.start(disk.inside / "run", within=disk.enter)

    def saving() -> bool:
        return printed(log) > EVERY and checkpoint.latest_step(ckpt) is not None and any(ckpt.glob("*-tmp*"))

    end = time.monotonic() + WAIT
    try:
        while True:
            assert child.poll() is None and time.monotonic() < end, log.read_text()
            if saving():
                child.send_signal(signal.SIGSTOP)
                if saving():  # not yet committed
                    break
                child.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        fill(disk.outside)
        kept = checkpoint._steps(ckpt)
        child.send_signal(signal.SIGCONT)
        assert child.wait(WAIT) == 1, log.read_text()
    finally:
        child.kill()  # it may be halted
        child.wait()
    told = log.read_text().splitlines()
    intact = f"the checkpoint of step {kept[-1]} is intact"
    # Space that the failed one gives back may suffice to try the next.
    failed = [line for line in told if line.startswith("warning: saving step ")]
    assert failed and all("No space left on device" in line and line.endswith(intact) for line in failed)
    steps = [int(line.split()[3]) for line in failed]
    assert steps == sorted(set(steps)) and steps[0] > kept[-1]  # each told once
    assert told[-1].startswith("error: ") and f"step {runs.steps}" in told[-1] and told[-1].endswith(intact)
    assert len(told) < 3 * runs.steps and not any(
        "Traceback" in line for line in told
    )  # no stacks of Orbax's
    # Nothing that the next start would trust.
    assert checkpoint._steps(ckpt) == kept and not list(ckpt.glob("*-tmp*"))
    assert {int(path.stem) for path in ckpt.glob("manifests/*")} == set(kept)
    assert not (home / "result.json").exists()
    json.loads((home / "config.json").read_text())
    empty(disk.outside)
    child, log = runs.start(disk.inside / "run", within=disk.enter)
    assert child.wait(WAIT) == 0, log.read_text()
    assert f"continuing at step {kept[-1]}\n" in log.read_text()
    same_end(runs.root / "alone", home)


@pytest.mark.parametrize("new", [False, True], ids=["known", "new"])
@pytest.mark.parametrize("where", ["workdir", "cache"])
def test_a_disk_that_is_full_before_the_run_begins(runs, tmp_path, mounted, where, new):
    """new: no directory is there yet, and none can be made."""
    inodes = ",nr_inodes=3000" if new else ""
    disk = mounted(f'mount -t tmpfs -o size=64m{inodes} tmpfs "$place"', tmp_path / "disk")
    home, place = (disk.inside / "run", disk.inside / "run")
    if where == "cache":
        home, place = tmp_path / "run", disk.inside / "home" / "tokens"
        runs = copy.copy(runs)
        runs.env = runs.env | {"NANOCHAT_JAX_HOME": str(disk.inside / "home")}
    for folder in () if new else ("run", "run/ckpt", "home", "home/tokens", "home/tokens/requests"):
        (disk.outside / folder).mkdir()
    fill(disk.outside)
    child, log = runs.start(home, within=disk.enter)
    assert child.wait(WAIT) == 1, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert (
        last
        == f"error: {place} cannot be written (No space left on device); the same command goes on once it can"
    )
    left = [
        path for path in disk.outside.rglob("*") if path.is_file() and not path.name.startswith("ballast")
    ]
    # The lock is no part of a run, and the same command goes on with what was gathered.
    assert not [p for p in left if not p.name.endswith(".lock") and ".partial" not in str(p.parent)], left
    empty(disk.outside)
    child, log = runs.start(home, within=disk.enter)
    assert child.wait(WAIT) == 0, log.read_text()
    same_end(runs.root / "alone", tmp_path / "run" if where == "cache" else disk.outside / "run")


def test_a_file_system_that_is_read_only(runs, tmp_path, mounted):
    disk = mounted('mount --bind "$place" "$place" && mount -o remount,bind,ro "$place"', tmp_path / "run")
    child, log = runs.start(disk.inside, within=disk.enter)
    assert child.wait(WAIT) == 2, log.read_text()
    sentence = f"config error: the workdir {disk.inside} cannot be written (Read-only file system); choose another --workdir"
    assert log.read_text().splitlines()[-1] == sentence
