"""Benchmarks: python -m nanochat_jax.bench throughput --config=configs/tiny.py [--json]"""

import json
import sys

from nanochat_jax import cli
from nanochat_jax.config import Config, nearest

FLAGS = {
    "json": cli.Flag(False, "print the whole record as JSON"),
    "blocks": cli.Flag(10, "timed blocks; the median counts"),
    "steps": cli.Flag(5, "steps per block"),
    "trees": cli.Flag("", "optimizers: parameter trees, e.g. tiny,config_a; default all"),
    "plan": cli.Flag("", "ablate: the directory of arms.json; also the word after `ablate`"),
    "seeds": cli.Flag("", "ablate, data: only these, e.g. 0,1"),
    "arms": cli.Flag("", "ablate: only these arms, or chains of arms, e.g. muon,adamw"),
    "report": cli.Flag(False, "ablate: train nothing, only write the report"),
    "peer_python": cli.Flag("", "inference: interpreter with torch and transformers to compare with"),
    "tokens": cli.Flag(64, "inference: tokens of each answer"),
    "card": cli.Flag("", "kernels: compile them for a card that is not here, e.g. h200; nothing is run"),
    "write": cli.Flag(False, "kernels: search tile sizes and store them in the table"),
}
# kind -> does it need --config
KINDS = {
    "throughput": True,
    "optimizers": False,
    "ablate": False,
    "telemetry": True,
    "kernels": False,
    "data": False,
    "inference": False,
}


def main(kind: str, cfg: Config, call: cli.Invocation) -> int:
    """Run one benchmark; print its record or the text for people. Status: the record's, else 0."""
    cfg = cli.trained(call)[1] if kind == "inference" else cfg
    cli.setup_runtime(cfg, keep_freed=kind != "inference")  # as the commands themselves
    from nanochat_jax.bench import commands

    if kind == "ablate":
        with cli.Interrupt() as interrupt:
            record, text = commands.ablate(call, lambda: interrupt.requested)
    else:
        record, text = commands.COMMANDS[kind](cfg, call)
    print(json.dumps(record, indent=1) if call.json else text)
    return record.get("status", 0)


if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if kind == "ablate" and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--plan={sys.argv[1]}"
    if kind not in KINDS and "--help" not in sys.argv:
        usage = f"usage: python -m nanochat_jax.bench <kind> --config=...{nearest(kind, KINDS)}"
        print(usage, file=sys.stderr)
        sys.exit(2)
    name = f"bench {kind or '<kind>'}"
    cli.run(name, lambda cfg, call: main(kind, cfg, call), FLAGS, needs_config=KINDS.get(kind, True))
