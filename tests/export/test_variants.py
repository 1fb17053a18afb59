"""Which public architecture a model has, and that its plain form computes the same."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from export_models import CASES, OWN, REWRITTEN, build, config
from hypothesis import strategies as st

from nanochat_jax.config import LoopConfig, MhcConfig, ModelConfig
from nanochat_jax.export import check, gguf, variants
from nanochat_jax.quant import ternary


@pytest.mark.parametrize("case", [*CASES, *REWRITTEN])
def test_architecture(case):
    wanted, settings = (CASES | REWRITTEN)[case]
    assert variants.architecture(config(settings)) == wanted


@pytest.mark.parametrize("case", OWN)
def test_what_no_architecture_holds_has_its_own_file(case):
    assert variants.architecture(config(OWN[case])) == variants.OWN


@pytest.mark.parametrize("case", REWRITTEN)
def test_plain_form_has_the_same_logits(case):
    architecture, settings = REWRITTEN[case]
    cfg, params = build(settings)
    shown, plain = variants.plain(cfg, params, architecture)
    assert shown.loop == LoopConfig() and shown.norm == "weighted" and not shown.embed_norm
    tokens = check.rows(cfg, 12)
    np.testing.assert_allclose(
        check.logits(shown, _padded(shown, plain), tokens), check.logits(cfg, params, tokens), atol=1e-5
    )


def _padded(cfg, params):
    """Tables with the rows that `plain` takes off."""
    wide = 256 - cfg.vocab_size
    out = {**params, "embed": np.pad(params["embed"], ((0, wide), (0, 0)))}
    return out if cfg.tied else {**out, "head": np.pad(params["head"], ((0, 0), (0, wide)))}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"softcap": 15.0}, "model.softcap = 15.0 (needs 0.0)"),
        ({"window": (4, 0)}, "model.window = (4, 0) (needs full attention"),
        ({"mhc": MhcConfig(streams=2)}, "model.mhc.streams = 2 (needs 1)"),
        ({"value_embed_every": 1}, "model.value_embed_every = 1 (needs 0)"),
        ({"loop": LoopConfig(count=2, norm=True)}, "model.loop.norm = True (needs False)"),
        ({"loop": LoopConfig(count=2, inject="add")}, "model.loop.inject = 'add' (needs 'none')"),
    ],
)
def test_obstacles_are_named(settings, said):
    cfg = config(settings)
    assert any(said in item for item in variants.obstacles(cfg, "llama"))
    name, found = variants.nearest(cfg)
    assert name == "llama" and len(found) == 1
    assert any(said in item for item in gguf.obstacles(cfg, "f16"))


@pytest.mark.parametrize("quant", ["nvfp4", "ternary_nvfp4", "nvfp4_grad", "fp8"])
def test_formats_without_a_form_are_refused(quant):
    cfg = ModelConfig(quant=quant)
    refused = quant in ("nvfp4", "fp8")
    assert bool(variants.unsupported(cfg)) == refused
    if refused:
        with pytest.raises(variants.ExportError, match=f"model.quant = '{quant}' computes in a format"):
            variants.architecture(cfg)


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({}, "tq2_0", "model.quant = 'full' (needs ternary, or --gguf=q8_0)"),
        ({"quant": "ternary"}, "tq2_0", "model.dim = 32 (needs a multiple of 256)"),
        ({"quant": "ternary", "quant_group": 16}, "tq1_0", "has one scale per 256 inputs"),
        ({"mlp_dim": 40}, "q8_0", "model.mlp_dim = 40 (needs a multiple of 32)"),
        ({"sub_norm": True}, "f16", "llama.cpp's bitnet has SiLU and a tied head"),
        (CASES["nanochat"][1], "f16", "the nearest is arcee, but model.qk_norm"),
    ],
)
def test_gguf_obstacles_are_named(settings, kind, said):
    assert any(said in item for item in gguf.obstacles(config(settings), kind))


@pytest.mark.parametrize("case", ["llama", "qwen3", "arcee"])
def test_gguf_holds_the_usual_ones(case):
    assert [gguf.obstacles(config(CASES[case][1]), kind) for kind in ("f32", "f16", "bf16")] == [[]] * 3
    wide = config({**CASES[case][1], "quant": "ternary", "dim": 256, "head_dim": 64, "mlp_dim": 256})
    assert gguf.obstacles(wide, "tq2_0") == []


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.sampled_from([(4, 3), (8, 8), (1, 5)]), st.sampled_from([1e-4, 1.0, 300.0])
)
def test_latent_weights_have_the_same_codes_and_scale(seed, shape, size):
    w = jnp.asarray(np.random.default_rng(seed).normal(0, size, shape), jnp.float32)
    t, gamma = ternary.quantize_ternary(w)
    again = variants.latent(np.asarray(ternary.dequantize(t, gamma)))
    t2, gamma2 = ternary.quantize_ternary(jnp.asarray(again))
    np.testing.assert_array_equal(t2, t)
    np.testing.assert_array_equal(gamma2, gamma)


def test_rounded_leaves_the_rest_alone():
    cfg, params = build({"quant": "ternary"})
    out = variants.rounded(cfg, params)
    np.testing.assert_array_equal(out["embed"], params["embed"])
    for i in range(cfg.layers):
        t, gamma = ternary.quantize_ternary(jnp.asarray(params["blocks"]["mlp"]["up"][i]))
        np.testing.assert_array_equal(out["blocks"]["mlp"]["up"][i], ternary.dequantize(t, gamma))
    same = dataclasses.replace(cfg, quant="full")
    np.testing.assert_array_equal(
        variants.rounded(same, params)["blocks"]["mlp"]["up"], params["blocks"]["mlp"]["up"]
    )
