"""Train: python -m nanochat_jax.train --config=configs/tiny.py"""

from nanochat_jax import cli
from nanochat_jax.config import Config, ConfigError

FLAGS = {
    "resume": cli.Flag("auto", "continue the run in the workdir", ("auto", "never", "must")),
    "dry_run": cli.Flag(False, "trace the step, print the parameter table, touch no data"),
    "verify_resume": cli.Flag(False, "prove that kill -9 and resume give the same bits"),
    **cli.PROCESS_FLAGS,
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Check, compose, run."""
    if not call.dry_run:
        cli.check_base(cfg, cli.workdir(cfg, call))
    if call.verify_resume:
        if cfg.data.pool.order == "completion" and not cfg.data.pool.replay:
            raise ConfigError(
                "--verify_resume compares bits, and data.pool.order = 'completion' has another order every time"
            )
        cli.setup_runtime(cfg)
        from nanochat_jax.train import verify

        return verify.verify_resume(call.argv, cfg.train.steps)
    with cli.joined(cfg, call) as several:
        from nanochat_jax import processes
        from nanochat_jax.train import program

        if call.dry_run:
            if processes.first():
                print(program.dry_run(cfg))
            return 0
        from nanochat_jax.plan import devices, fit

        fit.refuse(cfg, devices.limit())
        facts = cli.record("train", call)
        home = cli.workdir(cfg, call)
        with cli.Interrupt(several) as interrupt:
            asked = processes.stop_asked(interrupt)
            return program.train(cfg, home, cli.cache_home(), facts, call.resume, asked)


if __name__ == "__main__":
    cli.run("train", main, FLAGS)
