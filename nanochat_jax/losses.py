"""Loss terms over token predictions, with logits that never exist for the whole batch.

All terms that read the main logits share one pass: `token_loss` walks the sequence in chunks, and
when it is differentiated it forms the gradients of a chunk's logits while they are there (the
weights of the terms are known in advance, so nothing is recomputed and nothing is stored).

    nll_t = lse(z) - z[target]      z-loss = lse(z)^2      entropy H = -sum p log p
    d/dz  = p - onehot              2 lse(z) p             -p (log p + H)

Multi-token prediction shares the pass: the hidden states of all offsets are walked one after the other,
chunk by chunk, into one gradient of the head. So neither logits nor gradients of the head exist once
per offset; what grows with depth is of the size of the hidden states. Its term is

    sum_i decay^(i-1) L_i,    L_i = mean nll of offset i over its own valid targets, i = 1..depth.

A looped model with an exit gate (model/loop.py) predicts after every loop r. Its loss weights each
prediction of a token by the probability p_r of leaving there, and p learns from it:

    exit  sum_r p_r nll_r       exit_entropy  H(p), a bonus      gate  the second stage, for the gate alone

It replaces next_token, whose metric stays the plain cross-entropy after the last loop. Reading R predictions
costs R heads. With model.loop.readout = "sampled" a step reads one loop r at random, and R p_r nll_r, whose
mean over r is the sum, stands for it; the term next_token can be added to learn from the last loop always.

A term's weight is a number, or points (step, weight) with straight lines between them and the first and
last weight outside: ("mtp", ((0, 0.2), (1000, 0.2), (1500, 0.0))) fades the term out. Numbers are constants
of the program, as without schedules; scheduled weights enter it as values computed from the step.

Sums, not means: the train step scales `batch.weights` to sum to 1 over the whole global batch, so
that microbatches and shards add up to exactly the large batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.config import Config, ModelConfig, Weight, padded_vocab
from nanochat_jax.model import collider, loop, mtp, transformer
from nanochat_jax.params import fold_name
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch, Key, Metrics, Params

# term -> per-token statistic of the logits it sums, and its sign in the loss; "future" is the nll of
# tokens beyond the next one, which has logits of its own; the last three are of the exit gate
TERMS: dict[str, tuple[str, float]] = {
    "next_token": ("nll", 1.0),
    "z": ("z", 1.0),  # arXiv:2204.02311: keeps log-partition near 0
    "logit_entropy": ("entropy", -1.0),  # a bonus: minimizing it raises the entropy
    "mtp": ("future", 1.0),  # arXiv:2404.19737, arXiv:2412.19437
    "exit": ("exit", 1.0),  # arXiv:2510.25741
    "exit_entropy": ("exit_entropy", -1.0),  # the same; weights of 0.05 to 0.1
    "gate": ("gate", 1.0),  # its second stage
}
STATISTICS: tuple[str, ...] = ("nll", "z", "entropy")
EXITS: tuple[str, ...] = ("exit", "exit_entropy", "gate")

# loss_fn(params, batch, key, step = 0) -> (loss, metrics); the step is read by scheduled weights
LossFn = Callable[..., tuple[jax.Array, Metrics]]
Terms = tuple[tuple[str, Weight], ...]


def weight_at(weight: Weight, step: jax.typing.ArrayLike) -> float | jax.Array:
    """A term's weight after `step` updates: the number itself, or float32 [] on the line of its points."""
    if not isinstance(weight, tuple):
        return float(weight)
    steps, values = (jnp.asarray(column, jnp.float32) for column in zip(*weight, strict=True))
    return jnp.interp(jnp.asarray(step, jnp.float32), steps, values)


def _coefficients(terms: Terms, step: jax.typing.ArrayLike) -> dict[str, float | jax.Array]:
    """The coefficient of every statistic in the loss: a number, or an array if a term of it is scheduled."""
    found: dict[str, float | jax.Array] = dict.fromkeys((*STATISTICS, "future", *EXITS), 0.0)
    for name, weight in terms:
        statistic, sign = TERMS[name]
        found[statistic] = found[statistic] + sign * weight_at(weight, step)
    return found


