"""A matrix of arms x seeds: train each with one process, resume what was interrupted, report.

    python -m nanochat_jax.bench ablate experiments/blocks

The directory holds arms.json:

    {"base": [arguments], "seeds": [0, 1], "arms": {name: [arguments]},
     "seconds": 600, "tune_on_first_seed": true}

Arguments are those of `python -m nanochat_jax.train`; the last two keys are optional. All arms see the
same tokens in the same order, and the first is what the others are compared with, seed by seed.

- `seconds`: equal time instead of equal tokens. The speed of each arm is measured once, by `bench
  throughput`, and train.steps set so that the schedule ends after so many seconds of training steps.
  The seconds that they really took are recorded too.
- Arms "x, 0.01" and "x, 0.02" are rates of the chain "x". With `tune_on_first_seed` all rates run with
  the first seed, and only the best of each chain with the others.

Each finished run appends a line to results.jsonl there and is never run again, unless its arguments
change. Several invocations on one machine share the work; an interrupted run goes on from its last
checkpoint, under runs/<directory's name>/.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanochat_jax.bench import claims
from nanochat_jax.bench.ablate_measure import measured
from nanochat_jax.config import ConfigError, nearest

log = logging.getLogger(__name__)
Run = tuple[str, int]  # arm, seed
Results = dict[Run, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """arms.json."""

    base: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: dict[str, tuple[str, ...]]
    seconds: float = 0.0  # of training steps in each run; 0 = the steps that the arguments say
    tune_on_first_seed: bool = False


@dataclass(frozen=True)
class Commands:
    """The programs that train an arm and measure its speed; arguments are appended."""

    train: tuple[str, ...] = (sys.executable, "-m", "nanochat_jax.train")
    probe: tuple[str, ...] = (sys.executable, "-m", "nanochat_jax.bench", "throughput", "--json")


def read_plan(directory: Path) -> Plan:
    """The directory's arms.json. Raises: ConfigError."""
    path = directory / "arms.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"there is no {path}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    known = [field.name for field in fields(Plan)]
    for key in given:
        if key not in known:
            raise ConfigError(f"{path} has an unknown key '{key}'{nearest(key, known)}")
    try:
        plan = Plan(
            tuple(given["base"]), tuple(given["seeds"]),
            {name: tuple(arguments) for name, arguments in given["arms"].items()},
            float(given.get("seconds", 0.0)), bool(given.get("tune_on_first_seed", False)),
        )  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} has a value of the wrong type: {error}") from None
    if not plan.arms or not plan.seeds or plan.seconds < 0:
        raise ConfigError(f"{path} needs at least one arm and one seed, and seconds that are not negative")
    return plan


def chains(arms: Iterable[str]) -> dict[str, str]:
    """Arm -> its chain: "x" of "x, 0.01" if another arm is "x, <number>"; else the arm itself."""
    arms = list(arms)
    stems = {arm: (re.fullmatch(r"(.+), [0-9.]+(?:e-?[0-9]+)?", arm) or [arm, arm])[1] for arm in arms}
    rates = [stem for arm, stem in stems.items() if stem != arm]
    return {arm: stem if rates.count(stem) > 1 and stem not in arms else arm for arm, stem in stems.items()}


def best(plan: Plan, results: Results) -> dict[str, str]:
    """Chain -> its arm with the fewest bits per byte of the first seed, once all of them have run.

    A run that diverged loses; if all did, the first is taken.
    """
    of, first, found = chains(plan.arms), plan.seeds[0], {}
    for chain in dict.fromkeys(of.values()):
        rates = [arm for arm in plan.arms if of[arm] == chain]
        if all((arm, first) in results for arm in rates):
            found[chain] = min(rates, key=lambda arm: score(results[arm, first]))
    return found


def score(result: dict[str, Any]) -> float:
    """Bits per byte; infinite for a run that has none, because it diverged."""
    bpb = result["bpb"]
    return bpb if bpb is not None and math.isfinite(bpb) else math.inf


