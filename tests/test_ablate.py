"""Ablations: what runs, once and by whom; what is kept of it; the report. The trainer is a stand-in."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from nanochat_jax import config as config_lib
from nanochat_jax import optim
from nanochat_jax import params as params_lib
from nanochat_jax.bench import ablate, ablate_measure, ablate_report, claims
from nanochat_jax.bench import commands as commands_
from nanochat_jax.config import ConfigError
from nanochat_jax.model import transformer

CHILD = str(Path(__file__).with_name("ablate_child.py"))
REPOSITORY = Path(__file__).parents[1]


def write_plan(directory, **keys):
    plan = {"base": [], "seeds": [0, 1], "arms": {"a": ["--bpb=1.5"], "b": ["--bpb=1.4"]}} | keys
    directory.mkdir(exist_ok=True)
    (directory / "arms.json").write_text(json.dumps(plan))
    return ablate.read_plan(directory)


def commands(home):
    fake = (sys.executable, CHILD, str(home / "journal"))
    return ablate.Commands((*fake, "train"), (*fake, "probe"))


def go(home, **options):
    options = {"pause": 0.02} | options
    return ablate.run(home / "plan", home / "runs", commands=commands(home), **options)


def journal(home, what="start", kind="train"):
    path = home / "journal"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["what"] == what and line["kind"] == kind]


def results(home):
    return ablate.read_results(home / "plan", ablate.read_plan(home / "plan"))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# What is planned


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no"),
        ("{", "is no JSON"),
        ('{"base": [], "seeds": [0]}', "lacks the key 'arms'"),
        ('{"base": [], "seeds": [0], "arms": {"a": []}, "second": 1}', "Did you mean 'seconds'?"),
        ('{"base": [], "seeds": 0, "arms": {"a": []}}', "wrong type"),
        ('{"base": [], "seeds": [0], "arms": ["a"]}', "wrong type"),
        ('{"base": [], "seeds": [], "arms": {"a": []}}', "at least one"),
        ('{"base": [], "seeds": [0], "arms": {}}', "at least one"),
        ('{"base": [], "seeds": [0], "arms": {"a": []}, "seconds": -1}', "not negative"),
    ],
)
def test_mistakes_in_a_plan(tmp_path, text, message):
    if text is not None:
        (tmp_path / "arms.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        ablate.read_plan(tmp_path)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in REPOSITORY.glob("experiments/*/arms.json")))
def test_plans_of_the_repository(name):
    """They load, and every arm's arguments make a valid config."""
    from nanochat_jax import cli

    plan = ablate.read_plan(REPOSITORY / "experiments" / name)
    for arguments in plan.arms.values():
        invocation = cli.parse([*plan.base, *arguments, "--config.seed=1", "--workdir=x"], {})
        cli.load(invocation)


def test_chains_are_arms_that_differ_in_a_number():
    arms = [
        "x, 0.01",
        "x, 0.02",
        "y, 1e-3",
        "y, 2e-3",
        "alone, 0.1",
        "full, no norms",
        "decay over 20 %",
        "z",
    ]
    of = ablate.chains(arms)
    assert of == {arm: arm for arm in arms} | {
        "x, 0.01": "x", "x, 0.02": "x", "y, 1e-3": "y", "y, 2e-3": "y"
    }  # fmt: skip


def test_an_arm_named_like_a_chain_keeps_its_name():
    assert set(ablate.chains(["x", "x, 0.01", "x, 0.02"]).values()) == {"x", "x, 0.01", "x, 0.02"}


def test_selected_arms(tmp_path):
    arms = {name: [] for name in ["full, no norms", "no norms", "m, 0.1", "m, 0.2", "full"]}
    plan = write_plan(tmp_path, arms=arms)
    assert ablate.selected("full, no norms", plan) == ["full, no norms"]
    assert ablate.selected("full,m", plan) == ["m, 0.1", "m, 0.2", "full"]
    assert ablate.selected("m, 0.2,no norms", plan) == ["no norms", "m, 0.2"]
    with pytest.raises(ConfigError, match=r"no arm 'ful'. Did you mean 'full'\?"):
        ablate.selected("ful", plan)


