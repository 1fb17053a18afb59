"""Self-speculative decoding: the model drafts its next tokens cheaply and reads them all in one step.

Drafts come from the layers of multi-token prediction (model/mtp.py), or from the model with fewer loops.
One pass over the last token and d drafts gives the model's own distribution at all d + 1 places. From each
the token is drawn exactly as decoding one by one draws it: same controls, same counts, same noise, which
belongs to (key, number of the draw) alone. The step keeps the tokens up to the first that a draft did not
foresee, and rolls the rest back.

So what is said is the plain text, token for token, greedy or sampled, whatever drafts and however many;
the drafts decide only how many tokens a step yields. They are drawn with the noise of their own place,
which makes them meet the model's draw more often than independent ones would: of distributions p, q at
least in (1 - TV) / (1 + TV) of all cases (Gumbel coupling, arXiv:2408.07978). The rejection rule of
arXiv:2211.17192 meets in 1 - TV of them and has the same distribution, but a text that depends on the
drafts, and hence on times and neighbours.

Once drafting has ended (`pace`), steps are those of inference/slots.py, which keep nothing for it: rows that go on
when lengths are tried again begin with poor drafts.

Rows need not advance together. What the drafting layers keep of a position may stem from a draft that did
not come true; therefore they read the last W positions anew in every step.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import InferConfig, ModelConfig, padded_vocab
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine, pace, slots
from nanochat_jax.inference.sample import Controls
from nanochat_jax.model import block, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Key, KVCache, Params


class Tail(NamedTuple):
    """The last positions that the cache holds, from `start` on; what stands behind its length is garbage."""

    hidden: jax.Array  # [B, W, D], of the trunk
    tokens: jax.Array  # int32 [B, W], the token after each of them
    start: jax.Array  # int32 [B]


class State(NamedTuple):
    """Slots, and what drafting keeps beside them."""

    slots: slots.Slots
    tail: Tail | None  # None where fewer loops draft


class Steps(NamedTuple):
    """The draws of one step; of n of them with a further axis [n, ..]."""

    drawn: slots.Drawn  # every field [d + 1, B, ..]
    count: jax.Array  # int32 [B]: so many of them are the row's next tokens


def window(cfg: ModelConfig) -> int:
    """W: after a step with M drafts all that may be wrong, and the plain steps of a turn (`pace.TURN`) with those of
    another, which may be under way when the turn ends."""
    return 2 * (cfg.mtp.depth + pace.TURN)


def room(cfg: ModelConfig, drafts: int, burst: int = 1) -> int:
    """Cache slots beyond the longest text: two turns of `burst` steps in flight, and the drafting layers' window."""
    return 2 * burst * (drafts + 1) + window(cfg)


def allocate(cfg: ModelConfig, rows: int, capacity: int, loops: int) -> State:
    """Empty slots. capacity: with `room`. loops: of the drafts; 0 = multi-token prediction."""
    tail = None
    if not loops:
        shape = (rows, window(cfg))
        tail = Tail(
            jnp.zeros((*shape, cfg.dim), transformer.compute_dtype(cfg)), jnp.zeros(shape, jnp.int32),
            jnp.zeros((rows,), jnp.int32),
        )  # fmt: skip
    return State(slots.allocate(cfg, rows, capacity, future=not loops), tail)


def admit(
    state: State, slot: jax.Array, key: Key, controls: Controls, seen_V: jax.Array, bias_V: jax.Array
) -> State:
    """`slots.admit`; the tail begins with the prompt's first piece, see `fill`."""
    return state._replace(slots=slots.admit(state.slots, slot, key, controls, seen_V, bias_V))


