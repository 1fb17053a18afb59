"""A model as a Hugging Face folder: tensors and the settings that transformers reads.

Ternary models have three forms, all of them without code of ours on public architectures:
- packed: four codes a byte, with scale and 8-bit activations: the arithmetic of training
  (transformers' "bitnet" quantization, which needs `accelerate`);
- dequantized: scale * code as ordinary weights. Any loader; activations keep full precision, so that
  logits differ a little from training's;
- latent: the float weights behind the codes, quantized anew in every product: can be trained further.
The own modelling file always stores scale * code, and rounds activations to 8 bits itself.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax import params as params_lib
from nanochat_jax.config import InferConfig, ModelConfig
from nanochat_jax.export import folder, names, safetensors, variants
from nanochat_jax.export.tokenization import Ids
from nanochat_jax.export.variants import OWN, ExportError
from nanochat_jax.quant import ternary
from nanochat_jax.types import Params

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FORMS = ("packed", "dequantized", "latent")
SHARD = 5 * 10**9  # bytes of one file
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "bitnet": "BitNetForCausalLM",
    "arcee": "ArceeForCausalLM", "nanochat": "NanoChatForCausalLM",
}  # fmt: skip
MODELING = Path(__file__).parent / "templates" / "modeling_nanochat_jax.py"
Planned = tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]


def form_of(cfg: ModelConfig, architecture: str, wanted: str) -> str:
    """The form in which the ternary matrices are written; "full" for a model that has none.

    Args: wanted: one of FORMS, or "" for the best possible. Raises: ExportError.
    """
    if wanted and wanted not in FORMS:
        raise ExportError(f"--ternary must be one of {', '.join(FORMS)}, got '{wanted}'")
    if not cfg.quant.startswith("ternary"):
        if wanted:
            raise ExportError(f"--ternary={wanted} has no effect because model.quant is '{cfg.quant}'")
        return "full"
    if architecture == OWN:
        if wanted not in ("", "dequantized"):
            raise ExportError(f"the own modelling file holds scale * code only, not --ternary={wanted}")
        return "dequantized"
    outputs = (cfg.dim, cfg.mlp_dim, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim)
    reason = ""
    if cfg.quant_group:
        reason = f"one scale per matrix, and model.quant_group is {cfg.quant_group}"
    elif any(n % 4 for n in outputs):
        reason = f"outputs in multiples of 4, got {outputs}"
    if wanted in ("packed", "latent") and reason:
        raise ExportError(f"--ternary={wanted} needs {reason}; use --ternary=dequantized")
    return wanted or ("dequantized" if reason else "packed")


def settings(
    cfg: ModelConfig, architecture: str, form: str, dtype: str, context: int, special: Ids
) -> dict[str, Any]:
    """config.json. Args: cfg: the plain model, or with OWN the model as trained."""
    out: dict[str, Any] = {
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.dim, "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "max_position_embeddings": context,
        "bos_token_id": special.bos, "eos_token_id": list(special.eos), "pad_token_id": special.pad,
        "tie_word_embeddings": cfg.tied, "dtype": dtype, "torch_dtype": dtype, "use_cache": True,
    }  # fmt: skip
    if architecture == OWN:
        model = {
            k: v
            for k, v in dataclasses.asdict(cfg).items()
            if k not in ("remat", "unroll", "dtype", "filter")
        }
        layers = cfg.loop.before + cfg.loop.count * cfg.layers + cfg.loop.after
        return out | {
            "architectures": ["NanochatJaxForCausalLM"], "model_type": OWN, "num_hidden_layers": layers,
            "auto_map": {
                "AutoConfig": "modeling_nanochat_jax.NanochatJaxConfig",
                "AutoModelForCausalLM": "modeling_nanochat_jax.NanochatJaxForCausalLM",
            },
            "nanochat_jax": model,
        }  # fmt: skip
    out |= {
        "architectures": [CLASSES[architecture]], "model_type": architecture, "num_hidden_layers": cfg.layers,
        "intermediate_size": cfg.mlp_dim, "hidden_act": "silu" if cfg.mlp == "swiglu" else "relu2",
        "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    if architecture == "nanochat":
        out["final_logit_softcapping"] = cfg.softcap or None
    if form in ("packed", "latent"):
        out["quantization_config"] = {
            "quant_method": "bitnet", "linear_class": "bitlinear" if form == "packed" else "autobitlinear",
            "quantization_mode": "offline" if form == "packed" else "online",
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
    return out


def generation(infer: InferConfig, special: Ids) -> dict[str, Any]:
    """generation_config.json, from the run's own defaults of sampling."""
    out = {
        "bos_token_id": special.bos, "eos_token_id": list(special.eos),
        "pad_token_id": special.bos if special.pad is None else special.pad,
        "do_sample": infer.temperature > 0, "max_new_tokens": infer.max_tokens,
    }  # fmt: skip
    if infer.temperature > 0:
        out |= {"temperature": infer.temperature, "top_k": infer.top_k, "top_p": infer.top_p}
    return out


def pack_codes(codes_NM: np.ndarray) -> np.ndarray:
    """int8 codes [d_out, d_in] in {-1, 0, 1} -> uint8 [d_out / 4, d_in], quarter i of the rows in bits 2i."""
    quarters = (codes_NM + 1).astype(np.uint8).reshape(4, -1, codes_NM.shape[1])
    return np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None, None], 0)


