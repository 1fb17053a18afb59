"""A loss per training token under another model, in a file beside the corpus.

Token filtering (`model.filter.score` = "excess") compares the model's own losses with these. The file
holds float16 [n], entry i for token i of the training split as a target; `<file>.json` says which
corpus and rows they belong to. `evals.reference.token_losses` makes them.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from nanochat_jax import files
from nanochat_jax.config import DataConfig
from nanochat_jax.data.shards import Corpus
from nanochat_jax.data.sources import DataError
from nanochat_jax.data.stored import Stored


def write(path: Path, losses: np.ndarray, cfg: DataConfig, corpus: Corpus) -> None:
    """Write losses [n] of the training split, computed in rows of cfg.seq_len.

    Raises: DataError if there is not one finite loss for each token.
    """
    stored = np.asarray(losses, "<f2")
    if stored.shape != (corpus.train.count,) or not np.isfinite(stored).all():
        raise DataError(
            f"{path}: expected {corpus.train.count} finite losses, one per training token, got {stored.shape}"
        )
    with files.replacing(path) as partial:
        stored.tofile(partial)
    files.write_json(path.with_name(path.name + ".json"), _meant(cfg, corpus) | {"sha256": _sha256(path)})


def load(cfg: DataConfig, corpus: Corpus) -> Stored:
    """The losses in `cfg.reference`, float16 [n]; slices of it are arrays.

    Raises: DataError if the file is missing or damaged, or belongs to another corpus or row length.
    """
    path = Path(cfg.reference)
    try:
        found = json.loads(path.with_name(path.name + ".json").read_text())
        content = _sha256(path)
    except (OSError, ValueError) as error:
        raise DataError(f"data.reference: cannot read {path} and {path.name}.json: {error}") from None
    for key, value in (_meant(cfg, corpus) | {"sha256": content}).items():
        if found.get(key) != value:
            raise DataError(
                f"data.reference: {path} has {key} {found.get(key)}, expected {value}; compute the losses again"
            )
    return Stored(path, "<f2", corpus.train.count)


def _meant(cfg: DataConfig, corpus: Corpus) -> dict:
    return {
        "corpus": corpus.sha256, "tokens": corpus.train.count, "seq_len": cfg.seq_len, "isolate": cfg.isolate
    }  # fmt: skip


def _sha256(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
