"""Batches of rows, in an order that is a function of (seed, step) and of nothing else.

The order does not depend on how many hosts, threads or restarts there are, so resuming needs one
integer: the step. Grain supplies the seekable global shuffle and the prefetching threads.
"""

from collections.abc import Iterator

import grain
import numpy as np

from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing
from nanochat_jax.data.shards import Corpus, Tokens
from nanochat_jax.data.sources import DataError

Arrays = dict[str, np.ndarray]


class _Rows:
    """Random-access source of packed rows, for Grain."""

    def __init__(self, tokens: Tokens, seq_len: int, isolate: bool):
        self.tokens, self.seq_len, self.isolate = tokens, seq_len, isolate

    def __len__(self) -> int:
        return packing.rows(self.tokens.count, self.seq_len)

    def __getitem__(self, index: int) -> Arrays:
        return packing.window(self.tokens.ids, self.tokens.offsets, int(index), self.seq_len, self.isolate)

    def __repr__(self) -> str:
        return f"Rows({self.tokens!r}, seq_len={self.seq_len}, isolate={self.isolate})"


def _dataset(cfg: DataConfig, corpus: Corpus, seed: int) -> grain.MapDataset:
    source = _Rows(corpus.train, cfg.seq_len, cfg.isolate)
    if len(source) < cfg.batch:
        raise DataError(
            f"the training split has {corpus.train.count} tokens: {len(source)} rows of data.seq_len = "
            f"{cfg.seq_len}, fewer than data.batch = {cfg.batch}"
        )
    dataset = grain.MapDataset.source(source).seed(seed)
    if cfg.shuffle:
        dataset = dataset.shuffle()  # a new permutation every epoch
    return dataset.repeat()


def batch_at(cfg: DataConfig, corpus: Corpus, seed: int, step: int) -> Arrays:
    """The global batch of a step, fields [batch, seq_len]: the specification of `batches`."""
    dataset = _dataset(cfg, corpus, seed)
    return _stack([dataset[i] for i in range(step * cfg.batch, (step + 1) * cfg.batch)])


def batches(
    cfg: DataConfig, corpus: Corpus, seed: int, start: int = 0, shard: tuple[int, int] = (0, 1)
) -> Iterator[Arrays]:
    """Endless batches from step `start` on, prepared ahead by threads.

    Args: shard: (index, count): this host's share, rows [index * batch / count, ...) of each
    global batch, so that the shards in order make up the global batch.
    Yields: fields [batch / count, seq_len]. Close the iterator to stop its threads.
    Raises: DataError if the split is smaller than one batch, or shards do not divide the batch.
    """
    index, count = shard
    if cfg.batch % count:
        raise DataError(f"data.batch = {cfg.batch} must be a multiple of the {count} data shards")
    dataset, rows = _dataset(cfg, corpus, seed), cfg.batch // count

    class Shard:
        def __len__(self) -> int:
            return 2**62

        def __getitem__(self, step: int) -> Arrays:
            first = step * cfg.batch + index * rows
            return _stack([dataset[i] for i in range(first, first + rows)])

    options = grain.ReadOptions(num_threads=cfg.workers, prefetch_buffer_size=cfg.prefetch if cfg.workers else 0)
    iterator = iter(grain.MapDataset.source(Shard()).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return _closing(iterator)


def _closing(iterator) -> Iterator[Arrays]:
    try:
        yield from iterator
    finally:
        iterator.close()


def val_batches(cfg: DataConfig, corpus: Corpus, limit: int = 0) -> list[Arrays]:
    """Held-out batches in order, all of shape [batch, seq_len]; the last is padded with weight 0.

    Args: limit: at most so many batches, spread evenly over the split; 0 = all.
    """
    source = _Rows(corpus.val, cfg.seq_len, cfg.isolate)
    if not len(source):
        raise DataError(
            f"the held-out split has {corpus.val.count} tokens, less than one row of data.seq_len = "
            f"{cfg.seq_len}; raise data.val_percent or lower data.seq_len"
        )
    wanted = min(len(source), limit * cfg.batch) if limit else len(source)
    chosen = np.linspace(0, len(source) - 1, wanted).round().astype(int)
    made = []
    for first in range(0, wanted, cfg.batch):
        rows = [source[i] for i in chosen[first : first + cfg.batch]]
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        made.append(_stack(rows + [empty] * (cfg.batch - len(rows))))
    return made


def epoch_steps(cfg: DataConfig, corpus: Corpus) -> float:
    """Steps in which every training row is seen once."""
    return packing.rows(corpus.train.count, cfg.seq_len) / cfg.batch


def _stack(rows: list[Arrays]) -> Arrays:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
