"""Token filtering in the backward pass (Collider, arXiv:2502.00340).

The loss decides which k tokens of every row are learned from; the others take part in the forward
pass only. The objective, exactly, for a mask m of the kept tokens:

    loss = sum_t m_t w_t nll_t / sum_t m_t w_t  per row, weighted by the row's sum of w
    in every attention: K_t and V_t of a dropped token are constants (stop_gradient)

Then nothing flows back into a dropped token in any layer, so leaving its row out of the backward pass
changes nothing. The first line alone (Rho-1, arXiv:2404.07965) saves no work: its gradient comes back
to dropped tokens through the keys and values of kept ones. Relative to it the gradient is biased.

Every layer is differentiated on its kept rows alone: its backward pass gathers their inputs, runs the
same `block.layer` on them against the keys and values that the forward pass kept, and differentiates
that. With a forward pass as 1 and a share r of rows kept this costs 1 + 3r; without filtering 3, or
4 where layers are recomputed. It is a form of rematerialization: only inputs, keys and values stay.

"excess" compares a token's loss with another model's. "ema" has no other model: it compares with the running
average of the losses of targets with the same id, so that ids that are always hard are not kept for that
alone. Unlike a reference it cannot tell noise from what can be learned, and no source reports that it helps.

The choice is known after the last layer and needed by all: `passenger`, zeros [B, k], rides through
the layers unchanged, and its cotangent carries the indices back, as float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import FilterConfig, ModelConfig
from nanochat_jax.model import block
from nanochat_jax.params import fold_name
from nanochat_jax.quant.project import Project
from nanochat_jax.types import Key, Metrics, Params

# --- the choice


def kept_count(cfg: FilterConfig, length: int) -> int:
    """Tokens kept of each row of `length` tokens: a multiple of up to 128, about an eighth of the row.

    Products and chunks of the loss then have sizes that divide well; the share kept may differ from
    `keep` by up to a sixteenth. At least one multiple; all for a `keep` within half a multiple of 1.
    """
    unit = 2 ** min(7, max(0, math.floor(math.log2(max(1, length / 8)))))
    while length % unit:
        unit //= 2
    return max(unit, min(length, unit * round(cfg.keep * length / unit)))


def scores(
    cfg: FilterConfig, nll_BL: jax.Array, reference_BL: jax.Array | None, weights_BL: jax.Array, key: Key
) -> jax.Array:
    """How much each token is worth learning from, float32 [B, L]; -inf where its weight is 0.

    Args: nll: of each target. reference: of each target under another model, for "excess" (Rho-1), or what
    `recall` puts there for "ema".
    key: for "random".
    "excess", "ema" and "loss" put the share `trim` of a row's highest last, because they are noise as a rule.
    "middle" drops as many of the lowest as of the highest losses.
    Raises: ValueError for "excess" or "ema" without a reference.
    """
    known = weights_BL > 0
    if cfg.score == "random":
        return jnp.where(known, jax.random.uniform(fold_name(key, "filter"), nll_BL.shape), -jnp.inf)
    value = nll_BL
    if cfg.score in ("excess", "ema"):
        if reference_BL is None:
            raise ValueError(f"model.filter.score = '{cfg.score}' needs batch.reference, a loss per target")
        value = nll_BL - reference_BL.astype(jnp.float32)
    value = jnp.where(known, value, -jnp.inf)
    if cfg.score != "middle" and not cfg.trim:
        return value
    # 0 = the highest. Descending and stable, like top_k: equal values rank by position.
    rank = jnp.argsort(jnp.argsort(-value, axis=-1, stable=True), axis=-1).astype(jnp.float32)
    count = jnp.sum(known, -1, keepdims=True, dtype=jnp.float32)
    if cfg.score == "middle":
        return jnp.where(known, -jnp.abs(rank - (count - 1) / 2), -jnp.inf)
    L = nll_BL.shape[1]
    return jnp.where(known, -rank - jnp.where(rank < jnp.floor(cfg.trim * count), L, 0), -jnp.inf)


def select(scores_BL: jax.Array, k: int) -> jax.Array:
    """Positions of each row's k highest scores, ascending, int32 [B, k]; the lower of equal ones."""
    return jnp.sort(jax.lax.top_k(scores_BL, k)[1].astype(jnp.int32), axis=-1)


