"""What `python -m nanochat_jax.bench <kind>` does: flags -> (record for --json, text for people)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.bench import ablate as ablation
from nanochat_jax.bench import ablate_report as report
from nanochat_jax.bench import away as elsewhere
from nanochat_jax.bench import data as loaders
from nanochat_jax.bench import inference as answers
from nanochat_jax.bench import kernels as products
from nanochat_jax.bench import optimizers as memory
from nanochat_jax.bench import telemetry as watching
from nanochat_jax.bench import throughput as speed
from nanochat_jax.config import Config, ConfigError

log = logging.getLogger(__name__)


def throughput(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Tokens per second of the train step. Flags: blocks, steps."""
    record = speed.throughput(cfg, flags.blocks, flags.steps)
    return record, speed.line(record)


def optimizers(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Memory and time of the optimizers. Flags: blocks, steps, trees."""
    trees = tuple(filter(None, flags.trees.split(","))) or tuple(memory.TREES)
    record = memory.optimizers(flags.blocks, flags.steps, trees)
    return record, memory.table(record)


def telemetry(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Time that telemetry takes per step. Flags: blocks, steps."""
    record = watching.telemetry(cfg, flags.blocks, flags.steps)
    return record, watching.line(record)


def kernels(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Correctness and speed of every kernel, or whether they compile for another card. Flags: write, card."""
    if flags.card and flags.write:
        raise ConfigError("--write has no effect with --card, which times nothing")
    if flags.card:
        record = elsewhere.away(flags.card)
        return record, elsewhere.table(record)
    record = products.kernels(flags.write)
    return record, products.table(record)


def data(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Idle time of the device by loader, with samples of uneven cost. Flags: seeds."""
    record = loaders.data(_seeds(flags) or (0, 1, 2))
    return record, loaders.table(record)


def inference(cfg: Config, flags: Any) -> tuple[dict[str, Any], str]:
    """Speed of a run's answers. Flags: workdir, peer_python, blocks (repeats), tokens."""
    record = answers.inference(cfg, Path(flags.workdir), flags.peer_python, flags.blocks, flags.tokens)
    return record, answers.table(record)


COMMANDS = {
    "throughput": throughput,
    "optimizers": optimizers,
    "telemetry": telemetry,
    "kernels": kernels,
    "data": data,
    "inference": inference,
}


def _seeds(flags: Any) -> tuple[int, ...]:
    """Of --seeds; () if it is absent. Raises: ConfigError."""
    try:
        return tuple(int(seed) for seed in flags.seeds.split(",")) if flags.seeds else ()
    except ValueError:
        raise ConfigError(f"--seeds must be whole numbers with commas, got '{flags.seeds}'") from None


def ablate(flags: Any, interrupted: Callable[[], bool]) -> tuple[dict[str, Any], str]:
    """Train what is missing of an ablation, then report. Flags: plan, seeds, arms, report, workdir.

    The record's status is 1 if a run failed or still waits, 130 if interrupted.
    Raises: ConfigError for mistakes, before anything runs; ModuleNotFoundError without matplotlib, at
    the end.
    """
    if not flags.plan:
        raise ConfigError("name the directory of arms.json, e.g. `bench ablate experiments/blocks`")
    jax.config.update("jax_platforms", "cpu")  # this process only counts; the devices are the children's
    directory = Path(flags.plan)
    plan = ablation.read_plan(directory)
    runs = Path(flags.workdir or Path("runs") / directory.resolve().name)
    arms = ablation.selected(flags.arms, plan) if flags.arms else ()
    seeds = list(_seeds(flags))
    if others := set(seeds) - set(plan.seeds):
        raise ConfigError(f"--seeds has {sorted(others)}, which arms.json does not plan: {list(plan.seeds)}")
    problems = [] if flags.report else ablation.run(directory, runs, seeds, arms, interrupted=interrupted)
    for problem in problems:
        log.warning("%s", problem)
    try:
        text, rows = report.write(directory, runs)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        advice = 'report.png needs the plot extra: pip install "nanochat_jax[plot]"; all else is written'
        raise ModuleNotFoundError(advice, name=error.name) from None
    status = 130 if interrupted() else int(bool(problems))
    return {"status": status, "problems": problems, "rows": rows}, text
