"""A workdir belongs to one run at a time, whatever became of the run before."""

import os
import signal
import subprocess
import sys

import pytest

from nanochat_jax.config import ConfigError
from nanochat_jax.train import workdir

HOLD = "import sys, time, pathlib; from nanochat_jax.train import workdir\nwith workdir.held(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"


def test_a_second_run_is_refused_and_the_next_one_is_not(tmp_path):
    home = tmp_path / "runs" / "one"
    with workdir.held(home):
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()}\)"):
            workdir.held(home).__enter__()
        with workdir.held(tmp_path / "runs" / "two"):
            pass
    with workdir.held(home):
        pass


def test_a_killed_run_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {child.pid}"), workdir.held(tmp_path):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    with workdir.held(tmp_path):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*choose another --workdir"):
        workdir.held(tmp_path / "file" / "run").__enter__()


def test_the_command_refuses_a_workdir_in_use(tmp_path):
    """In one sentence, before data is touched; nothing is written beside the lock."""
    command = [sys.executable, "-m", "nanochat_jax.train", "--config=smoke", f"--workdir={tmp_path}"]
    with workdir.held(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"config error: {tmp_path} is in use by another run (process {os.getpid()})")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