# What runs


@pytest.mark.multiprocess
def test_every_run_once_and_what_is_kept(tmp_path):
    write_plan(tmp_path / "plan", base=["--base=1"])
    assert go(tmp_path) == []
    assert [(r["bpb"], r["config.seed"], r["base"]) for r in journal(tmp_path)] == [
        ("1.5", "0", "1"), ("1.4", "0", "1"), ("1.5", "1", "1"), ("1.4", "1", "1")
    ]  # fmt: skip
    row = results(tmp_path)["b", 1]
    assert row["peak_bytes"] >= 0.5 * 2**30
    assert {k: v for k, v in row.items() if k not in ("arguments", "peak_bytes")} == {
        "arm": "b", "seed": 1, "bpb": 1.41, "loss": 2.0, "steps": 20, "tokens": 160, "stop": 0,
        "tokens_per_s": 200.0, "state_bytes": None, "seconds": pytest.approx(0.4), "commit": "0123456789ab",
        "jax": "1.2.3", "device": "cpu", "cpu": "a CPU", "time": "now", "bpb_loops": [],
    }  # fmt: skip
    assert go(tmp_path) == [] and len(journal(tmp_path)) == 4
    assert not list((tmp_path / "runs").glob("*.claim"))


@pytest.mark.multiprocess
def test_other_arguments_are_another_run(tmp_path):
    write_plan(tmp_path / "plan", seeds=[0])
    go(tmp_path)
    write_plan(tmp_path / "plan", seeds=[0], arms={"c": [], "a": ["--bpb=1.5"], "b": ["--bpb=1.3"]})
    assert go(tmp_path) == []
    assert [r.get("bpb") for r in journal(tmp_path)] == ["1.5", "1.4", None, "1.3"]  # a is not run again
    assert len({r["workdir"] for r in journal(tmp_path)}) == 4
    assert results(tmp_path)["b", 0]["bpb"] == 1.3


@pytest.mark.multiprocess
def test_selection_of_seeds_and_arms(tmp_path):
    write_plan(tmp_path / "plan")
    assert go(tmp_path, seeds=[1], arms=["b"]) == []
    assert list(results(tmp_path)) == [("b", 1)]


@pytest.mark.multiprocess
def test_failures_are_told_and_tried_again(tmp_path):
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": ["--first_status=2"], "b": []})
    [problem] = go(tmp_path)
    assert problem.startswith("a, seed 0: ended with status 2")
    assert list(results(tmp_path)) == [("b", 0)]
    assert go(tmp_path) == [] and set(results(tmp_path)) == {("a", 0), ("b", 0)}


@pytest.mark.multiprocess
def test_divergence_is_a_result(tmp_path):
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": ["--status=1"]})
    assert go(tmp_path) == []
    row = results(tmp_path)["a", 0]
    assert row["bpb"] is None and row["stop"] == "diverged" and ablate.score(row) == math.inf
    assert go(tmp_path) == [] and len(journal(tmp_path)) == 1


@pytest.mark.multiprocess
def test_the_result_of_an_earlier_start_does_not_count(tmp_path):
    plan = write_plan(tmp_path / "plan", seeds=[0], arms={"a": ["--crash=1"]})
    workdir = ablate.place(plan, tmp_path / "runs", "a", 0)
    workdir.mkdir(parents=True)
    (workdir / "result.json").write_text('{"step": 3, "stop": "interrupted"}')
    [problem] = go(tmp_path)
    assert "ended with status 1" in problem and not results(tmp_path)


