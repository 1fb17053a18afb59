"""Batches of rows, in an order that is a function of (seed, step) and of nothing else.

The order does not depend on how many hosts, threads or restarts there are, so resuming needs one
integer: the step. Grain supplies the seekable global shuffle and the prefetching threads.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing, reference
from nanochat_jax.data.shards import Corpus, Tokens
from nanochat_jax.data.sources import DataError

Arrays = dict[str, np.ndarray]


class _Rows:
    """Random-access source of packed rows, with their part of `losses` [n] as field "reference"."""

    def __init__(self, tokens: Tokens, cfg: DataConfig, losses: np.ndarray | None = None):
        self.tokens, self.seq_len, self.isolate, self.losses = tokens, cfg.seq_len, cfg.isolate, losses

    def __len__(self) -> int:
        return packing.rows(self.tokens.count, self.seq_len)

    def __getitem__(self, index: int) -> Arrays:
        row = packing.window(self.tokens.ids, self.tokens.offsets, int(index), self.seq_len, self.isolate)
        if self.losses is not None:
            start = int(index) * self.seq_len + 1
            row["reference"] = np.asarray(self.losses[start : start + self.seq_len], np.float32)
        return row

    def __repr__(self) -> str:
        return f"_Rows({self.tokens!r}, seq_len={self.seq_len}, isolate={self.isolate})"


class _Shard:
    """Random-access source of batches: element i is this host's part of the batch of step i."""

    def __init__(self, rows: "grain.MapDataset[Arrays]", batch: int, index: int, count: int):
        self.rows, self.batch, self.first, self.size = rows, batch, index * batch // count, batch // count

    def __len__(self) -> int:
        return 1 << 62  # endless

    def __getitem__(self, index: int) -> Arrays:
        first = int(index) * self.batch + self.first
        return _stack(self.rows[i] for i in range(first, first + self.size))

    def __repr__(self) -> str:
        return f"_Shard({self.rows!r}, batch={self.batch}, first={self.first}, size={self.size})"


class Batches(Iterator[Arrays]):
    """Endless batches. `close` stops the threads behind them; a with statement does too."""

    def __init__(self, dataset: grain.IterDataset, start: int):
        self._iterator = iter(dataset)
        self._iterator.set_state({"next_index": start})
        self._open = True

    def __next__(self) -> Arrays:
        if not self._open:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """Stop. Further calls do nothing."""
        if self._open:
            self._open = False
            self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def batches(
    cfg: DataConfig, corpus: Corpus, seed: int, start: int = 0, shard: tuple[int, int] = (0, 1)
) -> Batches:
    """Endless batches from step `start` on, prepared ahead by `cfg.workers` threads.

    Args: start: the step of the first batch; seeking costs nothing. shard: (index, count), this
    host's share: rows [index * batch / count, ...) of each global batch, so that the shards in
    order make up the global batch.
    Returns: iterator of fields [batch / count, seq_len], see types.Batch. Close it after use.
    Raises: DataError if the split is smaller than one batch, or for cfg.reference as `reference.load`; ValueError for an impossible shard
    or start.
    """
    index, count = shard
    if not 0 <= index < count or cfg.batch % count:
        raise ValueError(f"shard {index} of {count}: data.batch = {cfg.batch} must be a multiple of {count}")
    if start < 0:
        raise ValueError(f"start must be a step, 0 or more, got {start}")
    source = _Shard(_order(cfg, corpus, seed), cfg.batch, index, count)
    options = grain.ReadOptions(
        num_threads=cfg.workers, prefetch_buffer_size=cfg.prefetch if cfg.workers else 0
    )
    return Batches(grain.MapDataset.source(source).to_iter_dataset(options), start)


def batch_at(cfg: DataConfig, corpus: Corpus, seed: int, step: int) -> Arrays:
    """The global batch of a step, fields [batch, seq_len]: the specification of `batches`."""
    return _Shard(_order(cfg, corpus, seed), cfg.batch, 0, 1)[step]


def _order(cfg: DataConfig, corpus: Corpus, seed: int) -> grain.MapDataset:
    """Training rows without end, in a new permutation every epoch."""
    rows = _Rows(corpus.train, cfg, reference.load(cfg, corpus) if cfg.reference else None)
    if len(rows) < cfg.batch:
        raise DataError(
            f"the training split has {corpus.train.count} tokens: {len(rows)} rows of data.seq_len = "
            f"{cfg.seq_len}, fewer than data.batch = {cfg.batch}"
        )
    dataset = grain.MapDataset.source(rows).seed(seed)
    return (dataset.shuffle() if cfg.shuffle else dataset).repeat()


class _Held(Sequence[Arrays]):
    """Held-out batches, made when asked for: the split may be larger than memory."""

    def __init__(self, rows: _Rows, chosen: np.ndarray, batch: int):
        self.rows, self.chosen, self.batch = rows, chosen, batch

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative indices, IndexError
        rows = [self.rows[i] for i in self.chosen[index * self.batch : (index + 1) * self.batch]]
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        return _stack(rows + [empty] * (self.batch - len(rows)))


def val_batches(cfg: DataConfig, corpus: Corpus, limit: int = 0) -> Sequence[Arrays]:
    """Held-out batches in order, all of shape [batch, seq_len].

    The last one is filled up with rows of zeros: segment 0, weight 0.
    Args: limit: at most so many batches, of rows spread evenly over the split; 0 = all.
    Raises: DataError if the held-out split is smaller than one row.
    """
    rows = _Rows(corpus.val, cfg)
    if not len(rows):
        raise DataError(
            f"the held-out split has {corpus.val.count} tokens, less than one row of data.seq_len = "
            f"{cfg.seq_len}; raise data.val_percent or lower data.seq_len"
        )
    wanted = min(len(rows), limit * cfg.batch) if limit else len(rows)
    return _Held(rows, np.linspace(0, len(rows) - 1, wanted).round().astype(int), cfg.batch)


def epoch_steps(cfg: DataConfig, corpus: Corpus) -> float:
    """Steps in which every training row is seen once."""
    return packing.rows(corpus.train.count, cfg.seq_len) / cfg.batch


def _stack(rows: Iterable[Any]) -> Arrays:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
