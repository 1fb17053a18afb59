"""Train every arm of an experiment with every seed, one process each, and tabulate the ends.

    python experiments/arms.py experiments/blocks

The directory holds arms.json: {"base": [arguments], "seeds": [0, 1], "arms": {name: [arguments]}}, where
arguments are those of `python -m nanochat_jax.train`. Each finished run appends a line to results.jsonl
there; runs that have one are skipped, so the same command goes on after an interruption. The first arm
is what the others are compared with, seed by seed. All arms see the same tokens in the same order.
"""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train(arguments: list[str], workdir: Path) -> dict:
    """Run to the end; returns what results.jsonl keeps of result.json and manifest.json."""
    command = [sys.executable, "-m", "nanochat_jax.train", *arguments, f"--workdir={workdir}"]
    status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    manifest = json.loads((workdir / "manifest.json").read_text())
    end = json.loads((workdir / "result.json").read_text()) if (workdir / "result.json").exists() else {}
    scores = end.get("eval", {})
    return {
        "bpb": scores.get("eval/bpb", math.nan), "loss": scores.get("eval/loss", math.nan),
        "steps": end.get("step"), "tokens": end.get("tokens"), "stop": end.get("stop") or status,
        "commit": (manifest["git"] or {}).get("commit", "")[:12], "jax": manifest["packages"]["jax"],
        "device": manifest["devices"]["kind"], "cpu": manifest["cpu"], "time": manifest["starts"][0]["time"],
    }  # fmt: skip


def table(plan: dict, results: list[dict]) -> str:
    """Mean over seeds per arm, its spread, and the mean of the differences from the first arm."""
    of = {(r["arm"], r["seed"]): r["bpb"] for r in results}
    first = next(iter(plan["arms"]))
    lines = ["| arm | bits per byte | by seed | against the first |", "|---|---|---|---|"]
    for arm in plan["arms"]:
        seeds = [s for s in plan["seeds"] if (arm, s) in of and (first, s) in of]
        if not seeds:
            continue
        each = [of[arm, s] for s in seeds]
        gap = statistics.mean(of[arm, s] / of[first, s] - 1 for s in seeds)
        by_seed = ", ".join(f"{value:.4f}" for value in each)
        lines.append(f"| {arm} | {statistics.mean(each):.4f} | {by_seed} | {gap:+.2%} |")
    return "\n".join(lines)


def main(directory: Path) -> None:
    plan = json.loads((directory / "arms.json").read_text())
    record = directory / "results.jsonl"
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = {(r["arm"], r["seed"]) for r in results}
    for seed in plan["seeds"]:
        for index, (arm, arguments) in enumerate(plan["arms"].items()):
            if (arm, seed) in done:
                continue
            workdir = ROOT / "runs" / directory.name / f"{index:02}-{seed}"
            result = train([*plan["base"], *arguments, f"--config.seed={seed}"], workdir)
            results.append({"arm": arm, "seed": seed, **result})
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(f"{arm}, seed {seed}: {result['bpb']:.4f} bits per byte", file=sys.stderr)
    print(table(plan, results))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