def digest(plan: Plan, arm: str) -> str:
    """Names what an arm's runs are made of, so that changed arguments make other runs."""
    content = json.dumps([plan.base, plan.arms[arm], plan.seconds])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_results(directory: Path, plan: Plan) -> Results:
    """The lines of results.jsonl that belong to the plan; of several for one run the last counts.

    A line whose arguments are not those of the plan any more is left out. A line that a crash has cut
    is, too.
    """
    path, found = directory / "results.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            run = row["arm"], row["seed"]
        except (ValueError, KeyError, TypeError):
            continue
        if run[0] in plan.arms and row.get("arguments", digest(plan, run[0])) == digest(plan, run[0]):
            found[run] = row
    return found


def append_result(directory: Path, row: dict[str, Any]) -> None:
    """Append a line with one write, after whatever a crash has left. Numbers that are none become null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    path = directory / "results.jsonl"
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, ("\n" * torn + json.dumps(row, allow_nan=False) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def missing(plan: Plan, results: Results, seeds: Iterable[int], arms: Iterable[str]) -> list[Run]:
    """Runs that can start now, in order: seed by seed, the first arm first."""
    of, ahead, arms = chains(plan.arms), best(plan, results), list(arms)
    rates = list(of.values())

    def allowed(arm: str, seed: int) -> bool:
        tuned = plan.tune_on_first_seed and rates.count(of[arm]) > 1 and seed != plan.seeds[0]
        return not tuned or ahead.get(of[arm]) == arm

    return [(a, s) for s in seeds for a in arms if (a, s) not in results and allowed(a, s)]


def selected(text: str, plan: Plan) -> list[str]:
    """Arms named in a list with commas: names, which may hold commas themselves, or names of chains.

    Raises: ConfigError for a name that is neither.
    """
    words, of, found = [word.strip() for word in text.split(",")], chains(plan.arms), []
    while words:
        for count in range(len(words), 0, -1):
            name = ", ".join(words[:count])
            if name in plan.arms or name in of.values():
                found += [arm for arm in plan.arms if name in (arm, of[arm])]
                words = words[count:]
                break
        else:
            raise ConfigError(f"no arm '{words[0]}'{nearest(words[0], [*plan.arms, *of.values()])}")
    return [arm for arm in plan.arms if arm in found]


def place(plan: Plan, runs: Path, arm: str, seed: int | str) -> Path:
    """Working directory of a run; beside it lie its claim and its log, under the same name."""
    name = re.sub(r"[^a-z0-9]+", "_", arm.lower()).strip("_")[:40]
    return runs / f"{name}-{digest(plan, arm)[:8]}-{seed}"


def run(
    directory: Path,
    runs: Path,
    seeds: Iterable[int] = (),
    arms: Iterable[str] = (),
    commands: Commands = Commands(),
    interrupted: Callable[[], bool] = lambda: False,
    pause: float = 1.0,
) -> list[str]:
    """Run what is missing, and wait for what other invocations run.

    Args: directory: of arms.json. runs: where the runs work. seeds, arms: only these; () = all.
    interrupted: asked while training; once true, the child saves and this returns. pause: seconds
    between two looks at what others do.
    Returns: a sentence for each run that failed, or that waits for the tuning of its rate.
    """
    plan = read_plan(directory)
    seeds, arms = tuple(seeds) or plan.seeds, tuple(arms) or tuple(plan.arms)
    failed: dict[Run, str] = {}
    while not interrupted():
        results = read_results(directory, plan)
        able = [one for one in missing(plan, results, seeds, arms) if one not in failed]
        if not able:
            break
        for arm, seed in able:
            claim = place(plan, runs, arm, seed).with_suffix(".claim")
            if claims.take(claim):
                try:
                    if (arm, seed) not in read_results(directory, plan):  # another has just finished it
                        problem = _run_one(plan, directory, runs, arm, seed, commands, interrupted)
                        failed |= {(arm, seed): problem} if problem else {}
                finally:
                    claims.release(claim)
                break
        else:
            time.sleep(pause)
    if interrupted():
        return [*failed.values(), "interrupted; the same command goes on"]
    return [*failed.values(), *_waiting(plan, read_results(directory, plan), seeds, arms)]


def _waiting(plan: Plan, results: Results, seeds: Iterable[int], arms: Iterable[str]) -> list[str]:
    """Chains whose best rate is not known, so that their other seeds cannot run."""
    of, known = chains(plan.arms), best(plan, results)
    stuck = {of[arm] for arm in arms if of[arm] != arm and of[arm] not in known}
    if not plan.tune_on_first_seed or set(seeds) <= {plan.seeds[0]}:
        return []
    return [f"{chain}: not all of its rates have run with seed {plan.seeds[0]}" for chain in sorted(stuck)]


def _run_one(
    plan: Plan, directory: Path, runs: Path, arm: str, seed: int, commands: Commands, interrupted: Callable
) -> str:
    """Train, and append the result unless interrupted. Returns: what went wrong, or ""."""
    workdir = place(plan, runs, arm, seed)
    claim, output = workdir.with_suffix(".claim"), workdir.with_suffix(".log")
    arguments = [*plan.base, *plan.arms[arm]]
    try:
        if plan.seconds:
            arguments.append(f"--config.train.steps={_planned_steps(plan, runs, arm, commands, claim)}")
    except (subprocess.CalledProcessError, ValueError, KeyError) as error:
        return "" if interrupted() else f"{arm}, seed {seed}: its speed could not be measured: {error}"
    (workdir / "result.json").unlink(missing_ok=True)  # that of an interrupted start
    log.info("%s, seed %d: training, see %s", arm, seed, output)
    command = [*commands.train, *arguments, f"--config.seed={seed}", f"--workdir={workdir}"]
    status, peak = _child(command, output, claim, interrupted)
    if status not in (0, 1) or not (workdir / "result.json").exists():
        if interrupted():
            return ""
        log.info("%s, seed %d: failed with status %d", arm, seed, status)
        return f"{arm}, seed {seed}: ended with status {status}, see {output}"
    row = {"arm": arm, "seed": seed, **measured(workdir, status, peak), "arguments": digest(plan, arm)}
    if plan.seconds:
        row["seconds_planned"] = plan.seconds
    with claims.locked(runs):
        append_result(directory, row)
    log.info("%s, seed %d: %.4f bits per byte", arm, seed, score(row))
    return ""


def _child(command: list[str], output: Path, claim: Path, interrupted: Callable) -> tuple[int, int]:
    """Run to the end. Returns: exit status (negative: signal), peak of resident memory in bytes.

    Linux counts into the peak what this process had when it started the child, about 0.2 GiB.
    The child has a session of its own: Ctrl-C reaches it once, from here, and it saves.
    """
    with open(output, "ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    told = False
    try:
        claims.share(claim, process.pid)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not told and interrupted():
                process.terminate()
                told = True
            time.sleep(0.05)
    except BaseException:  # a second interrupt
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _planned_steps(plan: Plan, runs: Path, arm: str, commands: Commands, claim: Path) -> int:
    """Steps that fill plan.seconds at the chain's speed, which is measured once and kept in a file."""
    of = chains(plan.arms)
    first = next(name for name in plan.arms if of[name] == of[arm])  # the rate has no speed of its own
    path = place(plan, runs, first, "speed").with_suffix(".json")
    if not path.exists():
        command = [*commands.probe, *plan.base, *plan.arms[first]]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        record = json.loads(output)
        partial = claim.with_suffix(".partial")
        partial.write_text(json.dumps({key: record[key] for key in ("step_ms", "tokens_per_second")}))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)  # of two invocations that measure at once, the first counts
        partial.unlink()
    return max(1, round(1e3 * plan.seconds / json.loads(path.read_text())["step_ms"]["median"]))
