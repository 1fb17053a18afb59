"""Attention of new tokens to themselves and to a cache of earlier ones, which is only read.

The cache holds many layers and T slots of which a row uses the first `length`. Slots of one head lie side by
side, [.., B, G, T, K], as both products want them: with heads inside, a CPU transposes what it reads.
`blocked`, for CPUs, goes through the used slots block by block with a running softmax: nothing is copied but
the block at hand, and slots that no row uses, or that no window reaches, are not read. A row's result does not
depend on how far the others' reach: a block without a visible slot changes no bit of it. `reference` reads all
T slots.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import dispatch
from nanochat_jax.kernels.attention import MASKED

BLOCK = 64  # slots at a time on CPU: a layer's keys of them stay in the second-level cache


def _part(a, number, start, size):
    """`size` slots from `start` on of one layer, [B, G, size, K]."""
    at = (*number, 0, 0, start, 0)
    shape = (*(1,) * len(number), *a.shape[-4:-2], size, a.shape[-1])
    return jax.lax.dynamic_slice(a, [jnp.int32(i) for i in at], shape).reshape(shape[len(number) :])


def _own_scores(q_BLGHK, k_BGLK, window):
    """Scaled scores [B, G, H, L, L] of the new tokens among themselves, masked."""
    index = jnp.arange(q_BLGHK.shape[1], dtype=jnp.int32)
    distance = index[:, None] - index[None]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    return jnp.where(seen[None, None, None], _scores(q_BLGHK, k_BGLK), MASKED)


def _scores(q_BLGHK, k_BGTK):
    scores = jnp.einsum("blghk,bgtk->bghlt", q_BLGHK, k_BGTK, preferred_element_type=jnp.float32)
    return scores * q_BLGHK.shape[-1] ** -0.5


def _seen(slot_T, length_B, queries, window):
    """[B, 1, 1, L, T]: slots in use, and near enough to the queries behind them."""
    seen_BLT = jnp.broadcast_to(
        (slot_T[None] < length_B[:, None])[:, None], (len(length_B), queries, len(slot_T))
    )
    if window:
        position_BL = length_B[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
        seen_BLT = seen_BLT & (position_BL[:, :, None] - slot_T[None, None] < window)
    return seen_BLT[:, None, None]


def _values(shares_BGHLT, v_BGTK):
    shares = shares_BGHLT.astype(v_BGTK.dtype)
    return jnp.einsum("bghlt,bgtk->bghlk", shares, v_BGTK, preferred_element_type=jnp.float32)


def _reference(q_BLGHK, k_BGLK, v_BGLK, keys, values, number, length_B, window):
    T = keys.shape[-2]
    old_k, old_v = (_part(a, number, 0, T) for a in (keys, values))
    seen = _seen(jnp.arange(T, dtype=jnp.int32), length_B, q_BLGHK.shape[1], window)
    old = jnp.where(seen, _scores(q_BLGHK, old_k.astype(q_BLGHK.dtype)), MASKED)
    shares = jax.nn.softmax(jnp.concatenate([old, _own_scores(q_BLGHK, k_BGLK, window)], -1), -1)
    return _values(shares[..., :T], old_v.astype(v_BGLK.dtype)) + _values(shares[..., T:], v_BGLK)


def _blocked(q_BLGHK, k_BGLK, v_BGLK, keys, values, number, length_B, window):
    if dispatch.backend() != "cpu":
        raise NotImplementedError("made for CPUs")
    T = keys.shape[-2]
    size = min(BLOCK, T)
    own = _own_scores(q_BLGHK, k_BGLK, window)
    # Every token sees itself: from here on the largest score is a true one, and masked ones count nothing.
    most = jnp.max(own, -1, keepdims=True)
    shares = jnp.exp(own - most)
    found = (most, jnp.sum(shares, -1, keepdims=True), _values(shares, v_BGLK))

    def add(i, found):
        most, total, y = found
        start = jnp.minimum(i * size, T - size)
        slot = start + jnp.arange(size, dtype=jnp.int32)
        old_k, old_v = (_part(a, number, start, size).astype(q_BLGHK.dtype) for a in (keys, values))
        seen = _seen(slot, length_B, q_BLGHK.shape[1], window) & (slot >= i * size)[None, None, None, None]
        scores = jnp.where(seen, _scores(q_BLGHK, old_k), MASKED)
        new = jnp.maximum(most, jnp.max(scores, -1, keepdims=True))
        shares, kept = jnp.exp(scores - new), jnp.exp(most - new)
        return new, kept * total + jnp.sum(shares, -1, keepdims=True), kept * y + _values(shares, old_v)

    first = jnp.maximum(jnp.min(length_B) - window + 1, 0) // size if window else 0
    _, total, y = jax.lax.fori_loop(first, -(-jnp.max(length_B) // size), add, found)
    return y / total


IMPLS = {"blocked": _blocked, "reference": _reference}


@functools.partial(jax.jit, static_argnames=("window", "impl"))  # outside of jit its loop would compile anew
def attend(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    number: tuple[int | jax.Array, ...],
    length_B: jax.Array,
    window: int = 0,
    impl: str = "auto",
) -> jax.Array:
    """Causal softmax attention of L new tokens per row that follow `length` cached ones.

    Args: q: [B, L, H, K]. k, v: [B, L, G, K], of the new tokens. keys, values: [.., B, G, T, K] of many
    layers, of which the one at the indices `number` is read, and of that the first length[b] slots of row
    b; what stands in the others must be finite. window: > 0 = distances below it only.
    Returns: [B, L, H, K] in v's dtype.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    q_BLGHK = q_BLHK.reshape(B, L, G, H // G, K)
    k_BGLK, v_BGLK = (jnp.swapaxes(a, 1, 2) for a in (k_BLGK, v_BLGK))  # as the cache holds them
    arguments = (q_BLGHK, k_BGLK, v_BGLK, keys, values, number, length_B, window)
    y_BGHLK = dispatch.first(IMPLS, impl, *arguments)
    return jnp.moveaxis(y_BGHLK, 3, 1).reshape(B, L, H, K).astype(v_BLGK.dtype)
