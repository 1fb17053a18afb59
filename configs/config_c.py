"""Machine C: one RTX 4090 beside two 56-core EPYCs. LoopLM of 0.7 B weights, 10 layers four times.

Argument: "fit" (default), "loop" or "dense", e.g. --config=configs/config_c.py:loop
    fit    dim 1792, 10 layers run 4 times: what fits 24 GB of the published width, streams and context.
    loop   the published 22 layers run 4 times: 1.32 B weights, the compute of 4.7 B unrolled (once "5B").
           Its float32 weights and gradients and the streams of 88 layers do not fit the card.
    dense  5.13 B weights in one loop: fits still less.
Published: 24 sequences x 2 microbatches, which needs many times the card's memory; the same 48 sequences
per update are cut into 48 microbatches. Rates, schedule and clip are the published ones; what is common to
the three machines, and what its data needs, comes from config_a.py. The entropy of loop exits has the weight
0.06.
"""

from nanochat_jax.cli import read_config
from nanochat_jax.config import ConfigError

DENSE = {"dim": 3584, "layers": 30, "heads": 28, "kv_heads": 4, "mlp_dim": 12544}


def get_config(arg: str = ""):
    if arg not in ("", "fit", "loop", "dense"):
        raise ConfigError(f"config argument '{arg}': expected fit, loop or dense")
    config = read_config("config_a:dense" if arg == "dense" else "config_a")
    config.name = config.name.replace("config_a", "config_c")
    m, o = config.model, config.opt
    m.update(dim=1792, layers=22, heads=14, kv_heads=14, mlp_dim=7168, quant="ternary", quant_group=128)
    config.data.update(seq_len=6144, batch=48, workers=112, prefetch=8)
    weights = (0.45, 0.35, 0.15, 0.05)
    config.data.mix = tuple((*part[:2], w) for part, w in zip(config.data.mix, weights, strict=True))
    config.train.update(steps=120_000, microbatches=48)
    if arg in ("", "fit"):
        m.layers = 10
    if arg != "dense":
        config.train.loss = (("exit", 1.0), ("exit_entropy", 0.06))
    if arg == "dense":
        m.update(DENSE)
    o.matrix.lr = 0.022
    for group in (o.embed, o.head, o.scalar):
        group.lr = 1.1e-4
    o.galore.update(rank=384, update_gap=300)
    o.schedule.update(warmup_steps=1500, decay_fraction=22.5 / 120)  # 3.5e-4 to 3.5e-5
    o.clip = 4.5
    config.ckpt.update(every_steps=1000, keep_last=5)
    config.eval.update(every_steps=5000, batches=21)  # about 1000 sequences
    return config