@pytest.mark.multiprocess
def test_tuning_on_the_first_seed(tmp_path):
    arms = {
        "a, 0.1": ["--bpb=1.5"],
        "a, 0.2": ["--bpb=1.4"],
        "b": ["--bpb=1.0"],
        "c, 1": ["--status=1"],
        "c, 2": [],
    }
    write_plan(tmp_path / "plan", arms=arms, tune_on_first_seed=True, seeds=[3, 0, 1])
    [problem] = go(tmp_path, seeds=[0], arms=["a, 0.1", "a, 0.2"])
    assert problem == "a: not all of its rates have run with seed 3" and not journal(tmp_path)
    assert go(tmp_path) == []
    assert set(results(tmp_path)) == {(arm, 3) for arm in arms} | {
        (arm, seed) for arm in ("a, 0.2", "b", "c, 2") for seed in (0, 1)
    }


@pytest.mark.multiprocess
def test_equal_time(tmp_path):
    arms = {"a, 0.1": ["--step_ms=20"], "a, 0.2": ["--step_ms=30"], "b": ["--step_ms=50"]}
    write_plan(tmp_path / "plan", arms=arms, seconds=2, seeds=[0, 1])
    assert go(tmp_path) == []
    of = {run: (row["steps"], row["seconds_planned"]) for run, row in results(tmp_path).items()}
    assert of == {(arm, s): (40 if arm == "b" else 100, 2) for arm in arms for s in (0, 1)}
    assert [r["step_ms"] for r in journal(tmp_path, kind="probe")] == ["20", "50"]  # once for each chain


# Who runs it

RUNNER = """
import sys
from pathlib import Path
from nanochat_jax.bench import ablate
home = Path(sys.argv[1])
fake = (sys.executable, sys.argv[2], str(home / "journal"))
problems = ablate.run(home / "plan", home / "runs", commands=ablate.Commands((*fake, "train")), pause=0.02)
print(problems)
"""


def start(home, env):
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(home), CHILD], env=env | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.multiprocess
def test_two_invocations_share_the_work(tmp_path, child_env):
    """Both work at once (each waits for a file that appears when two have started), nothing runs twice,
    and both end only when all is done."""
    gate = tmp_path / "gate"
    write_plan(tmp_path / "plan", seeds=[0, 1, 2], base=[f"--wait={gate}"])
    both = [start(tmp_path, child_env) for _ in range(2)]
    wait_for(lambda: len(journal(tmp_path)) == 2)
    gate.touch()
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.strip() == "[]"
    assert len(journal(tmp_path)) == len({r["workdir"] for r in journal(tmp_path)}) == 6
    assert len((tmp_path / "plan/results.jsonl").read_text().splitlines()) == len(results(tmp_path)) == 6


@pytest.mark.multiprocess
def test_after_a_killed_invocation(tmp_path, child_env):
    """While its orphan trains, nobody else does; once that is gone too, the run is taken over."""
    gate = tmp_path / "gate"
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": [f"--wait={gate}"]})
    killed = start(tmp_path, child_env)
    [claim] = wait_for(
        lambda: [p for p in (tmp_path / "runs").glob("*.claim") if p.read_text().count("[") == 3]
    )
    [orphan] = wait_for(lambda: journal(tmp_path))
    killed.kill()
    killed.communicate()
    assert not claims.take(claim)
    second = start(tmp_path, child_env)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)
    assert len(journal(tmp_path)) == 1
    os.kill(orphan["pid"], signal.SIGKILL)
    gate.touch()
    out, _ = second.communicate(timeout=60)
    assert out.strip() == "[]" and len(journal(tmp_path)) == 2 and set(results(tmp_path)) == {("a", 0)}
    assert len({r["workdir"] for r in journal(tmp_path)}) == 1  # where its checkpoints are


@pytest.mark.multiprocess
def test_an_interrupt_saves_and_the_next_call_resumes(tmp_path):
    gate = tmp_path / "gate"
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": [f"--wait={gate}"]})
    problems = go(tmp_path, interrupted=lambda: bool((tmp_path / "runs").exists() and journal(tmp_path)))
    assert problems == ["interrupted; the same command goes on"]
    assert len(journal(tmp_path, "end")) == 1 and not results(tmp_path)
    gate.touch()
    assert go(tmp_path) == [] and set(results(tmp_path)) == {("a", 0)}


