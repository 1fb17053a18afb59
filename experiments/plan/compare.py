"""Compile variants on CPU and write XLA's memory figures: python experiments/plan/compare.py [name ...]

Those for as many devices as there are, all by default; for the others set
XLA_FLAGS=--xla_force_host_platform_device_count=2. With one device some products run in kernels of their own, and need
other buffers. --xla_backend_optimization_level=0 makes it faster, and leaves the figures as they are. Writes
results.json beside this file (about 15 minutes on two cores).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import jax
from variants import ADDED, CHECKS, HELD_OUT, LATER, TECHNIQUES, VARIANTS, variant

from nanochat_jax.plan import memory, report

RESULTS = Path(__file__).with_name("results.json")


def main(names: list[str]) -> None:
    """Measure the named variants, all by default, and print the table."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [*VARIANTS, *HELD_OUT, *LATER, *TECHNIQUES, *CHECKS]:
        mesh = variant(name).mesh
        if mesh.data * mesh.fsdp * mesh.tensor != jax.device_count():
            continue
        figures = report.compile_step(variant(name))
        known[name] = {key: figures[key] for key in ("arguments", "temporary", "peak")}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(techniques(known), table(known), sep="\n\n")


def techniques(known: dict[str, dict[str, int]]) -> str:
    """Markdown: of every technique in a scan and written out XLA's figures, the plan's, and the difference, MB."""
    lines = [
        "| technique | arguments | in a scan: XLA temporary | plan | peak off by | written out: XLA temporary | plan | "
        "peak off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for added in ADDED:
        if not {f"scan: {added}", f"written out: {added}"} <= known.keys():
            continue  # not measured yet
        cells = [added]
        for form in ("scan", "written out"):
            xla, p = known[f"{form}: {added}"], memory.predict(variant(f"{form}: {added}"), "cpu")
            cells += [f"{xla['arguments'] / 1e6:.1f}"] * (form == "scan")
            cells += [f"{xla['temporary'] / 1e6:.1f}", f"{p.temporary / 1e6:.1f}"]
            cells += [f"{p.peak / xla['peak'] - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(known: dict[str, dict[str, int]]) -> str:
    """Markdown: XLA's figures of the other variants and the plan's, MB."""
    lines = [
        "| variant | arguments | XLA temporary | plan | peak off by | fullest phase |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*VARIANTS, *HELD_OUT, *LATER, *CHECKS):
        if name not in known:
            continue
        xla = known[name]
        p = memory.predict(variant(name), "cpu")
        phase = max(p.phases, key=lambda k: p.phases[k])
        lines.append(
            f"| {name} | {xla['arguments'] / 1e6:.1f} | {xla['temporary'] / 1e6:.1f} | {p.temporary / 1e6:.1f} | "
            f"{p.peak / xla['peak'] - 1:+.1%} | {phase} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
