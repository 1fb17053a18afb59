"""What makes a setting of the data invalid: its source or mixture, its filter, its order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nanochat_jax.validation.checks import ConfigError, at_least, choice, unused

if TYPE_CHECKING:
    from nanochat_jax.config import DataConfig

MOST = 2**15 - 1  # places that an entry of data_order.bin can state


def validate_data(d: DataConfig) -> None:
    if not d.source:
        raise ConfigError(
            "'data.source' is empty; expected stdlib, rust, a path, a glob, a URL, or hf:<dataset>"
        )
    at_least("data.seq_len", d.seq_len, 2)
    at_least("data.batch", d.batch, 1)
    at_least("data.workers", d.workers, 0)
    at_least("data.prefetch", d.prefetch, 1)
    at_least("data.max_bytes", d.max_bytes, 0)
    at_least("data.tokenize_workers", d.tokenize_workers, 0)
    if not 1 <= d.val_percent <= 50:
        raise ConfigError(f"'data.val_percent' must be in 1..50, got {d.val_percent}")
    _validate_mix(d)
    _validate_filter(d)
    _validate_kind(d)
    _validate_pool(d)


def _validate_mix(d: DataConfig) -> None:
    if not d.mix:
        return
    unused("data", d, "data.mix names the sources", ("source",))
    names = [name for name, *_ in d.mix]
    for name, source, weight in d.mix:
        if not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise ConfigError(
                f"'data.mix' has a part named {name!r}; expected lower-case letters, digits and _"
            )
        if names.count(name) > 1:
            raise ConfigError(f"'data.mix' has two parts named '{name}'")
        if not source:
            raise ConfigError(f"'data.mix' has no source for '{name}'")
        if weight <= 0:
            raise ConfigError(f"'data.mix' needs a positive weight for '{name}', got {weight}")
    least, total = min(weight for *_, weight in d.mix), sum(weight for *_, weight in d.mix)
    if least < 1e-4 * total:
        raise ConfigError(f"'data.mix' has a part of weight {least} of {total}, less than one row in 10000")
    if d.reference:
        raise ConfigError("'data.reference' must be empty with data.mix: it holds the losses of one corpus")


def _validate_filter(d: DataConfig) -> None:
    at_least("data.verify_every_n_examples", d.verify_every_n_examples, 0)
    if not 0 <= d.min_compile_rate <= 1:
        raise ConfigError(f"'data.min_compile_rate' must be in [0, 1], got {d.min_compile_rate}")
    if d.row_language:
        choice("data.row_language", d.row_language, ("rust", "python"))
    if not d.verify_every_n_examples:
        unused("data", d, "data.verify_every_n_examples is 0", ("min_compile_rate", "row_language"))
    elif not d.mix and d.source.startswith("tokens:"):
        raise ConfigError("'data.verify_every_n_examples' must be 0 with a token file, which has no text")


def _validate_kind(d: DataConfig) -> None:
    choice("data.kind", d.kind, ("text", "chat"))
    if d.kind == "text":
        return
    why = "with data.kind = 'chat', whose rows are conversations"
    if d.verify_every_n_examples:
        raise ConfigError(f"'data.verify_every_n_examples' must be 0 {why}, got {d.verify_every_n_examples}")
    if d.reference:
        raise ConfigError(f"'data.reference' must be empty {why}, got '{d.reference}'")
    for source in [d.source] if not d.mix else [source for _, source, _ in d.mix]:
        if source.startswith("tokens:"):
            raise ConfigError(f"'{source}' is a token file, and has no conversations for data.kind = 'chat'")


def _validate_pool(d: DataConfig) -> None:
    p = d.pool
    choice("data.pool.order", p.order, ("strict", "declared", "completion"))
    if p.order == "strict":
        unused("data.pool", p, "data.pool.order is 'strict'", ("window", "delay", "max_late", "replay"))
        return
    if not d.workers:
        raise ConfigError(f"'data.workers' must be at least 1 with data.pool.order = '{p.order}'")
    at_least("data.pool.window", p.window, 2)
    if p.order == "declared":
        unused("data.pool", p, "data.pool.order is 'declared'", ("max_late", "replay"))
        if not 1 <= p.delay <= p.window // 2:
            raise ConfigError(
                f"'data.pool.delay' must be in 1..{p.window // 2}, half of data.pool.window, got {p.delay}"
            )
        return
    unused("data.pool", p, "data.pool.order is 'completion'", ("delay",))
    if p.replay:
        unused("data.pool", p, "data.pool.replay has the order", ("max_late",))
    if not 1 <= p.max_late <= MOST or p.window > MOST:
        raise ConfigError(
            f"'data.pool.max_late' = {p.max_late} and 'data.pool.window' = {p.window} must be in 1..{MOST}"
        )