def _slide(tail: Tail, length_B, hidden_BTD, tokens_BT, count_B) -> Tail:
    """The tail after `count` of T further positions, which begin at `length`."""
    W, T = tail.tokens.shape[1], tokens_BT.shape[1]
    first = jnp.maximum(length_B + count_B - W, tail.start)

    def one(old, new, at, shift):
        long = jnp.pad(old, ((0, T), *((0, 0),) * (old.ndim - 1)))
        long = jax.lax.dynamic_update_slice_in_dim(long, new.astype(old.dtype), at, 0)
        return jax.lax.dynamic_slice_in_dim(long, shift, W, 0)

    hidden, tokens = (
        jax.vmap(one)(old, new, length_B - tail.start, first - tail.start)
        for old, new in ((tail.hidden, hidden_BTD), (tail.tokens, tokens_BT))
    )
    return Tail(hidden, tokens, first)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def fill(
    cfg: ModelConfig, params: Params, state: State, source: jax.Array, slot: jax.Array, tokens_C: jax.Array,
    start: jax.Array, valid: jax.Array, last: jax.Array, first: jax.Array, ahead_M: jax.Array,
) -> tuple[State, slots.Drawn]:  # fmt: skip
    """`slots.fill`, for the drafting layers too. Donates `state`.

    Args: first: bool [], this is the first piece that is read of its prompt. ahead: int32 [M], the tokens
    after the piece, as far as the prompt has them.
    """
    tail = state.tail
    if tail is None:
        found = slots.read(cfg, params, state.slots, source, slot, tokens_C, start, valid, last)
        return State(found[0], None), found[1]
    C = len(tokens_C)
    after = jnp.pad(tokens_C, (0, len(ahead_M)))
    after = jax.lax.dynamic_update_slice_in_dim(after, ahead_M, valid, 0)
    project = projections.from_config(cfg)

    def more(cache: KVCache, hidden_BCD: jax.Array) -> KVCache:
        batch, u, entries = engine.batch_of(tokens_C[None], cache.length), hidden_BCD, []
        for i in range(1, cfg.mtp.depth + 1):
            u, _, kv = transformer.draft(cfg, project, params, i, u, after[i : i + C][None], batch, cache)
            entries.append(kv)
        return block.append(cache, None, {"mtp": _stacked(entries)}, u)

    made, drawn, hidden = slots.read(
        cfg, params, state.slots, source, slot, tokens_C, start, valid, last, more
    )
    following = after[1 : C + 1].at[valid - 1].set(jnp.where(last, drawn.token[0], after[valid]))
    own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, 0), tail)
    own = own._replace(start=jnp.where(first, start, own.start))
    own = _slide(own, start[None], hidden, following[None], valid[None])
    tail = jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b[0], slot, 0), tail, own)
    return State(made, tail), drawn


def _stacked(entries: list[tuple]) -> tuple:
    return tuple(jnp.stack(each) for each in zip(*entries, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def step(
    cfg: ModelConfig, loops: int, drafts: int, most: int, params: Params, state: State, count: jax.Array,
    active_B: jax.Array, tops: jax.Array,
) -> tuple[State, Steps]:  # fmt: skip
    """Put every active row's last token into its cache, and as many drafts as come true, `count` times. Donates
    `state`.

    Args: loops: of the drafts; 0 = multi-token prediction. drafts: 0 = plain steps. count: int32 [], 1..most.
    active: bool [B]. tops: bool [], report the likeliest ids too.
    Returns: (state, of each step 1 to drafts + 1 tokens for every active row, none for others), fields of the
    latter with an axis [most, ..] before; what is behind `count` is meaningless.
    """
    return slots.repeat(lambda s: add(cfg, loops, drafts, params, s, active_B, tops), state, count, most)


def add(
    cfg: ModelConfig, loops: int, drafts: int, params: Params, state: State, active_B: jax.Array,
    tops: jax.Array,
) -> tuple[State, Steps]:  # fmt: skip
    """One step, see `step`."""
    row, length_B = state.slots.row, state.slots.cache.length
    noise = [slots.noise(row, k, active_B) for k in range(drafts + 1)]
    cache, guesses = state.slots.cache, []
    if drafts:
        draft = _by_layers if state.tail is not None else functools.partial(_by_loops, loops=loops)
        cache, guesses = draft(cfg, params, state, noise[:drafts])
    tokens_BT = jnp.stack([row.token, *guesses], 1)
    output = transformer.forward(
        cfg, projections.from_config(cfg), params, engine.batch_of(tokens_BT, length_B), cache
    )
    assert output.cache is not None
    logits_BTV = transformer.logits(cfg, params, output.hidden)
    live, lives, drawn = active_B, [], []
    for k in range(drafts + 1):
        row, found = slots.put_down(row, logits_BTV[:, k], live, tops, None, noise[k])
        drawn.append(found)
        lives.append(live)
        live = live & (found.token == guesses[k]) if k < drafts else live
    count_B = jnp.sum(jnp.stack(lives), 0, dtype=jnp.int32)
    said = jax.tree.map(lambda *a: jnp.stack(a), *drawn)
    tail = state.tail
    if tail is not None:
        tail = _slide(tail, length_B, output.hidden, said.token.T, count_B)
    kept = caches.roll_back(output.cache, length_B + count_B)
    return State(slots.Slots(kept, row), tail), Steps(said, count_B)


def _by_layers(
    cfg: ModelConfig, params: Params, state: State, noise: list[jax.Array]
) -> tuple[KVCache, list[jax.Array]]:
    """Drafts of the layers of multi-token prediction, which read the tail."""
    tail, (cache, row) = state.tail, state.slots
    assert tail is not None
    W, rows = tail.tokens.shape[1], jnp.arange(len(tail.start))
    at = jnp.maximum(cache.length - 1 - tail.start, 0)  # of an empty row anything
    batch, before = engine.batch_of(tail.tokens, tail.start), caches.roll_back(cache, tail.start)
    passed = jnp.pad(tail.tokens, ((0, 0), (0, len(noise))))
    u, entries, guesses, everyone = tail.hidden, [], [], jnp.ones(at.shape, bool)
    for i in range(1, len(noise) + 1):
        u, hidden, kv = transformer.draft(
            cfg, projections.from_config(cfg), params, i, u, passed[:, i - 1 : i - 1 + W], batch, before
        )
        row = slots.choose(row, transformer.logits(cfg, params, hidden[rows, at]), everyone, noise[i - 1])
        guesses.append(row.token)
        entries.append(kv)
        passed = passed.at[rows, at + i].set(row.token)
    return caches.roll_back(
        block.append(before, None, {"mtp": _stacked(entries)}, hidden), cache.length
    ), guesses


def _by_loops(
    cfg: ModelConfig, params: Params, state: State, noise: list[jax.Array], loops: int
) -> tuple[KVCache, list[jax.Array]]:
    """Drafts of the model with fewer loops, one after the other. What they leave in the cache is
    overwritten when the whole model reads them."""
    fewer = dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, count=loops, gate="none"))
    (cache, row), guesses = state.slots, []
    length_B, everyone = cache.length, jnp.ones(cache.length.shape, bool)
    for each in noise:
        batch = engine.batch_of(row.token[:, None], cache.length)
        output = transformer.forward(fewer, projections.from_config(fewer), params, batch, cache)
        assert output.cache is not None
        cache = output.cache
        row = slots.choose(row, transformer.logits(cfg, params, output.hidden[:, 0]), everyone, each)
        guesses.append(row.token)
    return caches.roll_back(cache, length_B), guesses


