"""Draw held-out bits per byte of runs: python experiments/plot.py OUT.png LABEL=WORKDIR [...]

Reads each run's metrics.jsonl; nothing is smoothed. Needs the 'plot' extra (matplotlib).
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(workdir: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def main(out: str, *runs: str) -> None:
    """Two panels: training loss, and held-out bits per byte."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for run in runs:
        label, _, directory = run.partition("=")
        left.plot(*read(Path(directory), "loss/next_token"), label=label)
        right.plot(*read(Path(directory), "eval/bpb"), marker="o", markersize=3, label=label)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.set(xlabel="step", ylabel="held-out bits per byte")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
