"""The train step and the eval step, as pure functions. No technique appears here: what varies
arrives as `loss_fn` and `tx`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import optim
from nanochat_jax.losses import LossFn
from nanochat_jax.types import Batch, Metrics, Params, TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def normalize(batch: Batch) -> Batch:
    """Scale the weights to sum to 1, so that weighted sums of the loss are means per token."""
    return batch.replace(weights=batch.weights / jnp.maximum(jnp.sum(batch.weights), 1e-6))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    seed: int,
    microbatches: int = 1,
    prepare: Callable[[Batch, optax.OptState], Batch] = lambda batch, opt_state: batch,
    over_rows: Callable[[Callable], Callable] = lambda gradient: gradient,
    first: tuple[int, LossFn] | None = None,
) -> StepFn:
    """Build step(state, batch) -> (state, metrics), to be jitted with the state donated.

    The step's key is fold_in(key(seed), state.step): the same command gives the same bits,
    interrupted or not. With `microbatches` = m, microbatch i holds the rows i, i + m, ... and the
    gradients add up to those of the whole batch, because weights are normalized before the cut.
    `prepare` adds what else the loss needs of the whole normalized batch (`losses.make_prepare`).
    `over_rows` adds up what the devices' rows give (`parallel.over_rows`), after all microbatches.
    `first` = (n, loss): the first n steps have this loss instead, with the same metrics. The program holds
    both and runs one.
    The optimizer is told all metrics; those that are no numbers are for it alone.
    """

    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = jax.value_and_grad(functools.partial(loss_fn, step=state.step), has_aux=True)
        if first is not None:
            early = jax.value_and_grad(functools.partial(first[1], step=state.step), has_aux=True)
            gradient = functools.partial(jax.lax.cond, state.step < first[0], early, gradient)
        whole = prepare(normalize(batch), state.opt_state)
        accumulate = over_rows(functools.partial(_accumulate, gradient, microbatches))
        (loss, metrics), grads = accumulate(state.params, whole, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, metrics=metrics)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: value for name, value in metrics.items() if value.ndim == 0} | {
            "loss/total": loss,
            "opt/grad_norm": optax.tree.norm(grads),
            "opt/update_norm": optax.tree.norm(updates),
            "data/weight": jnp.sum(batch.weights),
            **optim.metrics(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _accumulate(gradient, microbatches: int, params: Params, batch: Batch, key: jax.Array):
    """((loss, metrics), grads) of the batch, summed over its microbatches."""
    if microbatches == 1:
        return gradient(params, batch, key)
    # Rows i::m and not blocks of rows: each device's rows then stay on that device.
    pieces = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(a.shape[0] // microbatches, microbatches, *a.shape[1:]), 1, 0), batch
    )

    def body(total, piece):
        index, rows = piece
        result = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), None

    first = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], pieces), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    return jax.lax.scan(body, zeros, (jnp.arange(microbatches), pieces))[0]


def make_eval_step(nll_fn: Callable[[Params, Batch], Any]):
    """Build eval_step(params, batch, token_bytes) -> {"nats", "bytes", "tokens"}, sums over the batch.

    Where nll_fn gives [R, B, L] and not [B, L] (`losses.make_token_nll` of each loop), "nats" is that of
    the last loop, and "loop_nats" [R] that of each. Where it gives the loop after which each token leaves as
    well, "exit_nats" is what that gives, and "exit_loops" the sum of those loops.
    token_bytes: int32 [V], raw bytes of each token, 0 for special tokens, whose predictions are
    left out of the sums, as are targets of weight 0.
    """

    def eval_step(params: Params, batch: Batch, token_bytes: jax.Array) -> Metrics:
        sizes = token_bytes[batch.targets]
        counted = (batch.weights > 0) & (sizes > 0)
        found = nll_fn(params, batch)
        nll, left = found if isinstance(found, tuple) else (found, None)
        last, each = (nll, {}) if nll.ndim == 2 else (nll[-1], {"loop_nats": _over_rows(nll, counted)})
        if left is not None:
            leaving = jnp.take_along_axis(nll, left[None] - 1, 0)[0]
            each["exit_nats"] = jnp.sum(jnp.where(counted, leaving, 0.0))
            each["exit_loops"] = jnp.sum(jnp.where(counted, left, 0))
        return each | {
            "nats": jnp.sum(jnp.where(counted, last, 0.0)),
            "bytes": jnp.sum(jnp.where(counted, sizes, 0)),
            "tokens": jnp.sum(counted),
        }

    return eval_step


def _over_rows(nll_RBL: jax.Array, counted_BL: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(counted_BL[None], nll_RBL, 0.0), (1, 2))
