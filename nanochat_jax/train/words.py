"""What a run says of itself when it begins and when it is done."""

from pathlib import Path

import jax

from nanochat_jax import params as params_lib
from nanochat_jax import processes
from nanochat_jax.config import Config
from nanochat_jax.data import mixture, pipeline, shards
from nanochat_jax.model import loop as model_loop
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.telemetry.console import duration, si
from nanochat_jax.train import hooks


def opening(cfg: Config, home: Path, corpus: mixture.Mixture | shards.Corpus, origin: str) -> str:
    """Device, model, data, and where it goes. Args: origin: what it starts from."""
    device = jax.devices()[0]
    dtype = transformer.compute_dtype(cfg.model).name
    total = params_lib.count(transformer.param_specs(cfg.model))
    low = projections.from_config(cfg.model).low_text()
    several = f" of {processes.count()} processes" if processes.count() > 1 else ""
    return (
        f"device: {len(jax.devices())} x {device.device_kind} ({device.platform}){several}, computing in {dtype}\n"
        f"model:  {si(total)} parameters, {model_loop.layers_text(cfg.model)}, "
        f"{cfg.model.quant} matrices{f' ({low})' if low else ''}\n"
        f"{_data_lines(cfg, corpus)}\n"
        f"output: {home}; {origin}"
    )


def _data_lines(cfg: Config, corpus: mixture.Mixture | shards.Corpus) -> str:
    """What each part of the data holds, and how often the run sees it."""
    lines = []
    for part in mixture.parts_of(corpus):
        tokens = {split: si(count["tokens"]) for split, count in part.corpus.manifest["counts"].items()}
        epochs = cfg.train.steps * part.weight / pipeline.epoch_steps(cfg.data, part.corpus)
        what = f"{part.name} ({100 * part.weight:.0f}%)" if part.name else cfg.data.source
        lines.append(
            f"data:   {what}: {tokens['train']} tokens to train on, {tokens['val']} held out; "
            f"this run sees {epochs:.2f} epochs"
        )
        if cfg.data.kind == "chat":
            lines.append(f"        {pipeline.whole_text(cfg.data, part.corpus)}")
    return "\n".join(lines)


def closing(cfg: Config, home: Path, scores: dict[str, float], count: int, took: float) -> str:
    """Scores, speed, and what to do next. Args: count: steps of this start. took: its seconds."""
    tokens = count * cfg.data.batch * cfg.data.seq_len
    speed = f"{si(tokens / took)} tokens/s over all, " if count else ""
    first = (
        f'  python -m nanochat_jax.inference --workdir={home} --prompt="{cfg.eval.prompt}" --max_tokens=200\n'
        f"  python -m nanochat_jax.train --config=sft_tiny:base={home}  # to chat with it afterwards\n"
    ) * (cfg.data.kind == "text")
    return (
        f"done in {duration(took)}: {scores['eval/bpb']:.4f} bits per byte held out, "
        f"{scores['eval/loss']:.4f} nats per token, {speed}"
        f"peak memory {hooks.memory_gib():.1f} GiB\n\nnext:\n"
        f"{first}"
        f"  python -m nanochat_jax.inference --workdir={home} --chat\n"
        f"  python -m nanochat_jax.serve --workdir={home}\n"
        f"  tensorboard --logdir={home / 'tb'}\n"
        f"  python -m nanochat_jax.train --config={home / 'config.json'} --workdir={home} "
        f"--config.train.steps={2 * cfg.train.steps} --config.opt.schedule.rewarm_steps=50"
    )
