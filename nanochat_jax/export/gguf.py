"""A model as a GGUF file that llama.cpp loads, written by the `gguf` package (extra 'export').

Matrices are F32, F16, BF16, Q8_0, or, of ternary models, TQ2_0 or TQ1_0, which hold codes and scale
exactly. With the ternary types the embedding and the head are F16: they are not ternary. Norms are F32.
llama.cpp rounds activations to 8 bits by blocks of 256, not by token: its logits differ from ours.
Tensors are streamed: one at a time is in memory.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nanochat_jax.config import ModelConfig
from nanochat_jax.export import names, tokenization, variants
from nanochat_jax.export.variants import ExportError
from nanochat_jax.quant import gguf_blocks, pack, ternary
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.types import Params

ARCHITECTURES = ("llama", "qwen3", "bitnet", "arcee")
TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
TERNARY = ("tq1_0", "tq2_0")


def obstacles(cfg: ModelConfig, kind: str) -> list[str]:
    """What keeps a model from being written as GGUF of a type: `setting = value (what would do)`."""
    architecture, found = variants.nearest(cfg, ARCHITECTURES)
    if found:
        return [f"the nearest is {architecture}, but {', '.join(found)}"]
    found = []
    if architecture == "bitnet" and (cfg.mlp != "swiglu" or not cfg.tied):
        found.append(
            "llama.cpp's bitnet has SiLU and a tied head (needs model.mlp = 'swiglu', model.tied = True)"
        )
    sizes = {"dim": cfg.dim, "mlp_dim": cfg.mlp_dim, "heads * model.head_dim": cfg.heads * cfg.head_dim}
    if kind in TERNARY:
        if not cfg.quant.startswith("ternary"):
            found.append(f"model.quant = '{cfg.quant}' (needs ternary, or --gguf=q8_0)")
        elif cfg.quant_group % 256:
            found.append(
                f"model.quant_group = {cfg.quant_group}: a block of {kind.upper()} has one scale per 256 "
                "inputs (needs 0 or a multiple of 256, or --gguf=f16)"
            )
    block = {"q8_0": 32, "tq1_0": 256, "tq2_0": 256}.get(kind, 1)
    found += [f"model.{n} = {v} (needs a multiple of {block})" for n, v in sizes.items() if v % block]
    return found


def write(
    path: Path, cfg: ModelConfig, params: Params, tokenizer: Tokenizer, kind: str, context: int,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write one file.

    Args: params: as trained. kind: one of TYPES. context: positions it was trained on. facts: further
    metadata, e.g. general.name; unknown keys are ignored by readers.
    Raises: ExportError for a combination that cannot be held; ModuleNotFoundError without the package.
    """
    if kind not in TYPES:
        raise ExportError(f"--gguf: '{kind}' is none of {', '.join(TYPES)}")
    if found := obstacles(cfg, kind):
        raise ExportError(f"GGUF {kind.upper()} cannot hold this model: {'; '.join(found)}")
    rule = tokenization.pre(tokenizer)
    library = importlib.import_module("gguf")
    architecture = variants.architecture(cfg)
    shown, plain = variants.plain(cfg, params, architecture)
    chosen = variants.ternary_paths(shown, plain) if cfg.quant.startswith("ternary") else set()
    types = library.GGMLQuantizationType
    writer = library.GGUFWriter(path, architecture)
    _model_keys(writer, shown, kind, context, library)
    for key, value in facts.items():
        _fact(writer, key, value)
    _tokenizer_keys(writer, tokenizer, rule, shown.vocab_size)
    gets: list[Callable[[], np.ndarray]] = []
    for entry in names.entries(shown, architecture, gguf=True):
        value = names.take(shown, architecture, plain, entry, gguf=True)
        stored = _stored(entry.path, value, kind, entry.path in chosen)
        get = _getter(shown, value, stored, entry.path in chosen, library)
        shape, name = value.shape, entry.name
        block, size = library.GGML_QUANT_SIZES[types[stored]]
        number = int(np.prod(shape)) // block * size
        if stored in ("F32", "F16"):
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32 if stored == "F32" else np.float16), number
            )
        else:
            row = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, row, np.dtype(np.uint8), number, raw_dtype=types[stored])
        gets.append(get)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for get in gets:
            writer.write_tensor_data(get())
    finally:
        writer.close()


def _stored(path: str, value: np.ndarray, kind: str, is_ternary: bool) -> str:
    """Type of one tensor: norms in F32, and what is not ternary beside ternary types in F16."""
    if value.ndim == 1:
        return "F32"
    if kind in TERNARY and not is_ternary:
        return "F16"
    return kind.upper()


def _getter(cfg: ModelConfig, value: np.ndarray, stored: str, is_ternary: bool, library: Any) -> Callable:
    """A function that gives the bytes of one tensor [d_out, d_in]."""

    def get() -> np.ndarray:
        if is_ternary:
            # Codes do not depend on the order of rows; scales of groups go with their rows.
            t, gamma = ternary.quantize_ternary(jnp.asarray(value.T), cfg.quant_group)
            if stored.lower() in TERNARY:
                return gguf_blocks.to_blocks(pack.pack(t, gamma), stored)
            wide = np.asarray(ternary.dequantize(t, gamma)).T
        else:
            wide = np.ascontiguousarray(value, np.float32)
        if not np.isfinite(wide).all():
            raise ExportError(f"a tensor of shape {value.shape} has values that are not finite")
        if stored == "F32":
            return np.ascontiguousarray(wide)
        if stored == "F16":
            if np.abs(wide).max(initial=0) > 65504:
                raise ExportError("a tensor has values that float16 cannot hold; use --gguf=bf16")
            return wide.astype(np.float16)
        if stored == "BF16":
            return np.ascontiguousarray(wide.astype(ml_dtypes.bfloat16)).view(np.uint8)
        return library.quants.quantize(np.ascontiguousarray(wide), library.GGMLQuantizationType[stored])

    return get


def _model_keys(writer: Any, cfg: ModelConfig, kind: str, context: int, library: Any) -> None:
    types = {
        "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
        "tq1_0": "MOSTLY_TQ1_0", "tq2_0": "MOSTLY_TQ2_0",
    }  # fmt: skip
    writer.add_file_type(library.LlamaFileType[types[kind]])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(cfg.dim)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)


def _tokenizer_keys(writer: Any, tokenizer: Tokenizer, rule: str, size: int) -> None:
    special = tokenization.ids(tokenizer)
    tokens, types, merges = tokenization.gguf_tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants merges; without any it gets one that no text has, for pieces start as single characters.
    writer.add_token_merges(merges or [f"{tokens[tokenizer.bos_id]} {tokens[tokenizer.bos_id]}"])
    writer.add_bos_token_id(special.bos)
    writer.add_eos_token_id(special.eos[-1])
    writer.add_eot_token_id(special.eos[0])
    if special.pad is not None:
        writer.add_pad_token_id(special.pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if template := tokenization.chat_template(tokenizer):
        writer.add_chat_template(template)


def _fact(writer: Any, key: str, value: Any) -> None:
    """One metadata entry of our own: text, or a whole number; anything else as JSON text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        value = json.dumps(value)
    writer.add_uint64(key, value) if isinstance(value, int) else writer.add_string(key, value)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata, and tensors as float32 [d_out, d_in], by name, with the package's own reader.

    Raises: ValueError if the file is not whole GGUF.
    """
    library = importlib.import_module("gguf")
    try:
        reader = library.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path.name} is not a GGUF file: {type(error).__name__}: {error}") from None
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        wide = library.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = wide.reshape([int(n) for n in tensor.shape][::-1])
    return keys, tensors
