"""nanochat_jax: ternary looped language models in JAX, as pure functions over plain trees.

Public names load on first use (PEP 562), so `import nanochat_jax` and `--help` stay fast.
"""

import importlib

__version__ = "0.1.0"

_MODULES = (
    "chat", "checkpoint", "cli", "config", "data", "export", "inference", "kernels", "losses", "model", "optim",
    "parallel", "params", "quant", "serve", "telemetry", "tokenizer", "train", "types",
)  # fmt: skip


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
