"""What is written comes back bit for bit; what is damaged or foreign is refused with its reason."""

import json
import struct
import tracemalloc

import hypothesis
import numpy as np
import pytest
from export_models import CASES, OWN, REWRITTEN, build, config, weights
from hypothesis import strategies as st

from nanochat_jax import params as params_lib
from nanochat_jax.config import InferConfig, LoopConfig
from nanochat_jax.export import check, hf, importer, names, safetensors, variants
from nanochat_jax.export.tokenization import Ids
from nanochat_jax.export.variants import ExportError

SPECIAL = Ids(0, (4, 0), 9)


def write(folder, cfg, params, dtype="float32", wanted=""):
    return hf.write_model(folder, cfg, params, InferConfig(), SPECIAL, 64, dtype, wanted)


@pytest.mark.parametrize("case", [*CASES, *REWRITTEN, *OWN])
def test_round_trip(tmp_path, case):
    settings = OWN[case] if case in OWN else (CASES | REWRITTEN)[case][1]
    cfg, params = build(settings)
    _, form = write(tmp_path, cfg, params)
    said = check.tensors(tmp_path, cfg, params, form, "float32")
    assert "read back unchanged" in said
    back_cfg, back = importer.load(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    write(again, back_cfg, back)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text())["vocab_size"] == 130


@pytest.mark.parametrize("form", hf.FORMS)
@pytest.mark.parametrize("case", ["llama_tied", "qwen3", "nanochat"])
def test_ternary_round_trip(tmp_path, case, form):
    cfg, params = build({**CASES[case][1], "quant": "ternary"})
    assert write(tmp_path, cfg, params, wanted=form)[1] == form
    check.tensors(tmp_path, cfg, params, form, "float32")
    kinds = {v.dtype for v in safetensors.read(tmp_path / "model.safetensors").values()}
    assert (np.dtype("u1") in kinds) == (form == "packed")


def test_the_check_notices_one_changed_bit(tmp_path):
    cfg, params = build(CASES["llama"][1])
    write(tmp_path, cfg, params)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(check.CheckError, match="head read back"):
        check.tensors(tmp_path, cfg, params, "full", "float32")


def test_the_check_holds_one_leaf_at_a_time(tmp_path):
    cfg, params = build({**CASES["llama"][1], "layers": 4, "dim": 128, "head_dim": 32, "mlp_dim": 128})
    _, form = write(tmp_path, cfg, params)
    size = sum(value.nbytes for value in params_lib.flatten(params).values())
    check.tensors(tmp_path, cfg, params, form, "float32")  # imports are paid for
    tracemalloc.start()
    try:
        check.tensors(tmp_path, cfg, params, form, "float32")
        assert tracemalloc.get_traced_memory()[1] < 0.8 * size
    finally:
        tracemalloc.stop()


