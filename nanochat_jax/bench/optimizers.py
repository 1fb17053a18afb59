"""Memory and time of optimizer chains on the parameter trees of real models.

For every chain and tree: bytes of state per parameter (counted on `eval_shape`), temporary memory
of the compiled update (XLA's analysis of the compiled program, nothing is run), and for trees that
fit the time of one update against plain Muon's.

Protocol of times: each chain's update is compiled with its state donated and warmed up; then blocks
of all chains take turns, `steps` updates each, and the medians of the blocks are compared. The blocks
hold no refresh of GaLore's subspaces. All of them are refreshed in a state's first update: what that
takes longer is `refresh_ms`, and its share over the period of GAP updates is added before comparing.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax import optim
from nanochat_jax import params as params_lib
from nanochat_jax.config import (
    ConfigError,
    FoamConfig,
    GaloreConfig,
    GroupConfig,
    ModelConfig,
    OptConfig,
    ScheduleConfig,
    nearest,
)
from nanochat_jax.model import transformer
from nanochat_jax.optim import memory

_MUON = GroupConfig(name="muon", lr=0.02, beta1=0.95)
_ADAMW = GroupConfig(name="adamw")
_8BIT = dataclasses.replace(_MUON, state_bits=8)
_ADAMW_8BIT = dataclasses.replace(_ADAMW, state_bits=8)

# Chain -> settings of the matrix group and its wrappers; `rank` is the tree's.
CHAINS: dict[str, Any] = {
    "adamw": lambda rank: {"matrix": _ADAMW},
    "muon": lambda rank: {"matrix": _MUON},
    "normuon": lambda rank: {"matrix": dataclasses.replace(_MUON, name="normuon")},
    "adamw 8-bit": lambda rank: {"matrix": _ADAMW_8BIT},
    "muon 8-bit": lambda rank: {"matrix": _8BIT},
    "galore(adamw)": lambda rank: {"matrix": _ADAMW, "galore": GaloreConfig(rank=rank)},
    "galore(muon)": lambda rank: {"matrix": _MUON, "galore": GaloreConfig(rank=rank)},
    "galore(muon 8-bit)": lambda rank: {"matrix": _8BIT, "galore": GaloreConfig(rank=rank)},
    "galore(muon 8-bit), 8-bit projector": lambda rank: {
        "matrix": _8BIT, "galore": GaloreConfig(rank=rank, projector_bits=8),
    },
    "foam 1 (adamw)": lambda rank: {"matrix": _ADAMW, "foam": FoamConfig(level=1)},
    "foam 3 (adamw)": lambda rank: {"matrix": _ADAMW, "foam": FoamConfig(level=3)},
    "foam 1 (muon)": lambda rank: {"matrix": _MUON, "foam": FoamConfig(level=1)},
    "foam 1 (muon 8-bit)": lambda rank: {"matrix": _8BIT, "foam": FoamConfig(level=1)},
}  # fmt: skip


def _model(dim: int, layers: int, heads: int, mlp_dim: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, dim=dim, layers=layers, heads=heads, kv_heads=heads, head_dim=dim // heads,
        mlp_dim=mlp_dim, tied=tied,
    )  # fmt: skip


# Tree -> (model, rank of GaLore). The three hardware configs have the predecessor's dimensions.
TREES: dict[str, tuple[ModelConfig, int]] = {
    "tiny": (_model(256, 4, 4, 768, 4096, False), 64),
    "nano_125m": (_model(768, 12, 12, 2064, 50257, True), 256),
    "config_a": (_model(2048, 24, 16, 8192, 50257, False), 512),
    "config_b": (_model(1536, 20, 12, 6144, 50257, False), 256),
    "config_c": (_model(1792, 22, 14, 7168, 50257, False), 384),
}
TIMED = ("tiny", "nano_125m")  # trees small enough to be updated on any machine
GAP = GaloreConfig().update_gap


def settings(chain: str, rank: int) -> OptConfig:
    """The optimizer of a chain, with AdamW for everything but the matrices."""
    flat = ScheduleConfig(warmup_steps=0, decay_fraction=0.0, floor=1.0)
    return OptConfig(**CHAINS[chain](rank), schedule=flat, skip_nonfinite=0)


def shapes_of(model: ModelConfig) -> Any:
    """The parameters as ShapeDtypeStructs: nothing is allocated."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), transformer.param_specs(model)
    )


