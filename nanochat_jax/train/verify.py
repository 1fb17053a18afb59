"""Prove that interruption changes nothing: train straight, and train with a kill and a resume.

Both runs are child processes of the same command; the second is killed with SIGKILL after half of
the steps. The SHA-256 of the whole state (parameters, optimizer, step) and the data position must
be identical.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat_jax import checkpoint

EXIT_MISMATCH = 4


def verify_resume(argv: tuple[str, ...], steps: int) -> int:
    """Run the check. Returns the exit status: 0 identical, 4 different, 1 a child failed.

    Args: argv: the command line of the run; its --workdir and --resume are not used. steps: even.
    """
    argv = _without(argv, {"--verify_resume": False, "--workdir": True, "--resume": True})
    root = Path(tempfile.mkdtemp(prefix="verify_resume."))
    half = steps // 2
    every = ("--config.ckpt.every_steps=1", "--config.eval.sample_tokens=0", "--config.eval.every_steps=0")
    try:
        straight, broken = root / "straight", root / "broken"
        _child(argv, straight, *every)
        _child(argv, broken, *every, kill_at=half)
        reached = checkpoint.latest_step(broken / "ckpt")
        print(f"killed with SIGKILL; the last checkpoint is of step {reached} of {steps}", file=sys.stderr)
        _child(argv, broken, *every, "--resume=must")
        first, second = (_identity(home) for home in (straight, broken))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name in first:
        same = "identical" if first[name] == second[name] else "DIFFERENT"
        print(f"{name:<14} {same}  {first[name]}" + ("" if same == "identical" else f" / {second[name]}"))
    return 0 if first == second else EXIT_MISMATCH


def _without(argv: tuple[str, ...], flags: dict[str, bool]) -> tuple[str, ...]:
    """The words without these flags, whose values may stand behind '=' or, if True, in the next word."""
    kept, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in flags:
            kept.append(word)
        elif flags[name] and not equals:
            next(words, None)
    return tuple(kept)


def _identity(home: Path) -> dict[str, str]:
    """What must not differ, from the record at a run's end."""
    result = json.loads((home / "result.json").read_text())
    return {name: str(result[name]) for name in ("state_sha256", "data_position", "data_sha256")}


def _child(argv: tuple[str, ...], home: Path, *extra: str, kill_at: int | None = None) -> None:
    command = [sys.executable, "-m", "nanochat_jax.train", *argv, f"--workdir={home}", *extra]
    with open(home.with_suffix(".log"), "a+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
        if kill_at is None:
            status = child.wait()
        else:
            while child.poll() is None and (checkpoint.latest_step(home / "ckpt") or 0) < kill_at:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            status = child.wait()
            if status == -signal.SIGKILL:
                return
            status = status or -1  # it ended by itself before it could be killed
        output.seek(0)
        tail = "".join(output.readlines()[-5:])
    if status:
        raise RuntimeError(f"`{' '.join(command)}` ended with status {status}:\n{tail}")
