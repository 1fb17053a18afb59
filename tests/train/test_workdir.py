"""A workdir belongs to one run at a time, whatever became of the run before."""

import errno
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


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("name", [(), ("a/b",)], ids=["without", "with a name"])
def test_a_disk_that_takes_nothing_is_told_by_its_directory(tmp_path, reason, name):
    """A write names no file, mkdir and open do: one sentence for both."""
    with pytest.raises(workdir.UnwritableError) as caught, workdir.written(tmp_path):
        raise OSError(reason, os.strerror(reason), *name)
    assert str(caught.value) == (
        f"{tmp_path} cannot be written ({os.strerror(reason)}); the same command goes on once it can"
    )


@pytest.mark.parametrize("error", [OSError(errno.EIO, "?"), OSError(errno.ECONNRESET, "?"), OSError("?")])
def test_other_errors_are_no_failed_writes(tmp_path, error):
    with pytest.raises(OSError) as caught, workdir.written(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("step", ["mkdir", "open", "write"])
def test_a_workdir_on_a_full_disk(tmp_path, monkeypatch, step):
    """Once it has space, the same command goes on: no reason to choose another workdir."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", *(("x",) if step != "write" else ()))

    place = {"mkdir": workdir.Path, "open": workdir, "write": workdir.os}[step]
    with monkeypatch.context() as patch:
        patch.setattr(place, step, full, raising=step != "open")
        with pytest.raises(workdir.UnwritableError, match=r"run cannot be written \(No space left"):
            workdir.held(tmp_path / "run").__enter__()
    with workdir.held(tmp_path / "run"):
        pass


def test_the_command_refuses_a_workdir_in_use(tmp_path):
    """In one sentence, before data is touched; nothing is written beside the lock."""
    command = [sys.executable, "-m", "nanochat_jax.train", "--config=smoke", f"--workdir={tmp_path}"]
    with workdir.held(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"config error: {tmp_path} is in use by another run (process {os.getpid()})")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    (tmp_path / "result.json.4711.tmp").write_text("{")
    with workdir.held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
