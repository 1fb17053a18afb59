"""Examine the machine: python -m nanochat_jax.doctor [--json] [--config=<config>]"""

import json
from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.config import Config

FLAGS = {
    "json": cli.Flag(False, "print everything as JSON, for a bug report"),
    "timeout": cli.Flag(120.0, "seconds for each check that may hang"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Examine, print; 3 if something will not work."""
    cli.setup_runtime(cfg)

    import jax

    from nanochat_jax.doctor import report

    environment = cli.relevant_environment()
    programs = Path(jax.config.jax_compilation_cache_dir)
    findings = report.examine(
        cfg, cli.workdir(cfg, call), cli.cache_home(), programs, environment, call.timeout
    )
    print(json.dumps(report.record(findings, environment), indent=1) if call.json else report.text(findings))
    return 3 if report.failed(findings) else 0


if __name__ == "__main__":
    cli.run("doctor", main, FLAGS, needs_config=False)
