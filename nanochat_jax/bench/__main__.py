"""Benchmarks: python -m nanochat_jax.bench throughput --config=configs/tiny.py [--json]"""

import json
import sys
from typing import Any

from nanochat_jax import cli
from nanochat_jax.config import Config, nearest

FLAGS = {
    "json": cli.Flag(False, "print the whole record as JSON"),
    "blocks": cli.Flag(10, "timed blocks; the median counts"),
    "steps": cli.Flag(5, "steps per block"),
    "trees": cli.Flag("", "optimizers: parameter trees, e.g. tiny,config_a; default all"),
}


def _throughput(cfg: Config, call: cli.Invocation) -> tuple[dict[str, Any], str]:
    from nanochat_jax.bench import throughput

    record = throughput.throughput(cfg, call.blocks, call.steps)
    return record, throughput.line(record)


def _optimizers(cfg: Config, call: cli.Invocation) -> tuple[dict[str, Any], str]:
    from nanochat_jax.bench import optimizers

    trees = tuple(filter(None, call.trees.split(","))) or tuple(optimizers.TREES)
    record = optimizers.optimizers(call.blocks, call.steps, trees)
    return record, optimizers.table(record)


# kind -> (benchmark, does it need --config)
KINDS = {"throughput": (_throughput, True), "optimizers": (_optimizers, False)}


def main(kind: str, cfg: Config, call: cli.Invocation) -> int:
    """Run one benchmark; print its record or the text for people."""
    cli.setup_runtime(cfg)
    record, text = KINDS[kind][0](cfg, call)
    print(json.dumps(record, indent=1) if call.json else text)
    return 0


if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if kind not in KINDS and "--help" not in sys.argv:
        print(
            f"usage: python -m nanochat_jax.bench <kind> --config=...{nearest(kind, KINDS)}", file=sys.stderr
        )
        sys.exit(2)
    cli.run(
        f"bench {kind or '<kind>'}",
        lambda cfg, call: main(kind, cfg, call),
        FLAGS,
        needs_config=KINDS.get(kind, (None, True))[1],
    )