def _counts(coefficient: float | jax.Array) -> bool:
    """Whether a coefficient can matter. A schedule always can."""
    return not isinstance(coefficient, float) or coefficient != 0


def make_loss(
    cfg: ModelConfig, terms: Terms, chunk: int = 512, whole: transformer.Whole = None, first: bool = False
) -> LossFn:
    """Build loss_fn(params, batch, key, step = 0) -> (scalar, metrics).

    Args: terms: (name in TERMS, weight or its points). chunk: tokens whose logits exist at once.
    step: int32 [] or a number, updates done so far; only scheduled weights read it.
    whole: see `transformer.forward`. first: the loss of the first model.filter.warmup steps: that of all
    tokens, with the metrics of the filtered one.
    The loss is the sum over tokens of batch.weights * sum_i weight_i * term_i. Metrics hold each
    term's own weighted sum as "loss/<name>", and "loss/entropy". The term "mtp" is weighted by
    batch.future (computed from this batch if it is None, see `make_prepare`); its metrics are nats per
    token: "loss/mtp_<i>" of each offset, and their mean weighted by decay^(i-1) as "loss/mtp".
    With model.filter the loss is that of the kept tokens (model/collider.py); the metrics of terms stay
    sums over all tokens, but for "mtp", and those of `collider.metrics` join them; for the score "ema" also
    `collider.seen`, which is for the optimizer alone. With the terms of the
    exit gate there are also "loss/loop_<r>", the plain nll after each loop, and `loop.metrics`. The term
    "gate" lets nothing but the gate learn. Scheduled weights are metrics as "loss/weight_<name>".
    Raises: ValueError for the term "mtp" at depth 0, for those of the gate without one, and for those of
    the gate with model.filter.
    """
    project = projections.from_config(cfg)
    scheduled = {name: weight for name, weight in terms if isinstance(weight, tuple)}
    used = {TERMS[name][0] for name, weight in terms if weight}
    if "future" in used and not cfg.mtp.depth:
        raise ValueError("the loss term 'mtp' needs model.mtp.depth of at least 1")
    filtering = cfg.filter.keep < 1 and not first
    exiting, sampled = bool(used & set(EXITS)), cfg.loop.readout == "sampled"
    if exiting and cfg.loop.gate == "none":
        raise ValueError(
            "the loss terms 'exit', 'exit_entropy' and 'gate' need an exit gate, model.loop.gate"
        )
    if exiting and cfg.filter.keep < 1:
        raise ValueError("the loss terms of the exit gate learn from all tokens: model.filter.keep must be 1")

    def loss_fn(
        params: Params, batch: Batch, key: Key, step: jax.typing.ArrayLike = 0
    ) -> tuple[jax.Array, Metrics]:
        drawing, coefficients = project.keyed(key), _coefficients(terms, step)
        future = coefficients.pop("future")
        exits = {name: coefficients.pop(name) for name in EXITS}
        if "future" in used and batch.future is None:
            batch = make_prepare(cfg)(batch, None)
        if "gate" in used:
            params = _only_gate(params)
        over, rider = functools.partial(_over_tokens, cfg, chunk, coefficients), None
        if filtering:
            B, L = batch.tokens.shape
            rider = collider.passenger(B, collider.kept_count(cfg.filter, L))
        only = _sampled_loop(key, cfg.loop.count) if exiting and sampled else None
        output = transformer.forward(
            cfg, drawing, params, batch, each_loop=exiting, only=only, passenger=rider, whole=whole
        )
        head = transformer.head(cfg, params)
        total, metrics, filtered, hidden = jnp.zeros((), jnp.float32), {}, {}, output.hidden
        if exiting:
            total, metrics = _exit_loss(cfg, chunk, exits, params, output, batch, only)
        if used & set(STATISTICS) or not exiting or sampled:
            if rider is None:
                main, sums = over(output.hidden, head, batch.targets, batch.weights)
                filtered = _all_kept(cfg, chunk, output, head, batch, sums) if first else {}
            else:
                main, sums, filtered, index_Bk = _filtered_loss(cfg, chunk, over, output, head, batch, key)
                if "future" in used:
                    hidden, weights = collider.only_kept(hidden, batch.future, index_Bk)
                    batch = batch.replace(future=weights)  # type: ignore[attr-defined]
            total = main if not metrics else total + main
            metrics |= {f"loss/{name}": sums[TERMS[name][0]] for name, _ in terms if TERMS[name][0] in sums}
            metrics |= {"loss/next_token": sums["nll"], "loss/entropy": sums["entropy"]}
        if "future" in used:
            more, means = _future_loss(cfg, drawing, chunk, future, params, hidden, batch)
            total, metrics = total + more, metrics | means
        for name, weight in scheduled.items():  # pieces of a batch add up to its weight
            metrics[f"loss/weight_{name}"] = jnp.sum(batch.weights) * weight_at(weight, step)
        return total, metrics | output.aux | filtered

    return loss_fn