def kept_weights(weights_BL: jax.Array, index_Bk: jax.Array) -> jax.Array:
    """Weights of the kept tokens [B, k], scaled so that each row's sum stays what it was.

    By row and not by batch: microbatches and shards then add up to the whole batch.
    """
    kept = gather_rows(weights_BL, index_Bk)
    total = jnp.sum(kept, -1, keepdims=True)
    return kept * (jnp.sum(weights_BL, -1, keepdims=True) / jnp.where(total > 0, total, 1.0))


def only_kept(
    hidden_BLD: jax.Array, future_BML: jax.Array, index_Bk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What layers behind the trunk (model/mtp.py) learn from: (hidden, weights of further targets).

    Dropped tokens are constants, and their targets have weight 0; each row's sum over an offset stays
    what it was. These layers are differentiated on all rows: they are one or two beside the trunk's.
    """
    kept_BL = scatter_rows(jnp.zeros(hidden_BLD.shape[:2]), index_Bk, jnp.ones(index_Bk.shape))
    hidden_BLD = jnp.where(kept_BL[..., None] > 0, hidden_BLD, jax.lax.stop_gradient(hidden_BLD))
    weights_BML = future_BML * kept_BL[:, None]
    total = jnp.sum(weights_BML, -1, keepdims=True)
    return hidden_BLD, weights_BML * (
        jnp.sum(future_BML, -1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    )


def metrics(nll_BL: jax.Array, weights_BL: jax.Array, index_Bk: jax.Array) -> Metrics:
    """Mean losses of kept and dropped tokens, and the share kept.

    Sums over rows, like every metric of a loss: a row's mean counts as the row's sum of weights, so
    where a row drops nothing that has a weight, its part of the mean of the dropped is 0.
    Returns: filter/kept_nll, filter/dropped_nll, filter/kept_share (of the weights).
    """
    kept = scatter_rows(jnp.zeros_like(weights_BL), index_Bk, gather_rows(weights_BL, index_Bk))
    rows = jnp.sum(weights_BL, -1)

    def mean(weights):
        total = jnp.sum(weights, -1)
        return jnp.sum(rows * jnp.sum(weights * nll_BL, -1) / jnp.where(total > 0, total, 1.0))

    dropped = mean(weights_BL - kept)
    return {"filter/kept_nll": mean(kept), "filter/dropped_nll": dropped, "filter/kept_share": jnp.sum(kept)}


# --- running averages

SEEN = "filter/seen"  # metric with what `seen` returns


class Averages(NamedTuple):
    """The state of an optimizer that keeps running averages beside its own: see `averaging`."""

    table: jax.Array  # float32 [V], loss of the targets with this id
    inner: optax.OptState


def averaging(
    tx: optax.GradientTransformation, cfg: FilterConfig, vocab_size: int
) -> optax.GradientTransformation:
    """`tx` with a table of the average loss of each target's id in its state; `tx` itself but for "ema".

    Its `update` takes one more argument, metrics, of which metrics[SEEN] is what `seen` returns. An id's
    average becomes decay * average + (1 - decay) * the batch's mean of its losses, if it occurs and is finite.
    The averages start at log(vocab_size), the loss of a model that knows nothing.
    """
    if cfg.keep == 1 or cfg.score != "ema":
        return tx

    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Averages:
        return Averages(jnp.full((vocab_size,), math.log(vocab_size), jnp.float32), tx.init(params))

    def update(
        updates: Any, state: Averages, params: Params | None = None, *, metrics: dict, **extra: Any
    ) -> tuple:
        sums, counts = metrics[SEEN]
        mean = sums / jnp.maximum(counts, 1.0)
        moved = cfg.decay * state.table + (1 - cfg.decay) * mean
        table = jnp.where((counts > 0) & jnp.isfinite(mean), moved, state.table)
        updates, inner = tx.update(updates, state.inner, params, metrics=metrics, **extra)
        return updates, Averages(table, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def recall(state: optax.OptState, targets_BL: jax.Array) -> jax.Array | None:
    """The average of each target's id before this step, float32 [B, L]; None if `state` holds none."""
    return state.table[targets_BL] if isinstance(state, Averages) else None


def seen(nll_BL: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, vocab_size: int) -> jax.Array:
    """Sum of the losses, and number, of the targets with each id whose weight is not 0, float32 [2, vocab_size].

    Sums, so that those of microbatches add up.
    """
    known, ids = (weights_BL > 0).astype(jnp.float32).reshape(-1), targets_BL.reshape(-1)
    losses = jnp.where(known > 0, nll_BL.reshape(-1), 0.0)
    nothing = jnp.zeros((vocab_size,), jnp.float32)
    return jnp.stack([nothing.at[ids].add(losses), nothing.at[ids].add(known)])


# --- rows


def gather_rows(a_BL: jax.Array, index_Bk: jax.Array) -> jax.Array:
    """a[b, index[b]]: [B, L, ...] to [B, k, ...]. The indices of a row are ascending and distinct."""

    def of_row(row, index):
        return row.at[index].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)

    return jax.vmap(of_row)(a_BL, index_Bk)


