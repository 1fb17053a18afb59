"""A Hugging Face folder -> our config and parameters.

Files come from anywhere: sizes are checked before anything is read, names may not leave the folder, and
no code is run. Packed ternary matrices come back as float weights with the same codes and scales.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, ModelConfig, padded_vocab, resolve
from nanochat_jax.export import hf, names, safetensors, variants
from nanochat_jax.export.variants import OWN, ExportError
from nanochat_jax.model import transformer
from nanochat_jax.types import Params

Tensors = dict[str, np.ndarray]


def load(source: Path) -> tuple[ModelConfig, Params]:
    """Config and float32 parameters of a folder that `hf` wrote, or of the same architectures.

    Rows of the vocabulary's padding are zero: no token has them.
    Raises: ExportError naming the setting or tensor that is missing, unknown, or of another shape.
    """
    cfg, leaves = stream(source)
    tree: Params = {}
    for path, value in leaves:
        node = tree
        *groups, last = path.split("/")
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = np.array(value, order="C")  # a copy: the files may go
    return cfg, tree


def stream(source: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """`load`, leaf by leaf: a whole model need not be in memory. Raises: as `load`, some of it on the way."""
    found = hf.read_settings(source)
    tensors, architecture = _tensors(source), found.get("model_type", "")
    cfg = model_config(found)
    form = found.get("quantization_config", {}).get("linear_class", "")
    return cfg, _leaves(source.name, cfg, architecture, form, tensors)


def _leaves(
    source: str, cfg: ModelConfig, architecture: str, form: str, tensors: Tensors
) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf of our tree and its path. Args: form: how ternary matrices are kept, "" = as floats."""
    used: set[str] = set()
    specs = transformer.param_specs(cfg)
    flat = params_lib.flatten(specs)
    if architecture == OWN:
        entries = names.own_entries({p: names.own_shape(cfg, p, spec.shape) for p, spec in flat.items()})
    else:
        entries = names.entries(cfg, architecture)
    of_path: dict[str, list[names.Entry]] = {}
    for entry in entries:
        of_path.setdefault(entry.path, []).append(entry)
    ternary_paths = variants.ternary_paths(cfg, specs) if cfg.quant.startswith("ternary") else set()

    def read(entry: names.Entry) -> np.ndarray:
        value = _get(tensors, entry.name, used)
        if entry.path in ternary_paths:
            if cfg.quant_group:
                raise ExportError(
                    f"{source} has ternary scales of groups (model.quant_group = {cfg.quant_group}); "
                    "float weights with the same codes are found for one scale per matrix only"
                )
            if form == "bitlinear":
                value = _unpacked(value, _get(tensors, f"{entry.name}_scale", used), entry.name)
            if form != "autobitlinear":
                value = variants.latent(value)
        return value if architecture == OWN else names.put(cfg, architecture, entry, value)

    for path, spec in flat.items():
        parts = [read(entry) for entry in of_path[path]]
        value = parts[0] if of_path[path][0].layer is None else np.stack(parts)
        del parts  # what is stacked is needed no more
        value = _padded(cfg, path, value)
        if value.shape != spec.shape:
            raise ExportError(f"{path} has shape {value.shape}, expected {spec.shape}")
        yield path, value
    if extra := tensors.keys() - used:
        raise ExportError(f"{source} has tensors that {architecture} does not know: {sorted(extra)[:5]}")


