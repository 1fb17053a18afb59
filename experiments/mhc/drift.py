"""Does constrained mixing keep the gain over all layers near 1 where free mixing drifts?

    python experiments/mhc/drift.py experiments/mhc/results.json

Two parts, both small. stacks: 64 sublayers with random coefficients, no training. training: a byte
model on files of Python's standard library, one arm per form of mixing, all else equal.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import config as config_lib
from nanochat_jax import parallel
from nanochat_jax.config import Config, DataConfig, MhcConfig, ModelConfig, OptConfig, TrainConfig
from nanochat_jax.model import mhc
from nanochat_jax.train import program

STREAMS, SUBLAYERS = 4, 64
FORMS = {
    "unconstrained": MhcConfig(STREAMS, "unconstrained"),
    "sinkhorn, 5": MhcConfig(STREAMS, iterations=5),
    "sinkhorn, 20": MhcConfig(STREAMS),
    "sinkhorn, 100": MhcConfig(STREAMS, iterations=100),
    "permutation": MhcConfig(STREAMS, "permutation"),
}
ARMS = {
    "1 stream": MhcConfig(1), "sinkhorn": FORMS["sinkhorn, 20"], "permutation": FORMS["permutation"],
    "unconstrained": FORMS["unconstrained"],
}  # fmt: skip
MODEL = ModelConfig(
    vocab_size=256,
    dim=32,
    layers=8,
    heads=2,
    kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    qk_norm="after_rope",
    unroll=1,
)
STEPS, ROWS, LENGTH, EVERY = 120, 8, 64, 10
FILES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "tarfile.py", "typing.py")


def stacks() -> list[dict]:
    """Mean and largest gain over 256 tokens, of the product over random sublayers."""
    found = []
    for alpha in (0.01, 0.3, 1.0, 3.0):
        for name, cfg in FORMS.items():
            Q = mhc.coefficient_count(cfg)
            start = mhc.param_specs(dataclasses.replace(MODEL, layers=SUBLAYERS, mhc=cfg), 0)["bias"]
            bias = start.init(jax.random.key(0), start.shape)

            def sublayer(seen, layer, cfg=cfg, Q=Q, alpha=alpha):
                index, bias = layer
                keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
                width = STREAMS * MODEL.dim
                phi = jax.random.normal(keys[0], (width, Q)) * width**-0.5
                x = jax.random.normal(keys[1], (1, 256, STREAMS, MODEL.dim))
                p = {"phi": phi, "bias": bias, "alpha": jnp.full(3, alpha)}
                return mhc.observe(seen, mhc.coefficients(cfg, p, x)), None

            layers = (jnp.arange(SUBLAYERS), bias)
            run = jax.jit(lambda s, layers, f=sublayer: jax.lax.scan(f, s, layers)[0])
            seen = run(mhc.watch(cfg, (1, 256)), layers)
            forward, backward = (np.asarray(g, np.float64) for g in mhc.gains(seen.product))
            finite = lambda value: float(value) if np.isfinite(value) else None  # noqa: E731 (overflow)
            found.append({
                "alpha": alpha, "form": name,
                "forward_mean": finite(forward.mean()), "forward_max": finite(forward.max()),
                "backward_mean": finite(backward.mean()), "backward_max": finite(backward.max()),
                "sum_error": float(seen.error.max()),
            })  # fmt: skip
    return found


def batches(seed: int):
    """Rows of bytes at random places of the files."""
    home = Path(sysconfig.get_path("stdlib"))
    text = np.frombuffer(b"".join((home / name).read_bytes() for name in FILES), np.uint8).astype(np.int32)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - LENGTH - 1, ROWS)
        rows = np.stack([text[s : s + LENGTH + 1] for s in starts])
        ones = np.ones((ROWS, LENGTH), np.int32)
        yield {
            "tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": ones.astype(np.float32),
            "segments": ones, "positions": ones.cumsum(1, dtype=np.int32) - 1,
        }  # fmt: skip


def train(arm: MhcConfig, rate: float) -> dict:
    """Loss and gains every EVERY steps; all learning rates times `rate`."""
    opt = OptConfig()
    scaled = {
        g: dataclasses.replace(getattr(opt, g), lr=rate * getattr(opt, g).lr) for g in config_lib.GROUPS
    }
    cfg = Config(
        model=dataclasses.replace(MODEL, mhc=arm), data=DataConfig(seq_len=LENGTH, batch=ROWS),
        opt=dataclasses.replace(opt, **scaled), train=TrainConfig(steps=STEPS),
    )  # fmt: skip
    config_lib.validate(cfg)
    parts = program.Parts(cfg)
    state, source, curve, losses = parts.fresh(cfg.seed), batches(cfg.seed), [], []
    for step in range(STEPS):
        state, metrics = parts.step(state, parallel.shard_batch(next(source), parts.mesh))
        values = {k: float(v) for k, v in metrics.items() if k.startswith("mhc/") or k == "loss/next_token"}
        losses.append(values["loss/next_token"])
        if step % EVERY == 0 or step == STEPS - 1:
            curve.append({"step": step + 1, **values, "grad_norm": float(metrics["opt/grad_norm"])})
    return {"curve": curve, "loss_of_last_20": float(np.mean(losses[-20:]))}


def main(path: Path) -> None:
    began = time.perf_counter()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {
        "date": time.strftime("%Y-%m-%d"), "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(), "device": jax.devices()[0].device_kind,
        "commit": git.stdout.strip(),
    }  # fmt: skip
    result = {**facts, "stacks": stacks(), "training": {}}
    for rate in (1.0, 4.0):
        for name, arm in ARMS.items():
            result["training"][f"{name}, rate {rate:g}"] = end = train(arm, rate)
            last = end["curve"][-1]
            print(
                f"{name}, rate {rate:g}: loss {end['loss_of_last_20']:.4f}, gain {last.get('mhc/gain', 1):.4f}"
            )
    result["seconds"] = round(time.perf_counter() - began)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
