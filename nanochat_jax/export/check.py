"""Load what was written, with the programs it was written for, and compare with our forward pass."""

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import params as params_lib
from nanochat_jax.config import ModelConfig
from nanochat_jax.export import gguf, importer, names, safetensors, variants
from nanochat_jax.export.hf import DTYPES
from nanochat_jax.export.variants import OWN, ExportError
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.types import Batch, Params

TOLERANCE = 1e-4  # of logits in float32, times their size where that is above 1
# Of the logits' size, where 8-bit activations are involved: sums in another order round some activation to
# the next of 255 levels, in about every fifth row of a small model and in every row of a deep one. Half of the
# rows must keep TOLERANCE, or twice what our own logits move by when the embeddings move by SUMS.
LEVELS = 0.05
SUMS = 1e-6  # relative: float32 sums of some hundred products in another order
LOG_PROBABILITIES = 1e-3  # measured: 6e-5, with keys and values in float32
GGML_F32 = 0  # llama.cpp's default for keys and values is float16, which alone moves logits by percents
GREEDY = 64  # tokens compared
TEXTS = (
    "def f(x):\n    return x + 1\n", 'fn main() { println!("{}", 42); }', "Zeichen \u00e4\u00df \u4f60\u597d \U0001f600",
    "I'll  x\r\n\r\n\t y 1 12 123 1234567",
)  # fmt: skip


class CheckError(ExportError):
    """What was written is not what was meant."""

    exit_code = 4


def logits(cfg: ModelConfig, params: Params, tokens_BL: np.ndarray) -> np.ndarray:
    """Our float32 logits [B, L, vocab_size] of whole rows."""
    return np.asarray(_runner(cfg, tokens_BL.shape)(params, jnp.asarray(tokens_BL, jnp.int32)))


def _runner(cfg: ModelConfig, shape_BL: tuple[int, ...]) -> Callable:
    """A compiled function (params, tokens) -> logits in float32 arithmetic."""
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none")
    index = jnp.broadcast_to(jnp.arange(shape_BL[1], dtype=jnp.int32), shape_BL)
    ones = jnp.ones(shape_BL, jnp.int32)

    @jax.jit
    def run(params, tokens):
        batch = Batch(tokens, ones, ones * 1.0, ones, index)
        with jax.default_matmul_precision("highest"):
            hidden = transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden
            return transformer.logits(cfg, params, hidden)[..., : cfg.vocab_size]

    return run


def rows(cfg: ModelConfig, length: int) -> np.ndarray:
    """Two rows of arbitrary tokens, the same for every call."""
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (2, length))


def tensors(source: Path, cfg: ModelConfig, params: Params, form: str, dtype: str) -> str:
    """Compare a folder's tensors, read back by `importer`, with the model. No package is needed.

    Full and latent weights must come back bit for bit (rounded to dtype); packed and dequantized ones with
    the same codes and scales. Raises: CheckError naming the weight.
    """
    found_cfg, found = importer.stream(source)
    architecture = variants.architecture(cfg)
    want_cfg, want = (cfg, params) if architecture == OWN else variants.plain(cfg, params, architecture)
    kind, V = safetensors.DTYPES[DTYPES[dtype]], cfg.vocab_size
    coded = form in ("packed", "dequantized")
    chosen = variants.ternary_paths(want_cfg, want) if want_cfg.quant != "full" else set()
    flat = params_lib.flatten(want)
    left = {path for path in flat if not path.startswith("loop/gate")}
    for path, back in found:  # one by one: host memory may hold one model and not two
        if path not in left:
            raise CheckError(f"{source.name} read back has {path}, which the model does not have")
        left.remove(path)
        value = np.asarray(flat[path], np.float32)
        axis = names.vocabulary_axis(path)
        if axis is not None:
            value, back = (names.known(a, axis, V) for a in (value, back))
        if path in chosen and coded:
            value = variants.rounded_stack(want_cfg, value)
        if path in chosen and coded and found_cfg.quant != "full":
            back = variants.rounded_stack(found_cfg, back)
        else:
            value = value.astype(kind, copy=False).astype(np.float32, copy=False)
        if not np.array_equal(value, back):
            raise CheckError(
                f"{path} read back from {source.name} differs by {np.abs(value - back).max():.3g}"
            )
    if left:
        raise CheckError(f"{source.name} read back lacks {sorted(left)[:3]}")
    return f"{len(flat)} weights read back unchanged"


def reference(cfg: ModelConfig, params: Params, form: str, tokens: np.ndarray) -> np.ndarray:
    """Logits that a loader of the folder must give: ours, without 8-bit activations where it has none."""
    if form == "dequantized" and variants.architecture(cfg) != OWN:
        params = variants.rounded(cfg, params)
        cfg = dataclasses.replace(cfg, quant="full", quant_group=0)
    return logits(cfg, params, tokens)