def generate(
    cfg: ModelConfig, params: Params, prompt: list[int], settings: InferConfig, key: Key,
    tell: list[pace.Pace] | None = None,
) -> Iterator[int]:  # fmt: skip
    """`engine.generate` with drafts: the same ids.

    tell: its only entry, if it has one, is replaced by what was seen of steps and drafts.
    Raises: as `engine.generate`.
    """
    engine.check(cfg, prompt, settings)
    loops, most = settings.draft_loops, settings.draft_tokens
    state = allocate(cfg, 1, settings.capacity + room(cfg, most), loops)
    zero, zeros = np.int32(0), np.zeros(padded_vocab(cfg), np.float32)
    controls = Controls(
        np.float32(settings.temperature), np.int32(settings.top_k), np.float32(settings.top_p),
        *map(np.float32, (0, 1, 0, 0)),
    )  # fmt: skip
    state = admit(state, zero, key, controls, zeros > 0, zeros)
    tokens = np.zeros(engine.bucket(len(prompt), settings.capacity), np.int32)
    tokens[: len(prompt)] = prompt
    ahead = np.zeros(cfg.mtp.depth, np.int32)
    state, first = fill(
        cfg, params, state, zero, zero, tokens, zero, np.int32(len(prompt)), np.True_, np.True_, ahead
    )
    yield int(first.token[0])
    said = sure = 1  # tokens handed out; tokens that dispatched steps yield at least
    seen, unread = pace.start(most), deque()
    before, spent, since = (
        0,
        0.0,
        time.perf_counter(),
    )  # drafts of the last step read; time in here since then
    while said < settings.max_tokens:
        if sure < settings.max_tokens:
            drafts = pace.wanted(seen)
            words = np.int32(1), np.ones(1, bool), np.False_
            state, steps = step(cfg, loops, drafts, 1, params, state, *words)
            unread.append((drafts, steps))
            sure += 1
        while unread and (len(unread) > 1 or sure >= settings.max_tokens):
            drafts, steps = unread.popleft()
            count = int(steps.count[0, 0])
            spent += time.perf_counter() - since
            seen = pace.seen(seen, drafts, [count], spent if drafts == before else None)
            before, spent = drafts, 0.0
            sure += count - 1
            if tell is not None:
                tell[:] = [seen]
            for token in np.asarray(steps.drawn.token[0, :count, 0])[: settings.max_tokens - said].tolist():
                said += 1
                yield token
            since = time.perf_counter()
