"""Models that are small enough to write and read in milliseconds, with weights that show every mistake."""

from typing import Any

import jax
import numpy as np

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, LoopConfig, MhcConfig, ModelConfig, MtpConfig
from nanochat_jax.model import transformer

SIZES: dict[str, Any] = {
    "vocab_size": 130, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48,
    "dtype": "float32",
}  # fmt: skip
LLAMA: dict[str, Any] = {"rope_theta": 500.0, "norm_eps": 1e-5}
# name of a case -> (architecture that it is written as, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_tied": ("llama", {**LLAMA, "tied": True, "kv_heads": 1}),
    "qwen3": ("qwen3", BLOCKS["portable"]),
    "bitnet": ("bitnet", {**LLAMA, "sub_norm": True}),
    "bitnet_relu2": ("bitnet", {"sub_norm": True, "mlp": "reglu2"}),
    "arcee": ("arcee", {"mlp": "relu2"}),
    "nanochat": (
        "nanochat",
        {"mlp": "relu2", "norm": "weightless", "embed_norm": True, "qk_norm": "after_rope", "softcap": 15.0},
    ),
}
# Models that are rewritten first: they come back in their plain form, not as they were.
REWRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "loops": ("llama", {"loop": LoopConfig(count=2, before=1, after=1), "mtp": MtpConfig(depth=1)}),
    "gains": ("qwen3", {"norm": "weightless", "qk_norm": "before_rope", "qk_gain": 1.2}),
    "gain_of_rows": ("qwen3", {"qk_norm": "before_rope", "qk_gain": 1.5}),
    "normalized": ("llama", {"embed_norm": True, "tied": True}),
    "sub_norms": ("bitnet", {"norm": "weightless", "sub_norm": True}),
}
# Wide enough that a millionth of the embeddings moves every row of logits by more than float32's rounding.
WIDE: dict[str, Any] = {"quant": "ternary", "dim": 512, "head_dim": 128, "mlp_dim": 1024}
OWN: dict[str, dict[str, Any]] = {
    "modern": BLOCKS["modern"],
    "windows": {**BLOCKS["modern"], "window": (4, 0), "value_embed_every": 1, "tied": True},
    "looped": {
        **BLOCKS["modern"],
        "loop": LoopConfig(count=2, before=1, after=1, norm=True, inject="add"),
        "quant": "ternary",
    },
    "weighted_streams": {
        "mhc": MhcConfig(streams=2), "loop": LoopConfig(count=2, norm=True, gate="shared"), "qk_norm": "after_rope",
        "embed_norm": True, "x0_scalars": True, "sub_norm": True,
    },
    "permutations": {**BLOCKS["modern"], "mhc": MhcConfig(streams=3, form="permutation")},
    "free_streams": {**BLOCKS["modern"], "mhc": MhcConfig(streams=2, form="unconstrained")},
    "fixed_streams": {**BLOCKS["modern"], "mhc": MhcConfig(streams=2, dynamic=False, iterations=4)},
    "future": {**BLOCKS["modern"], "mtp": MtpConfig(depth=2), "window": (0, 4)},
    "future_parallel": {
        "mtp": MtpConfig(depth=2, kind="parallel"), "mlp": "reglu2", "mhc": MhcConfig(streams=2), "sub_norm": True
    },
}  # fmt: skip


def config(settings):
    return ModelConfig(**{**SIZES, **settings})


def weights(cfg, seed=0):
    """Random weights with visible gains, gates and coefficients, by NumPy: nothing is compiled."""
    random = np.random.default_rng(seed)

    def one(path, spec):
        noise = random.normal(size=spec.shape).astype(np.float32)
        if spec.matmul or path in ("embed", "value/embed"):
            return noise * np.float32(spec.shape[-2] ** -0.5 if spec.matmul else 0.5)
        return 1 + np.float32(0.1) * noise

    tree = transformer.param_specs(cfg)
    flat = params_lib.flatten(tree)
    made = {path: one(path, spec) for path, spec in flat.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: made[params_lib.path_name(path)], tree)


def build(settings, seed=0):
    """(config, weights) of a case's settings."""
    cfg = config(settings)
    return cfg, weights(cfg, seed)
