"""The train command killed at random moments, and on a read-only file system; see docs/faults.md.

`KILLED_REPORT=<file>` writes what the fifty kills cost.
"""

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

    def start(self, home: Path, *extra: str) -> tuple[subprocess.Popen, Path]:
        """(the running command, the file of its stderr)."""
        log = home.with_name(f"{home.name}.{len(list(self.root.glob('*.log')))}.log")
        with open(log, "w") as out:
            return subprocess.Popen(self.command(home, *extra), env=self.env, stderr=out), log

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


def test_killed_in_a_step_in_a_save_and_while_starting(tmp_path):
    killed(tmp_path, 40, 3)


def test_killed_fifty_times(tmp_path):
    done = killed(tmp_path, 600, 50)
    assert sum(kill.in_save for kill in done) >= 5


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


def mounted(script: str, *words: str, env=None) -> subprocess.CompletedProcess:
    """Run a shell script in a mount namespace of its own; skips where that is not allowed."""
    isolated = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    return subprocess.run(
        [*isolated, "sh", "-c", script, "sh", *words], env=env, capture_output=True, text=True
    )


def test_a_file_system_that_is_read_only(tmp_path):
    runs = Runs(tmp_path, 40)
    script = 'place=$1; shift; mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" && "$@"'
    (tmp_path / "run").mkdir()
    got = mounted(script, str(tmp_path / "run"), *runs.command(tmp_path / "run"), env=runs.env)
    sentence = f"config error: the workdir {tmp_path / 'run'} cannot be written (Read-only file system); choose another --workdir"
    assert got.returncode == 2 and got.stderr.splitlines()[-1] == sentence, got.stderr
