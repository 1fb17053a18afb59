"""The watchdog: tells of a step that does not end, once, and of nothing else."""

import json
import subprocess
import sys
import threading
import time

import pytest

from nanochat_jax.telemetry.goodput import Ledger
from nanochat_jax.telemetry.writers import JsonLines
from nanochat_jax.train import watchdog

LIMIT = 0.2  # seconds


def run(script, seconds=LIMIT, doing=lambda: "data", patience=20.0):
    """What is reported while the script(hook, reports) runs."""
    reports = []
    with watchdog.watching(seconds, 3, doing, reports.append) as hook:
        script(hook, reports)
    return reports


def until(there, patience=20.0):
    """The machine may be busy: wait for what must happen, as long as it takes."""
    end = time.monotonic() + patience
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def stuck(hook, reports):
    until(lambda: reports)
    time.sleep(2 * LIMIT)  # not twice


def test_a_stall_is_reported_once_with_what_was_going_on():
    (stall,) = run(stuck)
    assert stall.step == 3 and stall.seconds >= LIMIT and stall.doing == "data"
    assert str(stall) == f"stalled: no step has ended for {stall.seconds:.3g} s, waiting for data"
    (stall,) = run(stuck, doing=lambda: "other")
    assert str(stall).endswith(" s, outside of steps")


def test_after_a_further_step_the_next_stall_is_reported_too():
    def script(hook, reports):
        until(lambda: reports)
        hook(4, None, {})
        until(lambda: len(reports) == 2)

    assert [stall.step for stall in run(script)] == [3, 4]


def test_steps_that_end_are_no_stall():
    def script(hook, reports):
        for step in range(60):
            hook(step, None, {"perf/step_ms": 1.0})
            time.sleep(LIMIT / 20)

    assert run(script, 20 * LIMIT) == []


@pytest.mark.parametrize("kind", watchdog.LONG)
def test_what_may_last_is_no_stall(kind):
    assert run(lambda hook, reports: time.sleep(3 * LIMIT), doing=lambda: kind) == []


def test_ten_usual_steps_are_waited_for():
    """And the step that was compiled is not usual."""

    def script(hook, reports):
        for step, ms in enumerate((None, 60_000.0, 50.0, 150.0, 100.0)):
            hook(step, None, {} if ms is None else {"perf/step_ms": ms})
        until(lambda: reports)

    (stall,) = run(script)
    assert stall.usual == pytest.approx(0.1) and stall.seconds >= 10 * stall.usual
    assert "(usually 0.1 s)" in str(stall)


def test_zero_watches_nothing():
    before = threading.active_count()
    assert run(lambda hook, reports: hook(1, None, {}) or time.sleep(LIMIT), seconds=0.0) == []
    assert threading.active_count() == before


def test_the_thread_ends_with_the_block_also_after_an_error():
    with pytest.raises(KeyError), watchdog.watching(100.0, 0, lambda: "step", print):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
        raise KeyError
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


STALL = watchdog.Stall(7, 312.0, 0.5, "data")


def a_worker_that_hangs(ended):
    ended.wait()


def test_the_report_names_the_thread_that_hangs(tmp_path):
    ended, told = threading.Event(), []
    thread = threading.Thread(target=a_worker_that_hangs, args=(ended,))
    thread.start()
    lines = JsonLines(tmp_path / "metrics.jsonl")
    try:
        lines.write(6, {"a": 1.0})
        watchdog.reporter(tmp_path, 0, lambda *line: told.append(line), False, str)(STALL)
    finally:
        ended.set()
        thread.join()
    lines.write(8, {"a": 2.0})
    lines.close()
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "a_worker_that_hangs" in stacks and "step 7 stalled: no step has ended for 312 s" in stacks
    sentence = (
        "stalled: no step has ended for 312 s (usually 0.5 s), waiting for data; stacks of all threads: "
        f"{tmp_path / 'stacks.txt'}"
    )
    assert told == [(sentence, 7)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 7, 8] and rows[1]["anomaly"] == sentence


def test_other_processes_write_their_stacks_only(tmp_path):
    told = []
    watchdog.reporter(tmp_path, 2, lambda text, step: told.append(text), False, str)(STALL)
    assert [path.name for path in tmp_path.iterdir()] == ["stacks.2.txt"] and told == []


def test_a_report_that_cannot_be_written_is_told(tmp_path, capfd):
    told = []
    watchdog.reporter(tmp_path / "gone", 0, lambda text, step: told.append(text), False, str)(STALL)
    assert "stacks of all threads: on stderr ([Errno 2]" in told[0]
    assert "test_a_report_that_cannot_be_written_is_told" in capfd.readouterr().err


ENDING = """
import sys, time
from pathlib import Path
from nanochat_jax.train import watchdog
tell = lambda text, step: print(text, file=sys.stderr)
report = watchdog.reporter(Path(sys.argv[1]), 0, tell, True, lambda: "the checkpoint of step 4 is intact")
with watchdog.watching(0.2, 5, lambda: "step", report):
    time.sleep(60)
"""


def test_the_process_ends_itself_when_asked_to(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == watchdog.EXIT_STALLED == 71
    assert done.stderr.endswith("stacks.txt; ending (the checkpoint of step 4 is intact)\n")
    assert 'File "<string>", line 8' in (tmp_path / "stacks.txt").read_text()


def test_the_ledger_tells_what_is_going_on():
    ledger = Ledger()
    assert ledger.doing() == "other"
    with ledger.within("step"), ledger.within("data"):
        assert ledger.doing() == "data"
    assert ledger.doing() == "other"
