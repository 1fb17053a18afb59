"""Numbers of a file: slices against NumPy's, and what happens when the file changes under them."""

import copy
import errno
import gc
import os
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nanochat_jax.data import stored
from nanochat_jax.data.sources import DataError
from nanochat_jax.data.stored import Stored


@hypothesis.given(st.data())
def test_slices_are_those_of_the_array(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from(["<u2", "<u4", "<f2"]))
    numbers = np.arange(data.draw(st.integers(0, 40))).astype(dtype)
    skip = data.draw(st.integers(0, 9))
    path = tmp_path_factory.getbasetemp() / "numbers"
    path.write_bytes(b"#" * skip + numbers.tobytes() + b"the rest")
    place = st.none() | st.integers(-50, 50)
    key = slice(data.draw(place), data.draw(place))
    kept = Stored(path, dtype, len(numbers), skip)
    assert len(kept) == len(numbers) and kept[key].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(kept[key], numbers[key])


def test_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with a step of 2"):
        Stored(tmp_path / "x", "<u2", 4)[::2]
    with pytest.raises(TypeError, match="read in slices, got 0"):
        Stored(tmp_path / "x", "<u2", 4)[0]  # type: ignore[index]


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    """A map would end the process. What is still there is read as before."""
    path = tmp_path / "train.bin"
    np.arange(100, dtype="<u2").tofile(path)
    kept = Stored(path, "<u2", 100)
    assert kept[90:].tolist() == list(range(90, 100))
    os.truncate(path, 101)
    assert kept[40:50].tolist() == list(range(40, 50))
    for key in (slice(50, 51), slice(90, 100), slice(0, 100)):
        with pytest.raises(DataError, match=r"train\.bin was cut while it was read: it ends after 101 bytes"):
            kept[key]


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path, numbers = tmp_path / "x", np.arange(1000, dtype="<u4")
    numbers.tofile(path)
    real = os.pread
    monkeypatch.setattr(stored.os, "pread", lambda file, size, at: real(file, min(size, 7), at))
    np.testing.assert_array_equal(Stored(path, "<u4", 1000)[3:900], numbers[3:900])


def test_a_file_that_is_replaced_stays_the_same_and_is_closed_at_last(tmp_path):
    path = tmp_path / "x"
    np.arange(9, dtype="<u2").tofile(path)
    kept = Stored(path, "<u2", 9)
    kept[:1]
    descriptor = kept._file
    path.unlink()
    np.zeros(2, "<u2").tofile(path)
    assert kept[:].tolist() == list(range(9))
    del kept
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    "again", [copy.copy, lambda kept: pickle.loads(pickle.dumps(kept))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_file_of_its_own(tmp_path, again):
    """Also after a read: the number of the descriptor soon means another file."""
    numbers = np.arange(9, dtype="<u2")
    numbers.tofile(tmp_path / "x")
    np.zeros(9, "<u2").tofile(tmp_path / "other")
    kept = Stored(tmp_path / "x", "<u2", 9)
    kept[:1]
    number, made = kept._file, again(kept)
    del kept
    gc.collect()
    other = os.open(tmp_path / "other", os.O_RDONLY)
    try:
        assert other == number  # reused
        assert made[:].tolist() == numbers.tolist()
    finally:
        os.close(other)


def test_a_disk_that_fails_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "x"
    np.arange(9, dtype="<u2").tofile(path)
    monkeypatch.setattr(stored.os, "pread", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        Stored(path, "<u2", 9)[:]
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


def test_no_read_asks_for_more_than_the_system_gives(tmp_path, monkeypatch):
    path, asked = tmp_path / "x", []
    np.arange(9, dtype="<u2").tofile(path)
    real = os.pread
    monkeypatch.setattr(stored.os, "pread", lambda file, size, at: asked.append(size) or real(file, size, at))
    monkeypatch.setattr(stored, "AT_ONCE", 8)
    assert Stored(path, "<u2", 9)[:].tolist() == list(range(9)) and asked == [8, 8, 2]
