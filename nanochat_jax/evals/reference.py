"""Losses of every training token under a model, for `data.reference` (Rho-1, arXiv:2404.07965).

python -m nanochat_jax.evals --workdir=<run of the reference model> --config=<the run to come> --reference=<file>
"""

from collections.abc import Callable

import jax
import numpy as np

from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing
from nanochat_jax.data.shards import Tokens
from nanochat_jax.types import Batch, Params


def token_losses(
    nll_fn: Callable[[Params, Batch], jax.Array], params: Params, cfg: DataConfig, tokens: Tokens
) -> np.ndarray:
    """Run the model over all rows in order, cfg.batch at a time.

    Args: nll_fn: jitted `losses.make_token_nll(...)`. tokens: the training split.
    Returns: float32 [n], entry i the nats of token i as a target. 0 for tokens that no row has as its
    target: the first one and those of the last, partial row.
    Raises: ValueError for conversations, whose rows are others.
    """
    if cfg.kind == "chat":
        raise ValueError("losses for data.reference need data.kind = 'text', got 'chat'")
    count, L = packing.rows(tokens.count, cfg.seq_len), cfg.seq_len
    made = np.zeros(tokens.count, np.float32)
    for first in range(0, count, cfg.batch):
        # The last batch repeats its last row, so that every batch has the same shape.
        indices = [min(first + i, count - 1) for i in range(cfg.batch)]
        rows = [packing.window(tokens.ids, tokens.offsets, i, L, cfg.isolate) for i in indices]
        batch = Batch(**{name: jax.numpy.stack([row[name] for row in rows]) for name in rows[0]})
        for i, losses in zip(indices, np.asarray(nll_fn(params, batch)), strict=True):
            made[i * L + 1 : i * L + L + 1] = losses
    return made
