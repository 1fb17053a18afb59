"""Metric sinks, console lines, manifest: what is written can be read back, and failure loses no run."""

import io
import json
import logging
import math

import pytest

from nanochat_jax.config import Config, LogConfig, to_dict
from nanochat_jax.telemetry import console, manifest, writers


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_the_values(tmp_path):
    import grain
    from tensorboardX.proto import event_pb2

    sink = writers.TensorBoard(tmp_path / "tb")
    sink.write(7, {"loss/total": 2.5, "bad": math.nan})
    sink.text(7, "eval/sample", "hello")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="is closed"):
        sink.write(8, {"a": 1.0})
    (path,) = (tmp_path / "tb").glob("events*")
    seen = {}
    for record in grain.experimental.TFRecordIterDataset(str(path)):
        event = event_pb2.Event()
        event.ParseFromString(record)
        for value in event.summary.value:
            seen[value.tag] = (event.step, value)
    assert seen["loss/total"][0] == 7 and seen["loss/total"][1].simple_value == 2.5
    assert "bad" not in seen and any("sample" in tag for tag in seen)


def test_a_failing_writer_is_dropped_with_one_warning(tmp_path, caplog):
    class Broken:
        calls = 0

        def write(self, step, metrics):
            self.calls += 1
            raise OSError("disk full")

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


def test_log_line_has_a_fixed_order():
    metrics = {
        "opt/grad_norm": 0.84, "loss/next_token": 3.70004, "perf/tokens_per_second": 5123.0,
        "opt/lr_matrix": 0.012, "data/wait_ms": 0.31, "perf/eta_seconds": 62.4, "perf/mfu": 0.487,
    }  # fmt: skip
    assert console.log_line(120, 400, metrics) == (
        "step 120/400 (30.0%) | loss 3.7000 | lr 1.20e-02 | gnorm 0.84 | 5.1k tok/s | mfu 48.7% | "
        "data 0.3 ms | eta 1m02s"
    )


def test_numbers_for_people():
    assert [console.si(n) for n in (3, 1234, 5.2e6, 7e9)] == ["3", "1.2k", "5.2M", "7.0B"]
    assert [console.duration(s) for s in (5, 62, 3723)] == ["5s", "1m02s", "1h02m"]


def test_the_bar_is_for_terminals_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        progress = console.Progress(10, stream)
        progress.bar(5, 3.0)
        progress.print("line")
        assert ("[###" in stream.getvalue()) == live and stream.getvalue().endswith("line\n")


def test_manifest_records_and_keeps_earlier_starts(tmp_path):
    cfg = Config()
    for _ in range(2):
        manifest.write(tmp_path, cfg, {"command": ["x"]})
    record = strict((tmp_path / "manifest.json").read_text())
    assert len(record["starts"]) == 2 and record["packages"]["jax"] and record["command"] == ["x"]
    assert strict((tmp_path / "config.json").read_text())["model"]["dim"] == cfg.model.dim


def test_changed_keys_names_what_makes_another_run():
    old, new = to_dict(Config()), to_dict(Config())
    new["train"]["steps"], new["log"]["every_steps"], new["mesh"]["data"] = 999, 1, 2
    assert manifest.changed_keys(old, new) == []
    new["model"]["dim"], new["seed"] = 512, 4
    assert manifest.changed_keys(old, new) == ["seed: 0 -> 4", "model.dim: 256 -> 512"]
    assert manifest.changed_keys(json.loads(json.dumps(old)), old) == []
