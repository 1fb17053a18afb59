"""The transformer: its table of weights, and its forward pass as a pure function.

embed -> layers before -> R loops of N layers (attention, MLP) -> layers after -> norm -> hidden.
One loop, with no layers before and after, is the ordinary model (model/loop.py).
The residual between them is one stream [B, L, D], or several [B, L, S, D] (model/mhc.py).
Layers are stacked on a leading axis and scanned, `unroll` of them per scan step; options that
differ by layer (window, value embeddings) repeat with a period that divides `unroll`.
The same function trains and, given a cache, serves.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanochat_jax import params as P
from nanochat_jax.config import ModelConfig, layer_period, padded_vocab, value_layers
from nanochat_jax.kernels import attention, dispatch
from nanochat_jax.model import block, collider, loop, mhc, mtp
from nanochat_jax.model.layers import MLPS, rms_norm
from nanochat_jax.params import ParamSpec
from nanochat_jax.quant import ternary
from nanochat_jax.quant.project import Project
from nanochat_jax.types import Batch, KVCache, Output, Params

# What makes weights whole, casts them and puts them side by side: never saved for the backward pass where
# devices hold parts.
GATHERING = (
    "optimization_barrier", "all_gather", "bitcast_convert_type", "convert_element_type", "concatenate"
)  # fmt: skip
STACKS = (*ternary.STACKS, "value")  # parts of the parameters with an axis of layers
Whole = Callable[[str, Params], Params] | None  # (stack, parts of one layer's weights) -> whole ones


def param_specs(cfg: ModelConfig) -> dict:
    """Every weight of the model: shape, axes, initial value. Matrices are [..., d_in, d_out]."""
    D, V, GK = cfg.dim, padded_vocab(cfg), cfg.kv_heads * cfg.head_dim
    specs: dict = {"embed": ParamSpec((V, D), ("vocab", "embed"), P.normal(cfg.embed_std))}
    if cfg.norm == "weighted":
        specs["norm"] = ParamSpec((D,), (None,), P.constant(1.0))
        if cfg.embed_norm:
            specs["embed_norm"] = ParamSpec((D,), (None,), P.constant(1.0))
    if not cfg.tied:
        specs["head"] = ParamSpec((D, V), ("embed", "vocab"), P.normal(0.001), matmul=True)
    if E := len(value_layers(cfg)):
        specs["value"] = {
            "embed": ParamSpec((E, V, GK), (None, "vocab", None), P.uniform(D**-0.5)),
            "gate": ParamSpec(
                (E, block.GATE_INPUTS, cfg.kv_heads), (None, None, None), P.uniform(0.01), matmul=True
            ),
        }
    specs["blocks"] = _stack_specs(cfg, cfg, cfg.loop.before)
    first = {"before": 0, "after": cfg.loop.before + cfg.layers}
    specs |= {name: _stack_specs(cfg, own, first[name]) for name, own in loop.outside(cfg).items()}
    return specs | loop.param_specs(cfg) | mtp.param_specs(cfg, specs["blocks"])


def _stack_specs(model: ModelConfig, cfg: ModelConfig, first: int) -> dict:
    """The weights of a stack of cfg.layers layers, the first of which is the model's layer `first`."""
    N, D, F = cfg.layers, cfg.dim, cfg.mlp_dim
    HK, GK = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim

    def matrix(d_in: int, d_out: int, axes: tuple, std: float) -> ParamSpec:
        return ParamSpec((N, d_in, d_out), ("layer", *axes), P.uniform(std), matmul=True)

    def gain(width: int) -> ParamSpec:
        return ParamSpec((N, width), ("layer", None), P.constant(1.0))

    # Output projections start smaller, so that the stream's size does not grow with depth.
    out_scale = (2 * loop.effective_layers(model)) ** -0.5
    attn = {
        "q": matrix(D, HK, ("embed", "heads"), D**-0.5),
        "k": matrix(D, GK, ("embed", "heads"), D**-0.5),
        "v": matrix(D, GK, ("embed", "heads"), D**-0.5),
        "o": matrix(HK, D, ("heads", "embed"), out_scale * HK**-0.5),
    }
    mlp = {
        "up": matrix(D, F, ("embed", "ffn"), D**-0.5),
        "down": matrix(F, D, ("ffn", "embed"), out_scale * F**-0.5),
    }
    if MLPS[cfg.mlp][1]:
        mlp["gate"] = matrix(D, F, ("embed", "ffn"), D**-0.5)
    specs: dict = {"attn": attn, "mlp": mlp}
    if cfg.mhc.streams > 1:
        attn["mhc"], mlp["mhc"] = mhc.param_specs(cfg, 0, first), mhc.param_specs(cfg, 1, first)
    if cfg.norm == "weighted":
        attn["norm"], mlp["norm"] = gain(D), gain(D)
        if cfg.sub_norm:
            attn["sub_norm"], mlp["sub_norm"] = gain(HK), gain(F)
        if cfg.qk_norm != "none":
            attn["q_norm"], attn["k_norm"] = gain(cfg.head_dim), gain(cfg.head_dim)
    depth = max(1, model.loop.before + model.layers + model.loop.after - 1)
    ramp = [(first + i) / depth for i in range(N)]  # both scalars shrink with depth, as in nanochat
    scalars = {}
    if cfg.residual_scalars:
        scalars["residual"] = ParamSpec((N,), ("layer",), P.constant(tuple(1.15 - 0.1 * t for t in ramp)))
    if cfg.x0_scalars:
        scalars["x0"] = ParamSpec((N,), ("layer",), P.constant(tuple(0.2 - 0.15 * t for t in ramp)))
    if scalars:
        specs["scale"] = scalars
    return specs


