"""Multi-token prediction: hidden states that predict tokens beyond the next one.

Offset i = 1..M at position t predicts the token after t + i, `targets[t + i]`. Each offset has one
layer of the trunk's kind with its own weights, and shares the trunk, the embedding and the
unembedding. z is the trunk's output after its last norm, E the embedding, u_0 = z.

    parallel  u_i = Block_i(z)                                             arXiv:2404.19737
    chained   u_i = Block_i([norm(u_{i-1}); norm(E(targets[t + i - 1]))] P_i)    arXiv:2412.19437, 2.2

The hidden state of offset i is norm(u_i). The chained form is fed the tokens that it passes over, so
it sees tokens up to t + i and still predicts t + i + 1. Deviations: the papers take z before the last
norm; the parallel paper gives the next token a head layer of its own and takes those layers from the
trunk, while here the trunk's last layer plays that part.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from nanochat_jax import params as P
from nanochat_jax.config import ModelConfig
from nanochat_jax.kernels import dispatch
from nanochat_jax.model.layers import rms_norm
from nanochat_jax.params import ParamSpec
from nanochat_jax.quant.project import Project
from nanochat_jax.types import Batch, Params

Block = Callable[[jax.Array, Params], jax.Array]  # ([B, L, D], one layer's weights) -> [B, L, D]


def param_specs(cfg: ModelConfig, blocks: Mapping[str, Mapping]) -> dict:
    """The weights under "mtp", with a leading axis of `cfg.mtp.depth`; {} if that is 0.

    Args: blocks: the trunk's table, whose attention and MLP entries are taken over. Options of single
    layers (value embeddings, stream scalars) and of several streams stay the trunk's.
    """
    M, D = cfg.mtp.depth, cfg.dim
    if not M:
        return {}
    specs: dict = {
        part: {
            name: dataclasses.replace(spec, shape=(M, *spec.shape[1:]))
            for name, spec in blocks[part].items()
            if isinstance(spec, ParamSpec)
        }
        for part in ("attn", "mlp")
    }
    norms = ["norm"]
    if cfg.mtp.kind == "chained":
        specs["join"] = ParamSpec(
            (M, 2 * D, D), ("layer", "embed", None), P.uniform((2 * D) ** -0.5), matmul=True
        )
        norms += ["hidden_norm", "embed_norm"]
    if cfg.norm == "weighted":
        specs |= {name: ParamSpec((M, D), ("layer", None), P.constant(1.0)) for name in norms}
    return {"mtp": specs}


def future_hidden(
    cfg: ModelConfig,
    project: Project,
    block: Block,
    p: Params,
    embed_VD: jax.Array,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
) -> jax.Array:
    """Hidden states of the offsets 1..M, after their norms, before the shared unembedding.

    Args: block: one layer on the residual stream, with the batch's segments and positions. p: the
    weights under "mtp". embed_VD: the embedding. hidden_BLD: the trunk's output. targets_BL: int32,
    read by the chained form only.
    Returns: [M, B, L, D] in hidden's dtype. The last i positions of a row, and those whose target
    lies in another document, hold no prediction; `future_weights` is 0 there. Nothing flows from
    them to others, because a row's later positions are never seen.
    """
    M = cfg.mtp.depth

    def offset(u, layer):
        q, e_BLD = layer
        if cfg.mtp.kind == "parallel":
            return u, rms_norm(block(hidden_BLD, q), q.get("norm"), cfg.norm_eps)
        u = block(joined(cfg, project, q, u, e_BLD), q)
        return u, rms_norm(u, q.get("norm"), cfg.norm_eps)

    passed = None
    if cfg.mtp.kind == "chained":  # one look-up of all offsets, hence one gradient of the table
        passed_MBL = jnp.stack([_later(targets_BL, i) for i in range(M)])
        passed = embed_VD.astype(hidden_BLD.dtype)[passed_MBL]
    # As in the trunk's layer scan: XLA's CPU backend does not fuse across the steps of a loop.
    unroll = M if dispatch.backend() == "cpu" else 1
    return jax.lax.scan(offset, hidden_BLD, (p, passed), unroll=unroll)[1]


def joined(cfg: ModelConfig, project: Project, q: Params, u_BLD: jax.Array, e_BLD: jax.Array) -> jax.Array:
    """What a chained offset's layer reads: the stream of the offset before, and the embedding of the token
    that it passes over; all [B, L, D]."""
    u = rms_norm(u_BLD, q.get("hidden_norm"), cfg.norm_eps)
    e = rms_norm(e_BLD, q.get("embed_norm"), cfg.norm_eps)
    return project("mtp/join", jnp.concatenate([u, e], -1), q["join"])


def future_targets(targets_BL: jax.Array, depth: int) -> jax.Array:
    """int32 [M, B, L]: targets[t + i] for the offsets i = 1..depth; 0 beyond the end of the row."""
    return jnp.stack([_later(targets_BL, i) for i in range(1, depth + 1)])


def future_weights(batch: Batch, depth: int) -> jax.Array:
    """Weight of each target of `future_targets`: its own weight, scaled by one factor per offset.

    A target counts if it lies in the row, in the document of t (by `segments`, and by the zero weight
    of a document's first token), and if neither it nor a target between has weight 0. The factor
    makes each offset's weights sum to the sum of `batch.weights`: after `train.step.normalize` an
    offset's weighted sum is the mean over its own valid targets. So the weights belong to the
    whole batch: compute them before cutting it into microbatches.

    Returns: float32 [B, M, L]; all 0 for an offset without any valid target.
    """
    total, learned = jnp.sum(batch.weights), batch.weights > 0
    rows = []
    for i in range(1, depth + 1):
        weights_BL = _later(batch.weights, i)
        learned = learned & (weights_BL > 0)
        valid = learned & (_later(batch.segments, i) == batch.segments)
        weights_BL = jnp.where(valid, weights_BL, 0.0)
        own = jnp.sum(weights_BL)
        rows.append(weights_BL * (total / jnp.where(own > 0, own, 1.0)))
    return jnp.stack(rows, axis=1)


def _later(a_BL: jax.Array, n: int) -> jax.Array:
    """The row from position n on, zeros at its end."""
    return jnp.pad(a_BL, ((0, 0), (0, n)))[:, n:]