def _filtered_loss(cfg, chunk, over, output, head, batch, key):
    """(loss of the kept tokens, the statistics' sums over all tokens, the filter's metrics, the kept)."""
    fixed = jax.lax.stop_gradient((output.hidden, head))
    each = _token_statistics(cfg, chunk, *fixed, batch.targets)
    scores_BL = collider.scores(cfg.filter, each["nll"], batch.reference, batch.weights, key)
    index_Bk = collider.select(scores_BL, output.ridden.shape[1])
    hidden_BkD, targets_Bk = (collider.gather_rows(a, index_Bk) for a in (output.hidden, batch.targets))
    total, _ = over(hidden_BkD, head, targets_Bk, collider.kept_weights(batch.weights, index_Bk))
    sums = {name: jnp.sum(batch.weights * value) for name, value in each.items()}
    metrics = collider.metrics(each["nll"], batch.weights, index_Bk)
    if cfg.filter.score == "ema":
        metrics[collider.SEEN] = collider.seen(each["nll"], batch.targets, batch.weights, padded_vocab(cfg))
    return collider.inject(total, output.ridden, index_Bk), sums, metrics, index_Bk


def _all_kept(cfg, chunk, output, head, batch, sums):
    """The metrics of a filter that keeps everything."""
    metrics = {"filter/kept_nll": sums["nll"], "filter/dropped_nll": jnp.zeros((), jnp.float32)}
    metrics["filter/kept_share"] = jnp.sum(batch.weights)
    if cfg.filter.score == "ema":
        fixed = jax.lax.stop_gradient((output.hidden, head))
        nll = _token_statistics(cfg, chunk, *fixed, batch.targets)["nll"]
        metrics[collider.SEEN] = collider.seen(nll, batch.targets, batch.weights, padded_vocab(cfg))
    return metrics


def make_prepare(cfg: ModelConfig) -> Callable[[Batch, Any], Batch]:
    """Build prepare(batch, optimizer state) -> batch with what else the loss needs: `future`, the weights of
    further targets, at a depth above 0, and `reference` from the running averages, if the state has them.

    For the whole normalized batch, before it is cut into microbatches: each offset has its own number
    of valid targets, which no piece knows.
    """
    depth = cfg.mtp.depth

    def prepare(batch: Batch, opt_state: Any) -> Batch:
        averages = collider.recall(opt_state, batch.targets)
        batch = batch if averages is None else batch.replace(reference=averages)  # type: ignore[attr-defined]
        return batch.replace(future=mtp.future_weights(batch, depth)) if depth else batch  # type: ignore[attr-defined]

    return prepare


def _future_loss(cfg, project, chunk, coefficient, params, hidden_BLD, batch):
    """coefficient * sum_i decay^(i-1) L_i, and the metrics."""
    depth = cfg.mtp.depth
    project = project.spared()  # these are last layers, which FP4 harms most
    hidden_MBLD = mtp.future_hidden(
        cfg, project, transformer.last_layer(cfg, project, batch),
        params["mtp"], params["embed"], hidden_BLD, batch.targets,
    )  # fmt: skip
    shares_M = cfg.mtp.decay ** jnp.arange(depth, dtype=jnp.float32)
    weights_MBL = shares_M[:, None, None] * jnp.moveaxis(batch.future, 1, 0)
    total, sums = _over_tokens(
        cfg, chunk, {"nll": coefficient, "z": 0.0, "entropy": 0.0}, hidden_MBLD,
        transformer.head(cfg, params), mtp.future_targets(batch.targets, depth), weights_MBL,
    )  # fmt: skip
    means_M = sums["nll"] / shares_M
    metrics = {f"loss/mtp_{i + 1}": means_M[i] for i in range(depth)}
    return total, metrics | {"loss/mtp": jnp.sum(sums["nll"]) / jnp.sum(shares_M)}


