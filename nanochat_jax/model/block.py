"""One layer of the transformer: attention, then MLP, each read from the residual and added to it.

Functions of (cfg, project, ...) over the weights of a single layer; model/transformer.py stacks them.
"""

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig
from nanochat_jax.kernels import attention as kernels
from nanochat_jax.kernels import cached
from nanochat_jax.model import mhc
from nanochat_jax.model.layers import MLPS, rms_norm, rotary_table, rotate
from nanochat_jax.quant.project import Project
from nanochat_jax.types import Batch, KVCache, Params

MANY_ROWS = 32  # of a cache: more are written by a loop, fewer by an update for each in the program
GATE_INPUTS = 12  # channels of the stream that steer the value-embedding gate, as in nanochat


def make_context(cfg: ModelConfig, batch: Batch, cache: KVCache | None) -> dict:
    """What all layers share: rotary tables, which index and segment each query and key of the rows has,
    and with a cache the number of tokens that each row holds already."""
    B, L = batch.tokens.shape
    index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    # The barrier keeps XLA from fusing the sines into every layer's rotation and computing them again
    # for each head (on CPU that costs more than the attention products).
    table = jax.lax.optimization_barrier(rotary_table(batch.positions, cfg.head_dim, cfg.rope_theta))
    places = (index, batch.segments if cache is None else jnp.zeros_like(index))
    return {"rotary": table, "q": places, "k": places, "length": None if cache is None else cache.length}


def layer(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, carry: tuple, x0: jax.Array,
    p: Params, kv: tuple | None,
) -> tuple[tuple, tuple | None]:  # fmt: skip
    """One layer: attention, then MLP, each added to the residual.

    Args: tokens: int32 [B, L]. i: the layer's index in the period. carry: (residual [B, L, D] or
    [B, L, S, D], what model.mhc watches). x0: [B, L, D], the embedding. p: the layer's weights. kv: keys
    and values of earlier tokens [.., B, G, T, K] and the layer's indices into the axes before; None = there
    are none.
    Returns: the carry after the layer, and with a cache the tokens' own keys and values [B, L, G, K].
    """
    carry, entries = layer_and_keys(cfg, project, context, tokens, i, carry, x0, p, kv)
    return carry, None if context["length"] is None else entries


def layer_and_keys(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, carry: tuple, x0: jax.Array,
    p: Params, kv: tuple | None,
) -> tuple[tuple, tuple]:  # fmt: skip
    """`layer`, which returns the tokens' own keys and values without a cache, too."""
    (x, watch), scale = carry, p.get("scale", {})
    project = project.at(p["number"]) if "number" in p else project
    if "residual" in scale:
        x = scale["residual"].astype(x.dtype) * x
    if "x0" in scale:
        x = x + scale["x0"].astype(x.dtype) * mhc.expand(cfg.mhc, x0)
    mix = mhc.coefficients(cfg.mhc, p["attn"].get("mhc", {}), x, cfg.norm_eps)
    h, watch = mhc.read(mix, x), mhc.observe(watch, mix)
    y, entries = attention(cfg, project, context, tokens, i, h, p["attn"], p["value"], kv)
    x = mhc.write(mix, x, y)
    mix = mhc.coefficients(cfg.mhc, p["mlp"].get("mhc", {}), x, cfg.norm_eps)
    h, watch = mhc.read(mix, x), mhc.observe(watch, mix)
    return (mhc.write(mix, x, mlp(cfg, project, h, p["mlp"])), watch), entries