@hypothesis.settings(max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    tied=st.booleans(),
    vocab=st.integers(3, 300),
    norm=st.booleans(),
)
def test_shapes(tmp_path_factory, heads, tied, vocab, norm):
    cfg = config({
        "heads": heads[0], "kv_heads": heads[1], "tied": tied, "vocab_size": vocab, "dim": 20, "mlp_dim": 12,
        "qk_norm": "before_rope" if norm else "none",
    })  # fmt: skip
    folder, params = tmp_path_factory.mktemp("shapes"), weights(cfg)
    write(folder, cfg, params)
    check.tensors(folder, cfg, params, "full", "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types(tmp_path, dtype):
    cfg, params = build(CASES["qwen3"][1])
    write(tmp_path, cfg, params, dtype)
    check.tensors(tmp_path, cfg, params, "full", dtype)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * sum(
        w.size for w in params_lib.flatten(params).values()
    )


def test_a_scale_that_the_type_would_round_is_refused(tmp_path):
    cfg, params = build({**CASES["llama"][1], "quant": "ternary"})
    with pytest.raises(ExportError, match="bfloat16 would round its ternary scale; use --dtype=float32"):
        write(tmp_path, cfg, params, "bfloat16", "dequantized")


@pytest.mark.parametrize(
    ("settings", "wanted", "said"),
    [
        ({"quant": "full"}, "packed", "--ternary=packed has no effect because model.quant is 'full'"),
        ({"quant": "ternary", "quant_group": 16}, "packed", "needs one scale per matrix"),
        ({"quant": "ternary", "mlp_dim": 46}, "packed", "outputs in multiples of 4"),
        ({"quant": "ternary", "softcap": 3.0}, "latent", "holds scale * code only"),
        ({"loop": LoopConfig(2, inject="linear")}, "full", "is not in the exported modelling file"),
    ],
)
def test_forms_that_cannot_be(settings, wanted, said):
    cfg = config(settings)
    with pytest.raises(ExportError, match=said.replace("*", r"\*")):
        hf.form_of(cfg, variants.architecture(cfg), wanted)


def test_packing_is_that_of_transformers():
    """Quarter i of the output rows in bits 2i, 2i + 1, code + 1."""
    codes = np.random.default_rng(0).integers(-1, 2, (8, 5)).astype(np.int8)
    packed = hf.pack_codes(codes)
    assert packed.shape == (2, 5) and packed.dtype == np.uint8
    assert packed[1, 3] == sum((int(codes[1 + 2 * i, 3]) + 1) << 2 * i for i in range(4))
    np.testing.assert_array_equal(hf.unpack_codes(packed), codes)
    with pytest.raises(ValueError, match="code 3"):
        hf.unpack_codes(np.full((1, 4), 255, np.uint8))


def test_shards(tmp_path, monkeypatch):
    cfg, params = build(CASES["llama"][1])
    monkeypatch.setattr(hf, "SHARD", 20_000)
    write(tmp_path, cfg, params)
    assert not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    check.tensors(tmp_path, cfg, params, "full", "float32")
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="names a file outside of its folder"):
        importer.load(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    cfg, params = build(CASES["llama"][1])
    params["norm"] = params["norm"] * np.float32(np.nan)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that are not finite"):
        write(tmp_path, cfg, params)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "gpt2", "model_type 'gpt2' is none of llama"),
        ("attention_bias", True, "attention_bias = True"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "scales rotary positions"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("num_hidden_layers", 3, "no tensor model.layers.2"),
        ("num_hidden_layers", 1, "tensors that llama does not know"),
        ("intermediate_size", 64, "blocks/mlp/down has shape"),
        ("num_key_value_heads", 3, "must be a multiple of"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization 'gptq' is not read"),
        ("vocab_size", None, "lacks vocab_size"),
    ],
)
def test_foreign_settings_are_refused(tmp_path, key, value, said):
    cfg, params = build(CASES["llama"][1])
    write(tmp_path, cfg, params)
    found = json.loads((tmp_path / "config.json").read_text())
    found[key] = value
    if value is None:
        del found[key]
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ExportError, match=said):
        importer.load(tmp_path)


# --- the file format


def a_file(path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.write(
        path, [("a", "F32", (2, 3), lambda: array), ("b", "U8", (3,), lambda: np.zeros(3, np.uint8))]
    )
    return path.read_bytes()


def test_file_layout(tmp_path):
    data = a_file(tmp_path / "x.safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and len(data) == 8 + length + 27
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda d: d[:4], "at least 8 expected"),
        (lambda d: struct.pack("<Q", 2**60) + d[8:], "its header would have"),
        (lambda d: d[:8] + b"x" + d[9:], "header: JSONDecodeError"),
        (lambda d: d[:-1], "tensor b"),
        (lambda d: d.replace(b'"F32"', b'"F99"'), "dtype F99"),
        (lambda d: d.replace(b"[2, 3]", b"[2,-3]"), "tensor a"),
        (lambda d: d.replace(b"[2, 3]", b"[9, 3]"), "tensor a"),
    ],
)
def test_damaged_files(tmp_path, wrong, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(wrong(a_file(path)))
    with pytest.raises(ValueError, match=said):
        safetensors.read(path)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.integers(0, 160), st.integers(1, 255))
def test_any_changed_byte_gives_tensors_or_a_value_error(tmp_path_factory, at, flip):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    data = bytearray(a_file(path))
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        found = safetensors.read(path)
    except ValueError:
        return
    assert sum(v.nbytes for v in found.values()) <= len(data)


def test_repeated_and_wrong_tensors(tmp_path):
    one = ("a", "F32", (1,), lambda: np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="written twice"):
        safetensors.write(tmp_path / "x", [one, one])
    with pytest.raises(ValueError, match="has shape"):
        safetensors.write(tmp_path / "x", [("a", "F32", (2,), one[3])])
    with pytest.raises(ValueError, match="float16 cannot hold"):
        safetensors.write(tmp_path / "x", [("a", "F16", (1,), lambda: np.full(1, 1e9, np.float32))])


def test_reordered_rows_come_back():
    cfg = config({"head_dim": 8})
    w = np.random.default_rng(0).normal(size=(32, 20))
    for architecture, gguf in (("llama", True), ("nanochat", False)):
        there, back = names._reordered(cfg, architecture, "blocks/attn/q", gguf)
        assert not np.array_equal(there(w), w)
        np.testing.assert_array_equal(back(there(w)), w)
    rows = names._reordered(cfg, "llama", "blocks/attn/q", True)[0](np.arange(32)[:, None])
    assert rows[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
