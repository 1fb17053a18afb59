"""LoopLM: layers applied several times, and a gate that learns after how many loops to leave.

Source: arXiv:2510.25741 (Ouro). R loops, r = 1..R. After each loop the gate reads the stream x_r:

    lambda_r = sigmoid(w . x_r / rms(x_r) + b_r)        probability of leaving after loop r if still there
    S_r      = prod_{j <= r} (1 - lambda_j),  S_0 = 1   of still being there
    p_r      = lambda_r S_{r-1} for r < R,  p_R = S_{R-1}

so that p sums to 1 and the last gate decides nothing. All of it in log space: finite for any logit.

The paper's gate has one bias; at w = b = 0 it starts at 1/2, 1/4, .. ("shared"). With a bias of its own
per loop, b_r = -log(R - r), it starts uniform ("per_loop"): the distribution that the entropy bonus pulls
to. The paper's gate reads the state behind the model's last norm; here the norm is without gain, which w
contains, so that the gate does not wait for the layers after the loops.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.config import LoopConfig, ModelConfig
from nanochat_jax.model import mhc
from nanochat_jax.model.layers import rms_norm
from nanochat_jax.params import ParamSpec, constant, zeros
from nanochat_jax.types import Metrics, Params

GAIN = 0.005  # nats that a loop must have won for another one to be worth its cost (stage 2)
SHARPNESS = 50.0  # of that threshold, per nat


def outside(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """The stacks "before" and "after" the loops, those that have layers: the model's config with as many.

    Their layers are of the blocks' kind, without value embeddings; windows start anew in each stack.
    """
    sizes = {"before": cfg.loop.before, "after": cfg.loop.after}
    return {
        name: dataclasses.replace(
            cfg, layers=n, value_embed_every=0, unroll=cfg.unroll if cfg.unroll and n % cfg.unroll == 0 else 0
        )
        for name, n in sizes.items()
        if n
    }


def effective_layers(cfg: ModelConfig) -> int:
    """Layers that a token passes when it runs through all loops."""
    return cfg.loop.before + cfg.loop.count * cfg.layers + cfg.loop.after


def readouts(cfg: ModelConfig) -> int:
    """Times that a training step runs the layers after the loops and the head: with an exit gate, per loop,
    or for the last one and a sampled one."""
    each = cfg.loop.count if cfg.loop.readout == "all" else 2
    return each if cfg.loop.gate != "none" else 1


def trained_layers(cfg: ModelConfig) -> int:
    """Layers that a token passes in a training step."""
    return effective_layers(cfg) + (readouts(cfg) - 1) * cfg.loop.after


def layers_text(cfg: ModelConfig) -> str:
    """The stacks for people: `1 layer before, 4 layers x 2 loops, 1 layer after`."""

    def some(n: int) -> str:
        return f"{n} layer{'' if n == 1 else 's'}"

    parts = [f"{some(cfg.loop.before)} before"] if cfg.loop.before else []
    parts.append(f"{cfg.layers} layers x {cfg.loop.count} loops")
    return ", ".join([*parts, *([f"{some(cfg.loop.after)} after"] if cfg.loop.after else [])])


def param_specs(cfg: ModelConfig) -> dict:
    """The weights under "loop": norm [D], inject [2D, D], gate/w [D, 1], gate/b [1] or [R - 1]; {} if there
    are none. The injection [stream; what entered] inject starts as none: the stream passes unchanged."""
    c, specs = cfg.loop, {}
    if c.norm and cfg.norm == "weighted":
        specs["norm"] = ParamSpec((cfg.dim,), (None,), constant(1.0))
    if c.inject == "linear":
        shape = (2 * cfg.dim, cfg.dim)
        specs["inject"] = ParamSpec(shape, ("embed", None), lambda key, shape: jnp.eye(*shape), matmul=True)
    if c.gate != "none":
        specs["gate"] = {
            "w": ParamSpec((cfg.dim, 1), (None, None), zeros, matmul=True),
            "b": ParamSpec((len(initial_bias(c)),), (None,), constant(initial_bias(c))),
        }
    return {"loop": specs} if specs else {}


def initial_bias(c: LoopConfig) -> tuple[float, ...]:
    """The biases of the gate at the start: (0,), or -log(R - r) for r = 1..R - 1."""
    return (0.0,) if c.gate == "shared" else tuple(-math.log(c.count - r) for r in range(1, c.count))


def gate(cfg: ModelConfig, p: Params, x: jax.Array, r: int | jax.Array) -> jax.Array:
    """Logit of lambda_r, float32 [B, L], from the stream [B, L, D] or [B, L, S, D] after loop r (from 1 on).

    Position t depends on x_t alone. With a bias per loop, the unused last one is 0.
    """
    h_BLD = rms_norm(mhc.collapse(cfg.mhc, x), None, cfg.norm_eps).astype(jnp.float32)
    bias = p["b"][0] if cfg.loop.gate == "shared" else jnp.append(p["b"], jnp.float32(0))[r - 1]
    return jnp.matmul(h_BLD, p["w"])[..., 0] + bias


def where_later(r: int | jax.Array, later: tuple, first: tuple) -> tuple:
    """`first` in loop 0, `later` in every other; r is known, or traced where a scan runs the loops."""
    if isinstance(r, int):
        return later if r else first
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(r > 0, a, b), later, first)


def exit_log_probs(logits: jax.Array) -> jax.Array:
    """log p_r of every loop.

    Args: logits: float32 [R, ...], of the gate after each loop; the last is not read.
    Returns: float32 [R, ...]; their exponentials sum to 1.
    """
    there, found = jnp.zeros_like(logits[0]), []
    for a in logits[:-1]:
        found.append(jax.nn.log_sigmoid(a) + there)
        there = there + jax.nn.log_sigmoid(-a)
    return jnp.stack([*found, there])


def leaves(log_there: jax.Array, quantile: jax.typing.ArrayLike) -> jax.Array:
    """Q-exit: does the share of the exit distribution up to here, 1 - S_r, reach the quantile?"""
    return -jnp.expm1(log_there) >= quantile


def exit_loop(logits: jax.Array, quantile: jax.typing.ArrayLike) -> jax.Array:
    """The first loop r whose cumulative probability reaches the quantile; R at the latest.

    Args: logits: float32 [R, ...], see `exit_log_probs`. quantile: in [0, 1].
    Returns: int32 [...], in 1..R.
    """
    there, loops = jnp.zeros_like(logits[0]), jnp.ones(logits.shape[1:], jnp.int32)
    for a in logits[:-1]:
        there = there + jax.nn.log_sigmoid(-a)
        loops = loops + ~leaves(there, quantile)
    return loops


def entropy(log_p: jax.Array) -> jax.Array:
    """-sum_r p_r log p_r in nats, [...] from [R, ...]."""
    return -jnp.sum(jnp.exp(log_p) * log_p, 0)


def stage_two(logits: jax.Array, nll: jax.Array) -> jax.Array:
    """The gate's loss per token in the second stage: cross-entropy with "did this loop still help?".

        I_r = max(0, L_{r-1} - L_r);  w_r = sigmoid(50 (I_r - 0.005));  r = 2..R
        -(1/R) sum_r [w_r log(1 - lambda_r) + (1 - w_r) log lambda_r]

    Args: logits: float32 [R, ...], of the gate. nll: float32 [R, ...], of each loop's prediction, as data.
    Returns: float32 [...].
    Source: arXiv:2510.25741, the second stage of its training. lambda_1 learns through the shared bias.
    """
    won = jnp.maximum(nll[:-1] - nll[1:], 0.0)
    stay = jax.lax.stop_gradient(jax.nn.sigmoid(SHARPNESS * (won - GAIN)))
    a = logits[1:]
    each = stay * jax.nn.log_sigmoid(-a) + (1 - stay) * jax.nn.log_sigmoid(a)
    return -jnp.sum(each, 0) / len(logits)


def metrics(log_p_RBL: jax.Array, weights_BL: jax.Array) -> Metrics:
    """loop/mean_exit (expected number of loops) and loop/exit_entropy, sums weighted like the loss."""
    log_p, weights = jax.lax.stop_gradient((log_p_RBL, weights_BL))
    number = 1 + jnp.arange(len(log_p), dtype=jnp.float32).reshape(-1, 1, 1)
    return {
        "loop/mean_exit": jnp.sum(weights[None] * number * jnp.exp(log_p)),
        "loop/exit_entropy": jnp.sum(weights * entropy(log_p)),
    }


class Leaving(NamedTuple):
    """Which rows of a decoding step still run, all [B]."""

    log_there: jax.Array  # float32, log S_r
    running: jax.Array  # bool
    depth: jax.Array  # int32, loops that the row runs through


def leave(before: Leaving | None, logit_B: jax.Array, quantile: jax.typing.ArrayLike) -> Leaving:
    """The state after one more loop, from its gate; `before` is None after the first."""
    if before is None:
        nothing = jnp.zeros_like(logit_B)
        before = Leaving(nothing, nothing == 0, jnp.ones(logit_B.shape, jnp.int32))
    there_B = before.log_there + jax.nn.log_sigmoid(-logit_B)
    running = before.running & ~leaves(there_B, quantile)
    return Leaving(there_B, running, before.depth + running)


def unless_left(
    leaving: Leaving, run: Callable[[tuple], tuple], carry: tuple, before: tuple
) -> tuple[tuple, tuple]:
    """One more loop for the rows that still run; nothing is computed when none does.

    A row that has left keeps its stream. Its entries in this loop's cache are those of the loop before,
    hence in the end those of the loop that it left after: that is what later tokens find which run
    further. So a row does not depend on how far the others run.

    Args: run: carry -> (carry, new keys and values) of the loop. carry: (stream [B, 1, ..], ..). before:
    keys and values of the loop before, [N, B, 1, G, K] each.
    """
    x, running = carry[0], leaving.running

    def further():
        (new, *rest), entries = run(carry)
        kept = running.reshape(-1, *(1,) * (x.ndim - 1))
        rows = running.reshape(1, -1, 1, 1, 1)
        entries = jax.tree.map(lambda now, old: jnp.where(rows, now, old), entries, before)
        return (jnp.where(kept, new, x), *rest), entries

    return jax.lax.cond(jnp.any(running), further, lambda: (carry, before))
