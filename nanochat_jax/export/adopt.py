"""A Hugging Face folder -> a run's directory: what inference reads and ckpt.init_from starts from."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from nanochat_jax import checkpoint
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import Config, TrainConfig, to_dict
from nanochat_jax.export import folder, importer
from nanochat_jax.export.variants import ExportError
from nanochat_jax.types import TrainState


def adopt(source: Path, workdir: Path) -> Config:
    """Write config.json, tokenizer.json and a checkpoint of step 0, without optimizer state.

    The directory appears whole or not at all. Returns: the config, in which training's settings are defaults.
    Raises: ExportError for a folder that cannot be read, or a workdir that is not empty.
    """
    model, params = importer.load(source)
    try:
        words = tokenizers.load(source / "tokenizer.json")
    except ValueError as error:
        raise ExportError(str(error)) from None
    if words.vocab_size > model.vocab_size:
        raise ExportError(f"the tokenizer has {words.vocab_size} ids, the model {model.vocab_size}")
    loss = (("next_token", 1.0), ("mtp", 0.2)) if model.mtp.depth else TrainConfig().loss
    cfg = Config(name=workdir.name, model=model, train=dataclasses.replace(TrainConfig(), loss=loss))
    with folder.whole(workdir, flag="--workdir") as target:
        words.save(target / "tokenizer.json")
        (target / "config.json").write_text(json.dumps(to_dict(cfg), indent=1) + "\n", encoding="utf-8")
        with checkpoint.Checkpointer(cfg.ckpt, target / "ckpt") as checkpoints:
            state = TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {})
            checkpoints.save(0, state, {"step": 0, "config": to_dict(cfg), "extension": None}, wait=True)
    return cfg
