"""Blocks: options of the transformer that belong together. Config files write
`config.model.update(BLOCKS["modern"])`."""

from typing import Any

BLOCKS: dict[str, dict[str, Any]] = {
    # What nanochat and modded-nanogpt converged on, with SubLN for ternary (arXiv:2504.12285).
    "modern": {
        "mlp": "relu2", "norm": "weightless", "sub_norm": True, "embed_norm": True,
        "qk_norm": "after_rope", "qk_gain": 1.2, "rope_theta": 100000.0, "softcap": 15.0,
        "tied": False, "embed_std": 0.8, "value_embed_every": 2, "residual_scalars": True,
        "x0_scalars": True,
    },
    # The Qwen3 shape: loads in transformers and llama.cpp without remote code.
    "portable": {
        "mlp": "swiglu", "norm": "weighted", "sub_norm": False, "embed_norm": False,
        "qk_norm": "before_rope", "qk_gain": 1.0, "rope_theta": 1000000.0, "softcap": 0.0,
        "tied": True, "embed_std": 0.02, "value_embed_every": 0, "residual_scalars": False,
        "x0_scalars": False,
    },
    # The LLaMA block of the Rust system that this project replaces (group-wise scales).
    "seed": {
        "mlp": "swiglu", "norm": "weighted", "sub_norm": False, "embed_norm": False,
        "qk_norm": "none", "qk_gain": 1.0, "rope_theta": 10000.0, "softcap": 0.0, "tied": True,
        "embed_std": 0.02, "value_embed_every": 0, "residual_scalars": False,
        "x0_scalars": False, "quant_group": 128,
    },
}  # fmt: skip
