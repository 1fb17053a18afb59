"""Several corpora as one: `data.mix` names parts, their sources and their weights.

Each part is a corpus of its own (see `shards`), with its own held-out documents; whether a document
is held out follows from its content alone, so parts that share one agree about it. What they share
is the tokenizer: with "bpe" or "bpe3" it is trained on text of all parts, in proportion to their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import shards
from nanochat_jax.data.shards import Corpus, Report
from nanochat_jax.data.sources import DataError


@dataclass(frozen=True)
class Part:
    """A corpus in a mixture. `weight` is its share of the rows; all shares add up to 1."""

    name: str
    weight: float
    corpus: Corpus


@dataclass(frozen=True)
class Mixture:
    """Prepared corpora with one tokenizer."""

    parts: tuple[Part, ...]

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.parts[0].corpus.tokenizer

    @cached_property
    def sha256(self) -> str:
        """Content hash of all parts and their weights."""
        return shards.digest([(part.name, part.weight, part.corpus.sha256) for part in self.parts])

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's record says about its data."""
        return {
            "sha256": self.sha256,
            "mix": [{"name": p.name, "weight": p.weight, **p.corpus.facts} for p in self.parts],
        }


def parts_of(corpus: Corpus | Mixture) -> tuple[Part, ...]:
    """The parts of a mixture; a corpus is its own only part."""
    return corpus.parts if isinstance(corpus, Mixture) else (Part("", 1.0, corpus),)


def prepare(
    cfg: DataConfig,
    vocab_size: int,
    cache_dir: Path,
    progress: Report | None = None,
    verify: bool = False,
) -> Corpus | Mixture:
    """Load or make the corpus of `cfg`, or all corpora of its mixture. Arguments as `shards.prepare`.

    Raises: as `shards.prepare`; the message of a part begins with its name.
    """
    if not cfg.mix:
        return shards.prepare(cfg, vocab_size, cache_dir, progress, verify)
    report = progress or (lambda line: None)
    wanted = {name: dataclasses.replace(cfg, source=source, mix=()) for name, source, _ in cfg.mix}
    total = sum(weight for *_, weight in cfg.mix)
    weights = {name: weight / total for name, _, weight in cfg.mix}
    if cfg.tokenizer in tokenizers.SPLITS:
        for name, part in wanted.items():  # before anything is read
            with _named(name):
                shards.tokenizer_name(part, vocab_size)
        shared = str(_shared_tokenizer(cfg.tokenizer, wanted, weights, vocab_size, cache_dir, report))
        wanted = {name: dataclasses.replace(part, tokenizer=shared) for name, part in wanted.items()}
    made = []
    for name, part in wanted.items():
        with _named(name):
            corpus = shards.prepare(part, vocab_size, cache_dir, _labelled(name, report), verify)
        made.append(Part(name, weights[name], corpus))
    return Mixture(tuple(made))


def _labelled(name: str, report: Report) -> Report:
    return lambda line: report(f"{name}: {line}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the part's name before the message of what goes wrong with it."""
    try:
        yield
    except (DataError, ConfigError) as error:
        raise type(error)(
            f"data.mix part '{name}': {error}; name a corpus of yours in data.mix, or learn from one source with "
            "--config.data.mix='()' --config.data.source=rust"
        ) from error


def _shared_tokenizer(
    kind: str,
    wanted: dict[str, DataConfig],
    weights: dict[str, float],
    vocab_size: int,
    cache_dir: Path,
    report: Report,
) -> Path:
    """Train on text of all parts, or find what an earlier call has trained."""
    key: dict[str, Any] = {"version": shards.VERSION, "tokenizer": f"{kind}:{vocab_size}"}
    for name, part in wanted.items():
        with _named(name):
            key[name] = [weights[name], shards.text_request(part)]
    path = cache_dir / "tokenizers" / f"{shards.digest(key)[:20]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path
    learned: list[str] = []
    for name, part in wanted.items():
        with _named(name):
            text = shards.gathered(part, cache_dir, _labelled(name, report))
        chosen = np.flatnonzero(~text.held_out)
        share = max(1, int(shards.TRAINING_BYTES * weights[name]))
        learned += [text.plain(i) for i in chosen[:: -(-int(text.sizes[chosen].sum()) // share)]]
    report(f"training a tokenizer of {vocab_size} ids on {sum(map(len, learned)) / 1e6:.1f} M characters")
    shards.save_whole(path, tokenizers.train(learned, vocab_size, tokenizers.SPLITS[kind]))
    return path