@pytest.mark.multiprocess
def test_a_run_that_another_finished_meanwhile(tmp_path, monkeypatch):
    """Between the look at the results and the claim, another invocation may finish the run."""
    write_plan(tmp_path / "plan", seeds=[0])
    take = claims.take

    def late(path):
        if (taken := take(path)) and not results(tmp_path):
            ablate.append_result(tmp_path / "plan", {"arm": "a", "seed": 0, "bpb": 1.0})
        return taken

    monkeypatch.setattr(claims, "take", late)
    assert go(tmp_path) == []
    assert [r["bpb"] for r in journal(tmp_path)] == ["1.4"] and results(tmp_path)["a", 0]["bpb"] == 1.0


def test_claims(tmp_path):
    path = tmp_path / "a.claim"
    assert claims.take(path) and not claims.take(path)
    assert path.read_text() == json.dumps([[os.getpid(), claims.started(os.getpid())]])
    claims.release(path)
    assert not path.exists() and claims.take(path)
    path.write_text(json.dumps([[os.getpid(), "another process that had this id"]]))
    assert claims.take(path)
    path.write_text('[[1, "')  # cut by a crash
    assert claims.take(path)
    path.write_text(json.dumps([[os.getppid(), claims.started(os.getppid())]]))
    claims.release(path)  # not ours
    assert path.exists() and not claims.take(path)


@pytest.mark.multiprocess
def test_a_process_that_ended_has_no_start(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert claims.started(child.pid)
    child.stdin.close()
    wait_for(lambda: claims.started(child.pid) is None)  # a zombie already counts as gone
    child.wait()
    assert claims.started(child.pid) is None


# What is kept


def test_old_and_torn_lines(tmp_path):
    """Lines from before speeds were kept load; a line cut by a crash is skipped and not added to."""
    old = {"arm": "a", "seed": 0, "bpb": 1.5, "loss": 4.0, "steps": 300, "commit": "c", "device": "cpu"}
    plan = write_plan(tmp_path)
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + '\n{"arm": "b", "se')
    assert ablate.read_results(tmp_path, plan) == {("a", 0): old}
    ablate.append_result(tmp_path, {"arm": "b", "seed": 0, "bpb": math.nan})
    assert ablate.read_results(tmp_path, plan)["b", 0]["bpb"] is None
    ablate.append_result(tmp_path, {"arm": "a", "seed": 0, "bpb": 1.6})
    assert ablate.read_results(tmp_path, plan)["a", 0]["bpb"] == 1.6
    assert "| a | 0 | 1.6000 |" in ablate_report.markdown(plan, ablate.read_results(tmp_path, plan), "t")


def test_memory_of_a_device_is_its_allocators(tmp_path):
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": ["--platform=gpu"]})
    subprocess.run(
        [*commands(tmp_path).train, "--platform=gpu", "--config.seed=0", f"--workdir={tmp_path / 'w'}"],
        check=True,
    )
    assert ablate_measure.measured(tmp_path / "w", 0, 2**40)["peak_bytes"] == 2**29


@pytest.mark.parametrize("opt", [{}, {"matrix": {"state_bits": 8}}, {"galore": {"rank": 8, "min_dim": 16}}])
def test_state_bytes_are_those_of_the_arrays(opt):
    model = {
        "vocab_size": 64,
        "dim": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "mlp_dim": 64,
    }
    settings = {"model": model, "opt": opt}
    cfg = config_lib.resolve(config_lib.from_json(settings))
    tx, _ = optim.build(cfg.opt, cfg.train.steps)
    params = params_lib.init_params(transformer.param_specs(cfg.model), jax.random.key(0))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert ablate_measure.state_bytes(json.loads(json.dumps(settings))) == total > 0


# The report


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 7, 10, 11, 30, 101])
def test_quantile_of_student(freedom):
    np.testing.assert_allclose(ablate_report.t_quantile(freedom), stats.t.ppf(0.975, freedom), rtol=1e-9)


