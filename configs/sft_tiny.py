"""Teaches the tiny model to answer, on a few hundred short conversations about Rust and itself.

Starts from the parameters of configs/tiny.py's run, or of another one: its model, loss and tokenizer are
taken over. Data: nanochat_jax/data/conversations.jsonl; for your own set data.source to a .jsonl or .parquet
of {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
Run: python -m nanochat_jax.train --config=configs/sft_tiny.py
Argument: base=<workdir>, e.g. --config=configs/sft_tiny.py:base=runs/tiny_rust
"""

from pathlib import Path

from nanochat_jax.cli import read_config
from nanochat_jax.config import parse_arg


def get_config(arg: str = ""):
    base = Path(parse_arg(arg, base="runs/tiny").base)
    config = read_config("tiny")
    if (base / "config.json").exists():
        trained = read_config(str(base / "config.json"))
        trained.model.filter = config.model.filter  # its losses are of another corpus
        config.model.update(trained.model)
        config.train.loss = trained.train.loss
    config.name = "sft_tiny"
    config.ckpt.init_from = str(base)
    config.data.update(
        source="conversations", kind="chat", text_key="messages", tokenizer=str(base / "tokenizer.json"),
        val_percent=5, seq_len=256, batch=4,
    )  # fmt: skip
    for group in ("matrix", "embed", "head", "scalar"):
        config.opt[group].lr *= 0.5  # and fall to a tenth of that
    config.opt.schedule.update(kind="linear", warmup_steps=10)
    config.train.steps = 180
    config.eval.update(every_steps=90, batches=0, prompt="What is ownership?", sample_tokens=60)
    config.infer.temperature = 0.3
    return config
