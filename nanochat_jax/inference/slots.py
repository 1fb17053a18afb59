"""Rows of one cache that serve different requests: the device's side of continuous batching.

Three programs with static shapes: `admit` gives a slot to a request, `fill` reads a piece of its prompt,
`step` adds tokens to all active rows. What a row draws depends on its prompt, its controls, its key and
the number of the draw, never on the slot or the other rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import ModelConfig, padded_vocab
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine
from nanochat_jax.inference.sample import Controls, draw, gumbel, neutral, penalize
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Key, KVCache, Params

TOP = 20  # most alternatives that a request can ask for with each token


class Row(NamedTuple):
    """What is kept for each of the B slots beside the cache."""

    token: jax.Array  # int32 [B], drawn last, not yet in the cache
    draws: jax.Array  # int32 [B], tokens drawn so far
    key: (
        jax.Array
    )  # uint32 [B, 2], `jax.random.key_data` of the request's: arrays of keys are dispatched slowly
    controls: Controls
    seen: jax.Array  # bool [B, V], id in prompt or answer
    times: jax.Array  # int32 [B, V], how often in the answer
    bias: jax.Array  # float32 [B, V], of the request; -1e30 for ids without a meaning


class Slots(NamedTuple):
    """The state of all slots; the programs consume (donate) it and give a new one."""

    cache: KVCache
    row: Row


class Drawn(NamedTuple):
    """What one draw says, per row."""

    token: jax.Array  # int32 [B]
    log_prob: jax.Array  # float32 [B], under the model itself: no controls
    top_ids: jax.Array  # int32 [B, TOP], the likeliest under the model; zeros if nobody asked
    top_log_probs: jax.Array  # float32 [B, TOP]
    finite: jax.Array  # bool [B], all logits were numbers
    depth: jax.Array  # int32 [B], loops that the token ran through; 0 = no early exit


def allocate(cfg: ModelConfig, slots: int, capacity: int, future: bool = False) -> Slots:
    """Empty slots. capacity: tokens that fit in each, the padding of the last written piece included.
    future: see `cache.allocate`."""
    V = padded_vocab(cfg)
    nothing = jnp.zeros((slots,), jnp.int32)
    row = Row(
        nothing, nothing + 0, jnp.zeros((slots, 2), jnp.uint32), neutral(slots), jnp.zeros((slots, V), bool),
        jnp.zeros((slots, V), jnp.int32), jnp.zeros((slots, V), jnp.float32),
    )  # fmt: skip
    return Slots(caches.allocate(cfg, slots, capacity, future=future), row)


@functools.partial(jax.jit, donate_argnums=0)
def admit(slots: Slots, slot: jax.Array, key: Key, controls: Controls, seen_V, bias_V) -> Slots:
    """Give slot `slot` (int32 []) to a request; its cache follows with `fill`. Donates `slots`.

    Args: key: of threefry2x32. controls: scalars. seen: bool [V], ids of the prompt. bias: float32 [V].
    """
    if (impl := jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(f"keys of requests are of threefry2x32, got one of {impl}")
    zero = jnp.int32(0)
    new = Row(
        zero, zero, jax.random.key_data(key), controls, seen_V, jnp.zeros_like(slots.row.times[0]), bias_V
    )
    return slots._replace(row=_put(slots.row, slot, jax.tree.map(lambda a: a[None], new)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def fill(
    cfg: ModelConfig, params: Params, slots: Slots, source: jax.Array, slot: jax.Array, tokens_C: jax.Array,
    start: jax.Array, valid: jax.Array, last: jax.Array,
) -> tuple[Slots, Drawn]:  # fmt: skip
    """Read a piece of a prompt behind the first `start` tokens of slot `source`, into slot `slot`.

    Two slots differ where a prompt begins like what `source` holds; its own row stays as it is.
    Donates `slots`.
    Args: tokens: int32 [C], padded on the right. valid: int32 [], real tokens among them, >= 1.
    last: bool [], the prompt ends here: the first token of the answer is drawn.
    Returns: (slots, the draw with B = 1; meaningless unless `last`).
    """
    return read(cfg, params, slots, source, slot, tokens_C, start, valid, last)[:2]


def read(
    cfg: ModelConfig, params: Params, slots: Slots, source: jax.Array, slot: jax.Array, tokens_C: jax.Array,
    start: jax.Array, valid: jax.Array, last: jax.Array,
    more: Callable[[KVCache, jax.Array], KVCache] = lambda cache, hidden_BCD: cache,
) -> tuple[Slots, Drawn, jax.Array]:  # fmt: skip
    """`fill` without jit, and the hidden states [1, C, D] too.

    more: writes what else belongs into the cache of the one row, whose length still is `start`, from the
    hidden states.
    """
    prefix = caches.take(slots.cache, source, start)
    batch = engine.batch_of(tokens_C[None], prefix.length)
    output = transformer.forward(cfg, projections.from_config(cfg), params, batch, prefix)
    assert output.cache is not None
    behind = jax.lax.dynamic_slice_in_dim(output.hidden[0], valid - 1, 1, axis=0)
    logits = transformer.logits(cfg, params, behind)
    filled = more(caches.roll_back(output.cache, prefix.length), output.hidden)
    cache = caches.insert(slots.cache, caches.roll_back(filled, prefix.length + valid), slot)
    own = row_of(slots.row, slot)
    own, drawn = put_down(own, logits, last[None], jnp.bool_(True), None, noise(own, 0, last[None]))
    return Slots(cache, _put(slots.row, slot, own)), drawn, output.hidden


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step(
    cfg: ModelConfig, most: int, params: Params, slots: Slots, count: jax.Array, active_B: jax.Array,
    tops: jax.Array, quantile=None,
) -> tuple[Slots, Drawn]:  # fmt: skip
    """Put every active row's last token into the cache and draw its next one, `count` times. Donates `slots`.

    One program whatever the count, so that no bit depends on it.
    Args: count: int32 [], 1..most. active: bool [B]. tops: bool [], report the likeliest ids too. quantile:
    see engine.decode.
    Returns: (slots, the draws, every field [most, B, ..]; those from `count` on are meaningless).
    """
    return repeat(lambda slots: add(cfg, params, slots, active_B, tops, quantile), slots, count, most)


def repeat(
    step: Callable[[Any], tuple[Any, Any]], state: Any, count: jax.Array, most: int
) -> tuple[Any, Any]:
    """`count` steps one after the other, 1..most: (state behind them, what they found, with an axis [most, ..])."""

    def one(i: jax.Array, carry: tuple) -> tuple:
        state, new = step(caches.in_order(carry[0]))
        return caches.in_order(state), jax.tree.map(lambda all_, one: all_.at[i].set(one), carry[1], new)

    empty = jax.tree.map(lambda a: jnp.zeros((most, *a.shape), a.dtype), jax.eval_shape(step, state)[1])
    return jax.lax.fori_loop(0, count, one, (state, empty))


def add(
    cfg: ModelConfig, params: Params, slots: Slots, active_B: jax.Array, tops: jax.Array, quantile=None
) -> tuple[Slots, Drawn]:
    """One token more for every active row, see `step`; the draw's fields are [B, ..]."""
    batch = engine.batch_of(slots.row.token[:, None], slots.cache.length)
    output = transformer.forward(
        cfg, projections.from_config(cfg), params, batch, slots.cache, quantile=quantile
    )
    assert output.cache is not None
    length = jnp.where(active_B, output.cache.length, slots.cache.length)
    logits = transformer.logits(cfg, params, output.hidden[:, 0])
    row, drawn = put_down(slots.row, logits, active_B, tops, output.depth, noise(slots.row, 0, active_B))
    return Slots(caches.roll_back(output.cache, length), row), drawn


