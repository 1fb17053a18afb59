"""Which public architecture computes the same function as a model, and the model in its plain form.

A model that a public architecture can hold is rewritten first: loops are unrolled, constant gains are
folded into weights, a norm without gain gets a gain of ones, the normalized embedding becomes the table.
What is left has one weight for each tensor of that architecture. What no public architecture holds is
exported with a modelling file of its own ("nanochat_jax"), tensors unchanged.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from nanochat_jax.config import FilterConfig, LoopConfig, ModelConfig, MtpConfig
from nanochat_jax.model import loop
from nanochat_jax.quant import project as projections
from nanochat_jax.quant import ternary
from nanochat_jax.types import Params

OWN = "nanochat_jax"  # the architecture of templates/modeling_nanochat_jax.py
TERNARY = {("full", "full"), ("ternary", "int8"), ("ternary", "full")}  # (weight, act) with a public form


class ExportError(ValueError):
    """A model cannot be exported as asked. The message names the setting and the nearest way out."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an architecture demands; a tuple lists the values that it holds."""

    mlp: tuple[str, ...]
    qk_norm: str
    sub_norm: bool = False
    softcap: bool = False
    square: bool = False  # heads * head_dim = dim
    weightless: bool = False  # norms have no gain, and the embedding is normalized


# In order of preference: the first that fits is taken.
SHAPES = {
    "llama": Shape(("swiglu",), "none"),
    "qwen3": Shape(("swiglu",), "before_rope"),
    "bitnet": Shape(("swiglu", "reglu2"), "none", sub_norm=True, square=True),
    "arcee": Shape(("relu2",), "none"),
    "nanochat": Shape(("relu2",), "after_rope", softcap=True, weightless=True),
}


def unsupported(cfg: ModelConfig) -> list[str]:
    """Settings whose arithmetic exists nowhere outside of this project, with the way out."""
    found = []
    for _, precision in projections.PRESETS[cfg.quant]:
        if (precision.weight, precision.act) not in TERNARY:
            found.append(
                f"model.quant = '{cfg.quant}' computes in a format that the exported forms do not have; "
                "finish the run with a preset of the same weights (model.quant = full or ternary, from "
                "ckpt.init_from) and export that"
            )
            break
    if cfg.loop.inject == "linear":
        found.append(
            "model.loop.inject = 'linear' is not in the exported modelling file; train with 'add' or 'none'"
        )
    return found


