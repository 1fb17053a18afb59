"""Machine A: one 96 GB Blackwell workstation card. LoopLM of 1.8 B weights, 24 layers four times.

Argument: "loop" (default) or "dense", e.g. --config=configs/config_a.py:dense
    loop   dim 2048, 24 layers run 4 times: 1.82 B weights. Once called "7B": that is the compute of an
           unrolled model of 6.65 B (SwiGLU of 4 x dim, untied), not its number of weights.
    dense  7.19 B weights in one loop: does not fit this card with float32 weights and gradients.
`python -m nanochat_jax.plan --config=config_a` prints both counts, the memory, and the expected speed.

Published: 32 sequences x 4 microbatches. 32 sequences of 8192 tokens need several times the card's memory;
the same 128 sequences per update are cut into 64 microbatches instead. Loops learn when to leave: the entropy
of exits has the published weight (0.05), as have learning rates, schedule, clip and the weights of the mixture.

Data: four corpora, of which only the first can be installed; name the others where SOURCES does, or with
--config.data.mix="(('quality','rust',0.4),('verified','gs://bucket/verified/*.parquet',0.3),...)".
For Rust alone: --config.data.mix="()" --config.data.source=rust. The published filter (a file in 100 is
compiled, 0.85 must pass) is off, because of Debian's Rust sources one file in three compiles by itself; for
programs that do: --config.data.verify_every_n_examples=100 --config.data.min_compile_rate=0.85.
"""

from nanochat_jax.config import BLOCKS, ConfigError, defaults

SOURCES = {
    "quality": "rust",
    "verified": "data/verified",
    "synthetic": "data/synthetic",
    "docs": "data/docs",
}
DENSE = {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mlp_dim": 14336, "tied": True}


def get_config(arg: str = ""):
    if arg not in ("", "loop", "dense"):
        raise ConfigError(f"config argument '{arg}': expected loop or dense")
    config = defaults()
    config.name = "config_a_dense" if arg == "dense" else "config_a"
    m, o = config.model, config.opt
    m.update(BLOCKS["seed"])
    m.update(vocab_size=50257, dim=2048, layers=24, heads=16, kv_heads=16, head_dim=128, mlp_dim=8192)
    m.update(tied=False, quant="ternary_nvfp4", quant_group=0, remat="block", unroll=1)
    m.loop.update(count=4, gate="shared")
    m.mhc.streams = 4
    config.train.loss = (("exit", 1.0), ("exit_entropy", 0.05))
    if arg == "dense":
        m.update(DENSE)
        m.loop.update(count=1, gate="none")
        config.train.loss = (("next_token", 1.0),)
    config.data.update(seq_len=8192, batch=128, workers=64, prefetch=10)
    weights = (0.40, 0.30, 0.20, 0.10)
    config.data.mix = tuple((*part, weight) for part, weight in zip(SOURCES.items(), weights, strict=True))
    config.train.update(steps=100_000, microbatches=64)
    o.matrix.update(name="muon", lr=0.02, beta1=0.95, weight_decay=0.01, state_bits=8)
    for group in (o.embed, o.head, o.scalar):
        group.update(name="lion", lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.01)
    o.scalar.weight_decay = 0.0  # gains and mixing weights must not shrink
    o.galore.update(rank=512, update_gap=200, projector_bits=8)
    o.schedule.update(kind="wsd", warmup_steps=2000, decay_fraction=0.18, floor=0.1)  # 3e-4 to 3e-5
    o.clip = 5.0
    config.ckpt.update(every_steps=1000, every_minutes=0.0, keep_last=5)
    config.eval.update(every_steps=5000, batches=8)  # about 1000 sequences
    return config