def measure_memory(chain: str, tree: str) -> dict[str, Any]:
    """State bytes per parameter by group, and the compiled update's temporary bytes per parameter."""
    model, rank = TREES[tree]
    params = shapes_of(model)
    tx, _ = optim.build(settings(chain, rank), 1000)
    sizes = {path: math.prod(x.shape) for path, x in params_lib.flatten(params).items()}
    groups = params_lib.flatten(optim.labels(params))
    record: dict[str, Any] = memory.by_group(memory.state_bytes(tx, params), sizes, groups)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    analysis = compiled.memory_analysis()
    if analysis is not None:
        record["temporary"] = analysis.temp_size_in_bytes / sum(sizes.values())
    return record


def measure_times(tree: str, blocks: int, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds per update of the matrices by every chain, and the ratio to plain Muon's."""
    model, rank = TREES[tree]
    specs = {"blocks": transformer.param_specs(model)["blocks"]}
    params = params_lib.init_params(specs, jax.random.key(0))
    gradients = [params_lib.init_params(specs, jax.random.key(1 + i)) for i in range(3)]
    updates, states = {}, {}
    for chain in CHAINS:
        tx, _ = optim.build(settings(chain, rank), 1000)
        updates[chain] = jax.jit(tx.update, donate_argnums=1)
        inits = [jax.jit(tx.init)(params) for _ in range(3)]
        for state in inits[:2]:
            _, states[chain] = updates[chain](gradients[0], state, params)
        jax.block_until_ready(states[chain])
        states[chain] = inits[2], states[chain]
    first: dict[str, list[float]] = {chain: [] for chain in CHAINS}
    later: dict[str, list[float]] = {chain: [] for chain in CHAINS}

    def timed(chain: str, state: Any, count: int) -> tuple[float, Any]:
        began = time.perf_counter()
        for i in range(count):
            out, state = updates[chain](gradients[i % 3], state, params)
        jax.block_until_ready((out, state))
        return (time.perf_counter() - began) / count, state

    for block in range(blocks):
        for chain in CHAINS if block % 2 else reversed(CHAINS):
            zero, running = states[chain]
            if "galore" in chain:  # a state's first update refreshes everything
                seconds, _ = timed(chain, jax.tree.map(jnp.copy, zero), 1)
                first[chain].append(seconds)
            seconds, running = timed(chain, running, steps)
            later[chain].append(seconds)
            states[chain] = zero, running
    ms = {chain: 1e3 * statistics.median(all_) for chain, all_ in later.items()}
    refresh = {
        chain: max(0.0, 1e3 * statistics.median(all_) - ms[chain]) if all_ else 0.0
        for chain, all_ in first.items()
    }
    return {
        chain: {
            "ms": ms[chain],
            "refresh_ms": refresh[chain],
            "ratio_to_muon": (ms[chain] + refresh[chain] / GAP) / ms["muon"],
        }
        for chain in CHAINS
    }


def optimizers(blocks: int, steps: int, trees: Sequence[str] = tuple(TREES)) -> dict[str, Any]:
    """The whole report on some trees; JSON-able. Raises: ConfigError for an unknown tree."""
    for tree in trees:
        if tree not in TREES:
            raise ConfigError(f"--trees: no tree '{tree}'{nearest(tree, TREES)}")
    device = jax.devices()[0]
    return {
        "memory": {tree: {chain: measure_memory(chain, tree) for chain in CHAINS} for tree in trees},
        "times": {tree: measure_times(tree, blocks, steps) for tree in TIMED if tree in trees},
        "parameters": {
            tree: params_lib.count(transformer.param_specs(TREES[tree][0])) for tree in trees
        },
        "ranks": {tree: TREES[tree][1] for tree in trees},
        "blocks": blocks, "steps_per_block": steps, "update_gap": GAP,
        "device": device.device_kind, "jax": jax.__version__,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for tree, chains in record["memory"].items():
        size = f"{record['parameters'][tree] / 1e6:,.1f} M parameters, GaLore rank {record['ranks'][tree]}"
        lines.append(f"\n{tree}: {size}. Bytes of state per parameter:")
        lines.append(f"{'chain':<38}{'matrices':>10}{'all':>8}{'vs adamw':>10}{'temporary':>11}{'time':>8}")
        for chain, row in chains.items():
            share = row["all"] / chains["adamw"]["all"]
            time_ = record["times"].get(tree, {}).get(chain, {}).get("ratio_to_muon")
            lines.append(
                f"{chain:<38}{row['matrix']:>10.3f}{row['all']:>8.3f}{share:>10.1%}"
                f"{row.get('temporary', math.nan):>11.2f}{f'{time_:.2f}x' if time_ else '-':>8}"
            )
    return "\n".join(lines)