def attention(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, x_BLD: jax.Array,
    p: Params, value: Params | None, kv: tuple | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    """The attention sublayer: norm, projections, value embeddings, attention. Returns ([B, L, D], the
    tokens' keys and values)."""
    B, L, _ = x_BLD.shape
    h = rms_norm(x_BLD, p.get("norm"), cfg.norm_eps)
    flat = project.several(("attn/q", "attn/k", "attn/v"), h, (p["q"], p["k"], p["v"]))
    q, k, v = (y.reshape(B, L, -1, cfg.head_dim) for y in flat)
    if value is not None:
        gate = 3 * jax.nn.sigmoid(project("value/gate", h[..., :GATE_INPUTS], value["gate"]))
        v = v + gate[..., None] * value["embed"].astype(v.dtype)[tokens].reshape(v.shape)
    q, k = _queries_keys(cfg, q, k, p, context["rotary"])
    window = cfg.window[i % len(cfg.window)] if cfg.window else 0
    if context["length"] is None or kv is None:
        # Of some rows only (model/collider.py) the keys join those of the others.
        keys, values = (k, v) if kv is None else map(context["write"], kv, (k, v))
        (q_index, q_segment), (k_index, k_segment) = context["q"], context["k"]
        y = kernels.attend(
            q, keys, values, q_index, k_index, q_segment, k_segment, window=window, aligned=kv is None
        )
    else:
        keys, values, number = kv
        y = cached.attend(q, k, v, keys, values, number, context["length"], window=window)
    y = y.reshape(B, L, -1)
    if cfg.sub_norm:
        y = rms_norm(y, p.get("sub_norm"), cfg.norm_eps)
    return project("attn/o", y, p["o"]), (k, v)


def _queries_keys(cfg, q, k, p, table):
    def norm(x, gain):
        return rms_norm(x, p.get(gain), cfg.norm_eps) * jnp.asarray(cfg.qk_gain, x.dtype)

    if cfg.qk_norm == "before_rope":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    q, k = rotate(q, table), rotate(k, table)
    if cfg.qk_norm == "after_rope":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    return q, k


def append(cache: KVCache, new: tuple | None, outside: dict[str, tuple], x: jax.Array) -> KVCache:
    """The cache with each row's new entries behind its own length, which stays as it is.

    All layers at once and in place where the caller gives the cache away: what a layer would write into
    slots of its own, a scan or the next reader would copy whole.
    Args: new: keys and values [R, N, B, L, G, K] of at most as many loops as the cache has; None = these
    stay. outside: [n, B, L, G, K] of stacks outside the loops; others stay. x: what all readers of the old
    entries ended in. Every row needs L free slots: a write that does not fit is moved to the left without
    an error.
    """
    # Never more than the length, but known only after x: or else XLA might order the write before the last
    # read, for which it then copies the cache.
    start_B = jnp.minimum(cache.length, cache.k.shape[-2] + (x.ravel()[0] > 0).astype(jnp.int32))

    def put(a: jax.Array, new: jax.Array) -> jax.Array:
        new, rows, zero = jnp.swapaxes(new, -3, -2).astype(a.dtype), a.ndim - 4, jnp.int32(0)

        # No reshaping of the leading axes: XLA may give an axis of size 1 another layout, and then copies.
        def write(row, a):
            one = jax.lax.dynamic_slice_in_dim(new, row, 1, rows)
            return jax.lax.dynamic_update_slice(a, one, (*(zero,) * rows, row, zero, start_B[row], zero))

        if a.shape[rows] > MANY_ROWS:
            return jax.lax.fori_loop(jnp.int32(0), jnp.int32(a.shape[rows]), write, a)
        for row in range(a.shape[rows]):
            a = write(jnp.int32(row), a)
        return a

    written = {name: tuple(map(put, cache.outside[name], entries)) for name, entries in outside.items()}
    k, v = (cache.k, cache.v) if new is None else map(put, (cache.k, cache.v), new)
    return cache.replace(k=k, v=v, outside=cache.outside | written)  # type: ignore[attr-defined]


def mlp(cfg: ModelConfig, project: Project, x_BLD: jax.Array, p: Params) -> jax.Array:
    """The MLP sublayer: norm, then one of MLPS. Returns [B, L, D]."""
    h = rms_norm(x_BLD, p.get("norm"), cfg.norm_eps)
    inner = MLPS[cfg.mlp][0](project, p, h)
    if cfg.sub_norm:
        inner = rms_norm(inner, p.get("sub_norm"), cfg.norm_eps)
    return project("mlp/down", inner, p["down"])