def model_config(found: dict[str, Any]) -> ModelConfig:
    """Our settings for a config.json. Raises: ExportError for what we cannot compute."""
    architecture = found.get("model_type", "")
    if architecture == OWN:
        model = found.get("nanochat_jax")
        if not isinstance(model, dict):
            raise ExportError("config.json lacks the settings under 'nanochat_jax'")
        model = json.loads(json.dumps(model), object_hook=dict)
        model["loop"] = {**model.get("loop", {}), "gate": "none"}
        return _resolve(model)
    if architecture not in variants.SHAPES:
        raise ExportError(f"model_type '{architecture}' is none of {', '.join([*variants.SHAPES, OWN])}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if found.get(key):
            raise ExportError(f"config.json has {key} = {found[key]!r}, which this project does not have")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ExportError(f"config.json scales rotary positions ('{kind}'), which this project does not do")
    shape, theta = variants.SHAPES[architecture], rope.get("rope_theta", found.get("rope_theta"))
    act, needed = found.get("hidden_act", ""), ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in (*needed, "rms_norm_eps", "vocab_size") if key not in found]:
        raise ExportError(f"config.json lacks {', '.join(missing)}")
    if theta is None:
        raise ExportError("config.json lacks rope_theta")
    gated = "swiglu" in shape.mlp
    kinds = {("silu", True): "swiglu", ("relu2", True): "reglu2", ("relu2", False): "relu2"}
    if kinds.get((act, gated)) not in shape.mlp:
        raise ExportError(f"config.json has hidden_act = {act!r}, which our {architecture} does not have")
    heads = found["num_attention_heads"]
    quantization = found.get("quantization_config") or {}
    if quantization and quantization.get("quant_method") != "bitnet":
        raise ExportError(f"quantization '{quantization.get('quant_method')}' is not read; only 'bitnet' is")
    model = BLOCKS["seed"] | {
        "vocab_size": found["vocab_size"], "dim": found["hidden_size"], "layers": found["num_hidden_layers"],
        "heads": heads, "kv_heads": found.get("num_key_value_heads") or heads,
        "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
        "mlp_dim": found["intermediate_size"], "mlp": kinds[act, gated], "norm_eps": found["rms_norm_eps"],
        "rope_theta": float(theta), "tied": bool(found.get("tie_word_embeddings", False)),
        "qk_norm": shape.qk_norm, "sub_norm": shape.sub_norm, "quant_group": 0,
        "quant": "ternary" if quantization else "full",
    }  # fmt: skip
    if shape.weightless:
        cap = found.get("final_logit_softcapping")
        model |= {"norm": "weightless", "embed_norm": True, "softcap": float(cap or 0.0)}
    return _resolve(model)


def _resolve(model: dict[str, Any]) -> ModelConfig:
    try:
        loss = (
            (("next_token", 1.0), ("mtp", 0.2))
            if model.get("mtp", {}).get("depth")
            else (("next_token", 1.0),)
        )
        return resolve({"model": model, "train": {"loss": loss}}).model
    except ValueError as error:
        raise ExportError(f"config.json: {error}") from None


def _tensors(source: Path) -> Tensors:
    """All tensors of a folder, by name."""
    index = source / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExportError(f"{index.name} is damaged: {type(error).__name__}: {error}") from None
    found: Tensors = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ExportError(f"{index.name} names a file outside of its folder: {name!r}")
        if not (source / name).is_file():
            raise ExportError(f"{source} has no {name}")
        try:
            found |= safetensors.read(source / name)
        except ValueError as error:
            raise ExportError(str(error)) from None
    return found


def _get(tensors: Tensors, name: str, used: set[str]) -> np.ndarray:
    if name not in tensors:
        raise ExportError(f"the folder has no tensor {name}")
    used.add(name)
    value = tensors[name]
    return value if value.dtype == np.uint8 else value.astype(np.float32, copy=False)


def _unpacked(packed: np.ndarray, inverse: np.ndarray, name: str) -> np.ndarray:
    """scale * code [d_out, d_in]; the scale is rounded to the bits that it has here."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or inverse.size != 1 or not np.all(inverse > 0):
        raise ExportError(f"{name} is not a packed ternary matrix with a positive scale")
    mantissa, exponent = np.frexp(1 / inverse.astype(np.float64).reshape(()))
    scale = np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)
    return hf.unpack_codes(packed) * np.float32(scale)


def _padded(cfg: ModelConfig, path: str, value: np.ndarray) -> np.ndarray:
    """Zero rows for ids beyond the vocabulary."""
    axis = names.vocabulary_axis(path)
    if axis is None or value.ndim <= axis or value.shape[axis] != cfg.vocab_size:
        return value
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, padded_vocab(cfg) - cfg.vocab_size)
    return np.pad(value, widths)