def test_interval_of_the_mean():
    values = [1.52, 1.49, 1.55, 1.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(ablate_report.half_width(values), (high - low) / 2, rtol=1e-9)
    assert ablate_report.half_width([1.5]) is None


@pytest.fixture
def finished(tmp_path):
    """Three seeds of a plan with a chain; c diverged with one of them."""
    arms = {"a": [], "m, 0.1": [], "m, 0.2": [], "c|d": [], "later": []}
    plan = write_plan(tmp_path, arms=arms, seeds=[0, 1, 2])
    values = {"a": (1.5, 1.6, 1.7), "m, 0.1": (1.4,), "m, 0.2": (1.35, 1.42, 1.6), "c|d": (1.2, math.nan)}
    for arm, each in values.items():
        for seed, bpb in enumerate(each):
            row = {"arm": arm, "seed": seed, "bpb": bpb, "commit": "abc", "device": "cpu"}
            if arm != "a":
                row |= {"tokens_per_s": 1000.0 + seed, "peak_bytes": 2**30 + seed, "state_bytes": 2**20}
            ablate.append_result(tmp_path, row)
    return plan, tmp_path


def test_report_holds_the_numbers_of_scipy(finished):
    plan, home = finished
    text = ablate_report.markdown(plan, ablate.read_results(home, plan), "title")
    table = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    head, rule, *rows = table
    assert head == [
        "arm",
        "seeds",
        "bits per byte",
        "95 %",
        "against the first",
        "95 %",
        "tokens/s",
        "peak memory",
        "optimizer state",
    ]
    assert rule == ["---"] * 9 and {len(row) for row in rows} == {9}
    a, m = np.array([1.5, 1.6, 1.7]), np.array([1.35, 1.42, 1.6])
    width = stats.sem(a) * stats.t.ppf(0.975, 2)
    assert rows[0] == ["a", "0, 1, 2", "1.6000", f"± {width:.4f}", "", "", "", "", ""]
    gap, wide = m / a - 1, stats.sem(m) * stats.t.ppf(0.975, 2)
    assert rows[1] == [
        "m, 0.2", "0, 1, 2", f"{m.mean():.4f}", f"± {wide:.4f}", f"{gap.mean():+.2%}",
        f"± {stats.sem(gap) * stats.t.ppf(0.975, 2):.2%}", "1,001", "1,024.0 MiB", "1.0 MiB",
    ]  # fmt: skip
    assert rows[2][:6] == ["c\\|d", "0, 1", "diverged", "", "-20.00%", ""]
    assert len(rows) == 3
    assert "- m: 0.2 (0.1: 1.4000, 0.2: 1.3500)" in text and "chosen by seed 0" in text
    assert "2 of the planned runs have no result yet" in text  # c|d's last, later's first


def test_report_of_equal_time_shows_seconds(tmp_path):
    plan = write_plan(tmp_path, seconds=600, seeds=[0])
    row = {"arm": "a", "seed": 0, "bpb": 1.5, "steps": 1234, "seconds": 612.3}
    ablate.append_result(tmp_path, row)
    text = ablate_report.markdown(plan, ablate.read_results(tmp_path, plan), "t")
    assert "Equal time, 600 s" in text and text.splitlines()[6].endswith("| 1,234 | 612 |")


def test_report_files(finished):
    plan, home = finished
    workdir = ablate.place(plan, home / "runs", "a", 0)
    workdir.mkdir(parents=True)
    row = {"step": 5, "loss/next_token": 3.0, "perf/tokens_per_second": 1.0, "perf/step_ms": 1.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text, rows = ablate_report.write(home, home / "runs")
    assert (home / "report.md").read_text() == text
    assert (home / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(rows, allow_nan=False))[2]["bpb"] == [1.2, None]


def test_without_matplotlib_the_text_is_written(finished, monkeypatch):
    _, home = finished
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = SimpleNamespace(plan=str(home), workdir="", arms="", seeds="", report=True)
    with pytest.raises(ModuleNotFoundError, match="plot extra"):
        commands_.ablate(flags, lambda: False)
    assert "| a | 0, 1, 2 |" in (home / "report.md").read_text() and not (home / "report.png").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_status(finished, interrupted):
    """0 if everything is done, 130 if interrupted; a failure is in the test below."""
    _, home = finished
    flags = SimpleNamespace(plan=str(home), workdir=str(home / "w"), arms="a", seeds="0", report=False)
    record, text = commands_.ablate(flags, lambda: interrupted)
    assert record["status"] == (130 if interrupted else 0) and text == (home / "report.md").read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "name the directory of arms.json"),
        (["nowhere"], 2, "there is no nowhere/arms.json"),
        (["experiments/blocks", "--seeds=7"], 2, "does not plan"),
        (["experiments/blocks", "--seeds=x"], 2, "whole numbers"),
        (["experiments/blocks", "--arms=sead"], 2, "Did you mean 'seed'?"),
        (["{failing}"], 1, "a, seed 0: ended with status 2"),
    ],
)
def test_mistakes_on_the_command_line(child_env, tmp_path, arguments, status, message):
    write_plan(tmp_path / "plan", seeds=[0], arms={"a": ["--config=nowhere.py"]})
    arguments = [a.format(failing=tmp_path / "plan") for a in arguments] + [f"--workdir={tmp_path / 'runs'}"]
    command = [sys.executable, "-m", "nanochat_jax.bench", "ablate", *arguments]
    result = subprocess.run(command, env=child_env, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_real_run(tmp_path, child_env):
    """Two steps of two arms, equal tokens, as typed; a second call trains nothing; the report alone."""
    arms = {"full": ["--config.model.quant=full"], "8-bit": ["--config.opt.matrix.state_bits=8"]}
    base = [
        "--config=smoke",
        "--config.train.steps=2",
        "--config.log.every_steps=1",
        "--config.eval.batches=1",
    ]
    base += [
        "--config.eval.sample_tokens=0",
        "--config.opt.schedule.warmup_steps=1",
        "--config.log.tensorboard=false",
    ]
    write_plan(tmp_path / "plan", base=base, arms=arms, seeds=[0])
    command = [sys.executable, "-m", "nanochat_jax.bench", "ablate", str(tmp_path / "plan"), "--json"]
    command += [f"--workdir={tmp_path / 'runs'}"]
    for extra in ([], [], ["--report"]):
        result = subprocess.run(
            command + extra, env=child_env, capture_output=True, text=True, cwd=REPOSITORY
        )
        assert result.returncode == 0, result.stderr
    found = results(tmp_path)
    full, coded = found["full", 0], found["8-bit", 0]
    assert full["steps"] == 2 and 1 < full["bpb"] < 10 and full["tokens_per_s"] > 0 and full["seconds"] > 0
    assert full["peak_bytes"] > 2**26 and 0 < coded["state_bytes"] < full["state_bytes"]
    assert json.loads(result.stdout)["rows"][1]["facts"]["state_bytes"] == coded["state_bytes"]
    assert len((tmp_path / "plan/results.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "plan/report.png").stat().st_size > 1000


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_real_run_of_equal_time(tmp_path, child_env, monkeypatch):
    """The speed is measured by the real benchmark; the run takes about as long as planned (no bound here)."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("NANOCHAT_JAX_HOME", child_env["NANOCHAT_JAX_HOME"])
    base = ["--config=smoke", "--config.log.every_steps=1", "--config.eval.batches=1"]
    base += [
        "--config.eval.sample_tokens=0",
        "--config.opt.schedule.warmup_steps=1",
        "--config.log.tensorboard=false",
    ]
    write_plan(tmp_path / "plan", base=base, arms={"a": []}, seeds=[0], seconds=0.5)
    assert ablate.run(tmp_path / "plan", tmp_path / "runs") == []
    [speed] = (tmp_path / "runs").glob("*-speed.json")
    row = results(tmp_path)["a", 0]
    assert row["steps"] == max(1, round(500 / json.loads(speed.read_text())["step_ms"]["median"]))
    assert row["seconds_planned"] == 0.5 and row["seconds"] > 0
