"""Metric sinks: what is written can be read back, a resumed curve does not double back, and a full
disk loses no run."""

import json
import logging
import math
import os

import pytest

from nanochat_jax.config import LogConfig
from nanochat_jax.telemetry import writers


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_json_lines_hold_no_nan(tmp_path):
    sink = writers.JsonLines(tmp_path / "m.jsonl")
    sink.write(1, {"a": 1.5, "b": math.nan, "c": math.inf})
    sink.text(2, "sample", "x\ny")
    sink.close()
    first, second = map(strict, (tmp_path / "m.jsonl").read_text().splitlines())
    assert (first["step"], first["a"], first["b"], first["c"]) == (1, 1.5, None, None)
    assert first["nonfinite"] == ["b", "c"] and second["sample"] == "x\ny"


def test_resuming_drops_lines_of_lost_steps_and_half_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = writers.JsonLines(path)
    for step in range(1, 6):
        sink.write(step, {"a": step})
    sink.close()
    path.write_text(path.read_text() + '{"step": 6, "a"')
    again = writers.JsonLines(path, resume_step=3)
    again.write(4, {"a": 44.0})
    again.close()
    assert [strict(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 3, 44.0]


def test_damaged_lines_do_not_stop_a_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n\xff\xfe\nnull\n[]\n{"a": 2}\n{"step": 2, "a": 2}\n')
    writers.truncate_after(path, 2)
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    writers.JsonLines(path, resume_step=1).close()
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1]
    writers.JsonLines(path).close()  # a new run starts an empty file
    assert path.read_text() == ""


def events(directory):
    """(step, tag, value) of every scalar and text, and the steps of session starts, by file age."""
    import grain
    from tensorboardX.proto import event_pb2

    for path in sorted(directory.glob("events.out.tfevents.*")):
        for record in grain.experimental.TFRecordIterDataset(str(path)):
            event = event_pb2.Event()
            event.ParseFromString(record)
            if event.HasField("session_log"):
                yield event.step, "start", event.session_log.status
            for value in event.summary.value:
                text = value.tensor.string_val
                yield event.step, value.tag, text[0].decode() if text else value.simple_value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_the_values(tmp_path):
    sink = writers.TensorBoard(tmp_path / "tb")
    sink.write(7, {"loss/total": 2.5, "bad": math.nan})
    size = sum(path.stat().st_size for path in (tmp_path / "tb").iterdir())
    sink.write(8, {"bad": math.nan})  # nothing to say
    assert size == sum(path.stat().st_size for path in (tmp_path / "tb").iterdir())
    assert list(events(tmp_path / "tb")) == [(7, "loss/total", 2.5)]  # at once, not at the end
    sink.text(7, "eval/sample", "a\nb")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="is closed"):
        sink.write(8, {"a": 1.0})
    with pytest.raises(ValueError, match="is closed"):
        sink.text(8, "a", "b")
    assert list(events(tmp_path / "tb"))[1] == (7, "eval/sample/text_summary", "    a\n    b")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_hides_lost_steps_and_keeps_files_of_the_same_second(tmp_path):
    for resume_step in (0, 3, 3):
        sink = writers.TensorBoard(tmp_path, resume_step)
        sink.write(resume_step + 1, {"a": resume_step})
        sink.close()
    assert list(events(tmp_path)) == [(1, "a", 0.0), *([(4, "start", 1), (4, "a", 3.0)] * 2)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
def test_a_full_disk_switches_writers_off_and_nothing_waits(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").touch()
    both = writers.open_writers(LogConfig(), tmp_path)
    lines, board = both._writers
    lines._file.close()
    lines._file = open("/dev/full", "a")  # noqa: SIM115
    board._records._writer.close()
    board._records._writer = open("/dev/full", "wb")  # noqa: SIM115
    with caplog.at_level(logging.WARNING):
        for step in range(100):  # more than any queue holds
            both.write(step, {"a": 1.0})
            both.text(step, "b", "c")
    both.flush()
    both.close()
    assert caplog.text.count("No space left on device") == 2 and both._writers == []


def test_an_unwritable_directory_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        sinks = writers.open_writers(LogConfig(), tmp_path / "file" / "run")
    sinks.write(1, {"a": 1.0})
    sinks.close()
    assert caplog.text.count("metrics: ") == 2


def test_a_failing_writer_is_dropped_with_one_warning(tmp_path, caplog):
    class Broken:
        calls = 0

        def write(self, step, metrics):
            self.calls += 1
            raise OSError("disk full")

        def close(self):
            raise OSError("still full")

    broken, good = Broken(), writers.JsonLines(tmp_path / "m.jsonl")
    both = writers.Multi([broken, good])
    with caplog.at_level(logging.WARNING):
        both.write(1, {"a": 1.0})
        both.write(2, {"a": 2.0})
    both.close()
    assert broken.calls == 1 and caplog.text.count("switched off") == 1
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_tensorboard_is_a_setting(tmp_path):
    for wanted in (True, False):
        home = tmp_path / str(wanted)
        writers.open_writers(LogConfig(tensorboard=wanted), home).close()
        assert (home / "tb").exists() == wanted and (home / "metrics.jsonl").exists()


def test_another_thread_may_append_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FileNotFoundError):
        writers.append_line(path, 1, {"a": 1.0})
    lines = writers.JsonLines(path)
    lines.write(1, {"a": 1.0})
    writers.append_line(path, 1, {"anomaly": "stalled", "seconds": float("nan")})
    lines.write(2, {"a": 2.0})
    lines.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2]
    assert rows[1]["anomaly"] == "stalled" and rows[1]["seconds"] is None
