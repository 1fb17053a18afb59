"""Batches of rows, in an order that is a function of (seed, step) and of nothing else.

The order does not depend on how many hosts, threads or restarts there are, so resuming needs one
integer: the step. Grain supplies the seekable global shuffle, the interleaving of a mixture's parts
and the prefetching threads. The one exception is `data.pool.order` = "completion", where the order
is what happened: its journal belongs to the run.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax import chat
from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing, pool, reference
from nanochat_jax.data.mixture import Mixture, Part, parts_of
from nanochat_jax.data.shards import Corpus, Tokens
from nanochat_jax.data.sources import DataError
from nanochat_jax.data.stored import Stored

Arrays = dict[str, np.ndarray]


class _Rows:
    """Random-access source of packed rows of a corpus' or mixture's splits, one after the other.

    With their part of `losses` [n] as field "reference".
    """

    def __init__(self, corpus: Corpus | Mixture, split: str, cfg: DataConfig, losses: Stored | None = None):
        self.splits: list[Tokens] = [getattr(part.corpus, split) for part in parts_of(corpus)]
        self.seq_len, self.isolate, self.losses = cfg.seq_len, cfg.isolate, losses
        self.layouts = [_layout(split, cfg) for split in self.splits]
        self.learned = chat.learner(corpus.tokenizer) if cfg.kind == "chat" else None
        counts = [
            _row_count(split, cfg, layout) for split, layout in zip(self.splits, self.layouts, strict=True)
        ]
        self.starts = np.cumsum([0, *counts])  # first row of each split, and the number of rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Arrays:
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        tokens, index = self.splits[part], int(index) - int(self.starts[part])
        layout = self.layouts[part]
        if layout is not None and self.learned is not None:
            return packing.whole(
                tokens.ids, tokens.offsets, layout, index, self.seq_len, self.isolate, self.learned
            )
        row = packing.window(tokens.ids, tokens.offsets, index, self.seq_len, self.isolate)
        if self.losses is not None:
            start = index * self.seq_len + 1
            row["reference"] = self.losses[start : start + self.seq_len].astype(np.float32)
        return row

    def __repr__(self) -> str:
        return f"_Rows({self.splits!r}, seq_len={self.seq_len}, isolate={self.isolate})"

    @cached_property
    def documents(self) -> np.ndarray:
        """int64 [rows]: documents that start in each row: what making it costs."""
        found = []
        for split, layout, count in zip(self.splits, self.layouts, np.diff(self.starts), strict=True):
            if layout is not None:
                found.append(np.diff(layout.first))
                continue
            edges = np.searchsorted(split.offsets, np.arange(count + 1) * self.seq_len, "right")
            found.append(np.diff(edges))
        return np.concatenate(found)


def _layout(tokens: Tokens, cfg: DataConfig) -> packing.Layout | None:
    """Of conversations, which stay whole; None for text, which is concatenated and cut."""
    return _fitted(tokens, cfg.seq_len) if cfg.kind == "chat" else None


@lru_cache(maxsize=8)  # a run asks for its rows, for its epochs, and for what it says of them
def _fitted(tokens: Tokens, seq_len: int) -> packing.Layout:
    return packing.best_fit(tokens.offsets, seq_len)


def _row_count(tokens: Tokens, cfg: DataConfig, layout: packing.Layout | None) -> int:
    return packing.rows(tokens.count, cfg.seq_len) if layout is None else len(layout.first) - 1


class _Samples:
    """Rows of this host in the order of its batches: sample k is a row of step k // size."""

    def __init__(self, ids: Any, rows: _Rows, batch: int, index: int, count: int):
        self.ids, self.rows, self.batch, self.first, self.size = (
            ids,
            rows,
            batch,
            index * batch // count,
            batch // count,
        )

    def place(self, k: int) -> int:
        """Place of a sample among those of all hosts."""
        return k // self.size * self.batch + self.first + k % self.size

    def __getitem__(self, k: int) -> Arrays:
        return self.rows[self.ids[self.place(k)]]


class _Steps:
    """Random-access source of batches: element i is this host's part of the batch of step i."""

    def __init__(self, samples: _Samples):
        self.samples = samples

    def __len__(self) -> int:
        return 1 << 62  # endless

    def __getitem__(self, index: int) -> Arrays:
        first = int(index) * self.samples.size
        return _stack(self.samples[k] for k in range(first, first + self.samples.size))

    def __repr__(self) -> str:
        return f"_Steps({self.samples.rows!r}, batch={self.samples.batch}, first={self.samples.first}, size={self.samples.size})"


class _Reordered:
    """Elements of `ids` at the places that `order` names."""

    def __init__(self, ids: Any, order: Any):
        self.ids, self.order = ids, order

    def __getitem__(self, place: int) -> int:
        return self.ids[self.order[place]]


