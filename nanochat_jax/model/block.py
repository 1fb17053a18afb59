"""One layer of the transformer: attention, then MLP, each read from the residual and added to it.

Functions of (cfg, project, ...) over the weights of a single layer; model/transformer.py stacks them.
"""

import functools

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig
from nanochat_jax.kernels import attention as kernels
from nanochat_jax.model import mhc
from nanochat_jax.model.layers import MLPS, rms_norm, rotary_table, rotate
from nanochat_jax.quant.project import Project
from nanochat_jax.types import Batch, KVCache, Params

GATE_INPUTS = 12  # channels of the stream that steer the value-embedding gate, as in nanochat


def make_context(cfg: ModelConfig, batch: Batch, cache: KVCache | None) -> dict:
    """What all layers share: rotary tables, which key index and segment each query and slot has, and how
    new keys or values (second argument) are written into a layer's slots (first)."""
    B, L = batch.tokens.shape
    index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    # The barrier keeps XLA from fusing the sines into every layer's rotation and computing them again
    # for each head (on CPU that costs more than the attention products).
    table = jax.lax.optimization_barrier(rotary_table(batch.positions, cfg.head_dim, cfg.rope_theta))
    shared: dict = {"rotary": table}
    if cache is None:
        return shared | {"q": (index, batch.segments), "k": (index, batch.segments), "write": None}
    slots = jnp.broadcast_to(jnp.arange(cache.k.shape[3], dtype=jnp.int32), (B, cache.k.shape[3]))
    q_index = cache.length[:, None] + index
    return shared | {
        "q": (q_index, jnp.zeros_like(q_index)), "k": (slots, jnp.zeros_like(slots)),
        "write": functools.partial(_write, cache.length),
    }  # fmt: skip


def layer(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, carry: tuple, x0: jax.Array,
    p: Params, kv: tuple | None,
) -> tuple[tuple, tuple | None]:  # fmt: skip
    """One layer: attention, then MLP, each added to the residual.

    Args: tokens: int32 [B, L]. i: the layer's index in the period. carry: (residual [B, L, D] or
    [B, L, S, D], what model.mhc watches). x0: [B, L, D], the embedding. p: the layer's weights. kv: its
    slices of the cache, [B, T, G, K] each, or None.
    Returns: the carry after the layer, and kv with the new entries.
    """
    carry, written = layer_and_keys(cfg, project, context, tokens, i, carry, x0, p, kv)
    return carry, None if kv is None else written


def layer_and_keys(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, carry: tuple, x0: jax.Array,
    p: Params, kv: tuple | None,
) -> tuple[tuple, tuple]:  # fmt: skip
    """`layer`, which without kv returns the row's own keys and values in its place."""
    (x, watch), scale = carry, p.get("scale", {})
    project = project.at(p["number"]) if "number" in p else project
    if "residual" in scale:
        x = scale["residual"].astype(x.dtype) * x
    if "x0" in scale:
        x = x + scale["x0"].astype(x.dtype) * mhc.expand(cfg.mhc, x0)
    mix = mhc.coefficients(cfg.mhc, p["attn"].get("mhc", {}), x, cfg.norm_eps)
    h, watch = mhc.read(mix, x), mhc.observe(watch, mix)
    y, kv = attention(cfg, project, context, tokens, i, h, p["attn"], p["value"], kv)
    x = mhc.write(mix, x, y)
    mix = mhc.coefficients(cfg.mhc, p["mlp"].get("mhc", {}), x, cfg.norm_eps)
    h, watch = mhc.read(mix, x), mhc.observe(watch, mix)
    return (mhc.write(mix, x, mlp(cfg, project, h, p["mlp"])), watch), kv


def attention(
    cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array, i: int, x_BLD: jax.Array,
    p: Params, value: Params | None, kv: tuple | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    """The attention sublayer: norm, projections, value embeddings, attention. Returns ([B, L, D], kv with
    the new entries, or without kv the new keys and values)."""
    B, L, _ = x_BLD.shape
    h = rms_norm(x_BLD, p.get("norm"), cfg.norm_eps)
    flat = project.several(("attn/q", "attn/k", "attn/v"), h, (p["q"], p["k"], p["v"]))
    q, k, v = (y.reshape(B, L, -1, cfg.head_dim) for y in flat)
    if value is not None:
        gate = 3 * jax.nn.sigmoid(project("value/gate", h[..., :GATE_INPUTS], value["gate"]))
        v = v + gate[..., None] * value["embed"].astype(v.dtype)[tokens].reshape(v.shape)
    q, k = _queries_keys(cfg, q, k, p, context["rotary"])
    keys, values = written = (k, v)
    if kv is not None:
        written = context["write"](kv[0], k), context["write"](kv[1], v)
        keys, values = (a.astype(q.dtype) for a in written)
    window = cfg.window[i % len(cfg.window)] if cfg.window else 0
    (q_index, q_segment), (k_index, k_segment) = context["q"], context["k"]
    y = kernels.attend(
        q, keys, values, q_index, k_index, q_segment, k_segment, window=window, aligned=kv is None
    ).reshape(B, L, -1)
    if cfg.sub_norm:
        y = rms_norm(y, p.get("sub_norm"), cfg.norm_eps)
    return project("attn/o", y, p["o"]), written


def _queries_keys(cfg, q, k, p, table):
    def norm(x, gain):
        return rms_norm(x, p.get(gain), cfg.norm_eps) * jnp.asarray(cfg.qk_gain, x.dtype)

    if cfg.qk_norm == "before_rope":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    q, k = rotate(q, table), rotate(k, table)
    if cfg.qk_norm == "after_rope":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    return q, k


def _write(start_B, cache_BTGK, new_BLGK):
    """Put each row's new entries behind its own length."""
    write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0, 0)))
    return write(cache_BTGK, new_BLGK.astype(cache_BTGK.dtype), start_B)


def mlp(cfg: ModelConfig, project: Project, x_BLD: jax.Array, p: Params) -> jax.Array:
    """The MLP sublayer: norm, then one of MLPS. Returns [B, L, D]."""
    h = rms_norm(x_BLD, p.get("norm"), cfg.norm_eps)
    inner = MLPS[cfg.mlp][0](project, p, h)
    if cfg.sub_norm:
        inner = rms_norm(inner, p.get("sub_norm"), cfg.norm_eps)
    return project("mlp/down", inner, p["down"])
