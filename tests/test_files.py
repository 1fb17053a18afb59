"""A file is the old one or the new one, whatever happens while it is written."""

import errno
import json

import pytest

from nanochat_jax import files


def test_the_new_one_takes_the_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    files.write_json(path, {"a": 1}, sync=True)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("x")])
def test_the_old_one_stays(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_json_file_that_cannot_be_written_leaves_no_part_of_itself(tmp_path):
    (tmp_path / "x.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        files.write_json(tmp_path / "x.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    for name in ("manifest.json.4711.tmp", "a.tmp", "b.json"):
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tmp", "b.json"}
    files.sweep(tmp_path / "missing")


def test_it_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files.os, "fsync", lambda number: order.append("sync"))
    monkeypatch.setattr(files.Path, "replace", lambda self, path: order.append("name"))
    files.write_json(tmp_path / "a", 1, sync=True)
    files.write_json(tmp_path / "a", 1)
    assert order == ["sync", "name", "name"]
