"""Causal attention over packed rows, by the implementation that suits the device.

`reference` states the meaning and accepts everything; `cudnn` is the library's fused kernel;
`blocked` is the CPU path: it cuts the queries into blocks, which keeps the scores in cache; in a whole
row it multiplies each with the keys up to its end only, which skips almost half of the products.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.kernels import dispatch

MASKED = -1e30  # not -inf: a row with nothing to attend to must give finite garbage, not NaN
QUERY_BLOCK = 128  # rows of the score matrix computed at once on CPU


def _mask(q_index, k_index, q_segment, k_segment, window):
    """Boolean [B, L, T]: which keys each query sees."""
    distance = q_index[:, :, None] - k_index[:, None, :]
    mask = (distance >= 0) & (q_segment[:, :, None] == k_segment[:, None, :])
    return mask & (distance < window) if window else mask


def _scores_to_output(q_BLGHK, k_BTGK, v_BTGK, mask_BLT, scale):
    scores = jnp.einsum("blghk,btgk->bghlt", q_BLGHK, k_BTGK, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BLT[:, None, None], scores * scale, MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(v_BTGK.dtype)
    return jnp.einsum("bghlt,btgk->blghk", shares, v_BTGK)


def _reference(q, k, v, q_index, k_index, q_segment, k_segment, window, aligned):
    B, L, H, K = q.shape
    G = k.shape[2]
    mask = _mask(q_index, k_index, q_segment, k_segment, window)
    return _scores_to_output(q.reshape(B, L, G, H // G, K), k, v, mask, K**-0.5).reshape(B, L, H, K)


def _blocked(q, k, v, q_index, k_index, q_segment, k_segment, window, aligned):
    L, H, K = q.shape[1:]
    if dispatch.backend() != "cpu":
        raise NotImplementedError("made for CPUs")
    if aligned and L % QUERY_BLOCK:
        raise NotImplementedError(f"needs whole rows of a multiple of {QUERY_BLOCK} tokens, got {L}")
    if L < QUERY_BLOCK:
        raise NotImplementedError(f"needs at least {QUERY_BLOCK} queries, got {L}")
    share = H // k.shape[2]
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * K**-0.5, k, v))
    k, v = (a if share == 1 else jnp.repeat(a, share, axis=1) for a in (k, v))
    if aligned:
        q_index = k_index = jnp.arange(L, dtype=jnp.int32)[None]  # known to the compiler
    places = (q_index, k_index, q_segment, k_segment)
    return jnp.swapaxes(_block_attention(q, k, v, places, window, aligned), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _block_attention(q_BHLK, k_BHTK, v_BHTK, places, window, aligned):
    """Attention of scaled queries, with the indices and segments of `attend` as `places`. The backward
    pass is written out because automatic differentiation of the softmax makes three more passes over the
    scores."""
    return _block_forward(q_BHLK, k_BHTK, v_BHTK, places, window, aligned)[0]


def _blocks(queries: int, keys: int, window: int, aligned: bool) -> list[tuple[slice, slice]]:
    """(keys, queries) of each block of queries: of a whole row only the keys that it can see."""
    starts = range(0, queries, QUERY_BLOCK)
    if not aligned:
        return [(slice(0, keys), slice(s, min(s + QUERY_BLOCK, queries))) for s in starts]
    low = [max(0, s - window + 1) // 16 * 16 if window else 0 for s in starts]
    return [(slice(a, s + QUERY_BLOCK), slice(s, s + QUERY_BLOCK)) for a, s in zip(low, starts, strict=True)]


def _block_forward(q, k, v, places, window, aligned):
    outputs, shares = [], []
    q_index, k_index, q_segment, k_segment = places
    for keys, rows in _blocks(q.shape[2], k.shape[2], window, aligned):
        mask = _mask(q_index[:, rows], k_index[:, keys], q_segment[:, rows], k_segment[:, keys], window)
        scores = jnp.einsum(
            "bhlk,bhtk->bhlt", q[:, :, rows], k[:, :, keys], preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[:, None], scores, MASKED)
        p = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        total = jnp.sum(p, -1, keepdims=True)
        p = p.astype(v.dtype)
        y = jnp.einsum("bhlt,bhtk->bhlk", p, v[:, :, keys], preferred_element_type=jnp.float32)
        outputs.append((y / total).astype(v.dtype))
        shares.append((p, total))
    y = jnp.concatenate(outputs, 2)
    return y, (q, k, v, y, shares)


def _block_backward(window, aligned, residuals, dy):
    q, k, v, y, shares = residuals
    dk, dv, dq = jnp.zeros_like(k), jnp.zeros_like(v), []
    blocks = _blocks(q.shape[2], k.shape[2], window, aligned)
    for (keys, rows), (p, total) in zip(blocks, shares, strict=True):
        d = (dy[:, :, rows] / total).astype(v.dtype)
        inner = jnp.sum(d * y[:, :, rows], -1, keepdims=True)
        ds = p * (jnp.einsum("bhlk,bhtk->bhlt", d, v[:, :, keys]) - inner)
        dq.append(jnp.einsum("bhlt,bhtk->bhlk", ds, k[:, :, keys]))
        dk = dk.at[:, :, keys].add(jnp.einsum("bhlt,bhlk->bhtk", ds, q[:, :, rows]))
        dv = dv.at[:, :, keys].add(jnp.einsum("bhlt,bhlk->bhtk", p, d))
    return jnp.concatenate(dq, 2), dk, dv, None


_block_attention.defvjp(_block_forward, _block_backward)


def _cudnn(q, k, v, q_index, k_index, q_segment, k_segment, window, aligned):
    if dispatch.backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16, got {q.dtype}")
    if q.shape[1] == 1 or q.shape[3] > 128 or q.shape[3] % 8:
        raise NotImplementedError(f"no kernel for query shape {q.shape}")
    mask = _mask(q_index, k_index, q_segment, k_segment, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


IMPLS = {"blocked": _blocked, "cudnn": _cudnn, "reference": _reference}


def attend(
    q_BLHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    q_index: jax.Array,
    k_index: jax.Array,
    q_segment: jax.Array,
    k_segment: jax.Array,
    window: int = 0,
    aligned: bool = True,
    impl: str = "auto",
) -> jax.Array:
    """Softmax attention, scores scaled by K ** -0.5 and normalized in float32.

    Query l sees key t iff k_index[t] <= q_index[l], their segments are equal, and (window > 0)
    their distance is less than `window`. Query head h reads key head h // (H / G).
    Args: q: [B, L, H, K]. k, v: [B, T, G, K]. q_index, q_segment: int32 [B, L]. k_index,
    k_segment: int32 [B, T]. aligned: L = T and both indices count 0..L-1 (a whole training row).
    Returns: [B, L, H, K] in v's dtype.
    """
    arguments = (q_BLHK, k_BTGK, v_BTGK, q_index, k_index, q_segment, k_segment, window, aligned)
    return dispatch.first(IMPLS, impl, *arguments)
