"""Sample from a trained run, or chat: python -m nanochat_jax.inference --workdir=runs/tiny --prompt="def " """

import dataclasses
import sys

from nanochat_jax import cli
from nanochat_jax.config import Config, resolve, to_dict

FLAGS = {
    "chat": cli.Flag(False, "talk with the model; /clear forgets, Ctrl-C ends an answer, Ctrl-D the chat"),
    "prompt": cli.Flag("", "text to continue; default eval.prompt of the run"),
    "system": cli.Flag("", "what a chat begins with"),
    "max_tokens": cli.Flag(-1, "tokens to generate; default infer.max_tokens"),
    "temperature": cli.Flag(-1.0, "0 = greedy; default infer.temperature"),
    "top_k": cli.Flag(-1, "default infer.top_k"),
    "top_p": cli.Flag(-1.0, "default infer.top_p"),
    "exit_quantile": cli.Flag(-1.0, "1 = all loops; default infer.exit_quantile"),
    "loop_cache": cli.Flag("", "all or last; default infer.loop_cache"),
    "weights": cli.Flag("", "auto, full, codes or packed; default infer.weights"),
    "impl": cli.Flag("", "of the packed product; default infer.impl"),
    "draft_tokens": cli.Flag(-1, "tokens drafted ahead, 0 = none; default infer.draft_tokens"),
    "draft_loops": cli.Flag(-1, "loops of the drafts, 0 = layers of model.mtp; default infer.draft_loops"),
    "seed": cli.Flag(0, "of the draws"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Load the run in --workdir (its own config, unless --config is given); print a sample or chat."""
    home, cfg = cli.trained(call)
    given = {name: call.flags[name] for name in FLAGS if name not in ("chat", "prompt", "system", "seed")}
    changes = {name: value for name, value in given.items() if value not in ("", -1)}
    settings = resolve({**to_dict(cfg), "infer": {**dataclasses.asdict(cfg.infer), **changes}}).infer
    cli.setup_runtime(cfg, keep_freed=False)
    from nanochat_jax.inference import load, terminal

    try:
        if call.chat:
            return terminal.main(
                *load.load_engine(cfg, home, settings, slots=1), settings, call.seed, call.system
            )
        ran, tell = [], []
        text = load.sampler(cfg, home, settings, ran, tell)
        prompt = call.prompt or cfg.eval.prompt
        before = prompt  # written with the first piece: a prompt that is refused has none
        for piece in text(prompt, call.seed):
            sys.stdout.write(before + piece)
            sys.stdout.flush()
            before = ""
    except BrokenPipeError:
        return 0
    print()
    if line := load.summary(cfg.model, ran, tell):
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run("inference", main, FLAGS, needs_config=False)
