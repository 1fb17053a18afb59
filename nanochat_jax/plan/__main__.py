"""Plan a run before it runs: python -m nanochat_jax.plan --config=configs/config_a.py --device=rtxpro6000"""

import json

from nanochat_jax import cli
from nanochat_jax.config import Config

NAMES = ("rtx4090", "rtx5090", "rtxpro6000", "a100", "h100", "h200", "b200", "cpu")
FLAGS = {
    "device": cli.Flag("h100", "whose memory and speed", NAMES),
    "fit": cli.Flag("", "memory of each device to fit, e.g. 24GiB; default 92 % of the device's"),
    "compile": cli.Flag(
        False,
        "also compile the step, for XLA's own memory figures: for the device, if the extra card is installed",
    ),
    "json": cli.Flag(False, "print the whole record as JSON"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Print the plan."""
    cli.setup_runtime(cfg)
    from nanochat_jax.plan import report

    record = report.plan(cfg, call.device, call.fit, call.compile)
    print(json.dumps(record, indent=1) if call.json else report.text(record))
    return 0


if __name__ == "__main__":
    cli.run("plan", main, FLAGS)