def counts(cfg: ModelConfig) -> dict[str, int]:
    """Parameters: unique, unrolled (blocks counted once per loop), and in tables."""
    specs = param_specs(cfg)
    unique, blocks = P.count(specs), P.count(specs, r"^blocks/")
    tables = P.count(specs, r"^(value/)?embed$|^head$")
    return {"unique": unique, "unrolled": unique + (cfg.loop.count - 1) * blocks, "tables": tables}


def compute_dtype(cfg: ModelConfig) -> jnp.dtype:
    """The dtype of activations: bfloat16 on accelerators, float32 on CPU unless stated."""
    name = cfg.dtype if cfg.dtype != "auto" else ("float32" if dispatch.backend() == "cpu" else "bfloat16")
    return jnp.dtype(name)


def head(cfg: ModelConfig, params: Params) -> jax.Array:
    """The unembedding [D, V]."""
    return params["embed"].T if cfg.tied else params["head"]


def logits(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D], soft-capped; padding ids are masked."""
    raw = jnp.matmul(hidden, head(cfg, params).astype(hidden.dtype), preferred_element_type=jnp.float32)
    return mask_padding(cfg, softcap(cfg, raw))


def softcap(cfg: ModelConfig, raw: jax.Array) -> jax.Array:
    """cap * tanh(raw / cap), or raw itself when there is no cap."""
    return cfg.softcap * jnp.tanh(raw / cfg.softcap) if cfg.softcap else raw


def mask_padding(cfg: ModelConfig, raw: jax.Array) -> jax.Array:
    """Exclude the ids beyond vocab_size, which exist only to round the table up."""
    if raw.shape[-1] == cfg.vocab_size:
        return raw
    known = jax.lax.broadcasted_iota(jnp.int32, raw.shape, raw.ndim - 1) < cfg.vocab_size
    return jnp.where(known, raw, attention.MASKED)


def forward(
    cfg: ModelConfig,
    project: Project,
    params: Params,
    batch: Batch,
    cache: KVCache | None = None,
    each_loop: bool = False,
    only: jax.Array | None = None,
    quantile: jax.typing.ArrayLike | None = None,
    passenger: jax.Array | None = None,
    whole: Whole = None,
    empty: bool = False,
) -> Output:
    """Hidden states of packed rows, or of the next tokens of cached sequences.

    Args: batch: rows [B, L]; only tokens, segments and positions are read, and weights for aux.
    cache: if given, the L tokens follow the `cache.length[b]` tokens of row b, and segments are ignored.
    each_loop: without a cache, also return what the model with r loops gives, for every r, and the
    logits of the exit gate. only: int32 [], from 0 on: of the loops read out that one alone ([1, B, L, D]).
    quantile: with a cache and L = 1, a row leaves the loops when its exit
    distribution reaches this share (`model.loop.leaves`); None = all loops.
    passenger: if given, the backward pass sees the kept rows only (model/collider.py). whole: makes the
    weights of one layer of a stack whole where devices hold parts of them (`parallel.whole_layer`).
    empty: no row of the cache holds a token, so that none is read.
    Returns: Output with hidden [B, L, D] in the compute dtype, the cache with the new tokens'
    keys and values written and `length` advanced by L, and without a cache aux, sums over tokens
    weighted by `batch.weights` (like the loss, so that pieces of a batch add up).
    Raises: ValueError if each_loop or quantile is asked for where it cannot be.
    """
    if each_loop and cache is not None:
        raise ValueError("each_loop is for whole rows, without a cache")
    if quantile is not None and (cache is None or batch.tokens.shape[1] != 1 or cfg.loop.gate == "none"):
        raise ValueError("quantile needs a cache, one token per row, and an exit gate")
    dtype = compute_dtype(cfg)
    x = params["embed"].astype(dtype)[batch.tokens]
    if cfg.embed_norm:
        x = rms_norm(x, params.get("embed_norm"), cfg.norm_eps)
    context = block.make_context(cfg, batch, cache)
    x0, R, stacks = x, cfg.loop.count, loop.outside(cfg)
    x, watch = mhc.expand(cfg.mhc, x), mhc.watch(cfg.mhc, batch.tokens.shape) if cache is None else None
    watch = watch if passenger is None else (watch, passenger)

    def stack(name: str, carry: tuple, first: int | jax.Array, kv: Callable | None) -> tuple:
        """(carry, new keys and values) behind a stack of layers, whose first has the number `first`."""
        own, inner = stacks.get(name, cfg), name == "blocks"
        chosen = project if inner or cfg.fp4.outside == "same" else project.spared()
        if passenger is None:
            run = functools.partial(block.layer, cfg, chosen, context, batch.tokens)
        else:
            run = collider.layer(cfg, chosen, context, batch.tokens)
        if whole is not None:
            run = _gathering(run, functools.partial(whole, name))
        if cache is None:
            run = _remat(cfg, run, whole, "" if passenger is None else "none")
        layers = {"blocks": _numbered(own, project, params[name], first)}
        layers["value"] = params.get("value", {}) if inner else {}
        return _stack(own, run, carry, x0, layers, kv)

    def earlier(name: str, r: int = 0) -> Callable | None:
        """What layer i of a stack in loop r finds of earlier tokens, see `block.layer`."""
        if cache is None or empty:
            return None
        k, v = (cache.k, cache.v) if name == "blocks" else cache.outside[name]
        # With one loop's slots every loop finds there what the last one left.
        loops = (r if cache.k.shape[0] > 1 else 0,) if name == "blocks" else ()
        return lambda i: (k, v, (*loops, i))

    def outside(name: str, carry: tuple, first: int | jax.Array) -> tuple:
        if name not in stacks:
            return carry, {}
        carry, new = stack(name, carry, first, earlier(name))
        return carry, {name: new}

    def once(r: int | jax.Array, carry: tuple, kv: Callable | None) -> tuple:
        """Loop r, from 0 on."""
        x, *rest = first = carry
        if cfg.loop.norm:
            x = mhc.rms_norm(cfg.mhc, x, params.get("loop", {}).get("norm"), cfg.norm_eps)
        if cfg.loop.inject == "add":
            x = x + entered
        if cfg.loop.inject == "linear":
            x = project("loop/inject", jnp.concatenate([x, entered], -1), params["loop"]["inject"])
        carry = loop.where_later(r, (x, *rest), first)
        return stack("blocks", carry, cfg.loop.before + r * cfg.layers, kv)

    def ending(r: int | jax.Array, carry: tuple) -> tuple:
        """The layers after the loops, if loop r is the last: (carry, their cache)."""
        return outside("after", carry, cfg.loop.before + R * cfg.layers + (R - 1 - r) * cfg.loop.after)

    def readout(x: jax.Array) -> jax.Array:
        return rms_norm(mhc.collapse(cfg.mhc, x), params.get("norm"), cfg.norm_eps)

    carry, before = outside("before", (x, watch), 0)
    entered = picked = carry[0]
    entries, hidden, exits, leaving, after = [], [], [], None, {}

    def scanned(carries: tuple, r: jax.Array) -> tuple:
        """Loop r of a scan: (the streams behind it, those that are read out), what each_loop asks for."""
        carry, _ = once(r, carries[0], None)
        if not each_loop:
            return (carry, carry), ()
        logits = loop.gate(cfg, params["loop"]["gate"], carry[0], r + 1) if cfg.loop.gate != "none" else ()
        if only is not None:
            return (carry, (jnp.where(only == r, carry[0], carries[1][0]), *carry[1:])), ((), logits)
        ended, _ = ending(r, carry)
        return (carry, ended), (readout(ended[0]), logits)

    # The transpose of a scan adds the loops' gradients into one set, one after the other. Of loops written
    # out, as where layers are, all sets exist at once, because XLA adds them in one fusion at the end. Two
    # sets they are in any case, and a scan copies what one loop saves.
    scans = cache is None and R > 2 and layer_unroll(cfg) < cfg.layers
    if scans:
        (carry, ended), found = jax.lax.scan(scanned, (carry, carry), jnp.arange(R))
        picked, carry = ended[0], ended if each_loop and only is None else ending(R - 1, carry)[0]
        if each_loop:
            hidden, exits = list(found[0][:-1]), list(found[1])
    for r in range(0 if scans else R):
        further = functools.partial(once, r, kv=earlier("blocks", r))
        if leaving is None:
            carry, new = further(carry)
        else:
            carry, new = loop.unless_left(leaving, further, carry, entries[-1])
        entries.append(new)
        if each_loop:
            if only is not None:
                picked = jnp.where(only == r, carry[0], picked)
            elif r + 1 < R:
                hidden.append(readout(ending(r, carry)[0][0]))
            if cfg.loop.gate != "none":
                exits.append(loop.gate(cfg, params["loop"]["gate"], carry[0], r + 1))
        if quantile is not None and cache is not None and r + 1 < R:
            logit_B = loop.gate(cfg, params["loop"]["gate"], carry[0], r + 1)[:, 0]
            leaving = loop.leave(leaving, logit_B, quantile)
    if only is not None:
        hidden.append(readout(ending(only, (picked, *carry[1:]))[0][0]))
    if not scans:
        carry, after = ending(R - 1, carry)
    if cache is not None:
        new = jax.tree.map(lambda *a: jnp.stack(a), *entries[-len(cache.k) :])
        cache = block.append(cache, new, before | after, carry[0])
        cache = cache.replace(length=cache.length + batch.tokens.shape[1])
    x, watch = carry
    watch, ridden = (watch, None) if passenger is None else watch  # type: ignore[misc]
    aux, last = mhc.metrics(watch, x, batch.weights), readout(x)
    return Output(
        last, cache, aux, ridden=ridden,
        loops=jnp.stack(hidden if only is not None else [*hidden, last]) if each_loop else None,
        exits=jnp.stack(exits) if exits else None,
        depth=None if leaving is None else leaving.depth,
    )  # fmt: skip


def last_layer(cfg: ModelConfig, project: Project, batch: Batch) -> Callable[[jax.Array, Params], jax.Array]:
    """The trunk's last layer as a function (x [B, L, D], weights) -> x on one residual stream, without
    value embeddings and stream scalars; for layers that go on from the trunk (`model.mtp`)."""
    context, i = block.make_context(cfg, batch, None), cfg.layers - 1

    def layer(_, x, p):
        x = x + block.attention(cfg, project, context, batch.tokens, i, x, p["attn"], None, None)[0]
        return x + block.mlp(cfg, project, x, p["mlp"])

    run = _remat(cfg, layer)
    return lambda x, p: run(0, x, p)


def draft(
    cfg: ModelConfig, project: Project, params: Params, i: int, u_BLD: jax.Array, tokens_BL: jax.Array | None,
    batch: Batch, cache: KVCache,
) -> tuple[jax.Array, jax.Array, tuple]:  # fmt: skip
    """Offset i = 1.. of `model.mtp` on tokens that follow the `cache.length[b]` ones of row b, as in training.

    Args: u: the trunk's hidden states, or of the chained form those that offset i - 1 returned first.
    tokens: int32, targets[t + i - 1], which the chained form passes over. batch: only positions are read.
    cache: with the layers' keys and values under outside["mtp"], each offset's up to `length`.
    Returns: what the next offset reads [B, L, D], hidden states before the unembedding [B, L, D], and keys
    and values [B, L, G, K].
    """
    project = project.spared()
    q, j = _each(params["mtp"], cfg.mtp.depth)[i - 1], cfg.layers - 1
    context, x = block.make_context(cfg, batch, cache), u_BLD
    if cfg.mtp.kind == "chained":
        x = mtp.joined(cfg, project, q, u_BLD, params["embed"].astype(u_BLD.dtype)[tokens_BL])
    kv = (*cache.outside["mtp"], (i - 1,))
    y, entries = block.attention(cfg, project, context, batch.tokens, j, x, q["attn"], None, kv)
    x = x + y
    x = x + block.mlp(cfg, project, x, q["mlp"])
    last = rms_norm(x, q.get("norm"), cfg.norm_eps)
    return (x if cfg.mtp.kind == "chained" else u_BLD), last, entries


def _numbered(cfg: ModelConfig, project: Project, blocks: Params, first: int | jax.Array) -> Params:
    """The layers' weights with their number through all loops, where random rounding asks for it."""
    if project.key is None:
        return blocks
    return {**blocks, "number": first + jnp.arange(cfg.layers)}


