"""Train: python -m nanochat_jax.train --config=configs/tiny.py"""

from nanochat_jax import cli
from nanochat_jax.config import Config

FLAGS = {
    "resume": cli.Flag("auto", "continue the run in the workdir", ("auto", "never", "must")),
    "dry_run": cli.Flag(False, "trace the step, print the parameter table, touch no data"),
    "verify_resume": cli.Flag(False, "prove that kill -9 and resume give the same bits"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Check, compose, run."""
    cli.setup_runtime(cfg)
    if call.verify_resume:
        from nanochat_jax.train import verify

        skipped = ("--verify_resume", "--workdir", "--resume")
        argv = tuple(word for word in call.argv if not word.startswith(skipped))
        return verify.verify_resume(argv, cfg.train.steps)

    from nanochat_jax.train import program

    if call.dry_run:
        print(program.dry_run(cfg))
        return 0
    facts = {
        "command": ["python", "-m", "nanochat_jax.train", *call.argv],
        "config_file": call.config_path,
        "overrides": call.overrides,
        "environment": cli.relevant_environment(),
    }
    home = cli.workdir(cfg, call)
    with cli.Interrupt() as interrupt:
        return program.train(cfg, home, cli.cache_home(), facts, call.resume, lambda: interrupt.requested)


if __name__ == "__main__":
    cli.run("train", main, FLAGS)
