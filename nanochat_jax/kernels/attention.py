"""Causal attention over packed rows, by the implementation that suits the device.

`reference` states the meaning and accepts everything; `cudnn` is the library's fused kernel;
`blocked` is the CPU path: it cuts the queries into blocks and multiplies each with the keys up to
its end only, which skips almost half of the products and keeps the score matrix in cache.
"""

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
    B, L, H, K = q.shape
    G = k.shape[2]
    if dispatch.backend() != "cpu":
        raise NotImplementedError("made for CPUs")
    if not aligned or L % QUERY_BLOCK or L == QUERY_BLOCK:
        raise NotImplementedError(f"needs whole training rows of a multiple of {QUERY_BLOCK} tokens, got {L}")
    grouped = q.reshape(B, L, G, H // G, K)
    outputs = []
    for start in range(0, L, QUERY_BLOCK):
        end = start + QUERY_BLOCK
        low = max(0, (start - window + 1) // 16 * 16) if window else 0
        mask = _mask(
            q_index[:, start:end], k_index[:, low:end], q_segment[:, start:end], k_segment[:, low:end], window
        )
        outputs.append(
            _scores_to_output(grouped[:, start:end], k[:, low:end], v[:, low:end], mask, K**-0.5)
        )
    return jnp.concatenate(outputs, 1).reshape(B, L, H, K)


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
