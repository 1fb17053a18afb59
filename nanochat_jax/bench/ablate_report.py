"""Report of an ablation: report.md and report.png from arms.json, results.jsonl and the runs' metrics."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.bench import ablate
from nanochat_jax.bench.ablate_measure import metric_rows


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm, or the best rate of a chain of arms. Fields of runs follow `seeds`."""

    name: str
    arm: str  # where the runs are
    seeds: tuple[int, ...]
    bpb: tuple[float, ...]
    against: tuple[float, ...]  # bpb / that of the first row - 1, for the seeds that both have
    facts: dict[str, float | None]  # medians over seeds (peak_bytes: the largest), None = not measured


def t_quantile(freedom: int) -> float:
    """t with P(|T| < t) = 0.95 for Student's T of so many degrees of freedom.

    The distribution has a closed form for whole degrees (Abramowitz and Stegun 26.7.3, 26.7.4), in the
    angle atan(t / sqrt(freedom)); bisection inverts it.
    """

    def inside(angle: float) -> float:
        square, odd = math.cos(angle) ** 2, freedom % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * total * (freedom > 1))

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def rows(plan: ablate.Plan, results: ablate.Results) -> list[Row]:
    """One row for each arm that has results; of a chain of rates only the best of the first seed.

    While a chain's rates have not all run, each of them is a row.
    """
    of, ahead, found = ablate.chains(plan.arms), ablate.best(plan, results), []
    first = ahead.get(of[next(iter(plan.arms))], next(iter(plan.arms)))
    for arm in plan.arms:
        chain = of[arm]
        if chain in ahead and ahead[chain] != arm:
            continue
        seeds = tuple(seed for seed in plan.seeds if (arm, seed) in results)
        if not seeds:
            continue
        runs = [results[arm, seed] for seed in seeds]
        both = [seed for seed in seeds if (first, seed) in results]
        bpb = {seed: ablate.score(results[arm, seed]) for seed in seeds}
        base = {seed: ablate.score(results[first, seed]) for seed in both}
        found.append(
            Row(
                arm, arm, seeds, tuple(bpb.values()),
                tuple(bpb[s] / base[s] - 1 for s in both if math.isfinite(bpb[s] + base[s])),
                {
                    key: _over([run.get(key) for run in runs], largest=key == "peak_bytes")
                    for key in ("tokens_per_s", "peak_bytes", "state_bytes", "steps", "tokens", "seconds")
                },
            )
        )  # fmt: skip
    return found


def _over(values: list[float | None], largest: bool) -> float | None:
    known = [value for value in values if value is not None]
    return (max if largest else statistics.median)(known) if known else None


