"""Machine B: two RTX 4090. LoopLM of 0.91 B weights, 20 layers four times.

Argument: "loop" (default) or "dense", e.g. --config=configs/config_b.py:dense
    loop   dim 1536, 20 layers run 4 times: 0.91 B weights, the compute of 3.17 B unrolled (once "3B").
    dense  2.97 B weights in one loop, split over both cards: on the edge of fitting, see experiments/plan.
Published: 4 sequences x 8 microbatches, two per card, each of which holds all weights. Rates, schedule and
clip are the published ones; what is common to the three machines, and what its data needs, comes from
config_a.py. The entropy of loop exits has the weight 0.08.
"""

from nanochat_jax.cli import read_config

DENSE = {"dim": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "mlp_dim": 8192}


def get_config(arg: str = ""):
    config = read_config(f"config_a:{arg}")
    config.name = config.name.replace("config_a", "config_b")
    m, o = config.model, config.opt
    m.update(dim=1536, layers=20, heads=12, kv_heads=12, mlp_dim=6144, quant="ternary", quant_group=128)
    m.mhc.streams = 2
    config.mesh.data = 2  # the cards have no NVLink: gradients cross once per update, see experiments/plan
    config.data.update(seq_len=4096, batch=32, workers=8, prefetch=4)
    weights = (0.50, 0.30, 0.15, 0.05)
    config.data.mix = tuple((*part[:2], w) for part, w in zip(config.data.mix, weights, strict=True))
    config.train.update(steps=150_000, microbatches=8)
    if arg != "dense":
        config.train.loss = (("exit", 1.0), ("exit_entropy", 0.08))
    if arg == "dense":
        m.update(DENSE)
        config.train.microbatches = 16  # one sequence per card
        config.mesh.update(data=1, fsdp=2, reduce_dtype="bfloat16")  # no card holds all weights
    o.matrix.lr = 0.025
    for group in (o.embed, o.head, o.scalar):
        group.lr = 1.2e-4
    o.galore.update(rank=256, update_gap=500)
    o.schedule.update(warmup_steps=1000, decay_fraction=29 / 150)  # 4e-4 to 4e-5
    o.clip = 4.0
    config.ckpt.update(every_steps=2000, keep_last=3)
    config.eval.update(every_steps=10_000, batches=16)  # about 500 sequences
    return config