def _only_gate(params: Params) -> Params:
    """The same values, of which only the exit gate's learn."""
    frozen = jax.lax.stop_gradient(params)
    return frozen | {"loop": frozen["loop"] | {"gate": params["loop"]["gate"]}}


def _sampled_loop(key: Key, loops: int) -> jax.Array:
    """The loop that this step reads out, int32 [], from 0 on."""
    return jax.random.randint(fold_name(key, "exit"), (), 0, loops)


def _exit_loss(cfg, chunk, coefficients, params, output, batch, only):
    """The terms of the exit gate, weighted, and their metrics; of one loop for all unless `only` is None."""
    log_p_RBL = loop.exit_log_probs(output.exits)
    p_RBL = jnp.exp(log_p_RBL)
    weights_RBL = batch.weights[None] * (p_RBL if only is None else cfg.loop.count * p_RBL[only][None])
    targets_RBL = jnp.broadcast_to(batch.targets, weights_RBL.shape)
    expected, each = weighted_nll(  # type: ignore[misc]
        cfg, chunk, output.loops, transformer.head(cfg, params), targets_RBL, weights_RBL
    )
    spread = jnp.sum(batch.weights * loop.entropy(log_p_RBL))
    total = coefficients["exit"] * expected + coefficients["exit_entropy"] * spread
    if only is not None:
        metrics = {"loss/exit": expected, "loss/exit_entropy": spread}
        return total, metrics | loop.metrics(log_p_RBL, batch.weights)
    sums_R = jnp.sum(batch.weights[None] * each["nll"], (1, 2))
    metrics = {f"loss/loop_{r + 1}": sums_R[r] for r in range(cfg.loop.count)}
    metrics |= {"loss/next_token": sums_R[-1], "loss/entropy": jnp.sum(batch.weights * each["entropy"][-1])}
    metrics |= {"loss/exit": expected, "loss/exit_entropy": spread}
    if _counts(coefficients["gate"]):
        second = jnp.sum(batch.weights * loop.stage_two(output.exits, each["nll"]))
        total, metrics = total + coefficients["gate"] * second, metrics | {"loss/gate": second}
    return total, metrics | loop.metrics(log_p_RBL, batch.weights)


def make_token_nll(
    cfg: ModelConfig, chunk: int = 512, each_loop: bool = False, quantile: float | None = None
) -> Callable[[Params, Batch], Any]:
    """Build nll_fn(params, batch) -> float32 [B, L], the plain cross-entropy in nats per target.

    each_loop: float32 [R, B, L] instead, after each number of loops; the last is the former.
    quantile: with each_loop and an exit gate, (that, int32 [B, L]: the loop, from 1 on, after which the token
    leaves at this quantile of its exit distribution). The tokens that it sees have run through all loops,
    while in decoding they may have left earlier themselves.
    """
    project = projections.from_config(cfg)

    def nll_fn(params: Params, batch: Batch) -> Any:
        output = transformer.forward(cfg, project, params, batch, each_loop=each_loop)
        head = transformer.head(cfg, params)

        def of(hidden_BLD):
            return _token_statistics(cfg, chunk, hidden_BLD, head, batch.targets)["nll"]

        nll = jax.lax.map(of, output.loops) if each_loop else of(output.hidden)
        return nll if quantile is None else (nll, loop.exit_loop(output.exits, quantile))

    return nll_fn


def make_eval_nll(cfg: Config) -> Callable[[Params, Batch], Any]:
    """`make_token_nll` as a run's evaluation wants it: of each loop, and where tokens leave if they may.

    They may where `infer.exit_quantile` < 1.
    """
    quantile = cfg.infer.exit_quantile if cfg.infer.exit_quantile < 1 else None
    return make_token_nll(cfg.model, cfg.train.loss_chunk, cfg.model.loop.count > 1, quantile)


