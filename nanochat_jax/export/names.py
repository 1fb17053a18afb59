"""One table: our path <-> the tensor's name in transformers <-> its name in GGUF.

Our matrices are [d_in, d_out] and layers are stacked; elsewhere a matrix is [d_out, d_in] and every
layer has tensors of its own. Rotary pairs are (i, i + K/2) here and in transformers; GGUF's "llama"
and "arcee" pair neighbours, and transformers' NanoChat turns the other way round: for these the rows
of q and k are reordered within each head.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanochat_jax.config import ModelConfig
from nanochat_jax.export import variants
from nanochat_jax.types import Params

TABLE = {  # of the whole model: path -> (transformers, GGUF)
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}
LAYER = {  # of each layer, behind "model.layers.{i}." and "blk.{i}."
    "attn/norm": ("input_layernorm.weight", "attn_norm.weight"),
    "attn/q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "attn/k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "attn/v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "attn/o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "attn/q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "attn/k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "attn/sub_norm": ("self_attn.attn_sub_norm.weight", "attn_sub_norm.weight"),
    "mlp/norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "mlp/gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "mlp/up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "mlp/down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "mlp/sub_norm": ("mlp.ffn_sub_norm.weight", "ffn_sub_norm.weight"),
}
NANOCHAT = {"mlp/up": "mlp.fc1.weight", "mlp/down": "mlp.fc2.weight"}  # otherwise named there


class Entry(NamedTuple):
    """One tensor elsewhere and where it is here."""

    name: str
    path: str  # "embed", "blocks/attn/q"
    layer: int | None  # index into the stacked axis


def entries(cfg: ModelConfig, architecture: str, gguf: bool = False) -> list[Entry]:
    """Every tensor of a plain model (`variants.plain`), in file order."""
    bare = variants.SHAPES[architecture].weightless
    wanted = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down"]
    wanted += ["mlp/gate"] if cfg.mlp != "relu2" else []
    if not bare:
        wanted += ["attn/norm", "mlp/norm"]
        wanted += ["attn/q_norm", "attn/k_norm"] if cfg.qk_norm != "none" else []
        wanted += ["attn/sub_norm", "mlp/sub_norm"] if cfg.sub_norm else []
    found = [Entry(TABLE["embed"][gguf], "embed", None)]
    for i in range(cfg.layers):
        for path in (p for p in LAYER if p in wanted):
            name = LAYER[path][gguf]
            if architecture == "nanochat":
                name = NANOCHAT.get(path, name)
            found.append(Entry(f"{'blk' if gguf else 'model.layers'}.{i}.{name}", f"blocks/{path}", i))
    found += [] if bare else [Entry(TABLE["norm"][gguf], "norm", None)]
    return found if cfg.tied else [*found, Entry(TABLE["head"][gguf], "head", None)]


def take(cfg: ModelConfig, architecture: str, params: Params, entry: Entry, gguf: bool = False) -> np.ndarray:
    """The tensor as it is written: a matrix as [d_out, d_in]."""
    leaf = params
    for key in entry.path.split("/"):
        leaf = leaf[key]
    value = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
    if value.ndim == 2 and entry.path != "embed":
        value = _reordered(cfg, architecture, entry.path, gguf)[0](value.T)
    return value


def known(table: np.ndarray, axis: int, ids: int) -> np.ndarray:
    """The part of a vocabulary table that belongs to the first `ids` ids; a view."""
    return table[(*(slice(None),) * axis, slice(ids))]


def put(cfg: ModelConfig, architecture: str, entry: Entry, value: np.ndarray) -> np.ndarray:
    """Inverse of `take`, of one layer."""
    if value.ndim == 2 and entry.path != "embed":
        return np.ascontiguousarray(_reordered(cfg, architecture, entry.path, False)[1](value).T)
    return value


def _reordered(cfg: ModelConfig, architecture: str, path: str, gguf: bool) -> tuple[Callable, Callable]:
    """Functions that reorder the rows of q and k [heads * K, D] for an architecture, and back."""
    if not path.endswith(("attn/q", "attn/k")):
        return (lambda w: w), (lambda w: w)
    half, K = cfg.head_dim // 2, cfg.head_dim
    if gguf and architecture in ("llama", "arcee"):  # (i, i + K/2) -> (2i, 2i + 1)
        order = np.arange(K).reshape(2, half).T.reshape(-1)
    elif not gguf and architecture == "nanochat":  # the halves change places: the angle changes sign
        order = np.concatenate([np.arange(half, K), np.arange(half)])
    else:
        return (lambda w: w), (lambda w: w)
    back = np.argsort(order)

    def by(rows: np.ndarray) -> Callable:
        return lambda w: w.reshape(-1, K, w.shape[-1])[:, rows].reshape(w.shape)

    return by(order), by(back)


def own_entries(specs: dict[str, tuple[int, ...]]) -> list[Entry]:
    """Tensors of the own modelling file: our paths with dots, stacks taken apart, matrices [d_in, d_out].

    Args: specs: shape by path.
    """
    found = []
    for path, shape in specs.items():
        first, _, rest = path.partition("/")
        name = rest.replace("/", ".")
        if first in ("before", "blocks", "after", "mtp", "value"):
            found += [Entry(f"{first}.{i}.{name}", path, i) for i in range(shape[0])]
        else:
            found.append(Entry(path.replace("/", "."), path, None))
    return found


def own_shape(cfg: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape with the vocabulary's padding taken off its table."""
    axis = vocabulary_axis(path)
    return shape if axis is None else (*shape[:axis], cfg.vocab_size, *shape[axis + 1 :])


def vocabulary_axis(path: str) -> int | None:
    """The axis of a weight that counts token ids."""
    return {"embed": 0, "head": 1, "value/embed": 1}.get(path)