def markdown(plan: ablate.Plan, results: ablate.Results, title: str) -> str:
    """The report's text."""
    made = rows(plan, results)
    equal = len({row.facts["tokens"] for row in made}) <= 1
    budget = "equal tokens" if equal else "tokens differ between arms, see steps"
    budget = f"equal time, {plan.seconds:g} s of training steps" if plan.seconds else budget
    head = ["arm", "seeds", "bits per byte", "95 %", "against the first", "95 %", "tokens/s", "peak memory"]
    head += ["optimizer state", *(["steps", "seconds"] if plan.seconds or not equal else [])]
    lines = [f"# {title}", "", f"{budget.capitalize()}; {len(plan.seeds)} seed(s) planned.", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for index, row in enumerate(made):
        facts = row.facts
        mean = statistics.mean(row.bpb) if all(map(math.isfinite, row.bpb)) else None
        width, gap_width = half_width(row.bpb), half_width(row.against)
        gap = statistics.mean(row.against) if index and row.against else None
        cells = [row.name, ", ".join(map(str, row.seeds))]
        cells += ["diverged" if mean is None else f"{mean:.4f}", _cell(width, "± {:.4f}")]
        cells += [_cell(gap, "{:+.2%}"), _cell(gap_width if index else None, "± {:.2%}")]
        cells += [
            _cell(facts["tokens_per_s"], "{:,.0f}"),
            _size(facts["peak_bytes"]),
            _size(facts["state_bytes"]),
        ]
        if plan.seconds:
            cells += [_cell(facts["steps"], "{:,.0f}"), _cell(facts["seconds"], "{:.0f}")]
        lines.append(_line(cells))
    lines += ["", *_notes(plan, results, made), "", "![bits per byte by arm](report.png)", ""]
    return "\n".join(lines)


def _notes(plan: ablate.Plan, results: ablate.Results, made: list[Row]) -> list[str]:
    """What a reader must know to judge the table."""
    notes = [
        "95 %: half of the interval by Student's t over seeds; the differences are paired by seed. "
        "Tokens/s: median of each run's log, then over seeds. Peak memory: of the process on CPU, of the "
        "device's allocator elsewhere; the largest of the seeds."
    ]
    of, ahead = ablate.chains(plan.arms), ablate.best(plan, results)
    tuned = {chain: arm for chain, arm in ahead.items() if list(of.values()).count(chain) > 1}
    if tuned:
        notes += ["", f"Rates were chosen by seed {plan.seeds[0]}, which is among the seeds shown:", ""]
        for chain, chosen in tuned.items():
            rates = [arm for arm in plan.arms if of[arm] == chain]
            each = (f"{arm.rpartition(', ')[2]}: {_bpb(results[arm, plan.seeds[0]])}" for arm in rates)
            notes.append(f"- {chain}: {chosen.rpartition(', ')[2]} ({', '.join(each)})")
    wanted = {(row.arm, seed) for row in made for seed in plan.seeds}
    wanted |= {(arm, plan.seeds[0]) for arm in plan.arms}
    absent = sum(one not in results for one in wanted)
    if absent:
        notes += ["", f"{absent} of the planned runs have no result yet."]
    commits = sorted({results[one]["commit"] for one in results if results[one].get("commit")})
    devices = sorted({results[one]["device"] for one in results if results[one].get("device")})
    if commits:
        notes += ["", f"Commits {', '.join(commits)}; devices {', '.join(devices)}."]
    return notes


def _bpb(result: dict[str, Any]) -> str:
    value = ablate.score(result)
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _size(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f} MiB"


def picture(plan: ablate.Plan, results: ablate.Results, runs: Path, out: Path) -> None:
    """Bits per byte by arm with intervals and single seeds; beside it training losses of the first seed,
    where its metrics are still there. Needs matplotlib, the extra 'plot'."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    made = [row for row in rows(plan, results) if all(map(math.isfinite, row.bpb))]
    curves = {row.name: metric_rows(ablate.place(plan, runs, row.arm, row.seeds[0])) for row in made}
    curves = {name: found for name, found in curves.items() if found}
    columns = 1 + bool(curves)
    figure = Figure(figsize=(5.5 * columns, max(1.5 + 0.3 * len(made), 3.5)), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    left = axes[0, 0]
    for index, row in enumerate(made):
        left.plot(row.bpb, [index] * len(row.bpb), ".", color="gray", markersize=4)
        width = half_width(row.bpb)
        left.errorbar(statistics.mean(row.bpb), index, xerr=width, fmt="o", color=f"C{index % 10}", capsize=3)
    left.set(xlabel="held-out bits per byte (95 % interval, seeds)", ylim=(len(made) - 0.5, -0.5))
    left.set_yticks(range(len(made)), [row.name for row in made])
    if curves:
        for index, row in enumerate(made):
            if found := curves.get(row.name):
                points = [(one["step"], one.get("loss/next_token")) for one in found]
                axes[0, 1].plot(*zip(*points, strict=True), color=f"C{index % 10}", label=row.name)
        axes[0, 1].set(xlabel="step", ylabel="training loss (nats per token)")
        axes[0, 1].legend(frameon=False, fontsize="small")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


def write(directory: Path, runs: Path) -> tuple[str, list[dict[str, Any]]]:
    """Write report.md and report.png into the directory of arms.json.

    Returns: the text, and the rows as plain records. Raises: ModuleNotFoundError without matplotlib,
    after report.md is written.
    """
    plan = ablate.read_plan(directory)
    results = ablate.read_results(directory, plan)
    text = markdown(plan, results, directory.name)
    (directory / "report.md").write_text(text, encoding="utf-8")
    if results:
        picture(plan, results, runs, directory / "report.png")
    records = [dataclasses.asdict(row) for row in rows(plan, results)]
    return text, [row | {"bpb": [v if math.isfinite(v) else None for v in row["bpb"]]} for row in records]
