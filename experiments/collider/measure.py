"""Time, compiled work and memory of filtered backward passes; and how far the gradient is from Rho-1's.

    python experiments/collider/measure.py experiments/collider/results.json [rounds]

Arms take turns, and medians are reported, so that other load on the machine hits all alike. "backward" is
the time of forward and backward less the time of the forward pass alone. r = 1 runs the same recomputation
as the others, without dropping anything.
"""

import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import losses
from nanochat_jax import params as params_lib
from nanochat_jax.config import FilterConfig, ModelConfig
from nanochat_jax.model import block, collider, transformer
from nanochat_jax.params import flatten
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

B, L = 4, 256
SHARES = (1.0, 0.8, 0.6, 0.5)
BLOCK = ModelConfig(vocab_size=128, dim=384, layers=1, heads=6, kv_heads=6, head_dim=64, mlp_dim=1152)
MODEL = ModelConfig(vocab_size=1024, dim=256, layers=4, heads=4, kv_heads=4, head_dim=64, mlp_dim=768)
NEARLY = 0.999  # rounds to all rows, on the filtered path


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, 128, (B, L + 1)), jnp.int32)
    ones = jnp.ones((B, L), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones / (B * L), ones, index)


def parameters(cfg):
    return jax.jit(lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0)))()


def compiled(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    assert memory and cost
    return program, {
        "gflops": cost["flops"] / 1e9, "temp_mib": memory.temp_size_in_bytes / 2**20
    }  # fmt: skip


def block_arms():
    """{arm: (compiled function, arguments, facts)} of one layer: forward alone, and with backward."""
    rows, project = batch(), projections.from_config(BLOCK)
    p = jax.tree.map(lambda a: a[0], parameters(BLOCK)["blocks"]) | {"value": None}
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(B, L, BLOCK.dim)), jnp.float32) for _ in range(2))
    order = jnp.asarray(np.stack([rng.permutation(L) for _ in range(B)]), jnp.int32)

    def plain(x, p):
        context = block.make_context(BLOCK, rows, None)
        return block.layer(BLOCK, project, context, rows.tokens, 0, (x, None), x, p, None)[0][0]

    def filtered(share):
        index = jnp.sort(order[:, : round(share * L)], axis=-1)
        mask = jnp.any(index[:, :, None] == jnp.arange(L)[None, None], 1)[..., None]

        def loss(x, p, dy):
            run = collider.layer(BLOCK, project, block.make_context(BLOCK, rows, None), rows.tokens)
            (y, (_, ridden)), _ = run(0, (x, (None, collider.passenger(*index.shape))), x, p, None)
            return collider.inject(jnp.sum(jnp.where(mask, y * dy, 0.0)), ridden, index)

        return loss

    functions = {
        "plain": lambda x, p, dy: jnp.sum(plain(x, p) * dy),
        "remat": lambda x, p, dy: jnp.sum(jax.checkpoint(plain)(x, p) * dy),
    } | {f"r={share}": filtered(share) for share in SHARES}
    arms = {"forward": (*compiled(functions["plain"], x, p, dy), (x, p, dy))}
    for name, function in functions.items():
        arms[name] = (*compiled(jax.value_and_grad(function, argnums=(0, 1)), x, p, dy), (x, p, dy))
    return arms


def model_arms():
    """The same of a whole model: loss and gradients, without the optimizer."""
    rows, params, key = batch(), parameters(MODEL), jax.random.key(0)
    configs = {"plain": MODEL, "remat": dataclasses.replace(MODEL, remat="block")}
    for share in SHARES:
        how = FilterConfig(min(share, NEARLY), "random")
        configs[f"r={share}"] = dataclasses.replace(MODEL, filter=how)
    of = {name: losses.make_loss(cfg, (("next_token", 1.0),), B * L) for name, cfg in configs.items()}
    arms = {"forward": (*compiled(of["plain"], params, rows, key), (params, rows, key))}
    for name, loss in of.items():
        arms[name] = (
            *compiled(jax.value_and_grad(loss, has_aux=True), params, rows, key),
            (params, rows, key),
        )
    return arms


def timed(arms, rounds):
    times = {name: [] for name in arms}
    for turn in range(rounds + 1):  # the first warms up
        for name, (program, _, arguments) in arms.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(each) for name, each in times.items()}
    table = {}
    for name, (_, facts, _) in arms.items():
        table[name] = {key: round(value, 3) for key, value in facts.items()}
        table[name] |= {"ms": round(medians[name], 2), "fastest_ms": round(min(times[name]), 2)}
        table[name]["backward_ms"] = round(medians[name] - medians["forward"], 2)
    return table


def bias():
    """Cosine and length ratio to the gradient of the masked loss alone (Rho-1), at fresh weights."""
    rows, params, key, found = batch(), parameters(MODEL), jax.random.key(0), {}
    plain = jax.jit(jax.grad(losses.make_loss(MODEL, (("next_token", 1.0),), B * L), has_aux=True))
    for share in (0.8, 0.6, 0.5):
        how = FilterConfig(share, "random")
        cfg = dataclasses.replace(MODEL, filter=how)
        ours = jax.jit(jax.grad(losses.make_loss(cfg, (("next_token", 1.0),), B * L), has_aux=True))
        score = collider.scores(how, jnp.zeros((B, L)), None, rows.weights, key)
        index = collider.select(score, collider.kept_count(how, L))
        kept = collider.kept_weights(rows.weights, index)
        masked = rows.replace(weights=collider.scatter_rows(jnp.zeros((B, L)), index, kept))
        a, b = (
            np.concatenate([np.asarray(g, np.float64).reshape(-1) for g in flatten(grads).values()])
            for grads in (ours(params, rows, key)[0], plain(params, masked, key)[0])
        )
        length = np.linalg.norm(a), np.linalg.norm(b)
        found[f"r={share}"] = {"cosine": a @ b / length[0] / length[1], "length_ratio": length[0] / length[1]}
    return found


def main(path, rounds=15):
    made = {
        "machine": f"{platform.processor() or platform.machine()}, {jax.device_count()} {jax.default_backend()}",
        "jax": jax.__version__, "rounds": int(rounds), "shape": [B, L],
    }  # fmt: skip
    for name, arms in (("block", block_arms), ("model", model_arms)):
        made[name] = timed(arms(), int(rounds))
    made["bias"] = bias()
    Path(path).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
