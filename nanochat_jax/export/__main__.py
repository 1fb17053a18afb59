"""Publish a run, or read one back: python -m nanochat_jax.export --workdir=runs/tiny --out=published"""

import functools
import signal
import sys
from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.config import Config

FLAGS = {
    "out": cli.Flag("", "directory to write; it appears whole or not at all"),
    "gguf": cli.Flag("", "GGUF files to add, of f32, f16, bf16, q8_0, tq1_0, tq2_0; several with commas"),
    "dtype": cli.Flag("float32", "of the folder's tensors", ("float32", "float16", "bfloat16")),
    "ternary": cli.Flag("", "packed, dequantized or latent; default the best that the model allows"),
    "name": cli.Flag("", "of the model; default the run's name"),
    "license": cli.Flag("mit", "of the weights, an SPDX id"),
    "context": cli.Flag(0, "positions to allow; 0 = the length of training's rows"),
    "check": cli.Flag(True, "load what was written and compare"),
    "overwrite": cli.Flag(False, "replace --out"),
    "push": cli.Flag("", "owner/name on the Hugging Face hub"),
    "public": cli.Flag(False, "make a new hub repository public"),
    "dry_run": cli.Flag(False, "with --push: list what would be uploaded"),
    "adopt": cli.Flag("", "the reverse: a Hugging Face folder to make the new run --workdir of"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Export the run in --workdir (its own config, unless --config is given) to --out."""
    home, out = Path(call.workdir), Path(call.out).expanduser()
    if not call.workdir or bool(call.out) == bool(call.adopt):
        raise cli.UsageError("--workdir (a run) and either --out (a new directory) or --adopt are needed")
    if call.dry_run and not call.push:
        raise cli.UsageError("--dry_run has no effect without --push=owner/name")
    home, cfg = cli.trained(call) if call.out else (home, cfg)
    cli.setup_runtime(cfg, keep_freed=False)
    from nanochat_jax import tokenizer
    from nanochat_jax.export import adopt, folder, publish
    from nanochat_jax.inference import load

    if call.adopt:
        adopt.adopt(Path(call.adopt), home)
        print(home)
        return 0
    report = functools.partial(print, file=sys.stderr)
    options = publish.options(call.flags)
    if found := publish.problems(cfg, options):
        raise cli.UsageError("; ".join(found))
    folder.need_free(out, options.overwrite)
    words, params = tokenizer.load(home / "tokenizer.json"), load.load_params(cfg, home)
    for line in publish.build(cfg, params, words, home, out, options, report):
        report(line)
    publish.upload(out, call.push, not call.public, call.dry_run, report)
    print(out)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is half written is removed
    cli.run("export", main, FLAGS, needs_config=False)