def scatter_rows(a_BL: jax.Array, index_Bk: jax.Array, rows_Bk: jax.Array) -> jax.Array:
    """a with the rows at index[b] replaced; the inverse of `gather_rows`."""

    def of_row(row, index, new):
        return row.at[index].set(
            new.astype(row.dtype), mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(of_row)(a_BL, index_Bk, rows_Bk)


# --- layers


def passenger(batch_size: int, k: int) -> jax.Array:
    """What rides through the layers: float32 zeros [B, k]."""
    return jnp.zeros((batch_size, k), jnp.float32)


@jax.custom_vjp
def inject(total: jax.Array, ridden_Bk: jax.Array, index_Bk: jax.Array) -> jax.Array:
    """`total`, the loss. In the backward pass the passenger's cotangent becomes the kept indices.

    Args: ridden: the passenger after the last layer. index: int32, below 2^24.
    """
    return total


def _inject_forward(total, ridden, index):
    return total, index


def _inject_backward(index, cotangent):
    return cotangent, index.astype(jnp.float32), None


inject.defvjp(_inject_forward, _inject_backward)


def layer(cfg: ModelConfig, project: Project, context: dict, tokens: jax.Array) -> Callable[..., tuple]:
    """`block.layer` whose backward pass sees kept rows only, on the carry (x, (watch, passenger)).

    Takes (i, carry, x0, p, kv) and returns (carry, None). Only for losses that end in `inject`; there
    is no cache, so kv is None.
    """

    def run(i: int, carry: tuple, x0: jax.Array, p: Params, kv: None) -> tuple[tuple, None]:
        x, (watch, rider) = carry
        x, watch, rider = _layer(cfg, i, project, context, tokens, x, watch, rider, x0, p)  # type: ignore[misc]
        return (x, (watch, rider)), None

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(cfg, i, project, context, tokens, x, watch, rider, x0, p):
    return _layer_forward(cfg, i, project, context, tokens, x, watch, rider, x0, p)[0]


def _layer_forward(cfg, i, project, context, tokens, x, watch, rider, x0, p):
    (y, seen), kv = block.layer_and_keys(cfg, project, context, tokens, i, (x, watch), x0, p, None)
    return (y, seen, rider), (project, context, tokens, x, x0, p, kv)


def _layer_backward(cfg, i, residuals: tuple, cotangents: tuple) -> tuple[Any, ...]:
    project, context, tokens, x, x0, p, kv = residuals
    dy, _, d_rider = cotangents
    index = d_rider.astype(jnp.int32)

    def rows(tree):
        return jax.tree.map(lambda a: gather_rows(a, index), tree)

    kept = {
        "rotary": rows(context["rotary"]), "q": rows(context["q"]), "k": context["k"],
        "length": None, "write": lambda kept, new: scatter_rows(kept, index, new),
    }  # fmt: skip

    def on_rows(x, x0, p):
        return block.layer(cfg, project, kept, rows(tokens), i, (x, None), x0, p, kv)[0][0]

    dx, dx0, dp = jax.vjp(on_rows, rows(x), rows(x0), p)[1](rows(dy))
    whole = scatter_rows(jnp.zeros_like(x), index, dx)
    # Not a stack of zeros where the layer does not read the embedding.
    whole0 = scatter_rows(jnp.zeros_like(x0), index, dx0) if "x0" in p.get("scale", {}) else None
    return None, None, None, whole, None, d_rider, whole0, dp


_layer.defvjp(_layer_forward, _layer_backward)
