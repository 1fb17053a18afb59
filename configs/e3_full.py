"""Everything in one step: ternary weights, FP4 backward products, mixed residual streams, loops, multi-token
prediction, token filtering, GaLore over 8-bit Muon. The tiny model, on a laptop.

It shows that the techniques work together, not that together they are better: see experiments/e3.
Tokens are filtered at random, because scores that help need another model's losses
(`python -m nanochat_jax.evals --workdir=<its run> --config=configs/e3_full.py --reference=<file>`, then
--config.model.filter.score=excess --config.data.reference=<file>).
Run: python -m nanochat_jax.train --config=configs/e3_full.py
Argument: as for tiny.py
"""

from nanochat_jax.cli import read_config


def get_config(arg: str = ""):
    config = read_config(f"e3_galore2_muon_8bit:{arg}")
    config.name = "e3_full"
    config.model.quant = "ternary_nvfp4"
    config.model.mhc.streams = 4
    config.model.mhc.form = "permutation"  # exact, and on CPU quicker to compile than Sinkhorn's iterations
    config.model.unroll = 2  # layers per scan step: all four at once take minutes to compile on CPU
    config.model.loop.count = 2
    config.model.loop.norm = True
    config.model.mtp.depth = 1
    config.model.filter.keep = 0.6
    config.model.filter.score = "random"
    config.train.loss = (("next_token", 1.0), ("mtp", 0.2), ("z", 1e-4), ("logit_entropy", 0.01))
    return config
