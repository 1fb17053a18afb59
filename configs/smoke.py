"""Twenty steps of a very small model: does everything run? Used by continuous integration.

Run: python -m nanochat_jax.train --config=configs/smoke.py
"""

from nanochat_jax.config import BLOCKS, defaults


def get_config(arg: str = ""):
    config = defaults()
    config.name = "smoke"
    config.model.update(BLOCKS["modern"])
    config.model.update(vocab_size=512, dim=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp_dim=128)
    config.model.quant = "ternary"
    config.data.update(seq_len=128, batch=4, max_bytes=2_000_000, val_percent=5)
    config.opt.schedule.warmup_steps = 5
    config.train.steps = 20
    config.eval.update(every_steps=10, batches=4, sample_tokens=20)
    config.log.every_steps = 5
    return config