def _gathering(run, whole: Callable[[Params], Params]):
    """The layer `run` on parts of weights, made whole inside it."""

    def gathering(i, carry, x0, p, kv):
        # Weights alone would be made whole for all loops at once, before the first.
        p, carry = jax.lax.optimization_barrier((p, carry))
        return run(i, carry, x0, whole(p), kv)

    return gathering


def _remat(cfg: ModelConfig, run, whole: Whole = None, remat: str = ""):
    """What the backward pass recomputes: at least whole weights, where devices hold parts of them."""
    remat = remat or cfg.remat
    if remat == "none" and whole is None:
        return run
    policies = {
        "none": lambda primitive, *_, **__: primitive.name not in GATHERING,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    return jax.checkpoint(run, policy=policies.get(remat), static_argnums=0)


def layer_unroll(cfg: ModelConfig) -> int:
    """Layers per step of the layer scan."""
    if cfg.unroll:
        return cfg.unroll
    # XLA's CPU backend runs a scan's body without fusing across steps and copies its carries.
    return cfg.layers if dispatch.backend() == "cpu" else layer_period(cfg)


def apart(params: Params) -> Params:
    """`params` for inference, every layer's weights as arrays of their own: a tuple of trees for each stack.

    A layer that is cut out of a stack is copied first: weights that serve would be read and written in every
    step. `forward` runs such layers one after the other, written out whatever model.unroll says. For the
    moment of the call each stack exists twice.
    """
    stacks = {name: params[name] for name in STACKS if name in params}
    return params | {
        name: tuple(_each(tree, jax.tree.leaves(tree)[0].shape[0])) for name, tree in stacks.items()
    }


def _stack(cfg: ModelConfig, run, x, x0, layers, kv):
    """Apply all layers once to x = (residual, watch), of which number i is given kv(i). Returns (x, the
    layers' new keys and values [N, ..], or None)."""
    unroll = cfg.layers if isinstance(layers["blocks"], tuple) else layer_unroll(cfg)
    steps = cfg.layers // unroll
    if unroll == 1 and steps > 1:
        return _stack_singly(run, x, x0, layers, kv)

    def body(x, each):
        step, group = each
        each_layers = _each(group["blocks"], unroll)
        valued = [i for i in range(unroll) if i + cfg.layers - unroll in value_layers(cfg)]
        each_value = dict(zip(valued, _each(group["value"], len(valued)), strict=True))
        entries = []
        for i in range(unroll):
            p = {**each_layers[i], "value": each_value.get(i)}
            x, entry = run(i, x, x0, p, None if kv is None else kv(step * unroll + i))
            entries.append(entry)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *entries)

    if steps == 1:
        return body(x, (0, layers))
    grouped = jax.tree.map(lambda a: a.reshape(steps, a.shape[0] // steps, *a.shape[1:]), layers)
    x, entries = jax.lax.scan(body, x, (None if kv is None else jnp.arange(steps), grouped))
    return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), entries)


def _stack_singly(run, x, x0, layers, kv):
    """`_stack` of one layer per scan step. The weights reach the layer exactly as the scan hands them
    out: reshaped or split ones would be saved for the backward pass, a copy of all layers in every loop."""

    def body(x, each):
        i, layer = each
        p = {**layer["blocks"], "value": layer["value"] or None}
        return run(0, x, x0, p, None if kv is None else kv(i))

    numbers = None if kv is None else jnp.arange(layers["blocks"]["attn"]["q"].shape[0])
    return jax.lax.scan(body, x, (numbers, layers))


def _each(tree, n: int) -> list:
    """Split the leading axis of every leaf into n trees. A split, because the gradient of a split is
    one concatenation, while that of n slices is n padded copies of the whole stack."""
    if isinstance(tree, tuple):
        return list(tree)  # by `apart`
    if n == 0:
        return []
    leaves, structure = jax.tree.flatten(tree)
    columns = [[part[0] for part in jnp.split(leaf, n)] for leaf in leaves]
    return [structure.unflatten(row) for row in zip(*columns, strict=True)]
