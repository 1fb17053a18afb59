"""Does FIRE restore plasticity? A small network on a sequence of tasks: python experiments/fire/continual.py

(a) Memorize: the same 1,024 random inputs get new random labels in each of 20 tasks. What falls with
    the task number is plasticity alone, because there is nothing to generalize.
(b) Warm start: inputs labelled by a random teacher; half of the data first, then all of it. What counts is
    accuracy on fresh data, against a network that saw all data from the start.

Between tasks the hidden matrices are left alone ("none"), shrunk and perturbed, drawn anew with the optimizer
("reset"), or replaced by isometries with their moments dropped (FIRE). Writes results.json and curve.png here.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from nanochat_jax.optim import fire  # noqa: E402

INPUT, WIDTH, CLASSES, SAMPLES, BATCH = 64, 128, 10, 1024, 128
TASKS, STEPS, SEEDS = 20, 400, (0, 1, 2)
HIDDEN = {"in": True, "mid": True, "out": False}
TX = optax.adam(1e-3)
FIRED = fire.fire(TX, HIDDEN, trigger=lambda fire, **_: fire, scale="norm")


def init(key):
    shapes = {"in": (INPUT, WIDTH), "mid": (WIDTH, WIDTH), "out": (WIDTH, CLASSES)}
    keys = jax.random.split(key, len(shapes))
    return {
        n: jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


def hidden(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params["in"]) @ params["mid"])


def loss_fn(params, x, y):
    logits = hidden(params, x) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params, x, y):
    return jnp.mean(jnp.argmax(hidden(params, x) @ params["out"], -1) == y)


@jax.jit
def train(params, state, x, y, key, first_fires):
    """STEPS updates on random batches; the first one reinitializes if `first_fires`."""

    def step(carry, inputs):
        params, state = carry
        index, key = inputs
        rows = jax.random.randint(key, (BATCH,), 0, x.shape[0])
        grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        updates, state = FIRED.update(grads, state, params, fire=first_fires & (index == 0))
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, state), (jnp.arange(STEPS), keys))[0]


def between(method, params, state, key):
    """What happens to parameters and optimizer state when a new task begins."""
    if method == "reset":
        params = init(key)
        return params, FIRED.init(params)
    if method == "shrink and perturb":
        fresh = init(key)
        params = {n: 0.5 * p + 0.5 * fresh[n] if HIDDEN[n] else p for n, p in params.items()}
        return params, FIRED.init(params)
    return params, state


METHODS = ("none", "shrink and perturb", "reset", "fire")


def measures(params, before, x):
    return {
        "moved": float(sum(fire.squared_frobenius_error(params[n], before[n]) for n in ("in", "mid"))),
        "deviation": float(fire.deviation_from_isometry(params["mid"])),
        "effective_rank": float(fire.effective_rank(params["mid"])),
        "dormant": float(fire.dormant_share(hidden(params, x))),
    }


def memorize(method, seed):
    """Accuracy on its own labels at the end of each task, and the measures there."""
    key = jax.random.key(seed)
    x = jax.random.normal(jax.random.fold_in(key, 0), (SAMPLES, INPUT))
    params = init(jax.random.fold_in(key, 1))
    state, rows = FIRED.init(params), []
    for task in range(TASKS):
        key_of = lambda i, task=task: jax.random.fold_in(jax.random.fold_in(key, 100 + task), i)  # noqa: E731
        y = jax.random.randint(key_of(0), (SAMPLES,), 0, CLASSES)
        before = params
        if task:
            params, state = between(method, params, state, key_of(1))
        params, state = train(params, state, x, y, key_of(2), jnp.asarray(method == "fire" and task > 0))
        rows.append({"accuracy": float(accuracy(params, x, y)), **measures(params, before, x)})
    return rows


def warm_start(method, seed):
    """Accuracy on fresh data after half of the data and then all of it."""
    key = jax.random.key(1000 + seed)
    teacher = init(jax.random.fold_in(key, 0))
    x = jax.random.normal(jax.random.fold_in(key, 1), (3 * SAMPLES, INPUT))
    y = jnp.argmax(hidden(teacher, x) @ teacher["out"], -1)
    train_x, train_y, test_x, test_y = x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]
    params = init(jax.random.fold_in(key, 2))
    state = FIRED.init(params)
    if method != "from scratch":
        for i in range(5):
            half = SAMPLES // 2
            params, state = train(
                params,
                state,
                train_x[:half],
                train_y[:half],
                jax.random.fold_in(key, 10 + i),
                jnp.asarray(False),
            )
        params, state = between(method, params, state, jax.random.fold_in(key, 3))
    for i in range(5):
        now = jnp.asarray(method == "fire" and i == 0)
        params, state = train(params, state, train_x, train_y, jax.random.fold_in(key, 20 + i), now)
    return float(accuracy(params, test_x, test_y))


def main():
    runs = {method: [memorize(method, seed) for seed in SEEDS] for method in METHODS}
    warm = {method: [warm_start(method, seed) for seed in SEEDS] for method in ("from scratch", *METHODS)}
    record = {"memorize": runs, "warm_start": warm, "jax": jax.__version__, "seeds": SEEDS, "steps": STEPS}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axis = plt.subplots(figsize=(6, 3.4), constrained_layout=True)
    for method in METHODS:
        values = np.array([[row["accuracy"] for row in rows] for rows in runs[method]])
        axis.plot(range(1, TASKS + 1), values.mean(0), label=method)
        last = {k: np.mean([rows[-1][k] for rows in runs[method]]) for k in runs[method][0][-1]}
        print(
            f"{method:<20} first task {values[:, 0].mean():.3f}, last five {values[:, -5:].mean():.3f}; at the end: "
            + ", ".join(f"{k} {v:.3g}" for k, v in last.items() if k != "accuracy")
        )
    axis.set(xlabel="task", ylabel="accuracy on its own labels")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(HERE / "curve.png", dpi=130)
    for method, values in warm.items():
        print(
            f"warm start, {method:<20} {np.mean(values):.3f}  ({', '.join(f'{value:.3f}' for value in values)})"
        )


if __name__ == "__main__":
    main()
