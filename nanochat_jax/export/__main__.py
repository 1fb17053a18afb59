"""Publish a run: python -m nanochat_jax.export --workdir=runs/tiny --out=published [--gguf=tq2_0,f16]"""

import functools
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
    "overwrite": cli.Flag(False, "replace --out if it is there"),
    "push": cli.Flag("", "owner/name on the Hugging Face hub"),
    "public": cli.Flag(False, "make a new hub repository public"),
    "dry_run": cli.Flag(False, "with --push: list what would be uploaded"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Export the run in --workdir (its own config, unless --config is given) to --out."""
    home, cfg = cli.trained(call)
    if not call.out:
        raise cli.UsageError("--out is missing: a new directory")
    if call.dry_run and not call.push:
        raise cli.UsageError("--dry_run has no effect without --push=owner/name")
    cli.setup_runtime(cfg)
    from nanochat_jax import tokenizer
    from nanochat_jax.export import publish
    from nanochat_jax.inference import load

    options = publish.Options(
        gguf=tuple(filter(None, call.gguf.lower().split(","))), dtype=call.dtype, ternary=call.ternary,
        name=call.name or call.push, license=call.license, context=call.context, check=call.check,
        overwrite=call.overwrite,
    )  # fmt: skip
    if found := publish.problems(cfg, options):
        raise cli.UsageError("; ".join(found))
    report = functools.partial(print, file=sys.stderr)
    words = tokenizer.load(home / "tokenizer.json")
    for line in publish.build(cfg, load.load_params(cfg, home), words, home, Path(call.out), options, report):
        report(line)
    if call.push:
        publish.upload(Path(call.out), call.push, not call.public, call.dry_run, report)
    print(call.out)
    return 0


if __name__ == "__main__":
    cli.run("export", main, FLAGS, needs_config=False)