def transformers(
    source: Path, cfg: ModelConfig, params: Params, form: str, dtype: str, length: int = 48
) -> str:
    """Load a folder with transformers, offline, and compare logits of two rows in float32.

    Returns: what was measured, or why nothing could be. Raises: CheckError.
    """
    missing = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
    if form in ("packed", "latent") and not importlib.util.find_spec("accelerate"):
        missing.append("accelerate")
    if missing:
        return f"not loaded with transformers: {', '.join(missing)} not installed (extra 'export-check')"
    own, tokens = variants.architecture(cfg) == OWN, rows(cfg, length)
    name, theirs = _their_logits(source, own, tokens)
    shown = params
    if dtype != "float32":
        shown = _rounded_to(cfg, params, dtype)
    ours = reference(cfg, shown, form, tokens)
    size = max(1.0, float(np.abs(ours).max()))
    off = np.abs(ours - theirs).max(-1) / size
    worst, most, common = float(off.max()), TOLERANCE, TOLERANCE
    said = f"transformers ({name}): logits of size {size:.2g} differ by at most {worst * size:.2g}"
    if form == "latent":  # transformers does not round the scale to 11 bits as training does
        most = common = LEVELS
    elif form == "packed" or (own and form == "dequantized"):
        moved = sensitivity(cfg, shown, form, tokens, ours) / size
        most, common = LEVELS, max(TOLERANCE, 2 * moved)
    half = float(np.median(off))
    if most != common:
        said += f", half of the rows by at most {half * size:.2g}"
    if worst > most or half > common:
        raise CheckError(f"{said}; allowed is {most:g} of their size, for half of them {common:.2g}")
    return said


def sensitivity(
    cfg: ModelConfig, params: Params, form: str, tokens_BL: np.ndarray, logits_BLV: np.ndarray
) -> float:
    """How far half of the rows of our own logits move, at most, when the embeddings move by SUMS of themselves."""
    embed = np.random.default_rng(0).standard_normal(params["embed"].shape, np.float32)
    embed *= SUMS  # in place: of a large model's table there should be few copies
    embed += 1
    embed *= np.asarray(params["embed"], np.float32)
    moved = reference(cfg, {**params, "embed": embed}, form, tokens_BL)
    return float(np.median(np.abs(moved - logits_BLV).max(-1)))


def _their_logits(source: Path, own: bool, tokens_BL: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the class and float32 logits [B, L, V] of transformers' model, which is gone afterwards.

    Args: own: the folder brings its modelling file.
    """
    torch, library = importlib.import_module("torch"), importlib.import_module("transformers")
    with _modules_aside(library):
        model, report = library.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=own,
            output_loading_info=True,
            local_files_only=True,
        )
    if wrong := {key: sorted(value)[:3] for key, value in report.items() if value}:
        raise CheckError(f"transformers loads {source.name} with {wrong}")
    # The "bitnet" helpers of transformers are compiled by torch at first use, for minutes; here they need not.
    dynamo = importlib.import_module("torch._dynamo.config")
    before, dynamo.disable = dynamo.disable, True
    try:
        with torch.no_grad():
            return type(model).__name__, model.eval()(torch.tensor(tokens_BL)).logits.numpy()
    finally:
        dynamo.disable = before


@contextlib.contextmanager
def _modules_aside(library: Any) -> Iterator[None]:
    """Let transformers copy modelling files into a temporary folder and not into the user's cache."""
    place = importlib.import_module(f"{library.__name__}.dynamic_module_utils")
    before, path = place.HF_MODULES_CACHE, list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        place.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            place.HF_MODULES_CACHE, sys.path[:] = before, path
            for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
                del sys.modules[name]


def _rounded_to(cfg: ModelConfig, params: Params, dtype: str) -> Params:
    """Parameters as a folder of that dtype holds them; ternary matrices keep their exact product."""
    chosen = variants.ternary_paths(cfg, params) if cfg.quant.startswith("ternary") else set()
    kind = safetensors.DTYPES[DTYPES[dtype]]

    def fix(path: tuple, w: Any) -> Any:
        if "/".join(str(p.key) for p in path) in chosen:
            return w
        return np.asarray(w).astype(kind).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fix, params)