def obstacles(cfg: ModelConfig, architecture: str) -> list[str]:
    """What keeps a model from being written as a public architecture: `setting = value (needs ..)`."""
    shape, found = SHAPES[architecture], []

    def need(setting: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            found.append(f"model.{setting} = {value!r} (needs {wanted!r})")

    if cfg.mlp not in shape.mlp:
        found.append(f"model.mlp = {cfg.mlp!r} (needs {' or '.join(map(repr, shape.mlp))})")
    need("qk_norm", cfg.qk_norm, shape.qk_norm)
    need("sub_norm", cfg.sub_norm, shape.sub_norm)
    if shape.square and cfg.heads * cfg.head_dim != cfg.dim:
        found.append(
            f"model.heads * model.head_dim = {cfg.heads * cfg.head_dim} (needs model.dim = {cfg.dim})"
        )
    if not shape.softcap:
        need("softcap", cfg.softcap, 0.0)
    if shape.weightless:
        need("norm", cfg.norm, "weightless")
        need("embed_norm", cfg.embed_norm, True)
        need("qk_gain", cfg.qk_gain, 1.0)
    if any(cfg.window):
        found.append(f"model.window = {cfg.window!r} (needs full attention in every layer)")
    for setting in ("value_embed_every", "residual_scalars", "x0_scalars"):
        need(setting, getattr(cfg, setting), type(getattr(cfg, setting))(0))
    need("mhc.streams", cfg.mhc.streams, 1)
    need("loop.norm", cfg.loop.norm, False)
    need("loop.inject", cfg.loop.inject, "none")
    return found


def architecture(cfg: ModelConfig) -> str:
    """The public architecture that holds the model, else "nanochat_jax". Raises: ExportError."""
    if found := unsupported(cfg):
        raise ExportError("; ".join(found))
    return next((name for name in SHAPES if not obstacles(cfg, name)), OWN)


def nearest(cfg: ModelConfig, among: tuple[str, ...] = tuple(SHAPES)) -> tuple[str, list[str]]:
    """The public architecture with the fewest obstacles, and these."""
    name = min(among, key=lambda n: len(obstacles(cfg, n)))
    return name, obstacles(cfg, name)


def left_out(cfg: ModelConfig, architecture: str) -> list[str]:
    """What the exported model lacks without its logits changing, for the card and the console."""
    notes = []
    if architecture != OWN and cfg.loop.count > 1:
        notes.append(
            f"The {cfg.loop.count} loops are unrolled: shared layers are written once per loop "
            f"({loop.effective_layers(cfg)} layers)."
        )
    if cfg.loop.gate != "none":
        notes.append("The exit gate is left out: every token runs through all loops.")
    if architecture != OWN and cfg.mtp.depth:
        notes.append(
            f"The {cfg.mtp.depth} heads for later tokens are in mtp.safetensors, which no public loader reads."
        )
    return notes


def plain(cfg: ModelConfig, params: Params, architecture: str) -> tuple[ModelConfig, Params]:
    """The model as a public architecture has it, with the same logits.

    Returns: config and NumPy parameters in which each weight is one tensor; vocabulary tables end at
    vocab_size. Only folded weights are new arrays. Heads for later tokens are dropped.
    """
    keep_bare, D = SHAPES[architecture].weightless, cfg.dim
    params = jax.tree.map(np.asarray, params)
    stacks = [params[name] for name in _order(cfg)]
    blocks = stacks[0] if len(stacks) == 1 else jax.tree.map(lambda *a: np.concatenate(a), *stacks)
    blocks = {part: dict(blocks[part]) for part in ("attn", "mlp")}
    N = loop.effective_layers(cfg)
    out: Params = {"embed": params["embed"][: cfg.vocab_size], "blocks": blocks}
    tied = cfg.tied
    if not tied:
        out["head"] = params["head"][:, : cfg.vocab_size]
    if not keep_bare:
        out["norm"] = params.get("norm", np.ones(D, np.float32))
        widths = {"norm": (D, D), "sub_norm": (cfg.heads * cfg.head_dim, cfg.mlp_dim)}
        for name in ("norm", "sub_norm") if cfg.sub_norm else ("norm",):
            for part, width in zip(("attn", "mlp"), widths[name], strict=True):
                blocks[part].setdefault(name, np.ones((N, width), np.float32))
        if cfg.qk_norm != "none":
            for name in ("q_norm", "k_norm"):
                gain = blocks["attn"].get(name, np.ones((N, cfg.head_dim), np.float32))
                blocks["attn"][name] = gain if cfg.qk_gain == 1.0 else gain * np.float32(cfg.qk_gain)
        if cfg.embed_norm:
            if tied:  # the head keeps the table as it was
                out["head"], tied = np.ascontiguousarray(out["embed"].T), False
            out["embed"] = _normalized(out["embed"], params.get("embed_norm"), cfg.norm_eps)
    changed: dict[str, Any] = {} if keep_bare else {"norm": "weighted", "embed_norm": False, "qk_gain": 1.0}
    return dataclasses.replace(
        cfg, layers=N, tied=tied, loop=LoopConfig(), mtp=MtpConfig(), filter=FilterConfig(), remat="none",
        unroll=0, window=(), **changed,
    ), out  # fmt: skip


def _order(cfg: ModelConfig) -> list[str]:
    """The stacks in the order in which a token passes them."""
    before, after = (["before"] if cfg.loop.before else []), (["after"] if cfg.loop.after else [])
    return [*before, *["blocks"] * cfg.loop.count, *after]


def _normalized(table_VD: np.ndarray, gain: np.ndarray | None, eps: float) -> np.ndarray:
    wide = table_VD.astype(np.float32)
    y = wide / np.sqrt(np.mean(wide * wide, -1, keepdims=True) + np.float32(eps))
    return y if gain is None else y * gain


def ternary_paths(cfg: ModelConfig, params: Params) -> set[str]:
    """Paths of the stacked matrices that are ternary in the forward pass."""
    return set(ternary.select(params, projections.from_config(cfg).ternary_roles()))


def rounded(cfg: ModelConfig, params: Params) -> Params:
    """Parameters in which every ternary matrix is scale * code, float32: what the products multiply."""
    chosen = ternary_paths(cfg, params)

    def fix(path: tuple, w: Any) -> Any:
        return rounded_stack(cfg, w) if "/".join(str(p.key) for p in path) in chosen else w

    return jax.tree_util.tree_map_with_path(fix, params)


def rounded_stack(cfg: ModelConfig, w: Any) -> np.ndarray:
    """`rounded`, of the matrices [N, m, n] of one role."""
    layers = (ternary.dequantize(*ternary.quantize_ternary(w[i], cfg.quant_group)) for i in range(len(w)))
    return np.stack([np.asarray(layer) for layer in layers])


def latent(matrix: np.ndarray) -> np.ndarray:
    """Float weights [m, n] that quantize (one scale per matrix) to the codes and the scale of `matrix`.

    `matrix` is scale * code; its mean magnitude is smaller than the scale by the share of nonzeros.
    """
    share = np.count_nonzero(matrix) / matrix.size
    return matrix if not share else (matrix / np.float32(share)).astype(np.float32)
