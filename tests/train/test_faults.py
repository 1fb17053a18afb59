"""Every fault that a run promises to survive: what the user sees, what is kept, and that a restart ends
with the bits of a run without the fault. docs/faults.md is the table of these tests.

The runs are whole ones, of a very small model, in this process; those that are killed are commands.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from nanochat_jax import checkpoint, cli, config
from nanochat_jax.config import Config
from nanochat_jax.data import pipeline
from nanochat_jax.data.sources import DataError
from nanochat_jax.train import program

STEPS, EVERY = 12, 4  # steps of a run, and from one checkpoint to the next
# When a read fails, Orbax abandons the other reads; their coroutines complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. (None|<coroutine object):pytest.PytestUnraisableExceptionWarning"
)


class Outcome(NamedTuple):
    status: int
    text: str  # what stands on stderr

    @property
    def last(self) -> str:
        return self.text.strip().splitlines()[-1]


class Result(NamedTuple):
    """What must be the same with and without a fault."""

    bits: tuple[str, int]  # SHA-256 of the state, data position
    scores: dict
    rows: dict[int, dict]  # metrics of each step that depend on nothing but the step


def result(home: Path) -> Result:
    record = json.loads((home / "result.json").read_text())
    return Result((record["state_sha256"], record["data_position"]), record["eval"], metrics(home))


def metrics(home: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "loss/next_token" in line]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))  # every step once, in order
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith(("loss/", "opt/", "data/weight"))}
        for row in rows
    }


def events(home: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["anomaly"]) for line in lines if "anomaly" in line]


class World:
    """A corpus, a config, and the run without a fault."""

    def __init__(self, root: Path):
        self.root, text = root, root / "text"
        text.mkdir()
        for i in range(30):
            (text / f"{i}.txt").write_text("".join(f"def f{i}_{j}(x): return x + {j}\n" for j in range(20)))
        settings = config.defaults()
        settings.model.update(
            vocab_size=300, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=32, unroll=1
        )
        settings.data.update(
            source=str(text), tokenizer="bytes", seq_len=16, batch=8, val_percent=10, workers=2
        )
        settings.opt.matrix.name = "adamw"
        settings.opt.schedule.warmup_steps = 2
        settings.train.steps = STEPS
        settings.eval.update(every_steps=6, batches=1, sample_tokens=0)
        settings.log.update(every_steps=1, tensorboard=False)
        settings.ckpt.update(every_steps=EVERY, every_minutes=0.0, min_free_gb=0.0)
        self.cfg = config.resolve(settings)

    def train(self, home: Path, cfg: Config | None = None, at: dict | None = None, stop: int = 0, **place):
        """One start of the run. at: {call of the interrupt: action}; stop: the step to stop at."""
        calls = itertools.count(1)

        def asked() -> bool:
            call = next(calls)
            (at or {}).get(call, lambda: None)()
            return bool(stop) and call >= stop

        cache = place.get("cache", self.root / "cache")
        return program.train(cfg or self.cfg, home, cache, {}, "auto", asked)


def one_program(made):
    """program.Parts, but runs that differ in what no step depends on share their compiled programs."""
    plain = Config()

    def parts(cfg, extension=None):
        train = dataclasses.replace(cfg.train, stall_seconds=300.0, stall_exit=False)
        opt = dataclasses.replace(
            cfg.opt, skip_nonfinite=min(cfg.opt.skip_nonfinite, 1)
        )  # the bound is a hook's
        same = dataclasses.replace(cfg, train=train, opt=opt, ckpt=plain.ckpt, log=plain.log, eval=plain.eval)
        return made(same, extension)

    return parts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Parts", one_program(functools.cache(program.Parts)))
        jax.config.update("jax_disable_most_optimizations", True)  # they cost more than all these steps
        yield World(tmp_path_factory.mktemp("faults"))
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def whole(world) -> Result:
    """The run without a fault."""
    assert world.train(world.root / "whole") == 0
    found = result(world.root / "whole")
    assert list(found.rows) == list(range(1, STEPS + 1))
    return found


@pytest.fixture
def start(world, whole, tmp_path, capsys, caplog):
    """Start the run of a workdir as the command does; what its user gets."""

    def run(cfg: Config | None = None, home: Path = tmp_path / "run", **options) -> Outcome:
        capsys.readouterr()
        caplog.clear()
        try:
            status = world.train(home, cfg, **options)
        except Exception as error:
            found = cli.explain(error)
            if found is None:
                raise
            status = found
        return Outcome(status, caplog.text + capsys.readouterr().err)

    return run


@pytest.fixture
def rows_of(monkeypatch):
    """Let a function (step, fields) act where batches are made, in the threads of the data pipeline."""
    real = pipeline._Steps.__getitem__

    def tamper(change):
        def made(self, index):
            fields = real(self, index)
            change(int(index), fields)
            return fields

        monkeypatch.setattr(pipeline._Steps, "__getitem__", made)

    def mend():
        monkeypatch.setattr(pipeline._Steps, "__getitem__", real)

    tamper.mend = mend  # type: ignore[attr-defined]
    return tamper


def changed(cfg: Config, **groups: dict) -> Config:
    return dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **new) for name, new in groups.items()}
    )


def further(*values):
    """More of the same, for the slow job."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