def gguf_file(path: Path, cfg: ModelConfig, params: Params, kind: str) -> str:
    """Read a GGUF file with the package's reader and compare every tensor with what it must hold.

    Exact for F32, F16, BF16 and the ternary types; Q8_0 to half a step of its scale. Raises: CheckError.
    """
    _, found = gguf.read(path)
    architecture = variants.architecture(cfg)
    shown, plain = variants.plain(cfg, params, architecture)
    if cfg.quant.startswith("ternary"):
        plain = variants.rounded(shown, plain)
    entries = names.entries(shown, architecture, gguf=True)
    if missing := {e.name for e in entries} ^ found.keys():
        raise CheckError(f"{path.name} lacks, or has beyond what it needs: {sorted(missing)[:5]}")
    kinds = {"f16": "float16", "bf16": "bfloat16", "tq1_0": "float16", "tq2_0": "float16"}
    for entry in entries:
        value = names.take(shown, architecture, plain, entry, gguf=True)
        back = found[entry.name]
        if kind == "q8_0" and value.ndim == 2:
            blocks = value.reshape(-1, 32)
            step = np.abs(blocks).max(-1, keepdims=True) / 127
            good = np.all(np.abs(back.reshape(-1, 32) - blocks) <= step * (0.5 + 2**-10 * 127) + 1e-12)
        else:
            stored = (
                value
                if value.ndim == 1 or kind == "f32"
                else value.astype(safetensors.DTYPES[DTYPES[kinds[kind]]])
            )
            good = np.array_equal(stored.astype(np.float32), back)
        if not good:
            raise CheckError(f"{path.name}: {entry.name} does not hold the model's weights")
    return f"gguf: {len(entries)} tensors of {path.name} hold the model's weights"


def llama_cpp(path: Path, cfg: ModelConfig, params: Params, kind: str, tokenizer: Tokenizer) -> str:
    """Load a GGUF file with llama.cpp (llama-cpp-python) and compare.

    Texts must get our token ids. F32: top-5 log-probabilities to 1e-3, against our model without 8-bit
    activations. Ternary: 64 greedy tokens of the model as trained; where they part is said and not refused,
    because llama.cpp rounds activations by blocks of 256.
    Returns: what was measured, or why nothing could be. Raises: CheckError.
    """
    if not importlib.util.find_spec("llama_cpp"):
        return "not loaded with llama.cpp: llama_cpp not installed (extra 'export-check')"
    library, room = importlib.import_module("llama_cpp"), {"n_ctx": 256, "logits_all": True, "verbose": False}
    try:
        model = library.Llama(str(path), type_k=GGML_F32, type_v=GGML_F32, **room)
    except ValueError as error:
        raise CheckError(f"llama.cpp does not load {path.name}: {error}") from None
    for text in TEXTS:
        theirs = model.tokenize(text.encode(), add_bos=False, special=False)
        if list(theirs) != tokenizer.encode(text):
            raise CheckError(f"llama.cpp cuts {text!r} into other tokens: {theirs[:8]} ..")
    tokens = rows(cfg, 32)[:1]
    full, shown = cfg, params
    if cfg.quant.startswith("ternary"):
        shown, full = variants.rounded(cfg, params), dataclasses.replace(cfg, quant="full", quant_group=0)
    ours_LV = _log_softmax(logits(full, shown, tokens)[0])
    theirs_LV = _log_softmax(_scores(model, tokens[0].tolist()))
    top = np.argsort(-ours_LV, -1)[:, :5]
    off = float(np.abs(np.take_along_axis(ours_LV - theirs_LV, top, -1)).max())
    if kind == "f32" and off > LOG_PROBABILITIES:
        raise CheckError(f"llama.cpp: log-probabilities of {path.name} differ by {off:.2g}")
    said = f"llama.cpp: {path.name}: top-5 log-probabilities differ by at most {off:.2g}"
    if kind not in gguf.TERNARY:
        return said
    ours, found = greedy(cfg, params, [tokenizer.bos_id], GREEDY), [tokenizer.bos_id]
    while len(found) <= GREEDY:
        found.append(int(_scores(model, found)[-1].argmax()))
    same = next((i for i, (a, b) in enumerate(zip(ours, found[1:], strict=True)) if a != b), GREEDY)
    return f"{said}, {same} of {GREEDY} greedy tokens are equal before the first other one"


def greedy(cfg: ModelConfig, params: Params, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind a prompt, from whole rows without a cache."""
    row = np.zeros((1, len(prompt) + count), np.int64)
    row[0, : len(prompt)] = prompt
    run = _runner(cfg, row.shape)
    for i in range(len(prompt), row.shape[1]):
        row[0, i] = int(np.asarray(run(params, jnp.asarray(row, jnp.int32)))[0, i - 1].argmax())
    return row[0, len(prompt) :].tolist()


def _scores(model: Any, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits [L, V] of one row."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)], np.float64)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
