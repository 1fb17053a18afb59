"""Benchmarks: python -m nanochat_jax.bench throughput --config=configs/tiny.py [--json]"""

import json
import sys

from nanochat_jax import cli
from nanochat_jax.config import Config, nearest

FLAGS = {
    "json": cli.Flag(False, "print the whole record as JSON"),
    "blocks": cli.Flag(10, "timed blocks; the median counts"),
    "steps": cli.Flag(5, "steps per block"),
}
KINDS = ("throughput",)


def main(cfg: Config, call: cli.Invocation) -> int:
    """Run the benchmark that the first word names."""
    cli.setup_runtime(cfg)
    from nanochat_jax.bench import throughput

    record = throughput.throughput(cfg, call.blocks, call.steps)
    if call.json:
        print(json.dumps(record, indent=1))
        return 0
    step, mfu = record["step_ms"], record["mfu"]
    print(
        f"{record['tokens_per_second']:,.0f} tokens/s (step {step['median']:.1f} ms, "
        f"{step['min']:.1f} to {step['max']:.1f}), {record['model_flops_per_second'] / 1e9:,.0f} model GFLOP/s, "
        f"MFU {'unknown for this device' if mfu is None else f'{100 * mfu:.1f}%'}, "
        f"first call {record['first_call_seconds']:.1f} s on {record['devices']} x {record['device']}"
    )
    return 0


if __name__ == "__main__":
    kind = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    if kind not in KINDS and "--help" not in sys.argv:
        print(
            f"usage: python -m nanochat_jax.bench <kind> --config=...{nearest(kind, KINDS)}", file=sys.stderr
        )
        sys.exit(2)
    cli.run(f"bench {kind or '<kind>'}", main, FLAGS)
