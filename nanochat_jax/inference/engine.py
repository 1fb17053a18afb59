"""Prefill, extend, decode, generate: token ids in, token ids out.

Shapes are static: a prompt is padded to a bucket and one program serves each bucket; one program
decodes. The same forward pass trains and serves, so both agree by construction. Many requests at once
are the work of inference/slots.py and inference/schedule.py.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import InferConfig, ModelConfig
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference.sample import sample
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch, Key, KVCache, Params


def batch_of(tokens_BL: jax.Array, start_B: jax.Array) -> Batch:
    """A batch of tokens that follow `start` others in each row."""
    positions = start_B[:, None] + jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
    return Batch(tokens_BL, tokens_BL, jnp.zeros(tokens_BL.shape), jnp.ones_like(tokens_BL), positions)


def prefill(
    cfg: ModelConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Read prompts into an empty cache.

    Args: tokens: int32 [B, P], padded on the right. length: int32 [B], real tokens of each row, >= 1.
    Returns: (float32 logits [B, V] after each row's last real token, cache).
    """
    output = transformer.forward(
        cfg, projections.from_config(cfg), params, batch_of(tokens_BP, cache.length), cache, empty=True
    )
    last = jnp.take_along_axis(output.hidden, (length_B - 1)[:, None, None], axis=1)[:, 0]
    assert output.cache is not None
    return transformer.logits(cfg, params, last), caches.roll_back(output.cache, length_B)


def extend(
    cfg: ModelConfig, params: Params, tokens_BT: jax.Array, valid_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Append several tokens per row to whatever the cache holds.

    All T are written, hence every row needs T free slots: a write that does not fit would be moved to
    the left, over tokens that count, without an error.
    Args: tokens: int32 [B, T], padded on the right. valid: int32 [B], real tokens of each row, 0..T.
    Returns: (float32 logits [B, T, V] after every token, those of padding meaningless; cache).
    """
    batch = batch_of(tokens_BT, cache.length)
    output = transformer.forward(cfg, projections.from_config(cfg), params, batch, cache)
    assert output.cache is not None
    return transformer.logits(cfg, params, output.hidden), caches.roll_back(
        output.cache, cache.length + valid_B
    )


def decode(
    cfg: ModelConfig,
    params: Params,
    tokens_B: jax.Array,
    cache: KVCache,
    quantile: jax.typing.ArrayLike | None = None,
    active_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """`decode_counting` without the count."""
    return decode_counting(cfg, params, tokens_B, cache, quantile, active_B)[:2]


def decode_counting(
    cfg: ModelConfig,
    params: Params,
    tokens_B: jax.Array,
    cache: KVCache,
    quantile: jax.typing.ArrayLike | None = None,
    active_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """Append one token per row.

    active: bool [B]; the length of the other rows stays, and what is written behind it has no effect.
    None = all rows. quantile: leave the loops where the exit distribution reaches it, see `model.loop`; None = all loops.
    A loop is not computed when no row needs it: the batch costs what its deepest row costs.
    Returns: (float32 logits [B, V] of the next token, cache, and with a quantile the loops that each row ran
    through, int32 [B]).
    """
    output = transformer.forward(
        cfg, projections.from_config(cfg), params, batch_of(tokens_B[:, None], cache.length), cache,
        quantile=quantile,
    )  # fmt: skip
    assert output.cache is not None
    after = output.cache
    if active_B is not None:
        after = caches.roll_back(after, jnp.where(active_B, after.length, cache.length))
    return transformer.logits(cfg, params, output.hidden[:, 0]), after, output.depth


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _first(cfg, params, tokens, length, cache, key, temperature, top_k, top_p):
    logits, cache = prefill(cfg, params, tokens, length, cache)
    return sample(logits, jax.random.fold_in(key, 0), temperature, top_k, top_p), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _next(cfg, params, tokens, cache, key, index, quantile, temperature, top_k, top_p):
    logits, cache, depth = decode_counting(cfg, params, tokens, cache, quantile)
    return sample(logits, jax.random.fold_in(key, index), temperature, top_k, top_p), cache, depth


def bucket(length: int, capacity: int) -> int:
    """Padded prompt length: the next power of two from 32 on, at most the capacity."""
    return min(capacity, max(32, 1 << (length - 1).bit_length()))


def check(cfg: ModelConfig, prompt: list[int], settings: InferConfig) -> None:
    """Raises: ValueError if the prompt is empty, holds an unknown id, or does not fit with the answer."""
    if not prompt or not 0 <= min(prompt) <= max(prompt) < cfg.vocab_size:
        raise ValueError(f"a prompt needs token ids in 0..{cfg.vocab_size - 1}, got {prompt[:8]}")
    if len(prompt) + settings.max_tokens > settings.capacity:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_tokens = {settings.max_tokens} exceed "
            f"infer.capacity = {settings.capacity}"
        )


def generate(
    cfg: ModelConfig,
    params: Params,
    prompt: list[int],
    settings: InferConfig,
    key: Key,
    ran: list[jax.Array] | None = None,
) -> Iterator[int]:
    """Yield up to settings.max_tokens ids that continue the prompt, one at a time.

    The draw of token i depends on (key, i) only. One token is in flight while the one before it is
    handed out. With settings.exit_quantile below 1 tokens of the answer may leave the loops early; the
    prompt is always read with all of them. ran: receives the loops of each of those tokens, int32 [1].
    Raises: ValueError, see `check`.
    """
    check(cfg, prompt, settings)
    tokens = np.zeros((1, bucket(len(prompt), settings.capacity)), np.int32)
    tokens[0, : len(prompt)] = prompt
    controls = (
        jnp.float32(settings.temperature), jnp.int32(settings.top_k), jnp.float32(settings.top_p),
    )  # fmt: skip
    quantile = jnp.float32(settings.exit_quantile) if settings.exit_quantile < 1 else None
    cache = caches.allocate(cfg, 1, settings.capacity, settings.loop_cache)
    length = jnp.array([len(prompt)], jnp.int32)
    token, cache = _first(cfg, params, jnp.asarray(tokens), length, cache, key, *controls)
    for index in range(1, settings.max_tokens):
        following, cache, depth = _next(cfg, params, token, cache, key, jnp.int32(index), quantile, *controls)
        if ran is not None and depth is not None:
            ran.append(depth)
        yield int(token[0])
        token = following
    yield int(token[0])