DAMAGES = ["flipped", *further("truncated", "missing")]

# --- data: dead and stalled workers, damaged shards


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        pytest.param(KeyError("tokens"), "KeyError: 'tokens'", marks=pytest.mark.slow),
        pytest.param(DataError("x: cut"), "DataError: x: cut", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_its_steps_saved(start, whole, rows_of, tmp_path, error, said):
    """Also a mistake of ours: one sentence, not the stack of a thread."""

    def die(step, fields):
        if step == 9:
            raise error

    rows_of(die)
    got = start()
    # Two batches are on their way to the device when the tenth fails.
    assert got.status == 1 and got.last == (
        f"error: stopped at step 7, which is saved: the data failed ({said}); the same command continues this run"
    )
    assert checkpoint.latest_step(tmp_path / "run" / "ckpt") == 7
    assert list(metrics(tmp_path / "run")) == list(range(1, 8))
    rows_of.mend()
    again = start()
    assert again.status == 0 and "continuing at step 7" in again.text
    assert result(tmp_path / "run") == whole


def test_a_worker_that_stalls_is_reported_with_its_stack(start, world, whole, rows_of, tmp_path):
    stacks = tmp_path / "run" / "stacks.txt"
    sentence = f"waiting for data; stacks of all threads: {stacks}"

    def told() -> list[tuple[int, str]]:  # on a busy machine other steps may take as long
        return [(step, text) for step, text in events(tmp_path / "run") if text.endswith(sentence)]

    def hang_until_it_is_told(step, fields):
        end = time.monotonic() + 60
        while step == 7 and not told():
            assert time.monotonic() < end
            time.sleep(0.02)

    rows_of(hang_until_it_is_told)
    got = start(changed(world.cfg, train={"stall_seconds": 0.6}))
    assert got.status == 0
    ((step, event),) = told()
    assert 4 <= step <= 7 and event.startswith("stalled: no step has ended for ")
    assert "hang_until_it_is_told" in stacks.read_text()
    assert f"anomaly {step} | {event}" in got.text.splitlines()
    assert result(tmp_path / "run") == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_before_a_step_is_made(start, world, whole, tmp_path, damage):
    cache = shutil.copytree(world.root / "cache", tmp_path / "cache")
    assert start(cache=cache, stop=6).status == 130
    (shard,) = cache.rglob("train.bin")
    hurt(shard, damage)
    got = start(cache=cache)
    advice = f"; delete {shard.parent} to prepare it again"
    assert got.status == 1 and got.last.startswith(f"error: {shard}") and got.last.endswith(advice)
    assert checkpoint.latest_step(tmp_path / "run" / "ckpt") == 6
    shutil.rmtree(shard.parent)
    assert start(cache=cache).status == 0
    assert result(tmp_path / "run") == whole


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_file_that_is_cut_while_it_is_read_is_named(start, world, whole, tmp_path, split):
    cache = shutil.copytree(world.root / "cache", tmp_path / "cache")
    (shard,) = cache.rglob(f"{split}.bin")
    near = changed(world.cfg, data={"workers": 1, "prefetch": 1})  # else all steps' batches are made at once
    got = start(near, cache=cache, at={3: functools.partial(os.truncate, shard, 0)})
    step = checkpoint.latest_step(tmp_path / "run" / "ckpt") or 0
    assert got.status == 1 and step in (range(4, STEPS) if split == "train" else [6])
    assert got.last.startswith(f"error: stopped at step {step}, which is saved: the data failed (DataError: ")
    assert f"{shard} was cut while it was read: it ends after 0 bytes" in got.last
    assert start(cache=cache).last.startswith(f"error: {shard}: expected ")
    shutil.rmtree(shard.parent)
    assert start(cache=cache).status == 0 and result(tmp_path / "run") == whole


def hurt(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)


# --- numbers: NaN, spikes


def with_nan(steps):
    def change(step, fields):
        if step in steps:
            fields["weights"][0, 0] = np.nan

    return change


def test_a_nan_is_skipped_and_told(start, world, rows_of, tmp_path):
    """The step changes no parameter; a restart before and after it changes no bit."""
    rows_of(with_nan({5}))
    got = start(home=tmp_path / "straight")
    assert got.status == 0 and got.text.count("not finite: nan") == 2  # the loss, the gradient
    want = result(tmp_path / "straight")
    assert list(want.rows) == list(range(1, STEPS + 1)) and want.rows[6]["loss/next_token"] is None
    assert [want.rows[step]["opt/skipped"] for step in (5, 6, 7, STEPS)] == [0, 1, 1, 1]
    assert start(stop=5).status == 130 and start(stop=2).status == 130
    assert start().status == 0
    assert result(tmp_path / "run") == want


def test_too_many_nans_in_a_row_end_the_run_with_its_state_saved(start, world, rows_of, tmp_path):
    few = changed(world.cfg, opt={"skip_nonfinite": 3})
    rows_of(with_nan(range(4, 8)))
    got = start(few)
    assert got.status == 1
    assert (
        "stopped at step 8: 3 steps in a row had a non-finite gradient (opt.skip_nonfinite = 3)" in got.text
    )
    assert got.last == "the same command continues this run"
    assert checkpoint.latest_step(tmp_path / "run" / "ckpt") == 8
    rows = metrics(tmp_path / "run")
    assert [rows[step]["opt/skipped_in_a_row"] for step in (4, 5, 8)] == [0, 1, 4]
    # Continued (the counter goes on, and the next good step resets it), as if the bound had been higher.
    assert start(few).status == 0
    assert start(changed(world.cfg, opt={"skip_nonfinite": 9}), home=tmp_path / "patient").status == 0
    assert result(tmp_path / "run") == result(tmp_path / "patient")


SPIKE = 100  # the step; more must have been calm than not, or the fall of the loss counts as its noise


@pytest.mark.slow
@pytest.mark.parametrize("sigmas", [0.0, 6.0], ids=["told", "told and skipped"])
def test_a_loss_spike_is_told_also_soon_after_a_restart(start, world, rows_of, tmp_path, sigmas):
    def change(step, fields):
        fields["tokens"][:] = fields["targets"][:] = 65
        fields["weights"][:] = 1
        if step == SPIKE - 1:
            fields["targets"][:] = 90

    rows_of(change)
    cfg = changed(
        world.cfg, train={"steps": SPIKE + 4}, opt={"spike_sigmas": sigmas}, ckpt={"every_steps": 0},
        eval={"every_steps": 0},
    )  # fmt: skip
    assert start(cfg, home=tmp_path / "straight").status == 0
    want = result(tmp_path / "straight")
    spikes = [event for event in events(tmp_path / "straight") if " spike: " in event[1]]
    assert (SPIKE, "loss spike") in [(step, text.split(":")[0]) for step, text in spikes]
    if sigmas:
        assert [want.rows[s]["opt/skipped_spikes"] for s in (SPIKE - 1, SPIKE, SPIKE + 4)] == [0, 1, 1]
    # 8 steps before the spike: what the detectors know comes from the checkpoint.
    assert start(cfg, stop=SPIKE - 8).status == 130
    assert start(cfg).status == 0
    assert result(tmp_path / "run") == want
    assert [event for event in events(tmp_path / "run") if " spike: " in event[1]] == spikes


# --- checkpoints: damage, a full disk


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["params", pytest.param("opt", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(start, whole, tmp_path, item, damage):
    assert start(stop=10).status == 130
    ckpt = tmp_path / "run" / "ckpt"
    data = [path for path in (ckpt / "10" / item).rglob("d/*") if path.is_file()]
    hurt(max(data, key=lambda path: path.stat().st_size), damage)
    got = start()
    assert got.status == 0 and "continuing at step 8" in got.text
    assert f"checkpoint of step 10 is DAMAGED ({item}/" in got.text and "trying an older one" in got.text
    assert (ckpt / "damaged" / "10").is_dir()
    assert result(tmp_path / "run") == whole


@pytest.fixture(params=["writing fails", pytest.param("no space is left", marks=pytest.mark.slow)])
def disk(request, monkeypatch):
    """disk(full): files cannot grow beyond 40 KiB, so that a save fails in the middle; or the system says that
    there is no space."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = shutil.disk_usage

    def fill(full=True):
        if request.param == "writing fails":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 2**10 if full else soft, hard))
        else:
            gone = lambda path: real(path)._replace(free=1000)  # noqa: E731
            monkeypatch.setattr(shutil, "disk_usage", gone if full else real)

    fill.figure = request.param == "no space is left"  # type: ignore[attr-defined]
    yield fill
    fill(False)


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_disk_that_is_full_for_a_while_costs_its_saves_only(start, whole, disk, tmp_path, monkeypatch):
    savers, save = [], checkpoint.Checkpointer.save

    def noted(self, *args, **options):
        savers.append(self)
        return save(self, *args, **options)

    def space():  # once the save of step 8, which goes on beside the steps, has failed
        until(lambda: not savers[-1]._manager.is_saving_in_progress())
        disk(False)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", noted)
    got = start(at={3: disk, 11: space})
    assert got.status == 0
    for step in (4, 8):
        what = f"no checkpoint at step {step}" if disk.figure else f"saving step {step} in"
        assert f"warning: {what}" in got.text
    assert "there is no other one" in got.text
    assert checkpoint._steps(tmp_path / "run" / "ckpt") == [STEPS]
    assert result(tmp_path / "run") == whole


def test_a_disk_that_stays_full_ends_the_run_at_the_last_checkpoint(start, whole, disk, tmp_path):
    ckpt = tmp_path / "run" / "ckpt"

    def fill():  # once the first save is whole
        until(lambda: checkpoint.latest_step(ckpt) == 4)
        disk()

    got = start(at={5: fill})
    disk(False)
    assert got.status == 1 and got.last.startswith("error: ")
    assert f"step {STEPS}" in got.last and "the checkpoint of step 4 is intact" in got.last
    assert checkpoint._steps(ckpt) == [4] and not list(ckpt.glob("*tmp*"))
    assert not (tmp_path / "run" / "result.json").exists()
    again = start()
    assert again.status == 0 and "continuing at step 4" in again.text
    assert result(tmp_path / "run") == whole


# --- surroundings: the clock, the workdir, the sinks


def test_a_clock_that_goes_backwards_changes_labels_only(start, whole, tmp_path, monkeypatch):
    """Each look at the clock tells a time one hour before the last."""
    lock, now = threading.Lock(), [time.time_ns()]

    def back():
        with lock:
            now[0] -= 3600 * 10**9
            return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", back)
        patch.setattr(time, "time", lambda: back() / 1e9)
        assert start(stop=6).status == 130
        got = start()
    assert got.status == 0 and result(tmp_path / "run") == whole
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["time"] > rows[-1]["time"]
    times = [value for row in rows for name, value in row.items() if name.endswith(("_ms", "_seconds"))]
    assert len(times) > 3 * STEPS and all(0 <= value < 1e6 for value in times)
    shares = {k: v for k, v in rows[-1].items() if k.startswith("goodput/") and k != "goodput/wall_seconds"}
    assert min(shares.values()) >= 0 and sum(shares.values()) == pytest.approx(1)
    for line in (tmp_path / "run" / "spans.jsonl").read_text().splitlines():
        span = json.loads(line)
        assert int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sink", ["tb", *further("metrics.jsonl", "spans.jsonl")])
def test_a_sink_that_cannot_be_written_costs_itself_and_one_warning(start, world, whole, tmp_path, sink):
    home = tmp_path / "run"
    home.mkdir()
    (home / sink).touch() if sink == "tb" else (home / sink).mkdir()
    got = start(changed(world.cfg, log={"tensorboard": True}))
    assert got.status == 0
    assert sum("WARNING" in line and str(home / sink) in line for line in got.text.splitlines()) == 1
    record = json.loads((home / "result.json").read_text())
    assert (record["state_sha256"], record["data_position"]) == whole.bits and record["eval"] == whole.scores
    if sink != "metrics.jsonl":
        assert metrics(home) == whole.rows
    if sink != "tb":
        assert len(list((home / "tb").glob("events*"))) == 1


@pytest.fixture
def read_only():
    """A directory that this process cannot write to, whoever it is."""
    place = Path(tempfile.mkdtemp(prefix="faults."))
    if os.geteuid() == 0:
        place.chmod(0o755)
        os.seteuid(65534)
    else:
        place.chmod(0o555)
    yield place
    os.seteuid(os.getuid())
    place.chmod(0o755)
    shutil.rmtree(place)


def test_a_read_only_workdir_is_refused_before_anything_is_done(start, read_only):
    for home in (read_only, read_only / "run"):
        got = start(home=home)
        assert got.status == 2 and got.text.splitlines() == [
            f"config error: the workdir {home} cannot be written (Permission denied); choose another --workdir"
        ]
    assert not list(read_only.iterdir())