class Batches(Iterator[Arrays]):
    """Endless batches. `close` stops the threads behind them; a with statement does too."""

    def __init__(self, dataset: grain.IterDataset, state: dict[str, Any]):
        self._iterator = iter(dataset)
        self._iterator.set_state(state)
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
    cfg: DataConfig,
    corpus: Corpus | Mixture,
    seed: int,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    *,
    journal: Path | None = None,
    stages: pool.Stages = (),
    costs: np.ndarray | None = None,
) -> Batches:
    """Endless batches from step `start` on, prepared ahead by `cfg.workers` threads.

    Args: start: the step of the first batch; seeking costs nothing. shard: (index, count), this
    host's share: rows [index * batch / count, ...) of each global batch, so that the shards in
    order make up the global batch. journal: file for the order of rows, with cfg.pool.order =
    "completion". stages: on-line transforms of a row, one after the other, in the pool's threads.
    costs: float [rows], what each row will cost, for "declared"; default: documents in the row.
    Returns: iterator of fields [batch / count, seq_len], see types.Batch. Close it after use.
    Raises: DataError if the split is smaller than one batch, for cfg.reference as `reference.load`,
    or for a journal that does not fit; ValueError for an impossible shard or start.
    """
    index, count = shard
    if not 0 <= index < count or cfg.batch % count:
        raise ValueError(f"shard {index} of {count}: data.batch = {cfg.batch} must be a multiple of {count}")
    if start < 0:
        raise ValueError(f"start must be a step, 0 or more, got {start}")
    ids, rows = _order(cfg, corpus, seed, costs)
    samples = _Samples(ids, rows, cfg.batch, index, count)
    if cfg.pool.order == "strict" and not stages:
        reading = grain.ReadOptions(
            num_threads=cfg.workers, prefetch_buffer_size=cfg.prefetch if cfg.workers else 0
        )
        source = grain.MapDataset.source(_Steps(samples))
        return Batches(source.to_iter_dataset(reading), {"next_index": start})
    options: dict[str, Any] = {"stages": stages, "window": max(cfg.pool.window, samples.size)}
    state: dict[str, Any] = {"next_index": start * samples.size}
    elements: Any = samples
    if cfg.pool.order == "declared":
        order = ids.order
        options |= {"priority": lambda k: order[samples.place(k)], "reach": cfg.pool.delay}
    elif cfg.pool.replay:
        elements = _Reordered(samples, _Replayed(_own(Path(cfg.pool.replay), shard)))
    elif cfg.pool.order == "completion":
        if journal is None:
            raise ValueError("completion order needs a journal to be resumed from")
        journal = _own(journal, shard)
        options |= {"completion": True, "max_late": cfg.pool.max_late, "journal": journal}
        state = pool.state_at(journal, start * samples.size, cfg.pool.max_late, options["window"])
    prepared = pool.Pool(elements, cfg.workers, **options).batch(samples.size, batch_fn=_stack)
    ahead = grain.experimental.ThreadPrefetchIterDataset(prepared, prefetch_buffer_size=cfg.prefetch)
    return Batches(ahead, state)


def _own(journal: Path, shard: tuple[int, int]) -> Path:
    """The file of one host: data_order.bin, or data_order.0-of-2.bin."""
    index, count = shard
    return journal if count == 1 else journal.with_name(f"{journal.stem}.{index}-of-{count}{journal.suffix}")


class _Replayed:
    """The order that a journal tells."""

    def __init__(self, path: Path):
        count = path.stat().st_size // 2 if path.exists() else 1
        self.path, self.order = path, pool.read_journal(path, 0, count)

    def __getitem__(self, place: int) -> int:
        if place >= len(self.order):
            raise DataError(f"{self.path} knows the order of {len(self.order)} rows, and they are through")
        return int(self.order[place])


def batch_at(cfg: DataConfig, corpus: Corpus | Mixture, seed: int, step: int) -> Arrays:
    """The global batch of a step, fields [batch, seq_len]: the specification of `batches`.

    With cfg.pool.order = "completion" it is the batch if no row were slow.
    """
    ids, rows = _order(cfg, corpus, seed)
    return _Steps(_Samples(ids, rows, cfg.batch, 0, 1))[step]


def _order(
    cfg: DataConfig, corpus: Corpus | Mixture, seed: int, costs: np.ndarray | None = None
) -> tuple[Any, _Rows]:
    """(row numbers without end, in a new permutation every epoch; training rows)."""
    parts = parts_of(corpus)
    losses = reference.load(cfg, parts[0].corpus) if cfg.reference else None
    rows = _Rows(corpus, "train", cfg, losses)
    if len(rows) < cfg.batch:
        tokens = sum(part.corpus.train.count for part in parts)
        raise DataError(
            f"the training split has {tokens} tokens: {len(rows)} rows of data.seq_len = "
            f"{cfg.seq_len}, fewer than data.batch = {cfg.batch}"
        )
    made = []
    for part, first, stop in zip(parts, rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True):
        if first == stop:
            raise DataError(
                f"data.mix part '{part.name}' has {part.corpus.train.count} training tokens, less than one "
                f"row of data.seq_len = {cfg.seq_len}"
            )
        dataset = grain.MapDataset.range(first, stop).seed(_part_seed(seed, part))
        made.append((dataset.shuffle() if cfg.shuffle else dataset).repeat())
    ids = made[0] if len(made) == 1 else grain.MapDataset.mix(made, weights=_whole(parts))
    if cfg.pool.order == "declared":
        late, plain = pool.slow(rows.documents if costs is None else costs), ids
        ids = _Reordered(plain, pool.Declared(lambda i: bool(late[plain[i]]), cfg.pool.delay))
    return ids, rows


