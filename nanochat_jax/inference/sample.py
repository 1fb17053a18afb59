"""From logits to a token, for rows with controls of their own.

In this order: penalties for what was said before, bias, temperature, top-k, top-p, min-p, and a draw by the
largest of logit plus Gumbel noise. Temperature 0 takes the likeliest after penalties and bias. Every
control has a value at which it is the identity (`neutral`).

The noise belongs to ids, not to ranks: whichever of the three ways below finds what may be drawn, the
same noise gives the same token, and so a row does not depend on what the others ask for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.types import Key

FEW = 256  # likeliest ids that are looked at before everything is sorted


class Controls(NamedTuple):
    """What a request asks of the draw; every field [B], or a scalar for all rows."""

    temperature: jax.Array  # >= 0; 0 = the likeliest
    top_k: jax.Array  # int32; keep so many of the likeliest; 0 = all
    top_p: jax.Array  # in (0, 1]: keep the smallest set of the likeliest with this share; at least one
    min_p: jax.Array  # in [0, 1]: keep what has this share of the likeliest one's probability
    repetition: jax.Array  # > 0: logits of ids in prompt or answer are divided by it (CTRL, arXiv:1909.05858)
    presence: jax.Array  # subtracted from the logits of ids in the answer
    frequency: jax.Array  # subtracted from them as often as they occur


def neutral(rows: int) -> Controls:
    """Controls of `rows` rows that leave the model's distribution as it is."""

    def filled(value: float) -> jax.Array:
        return jnp.full((rows,), value, jnp.float32)

    return Controls(
        filled(1), jnp.zeros((rows,), jnp.int32), filled(1), filled(0), filled(1), filled(0), filled(0)
    )


def penalize(
    logits_BV: jax.Array, controls: Controls, seen_BV: jax.Array, times_BV: jax.Array, bias_BV: jax.Array
) -> jax.Array:
    """Logits after penalties and bias, float32 [B, V].

    Args: seen: bool, the id is in prompt or answer. times: int32, how often it is in the answer.
    bias: float32, added last.
    """
    by = jnp.reshape(controls.repetition, (-1, 1))
    punished = jnp.where(logits_BV > 0, logits_BV / by, logits_BV * by)
    logits = jnp.where(seen_BV, punished, logits_BV)
    times = times_BV.astype(jnp.float32)
    logits = logits - jnp.reshape(controls.presence, (-1, 1)) * (times > 0)
    return logits - jnp.reshape(controls.frequency, (-1, 1)) * times + bias_BV


def _cut(scaled_BV: jax.Array, controls: Controls, few: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `few` likeliest ids [B, few] in order, which of them may be drawn, and whether these are all
    that may be drawn [B]. Of equal logits the lower id comes first, so that exactly k survive."""
    V = scaled_BV.shape[-1]
    top_k, top_p, min_p = (jnp.reshape(c, (-1, 1)) for c in (controls.top_k, controls.top_p, controls.min_p))
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    values, ids = jax.lax.top_k(scaled_BV, few)
    best = values[:, :1]
    within = jnp.arange(few)[None] < top_k
    shares = jnp.where(within, jnp.exp(values - best), 0.0)
    total = jnp.where(
        top_k < V, jnp.sum(shares, -1, keepdims=True), jnp.sum(jnp.exp(scaled_BV - best), -1, keepdims=True)
    )
    upto = jnp.cumsum(shares / total, -1)
    before = jnp.concatenate([jnp.zeros_like(upto[:, :1]), upto[:, :-1]], -1)
    first = jnp.arange(few)[None] == 0
    # The sums reach 1 before the last ids do: a top_p of 1 must not look at them.
    likely = (before < top_p) | (top_p >= 1) | first
    kept = within & likely & (values - best >= jnp.log(min_p))
    # With few < top_k < V the sum of the top_k is not known here.
    whole = (top_k <= few) | ((top_k == V) & (top_p < 1) & (upto[:, -1:] >= top_p))
    return ids, kept, whole[:, 0]


def _scaled(logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    return logits_BV / jnp.maximum(jnp.reshape(temperature, (-1, 1)), 1e-6)


def narrow(logits_BV: jax.Array, controls: Controls) -> jax.Array:
    """Logits over the temperature, with the ids that may not be drawn at -inf, by a full sort."""
    scaled = _scaled(logits_BV, controls.temperature)
    ids, kept, _ = _cut(scaled, controls, scaled.shape[-1])
    rows = jnp.arange(len(scaled))[:, None]
    return jnp.where(jnp.zeros(scaled.shape, bool).at[rows, ids].set(kept), scaled, -jnp.inf)


def draw(logits_BV: jax.Array, noise_BV: jax.Array, controls: Controls) -> jax.Array:
    """One token per row, int32 [B].

    Args: logits: float32, after `penalize`. noise: float32 of the Gumbel distribution.
    Sorts only if a row's controls need more than the FEW likeliest ids.
    """
    B, V = logits_BV.shape
    scaled = _scaled(logits_BV, controls.temperature)
    best = jnp.max(scaled, -1, keepdims=True)
    likely = scaled - best >= jnp.log(jnp.reshape(controls.min_p, (-1, 1)))
    random = jnp.reshape(controls.temperature > 0, (-1, 1))
    free = jnp.argmax(jnp.where(random, jnp.where(likely, scaled + noise_BV, -jnp.inf), logits_BV), -1)
    open_B = ((controls.top_k <= 0) | (controls.top_k >= V)) & (controls.top_p >= 1)
    done = jnp.broadcast_to(open_B | (controls.temperature <= 0), (B,))

    def among(cut):
        ids, kept, _ = cut
        noisy = jnp.take_along_axis(scaled + noise_BV, ids, -1)
        return jnp.take_along_axis(ids, jnp.argmax(jnp.where(kept, noisy, -jnp.inf), -1)[:, None], -1)[:, 0]

    def narrowed():
        if V <= FEW:
            return among(_cut(scaled, controls, V))
        cut = _cut(scaled, controls, FEW)
        return jax.lax.cond(
            jnp.all(cut[2] | done), lambda: among(cut), lambda: among(_cut(scaled, controls, V))
        )

    return jnp.where(done, free, jax.lax.cond(jnp.all(done), lambda: free, narrowed)).astype(jnp.int32)


def gumbel(key: Key, V: int) -> jax.Array:
    """The noise of one row's draw, float32 [V]."""
    return jax.random.gumbel(key, (V,), jnp.float32)


def sample(
    logits_BV: jax.Array, key: Key, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Draw one token per row, int32 [B], with the same controls for all rows."""
    B, V = logits_BV.shape
    controls = neutral(1)._replace(temperature=temperature, top_k=top_k, top_p=top_p)
    noise = jax.random.gumbel(key, (B, V), jnp.float32)
    return draw(logits_BV, noise, Controls(*(jnp.reshape(c, (1,)) for c in controls)))
