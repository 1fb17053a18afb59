"""GGUF files against the gguf package's own reader and quantizers."""

import numpy as np
import pytest
from export_models import CASES, build

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.export import check, gguf, names, tokenization, variants

library = pytest.importorskip("gguf", reason="extra 'export'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
BYTES = tokenizers.byte_tokenizer()
WIDE = {"vocab_size": 270, "dim": 256, "head_dim": 64, "mlp_dim": 256, "layers": 1}
FACTS = {"general.name": "a name", "nanochat_jax.tokens": 7}


def written(folder, settings, kind):
    cfg, params = build(WIDE | settings)
    path = folder / "x.gguf"
    gguf.write(path, cfg, params, BYTES, kind, 64, FACTS)
    return path, cfg, params


@pytest.mark.parametrize("kind", gguf.TYPES)
def test_every_tensor_holds_the_weights(tmp_path, kind):
    settings = {**CASES["qwen3"][1], "quant": "ternary" if kind in gguf.TERNARY else "full"}
    path, cfg, params = written(tmp_path, settings, kind)
    assert "13 tensors" in check.gguf_file(path, cfg, params, kind)
    types = {t.name: t.tensor_type.name for t in library.GGUFReader(path).tensors}
    assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.0.attn_q.weight"] == kind.upper()
    assert types["token_embd.weight"] == ("F16" if kind in gguf.TERNARY else kind.upper())


@pytest.mark.parametrize(
    "settings", [CASES["llama"][1], CASES["arcee"][1], {**CASES["bitnet"][1], "tied": True}, {"kv_heads": 1}]
)
def test_architectures(tmp_path, settings):
    path, cfg, params = written(tmp_path, settings, "f16")
    check.gguf_file(path, cfg, params, "f16")
    keys, tensors = gguf.read(path)
    name = variants.architecture(cfg)
    assert keys["general.architecture"] == name
    assert (
        keys[f"{name}.attention.head_count_kv"] == cfg.kv_heads and keys[f"{name}.block_count"] == cfg.layers
    )
    assert keys[f"{name}.rope.freq_base"] == pytest.approx(cfg.rope_theta)
    assert keys[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(cfg.norm_eps)
    assert keys["general.name"] == "a name" and keys["nanochat_jax.tokens"] == 7
    assert ("output.weight" in tensors) != cfg.tied


def test_rotary_rows_pair_neighbours_in_llama_only(tmp_path):
    """The order of llama.cpp's own converter: [heads, 2, K / 2, D] with the middle axes exchanged."""
    for case in ("llama", "qwen3"):
        path, cfg, params = written(tmp_path, CASES[case][1], "f32")
        q = params["blocks"]["attn"]["q"][0].T
        want = q.reshape(cfg.heads, 2, cfg.head_dim // 2, cfg.dim).swapaxes(1, 2).reshape(q.shape)
        np.testing.assert_array_equal(
            gguf.read(path)[1]["blk.0.attn_q.weight"], want if case == "llama" else q
        )


def test_the_check_notices_wrong_weights(tmp_path, monkeypatch):
    path, cfg, params = written(tmp_path, CASES["llama"][1], "f32")
    monkeypatch.setattr(names, "_reordered", lambda *a: ((lambda w: w), (lambda w: w)))
    with pytest.raises(check.CheckError, match=r"blk\.0\.attn_q\.weight does not hold"):
        check.gguf_file(path, cfg, params, "f32")


def test_ternary_scale_is_the_model_s(tmp_path):
    """The absmean scale of training, not one measured anew on rounded weights (which is about 0.7 of it)."""
    path, _, params = written(tmp_path, {"quant": "ternary"}, "tq2_0")
    back = gguf.read(path)[1]["blk.0.ffn_up.weight"]
    scale = np.abs(params["blocks"]["mlp"]["up"][0]).mean()
    assert np.unique(np.abs(back)).size == 2 and np.abs(back).max() == pytest.approx(scale, rel=2**-11)


def test_tokens_and_turns(tmp_path):
    keys, _ = gguf.read(written(tmp_path, {}, "f16")[0])
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "smaug-bpe"
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 270 and tokens[BYTES.vocab_size :] == [
        f"[PAD{i}]" for i in range(266, 270)
    ]
    assert types[:10] == [3] * 10 and types[10:266] == [1] * 256 and types[266:] == [5] * 4
    assert (
        keys["tokenizer.ggml.bos_token_id"] == BYTES.bos_id and keys["tokenizer.ggml.add_bos_token"] is True
    )
    assert keys["tokenizer.ggml.eot_token_id"] == BYTES.special_id("<|assistant_end|>")
    assert keys["tokenizer.chat_template"] == tokenization.chat_template(BYTES)


@pytest.mark.parametrize("cut", [3, 40, -1000])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    path, _, _ = written(tmp_path, {}, "f16")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file"):
        gguf.read(path)


@pytest.mark.parametrize("kind", gguf.TYPES)
@pytest.mark.parametrize("case", ["llama", "qwen3", "arcee", "bitnet"])
def test_llama_cpp(tmp_path, case, kind):
    """llama.cpp loads every architecture in every type, cuts text alike, and computes what we do.

    In F32 to 1e-3, which `check` asserts; codes and scales of ternary matrices are exact and the table is
    F16, so that only the rounding of activations is left; the others round weights.
    """
    pytest.importorskip("llama_cpp", reason="extra 'export-check'")
    quant = "ternary" if kind in gguf.TERNARY else "full"
    settings = {**CASES[case][1], "quant": quant} | ({"tied": True} if case == "bitnet" else {})
    path, cfg, params = written(tmp_path, settings, kind)
    said = check.llama_cpp(path, cfg, params, kind, BYTES)
    off = float(said.split("at most ")[1].split(",")[0])
    assert off < {"f32": 1e-3, "f16": 0.05, "bf16": 0.3, "q8_0": 1.0, "tq1_0": 2.0, "tq2_0": 2.0}[kind], said


def test_a_file_that_llama_cpp_does_not_load(tmp_path):
    pytest.importorskip("llama_cpp", reason="extra 'export-check'")
    path, cfg, params = written(tmp_path, CASES["llama"][1], "f32")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(check.CheckError, match=r"llama\.cpp does not load x\.gguf"):
        check.llama_cpp(path, cfg, params, "f32", BYTES)
