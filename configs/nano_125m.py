"""A ternary model of 125 M weights for one GPU: GPT-2 small's shape, tied, 8-bit Muon.

The optimizers' benchmark tree of the same name. Data: Rust sources found on this machine, or
--config.data.source=hf:<dataset>. Expected: python -m nanochat_jax.plan --config=nano_125m
"""

from nanochat_jax.config import BLOCKS, defaults


def get_config():
    config = defaults()
    config.name = "nano_125m"
    m, o = config.model, config.opt
    m.update(BLOCKS["portable"])
    m.update(vocab_size=50257, dim=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp_dim=2048)
    m.update(quant="ternary", remat="block", unroll=1)
    config.data.update(source="rust", seq_len=1024, batch=128, workers=8, prefetch=8)
    # Each chunk reads and writes the head's float32 gradient (0.3 GB) whole: few large ones, where there is memory.
    config.train.update(steps=20_000, microbatches=4, loss_chunk=4096)
    o.matrix.state_bits = 8
    o.schedule.update(warmup_steps=200)
    config.eval.update(every_steps=1000, batches=8)
    return config