def _part_seed(seed: int, part: Part) -> int:
    """A part's order does not depend on the other parts."""
    return zlib.crc32(f"{seed}/{part.name}".encode()) & 0x7FFFFFFF if part.name else seed


def _whole(parts: tuple[Part, ...]) -> list[int]:
    """Weights as whole numbers, the least 100: Grain rounds others down."""
    least = min(part.weight for part in parts)
    return [round(100 * part.weight / least) for part in parts]


def whole_text(cfg: DataConfig, corpus: Corpus) -> str:
    """How the training conversations of a corpus fit into rows: what is cut off, and what is padding."""
    tokens = corpus.train
    layout, (cut, lost) = (
        _fitted(tokens, cfg.seq_len),
        packing.cut_off(tokens.offsets, cfg.seq_len),
    )
    documents, rows = len(layout.order), len(layout.first) - 1
    filled = tokens.count - documents - lost
    ends = f"{cut} longer than a row lose {lost} tokens at their ends" if cut else "none is longer than a row"
    return (
        f"{documents} conversations in {rows} rows of {cfg.seq_len}, {100 - 100 * filled / (rows * cfg.seq_len):.0f}% "
        f"padding; {ends}"
    )


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


def val_batches(cfg: DataConfig, corpus: Corpus | Mixture, limit: int = 0) -> Sequence[Arrays]:
    """Held-out batches in order, all of shape [batch, seq_len].

    The last one is filled up with rows of zeros: segment 0, weight 0.
    Args: limit: at most so many batches, of rows spread evenly over the split, a mixture's parts
    having the share of rows that their weights say, as far as they have as many; 0 = all.
    Raises: DataError if a held-out split is smaller than one row.
    """
    rows, chosen = _held_out(cfg, corpus, limit)
    return _Held(rows, np.concatenate(chosen), cfg.batch)


def val_parts(cfg: DataConfig, corpus: Corpus | Mixture, limit: int = 0) -> dict[str, Sequence[Arrays]]:
    """The rows of `val_batches` as batches of each part alone, by its name; a corpus has the name ""."""
    rows, chosen = _held_out(cfg, corpus, limit)
    names = (part.name for part in parts_of(corpus))
    return {name: _Held(rows, own, cfg.batch) for name, own in zip(names, chosen, strict=True)}


def _held_out(cfg: DataConfig, corpus: Corpus | Mixture, limit: int) -> tuple[_Rows, list[np.ndarray]]:
    """(held-out rows, the numbers of those of each part that are scored)."""
    parts = parts_of(corpus)
    rows = _Rows(corpus, "val", cfg)
    counts = np.diff(rows.starts)
    for part, count in zip(parts, counts, strict=True):
        if not count:
            which = f"of data.mix part '{part.name}' " if part.name else ""
            raise DataError(
                f"the held-out split {which}has {part.corpus.val.count} tokens, less than one row of "
                f"data.seq_len = {cfg.seq_len}; raise data.val_percent or lower data.seq_len"
            )
    shares = _shares(parts, counts, limit * cfg.batch)
    chosen = [
        first + np.linspace(0, count - 1, wanted).round().astype(int)
        for first, count, wanted in zip(rows.starts[:-1], counts, shares, strict=True)
    ]
    return rows, chosen


def _shares(parts: tuple[Part, ...], counts: np.ndarray, limit: int) -> np.ndarray:
    """How many rows of each part: all if limit is 0, else `limit` in all, by weight (largest remainders)."""
    if not limit:
        return counts
    exact = limit * np.array([part.weight for part in parts])
    shares = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(shares - exact, kind="stable")[: limit - shares.sum()]:
        shares[index] += 1
    return np.minimum(np.maximum(shares, 1), counts)


def epoch_steps(cfg: DataConfig, corpus: Corpus | Mixture) -> float:
    """Steps in which every training row is seen once; of a mixture, of the part that is seen most often."""
    return min(
        _row_count(part.corpus.train, cfg, _layout(part.corpus.train, cfg)) / (cfg.batch * part.weight)
        for part in parts_of(corpus)
    )


def _stack(rows: Iterable[Any]) -> Arrays:
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