def unpack_codes(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_codes`. Raises: ValueError for a code that is none."""
    codes = (packed[None] >> np.array([0, 2, 4, 6], np.uint8)[:, None, None]) & 3
    if np.any(codes == 3):
        raise ValueError("packed ternary weights hold the code 3, which stands for no weight")
    return codes.astype(np.int8).reshape(-1, packed.shape[1]) - 1


def planned(cfg: ModelConfig, params: Params, architecture: str, form: str, dtype: str) -> Iterator[Planned]:
    """Every tensor of a plain model: name, type, shape, and how to get it."""
    chosen = variants.ternary_paths(cfg, params) if form != "full" else set()
    for entry in names.entries(cfg, architecture):
        value = names.take(cfg, architecture, params, entry)
        if entry.path not in chosen or form == "latent":
            yield entry.name, DTYPES[dtype], value.shape, lambda v=value: v
        elif form == "packed":
            shape = (value.shape[0] // 4, value.shape[1])
            yield entry.name, "U8", shape, lambda v=value: pack_codes(_codes(v, cfg)[0])
            inverse = lambda v=value: 1 / _codes(v, cfg)[1].reshape(1)  # noqa: E731
            yield f"{entry.name}_scale", "F32", (1,), inverse
        else:
            yield (
                entry.name,
                DTYPES[dtype],
                value.shape,
                lambda v=value, n=entry.name: _exact(n, v, cfg, dtype),
            )


def planned_own(cfg: ModelConfig, params: Params, dtype: str) -> Iterator[Planned]:
    """Every tensor of a model for the own modelling file; the exit gate is left out."""
    chosen = variants.ternary_paths(cfg, params) if cfg.quant.startswith("ternary") else set()
    flat = {p: w for p, w in params_lib.flatten(params).items() if not p.startswith("loop/gate")}
    for entry in names.own_entries({path: w.shape for path, w in flat.items()}):
        leaf = np.asarray(flat[entry.path])
        axis = names.vocabulary_axis(entry.path)
        if axis is not None:
            leaf = names.known(leaf, axis, cfg.vocab_size)
        value = leaf if entry.layer is None else leaf[entry.layer]
        if entry.path in chosen:
            exact = lambda v=value, n=entry.name: _exact(n, v.T, cfg, dtype).T  # noqa: E731
            yield entry.name, DTYPES[dtype], value.shape, exact
        else:
            yield entry.name, DTYPES[dtype], value.shape, lambda v=value: v


def _codes(matrix: np.ndarray, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(codes [d_out, d_in], scale) of a latent matrix [d_out, d_in]."""
    t, gamma = ternary.quantize_ternary(jax.numpy.asarray(matrix.T), cfg.quant_group)
    return np.asarray(t).T, np.asarray(gamma, np.float32)


def _exact(name: str, matrix: np.ndarray, cfg: ModelConfig, dtype: str) -> np.ndarray:
    """scale * code [d_out, d_in]. Raises: ExportError where the stored type would round the scale."""
    t, gamma = ternary.quantize_ternary(jax.numpy.asarray(matrix.T), cfg.quant_group)
    value = np.asarray(ternary.dequantize(t, gamma)).T
    with np.errstate(over="ignore"):
        stored = value.astype(safetensors.DTYPES[DTYPES[dtype]]).astype(np.float32)
    if not np.array_equal(stored, value):
        raise ExportError(f"{name}: {dtype} would round its ternary scale; use --dtype=float32")
    return value


def write_tensors(target: Path, plan: Iterator[Planned]) -> int:
    """Write model.safetensors, or several files and their index beyond SHARD bytes. Returns bytes."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for item in plan:
        size = math.prod(item[2]) * safetensors.DTYPES[item[1]].itemsize
        if filled and filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    if len(shards) == 1:
        return safetensors.write(target / "model.safetensors", shards[0])
    total, where = 0, {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        total += safetensors.write(target / name, shard)
        where |= {item[0]: name for item in shard}
    folder.write_json(
        target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )
    return total


def write_model(
    target: Path, cfg: ModelConfig, params: Params, infer: InferConfig, special: Ids, context: int,
    dtype: str = "float32", wanted: str = "",
) -> tuple[str, str]:  # fmt: skip
    """Write the tensors, config.json and generation_config.json of a model.

    Args: params: as trained (latent weights where ternary). context: positions it was trained on.
    dtype: of the tensors. wanted: form of ternary matrices, see `form_of`.
    Returns: (architecture, form). Raises: ExportError.
    """
    architecture = variants.architecture(cfg)
    form = form_of(cfg, architecture, wanted)
    if architecture == OWN:
        shutil.copy(MODELING, target / MODELING.name)
        write_tensors(target, planned_own(cfg, params, dtype))
        shown = cfg
    else:
        shown, plain = variants.plain(cfg, params, architecture)
        write_tensors(target, planned(shown, plain, architecture, form, dtype))
        if cfg.mtp.depth:
            heads = {"mtp": params["mtp"]}
            safetensors.write(target / "mtp.safetensors", planned_own(cfg, heads, dtype))
    folder.write_json(target / "config.json", settings(shown, architecture, form, dtype, context, special))
    folder.write_json(target / "generation_config.json", generation(infer, special))
    return architecture, form


def read_settings(source: Path) -> dict[str, Any]:
    """config.json of a folder. Raises: ExportError."""
    try:
        found = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{source / 'config.json'} is not readable: {error}") from None
    if not isinstance(found, dict):
        raise ExportError(f"{source / 'config.json'} must hold an object")
    return found