def _token_statistics(cfg, chunk, hidden_BLD, head_DV, targets_BL):
    """STATISTICS of each token, float32 [B, L], in chunks of the sequence."""
    head_DV = head_DV.astype(hidden_BLD.dtype)

    def step(_, piece):
        h, target = piece
        s = _statistics(cfg, _logits(cfg, h, head_DV)[1], target)
        return None, {name: s[name] for name in STATISTICS}

    _, each = jax.lax.scan(step, None, _chunks(chunk, hidden_BLD, targets_BL))
    return {name: jnp.moveaxis(a, 0, 1).reshape(targets_BL.shape) for name, a in each.items()}


def _over_tokens(cfg, chunk, coefficients, hidden, head, targets, weights) -> Any:
    """`token_loss` of coefficients {statistic: number or array}."""
    fixed = tuple((name, c) for name, c in coefficients.items() if isinstance(c, float))
    scheduled = {name: c for name, c in coefficients.items() if not isinstance(c, float)}
    return token_loss(cfg, chunk, fixed, hidden, head, targets, weights, scheduled)  # type: ignore[misc]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def token_loss(
    cfg: ModelConfig,
    chunk: int,
    coefficients: tuple[tuple[str, float], ...],
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scheduled: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """sum_t weights_t * sum_i coefficient_i * statistic_i(t), in chunks of the sequence.

    Args: coefficients: those that are numbers; scheduled: the others, float32 []; together one for each
    of STATISTICS. hidden, targets and weights may have one more leading axis M; its entries are walked in turn.
    Returns: (float32 scalar, {statistic: its weighted sum, float32 [] or [M]}); the dict carries no
    gradient, nor do weights and targets.
    """
    weight_of = dict(coefficients) | dict(scheduled or {})
    return _total(cfg, chunk, weight_of, hidden_BLD, head_DV, targets_BL, weights_BL, grads=False)[0]


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut axis 1 into equal pieces and put them first: [B, L, ...] -> [L/c, B, c, ...].

    Cutting the sequence and not the rows keeps every chunk spread over all data shards.
    """
    B, L = arrays[0].shape[:2]
    size = max(1, min(L, chunk // B))
    while L % size:
        size -= 1
    return tuple(jnp.moveaxis(a.reshape(B, L // size, size, *a.shape[2:]), 1, 0) for a in arrays)


def _logits(cfg, hidden, head):
    """(softcapped, padding masked too), float32; the head in the dtype of the hidden states."""
    raw = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    capped = transformer.softcap(cfg, raw)
    return capped, transformer.mask_padding(cfg, capped)


def _statistics(cfg, z, targets):
    lse = jax.nn.logsumexp(z, axis=-1)
    at_target = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    p = jnp.exp(z - lse[..., None])
    entropy = lse - jnp.sum(p * jnp.where(z > transformer.attention.MASKED, z, 0.0), -1)
    return {"nll": lse - at_target, "z": lse**2, "entropy": entropy, "lse": lse, "p": p}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_nll(
    cfg: ModelConfig,
    chunk: int,
    hidden_RBLD: jax.Array,
    head_DV: jax.Array,
    targets_RBL: jax.Array,
    weights_RBL: jax.Array,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """sum of weights * nll, in chunks of the sequence, where the weights learn as well.

    Returns: (float32 scalar, {"nll", "entropy": float32 [R, B, L]}); the dict carries no gradient.
    """
    return _weighted(cfg, chunk, hidden_RBLD, head_DV, targets_RBL, weights_RBL, grads=False)[0]


def _weighted(cfg, chunk, hidden, head, targets, weights, grads):
    only = {"nll": 1.0, "z": 0.0, "entropy": 0.0}
    (total, _), gradients, each = _total(
        cfg, chunk, only, hidden, head, targets, weights, grads, ("nll", "entropy")
    )
    return (total, each), gradients


def _total(cfg, chunk, weight_of, hidden, head, targets, weights, grads, keep=()):
    """((total, sums), (d_hidden, d_head), kept statistics), with or without the leading axis M."""
    d_head = jnp.zeros(head.shape, jnp.float32) if grads else None
    head = head.astype(hidden.dtype)  # here and not in every chunk: XLA would cast it there again and again

    def walk(d_head, piece):
        h, target, weight = piece
        sums, d_hidden, d_head, kept = _scan(cfg, chunk, weight_of, h, head, target, weight, d_head, keep)
        return d_head, (sums, d_hidden, kept)

    pieces = (hidden, targets, weights)
    over = walk if hidden.ndim == 3 else lambda start, stacks: jax.lax.scan(walk, start, stacks)
    d_head, (sums, d_hidden, kept) = over(d_head, pieces)
    total = sum((weight_of[name] * jnp.sum(sums[name]) for name in STATISTICS), jnp.zeros((), jnp.float32))
    return (total, sums), (d_hidden, d_head), kept


def _scan(cfg, chunk, weight_of, hidden, head, targets, weights, d_head, keep):
    """Sums of the statistics of one [B, L]; the gradients, unless d_head, to which it adds, is None; and
    the statistics to keep, per token."""
    grads, zero = d_head is not None, jnp.zeros((), jnp.float32)

    def step(carry, piece):
        sums, d_head = carry
        h, target, weight = piece
        capped, z = _logits(cfg, h, head)
        s = _statistics(cfg, z, target)
        sums = {name: sums[name] + jnp.sum(weight * s[name]) for name in STATISTICS}
        kept = {name: s[name] for name in keep}
        if not grads:
            return (sums, d_head), (None, kept)
        dz = _logit_gradient(weight_of, s, z, target) * weight[..., None]
        if cfg.softcap:
            dz = dz * (1 - jnp.square(capped / cfg.softcap))
        dz = dz.astype(h.dtype)
        d_hidden = jnp.matmul(dz, head.T)
        flat_h, flat_dz = h.reshape(-1, h.shape[-1]), dz.reshape(-1, dz.shape[-1])
        d_head = d_head + jnp.matmul(flat_h.T, flat_dz, preferred_element_type=jnp.float32)
        return (sums, d_head), (d_hidden, kept)

    start = (dict.fromkeys(STATISTICS, zero), d_head)
    (sums, d_head), (d_hidden, kept) = jax.lax.scan(step, start, _chunks(chunk, hidden, targets, weights))
    if grads:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    kept = {name: jnp.moveaxis(a, 0, 1).reshape(targets.shape) for name, a in kept.items()}
    return sums, d_hidden, d_head, kept


def _logit_gradient(weight_of, s, z, target):
    p = s["p"]
    share = weight_of["nll"] + 2 * weight_of["z"] * s["lse"][..., None]
    dz = share * p - weight_of["nll"] * jax.nn.one_hot(target, z.shape[-1], dtype=p.dtype)
    if _counts(weight_of["entropy"]):
        log_p = z - s["lse"][..., None]
        dz = dz - weight_of["entropy"] * jnp.where(p > 0, p * (log_p + s["entropy"][..., None]), 0.0)
    return dz


def _token_loss_forward(cfg, chunk, coefficients, hidden, head, targets, weights, scheduled):
    weight_of = dict(coefficients) | dict(scheduled or {})
    out, (d_hidden, d_head), _ = _total(cfg, chunk, weight_of, hidden, head, targets, weights, grads=True)
    assert d_head is not None
    return out, (d_hidden, d_head.astype(head.dtype), targets, weights)


def _token_loss_backward(cfg, chunk, coefficients, residuals, cotangents):
    d_hidden, d_head, targets, weights = residuals
    g = cotangents[0]  # the statistics carry no gradient
    no_gradient = jnp.zeros(targets.shape, jax.dtypes.float0)
    return (g.astype(d_hidden.dtype) * d_hidden, g * d_head, no_gradient, jnp.zeros_like(weights), None)


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def _weighted_nll_forward(cfg, chunk, hidden, head, targets, weights):
    out, (d_hidden, d_head) = _weighted(cfg, chunk, hidden, head, targets, weights, grads=True)
    assert d_head is not None
    return out, (d_hidden, d_head.astype(head.dtype), targets, out[1]["nll"])


def _weighted_nll_backward(cfg, chunk, residuals, cotangents):
    d_hidden, d_head, targets, nll = residuals
    g = cotangents[0]
    no_gradient = jnp.zeros(targets.shape, jax.dtypes.float0)
    return g.astype(d_hidden.dtype) * d_hidden, g * d_head, no_gradient, g * nll


weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward)
