"""Compile the variants on CPU and write XLA's memory figures: python experiments/plan/compare.py [name ...]

Writes results.json beside this file (about 5 minutes for all 28 on two cores); needs XLA_FLAGS=--xla_force_host_platform_device_count=2.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from variants import HELD_OUT, LATER, VARIANTS, variant

from nanochat_jax.plan import memory, report

RESULTS = Path(__file__).with_name("results.json")


def main(names: list[str]) -> None:
    """Measure the named variants, all by default, and print the table."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [*VARIANTS, *HELD_OUT, *LATER]:
        figures = report.compile_step(variant(name))
        known[name] = {key: figures[key] for key in ("arguments", "temporary", "peak")}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


def table(known: dict[str, dict[str, int]]) -> str:
    """Markdown: XLA's figures and the plan's, MB."""
    lines = [
        "| variant | arguments | XLA temporary | plan | peak off by | fullest phase |",
        "|---|---|---|---|---|---|",
    ]
    for name, xla in known.items():
        p = memory.predict(variant(name), "cpu")
        phase = max(p.phases, key=lambda k: p.phases[k])
        lines.append(
            f"| {name} | {xla['arguments'] / 1e6:.1f} | {xla['temporary'] / 1e6:.1f} | {p.temporary / 1e6:.1f} | "
            f"{p.peak / xla['peak'] - 1:+.1%} | {phase} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
