"""Tokens per second and MFU of the real train step, on random rows.

Protocol: compile, `warmup` steps, then `blocks` timed blocks of `steps` steps each, ended by waiting
for the device; the median block counts, and the fastest and slowest are kept. Data loading is left
out; every step gets its own batch, already on the device.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from nanochat_jax import parallel
from nanochat_jax.config import Config
from nanochat_jax.model import flops
from nanochat_jax.train import program


def random_rows(cfg: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """One batch of uniformly random tokens, fields [batch, seq_len]; another model's losses are zeros."""
    rng = np.random.default_rng(seed)
    shape = (cfg.data.batch, cfg.data.seq_len)
    tokens = rng.integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    reference = {"reference": np.zeros(shape, np.float32)} if cfg.data.reference else {}
    return reference | {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(shape, np.float32),
        "segments": np.ones(shape, np.int32), "positions": positions,
    }  # fmt: skip


def throughput(cfg: Config, blocks: int = 10, steps: int = 5, warmup: int = 3) -> dict[str, Any]:
    """Measure; returns a JSON-able record with the protocol's numbers and the model's FLOPs."""
    parts = program.Parts(cfg)
    state = parts.fresh(cfg.seed)
    batches = [parallel.shard_batch(random_rows(cfg, seed), parts.mesh) for seed in range(4)]
    began = time.perf_counter()
    state, metrics = parts.step(state, batches[0])
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - began
    for i in range(warmup):
        state, metrics = parts.step(state, batches[i % 4])
    jax.block_until_ready(state)
    seconds = []
    for _ in range(blocks):
        began = time.perf_counter()
        for i in range(steps):
            state, metrics = parts.step(state, batches[i % 4])
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - began) / steps)
    tokens = cfg.data.batch * cfg.data.seq_len
    median = statistics.median(seconds)
    work = flops.train_flops_per_token(cfg.model, cfg.data.seq_len)
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind)
    count = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor
    return {
        "tokens_per_second": tokens / median,
        "step_ms": {"median": 1e3 * median, "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)},
        "flops_per_token": work,
        "model_flops_per_second": work * tokens / median,
        "mfu": work * tokens / median / (peak * count) if peak else None,
        "mfu_convention": "palm_noncausal",
        "first_call_seconds": compile_seconds,
        "blocks": blocks, "steps_per_block": steps,
        "device": device.device_kind, "devices": count, "jax": jax.__version__,
        "model": dataclasses.asdict(cfg.model), "batch": cfg.data.batch, "seq_len": cfg.data.seq_len,
    }  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """The record for people."""
    step, mfu = record["step_ms"], record["mfu"]
    return (
        f"{record['tokens_per_second']:,.0f} tokens/s (step {step['median']:.1f} ms, "
        f"{step['min']:.1f} to {step['max']:.1f}), {record['model_flops_per_second'] / 1e9:,.0f} model GFLOP/s, "
        f"MFU {'unknown for this device' if mfu is None else f'{100 * mfu:.1f}%'}, "
        f"first call {record['first_call_seconds']:.1f} s on {record['devices']} x {record['device']}"
    )