def noise(row: Row, ahead: int, live_B: jax.Array) -> jax.Array:
    """What decides the draw after `ahead` others of each row, float32 [B, V]: its key and the draw's number
    do, nothing else. Zeros where no live row draws at random."""

    def made() -> jax.Array:
        V = row.seen.shape[-1]
        keys = jax.random.wrap_key_data(row.key, impl="threefry2x32")
        return jax.vmap(lambda key, i: gumbel(jax.random.fold_in(key, i), V))(keys, row.draws + ahead)

    random = jnp.any(live_B & (row.controls.temperature > 0))
    return jax.lax.cond(random, made, lambda: jnp.zeros(row.seen.shape, jnp.float32))


def choose(row: Row, logits_BV: jax.Array, live_B: jax.Array, noise_BV: jax.Array) -> Row:
    """The row with the token that it draws from these logits, counted where `live`."""
    after = penalize(logits_BV, row.controls, row.seen, row.times, row.bias)
    token_B = jnp.where(live_B, draw(after, noise_BV, row.controls), row.token)
    rows, counted = jnp.arange(len(token_B)), live_B.astype(jnp.int32)
    return row._replace(
        token=token_B, draws=row.draws + counted, times=row.times.at[rows, token_B].add(counted),
        seen=row.seen.at[rows, token_B].max(live_B),
    )  # fmt: skip


def put_down(
    row: Row, logits_BV: jax.Array, live_B: jax.Array, tops: jax.Array, depth_B: jax.Array | None,
    noise_BV: jax.Array,
) -> tuple[Row, Drawn]:  # fmt: skip
    """`choose`, and what is told of the draw. tops: bool [], report the likeliest ids too."""
    B = len(logits_BV)
    row = choose(row, logits_BV, live_B, noise_BV)
    total = jax.nn.logsumexp(logits_BV, -1, keepdims=True)
    top_logits, top_ids = jax.lax.cond(
        tops, lambda: tuple(jax.lax.top_k(logits_BV, TOP)),
        lambda: (jnp.zeros((B, TOP), jnp.float32), jnp.zeros((B, TOP), jnp.int32)),
    )  # fmt: skip
    top_logs = jnp.where(tops, top_logits - total, 0.0)
    chosen = (jnp.take_along_axis(logits_BV, row.token[:, None], -1) - total)[:, 0]
    finite = jnp.all(jnp.isfinite(logits_BV), -1)
    depth_B = jnp.zeros((B,), jnp.int32) if depth_B is None else depth_B
    return row, Drawn(row.token, chosen, top_ids, top_logs, finite, depth_B)


def row_of(row: Row, slot: jax.Array) -> Row:
    """One slot's, with B = 1."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, 0), row)


def _put(row: Row, slot: jax.Array, one: Row) -> Row:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, slot, 0), row, one)


def meaningless(cfg: ModelConfig, known: int, ids: dict[int, float] | None = None) -> np.ndarray:
    """A bias, float32 [V]: that of `ids`, and -1e30 for ids from `known` on, which no tokenizer has."""
    bias = np.zeros(padded_vocab(cfg), np.float32)
    for index, value in (ids or {}).items():
        bias[index] = value
    bias[known:] = -1e30
    return bias
