"""Score a trained run: python -m nanochat_jax.evals --workdir=runs/tiny [--reference=losses.f16]"""

import dataclasses
from pathlib import Path

from nanochat_jax import cli
from nanochat_jax.config import Config, padded_vocab, resolve

FLAGS = {
    "reference": cli.Flag("", "write the run's loss of every training token here, for data.reference"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Bits per byte of held-out text, or a file of losses, of the run in --workdir.

    The corpus and the rows are those of --config, else the run's own.
    """
    home, cfg = cli.trained(call)
    run = resolve(cli.read_config(str(home / "config.json")))
    cli.setup_runtime(run)
    import jax

    from nanochat_jax import losses, tokenizer
    from nanochat_jax.data import mixture, pipeline, reference
    from nanochat_jax.evals import loss
    from nanochat_jax.evals import reference as scoring
    from nanochat_jax.inference import load
    from nanochat_jax.train import step
    from nanochat_jax.types import Batch

    corpus = mixture.prepare(cfg.data, cfg.model.vocab_size, cli.cache_home() / "tokens", print)
    if corpus.tokenizer.sha256 != tokenizer.load(home / "tokenizer.json").sha256:
        raise cli.UsageError(
            f"{home} has another tokenizer than the corpus; set data.tokenizer = {home / 'tokenizer.json'}"
        )
    params = load.load_params(run, home)
    if call.reference:
        if isinstance(corpus, mixture.Mixture):
            raise cli.UsageError("--reference: losses belong to one corpus, and data.mix has several")
        nll = jax.jit(losses.make_token_nll(run.model, run.train.loss_chunk))
        made = scoring.token_losses(nll, params, cfg.data, corpus.train)
        reference.write(Path(call.reference), made, cfg.data, corpus)
        print(f"{call.reference}: {len(made)} losses, mean {made.mean():.4f} nats; train with\n  "
              f"--config.data.reference={call.reference} --config.model.filter.keep=0.6")  # fmt: skip
        return 0
    sizes = corpus.tokenizer.token_bytes(padded_vocab(run.model))
    parts = pipeline.val_parts(cfg.data, corpus, cfg.eval.batches)
    scored = dataclasses.replace(run, infer=cfg.infer)  # exits as --config.infer says
    eval_step = jax.jit(step.make_eval_step(losses.make_eval_nll(scored)))
    for name, value in loss.of_parts(eval_step, params, parts, lambda rows: Batch(**rows), sizes).items():
        print(f"{name} {value:.6g}")
    return 0


if __name__ == "__main__":
    cli.run("evals", main, FLAGS, needs_config=False)
