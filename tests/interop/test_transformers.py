"""Whole-model logits and the ternary layer against transformers, after mapping the weights.

Every matrix of ours is [d_in, d_out]; PyTorch's Linear stores [d_out, d_in].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import ModelConfig
from nanochat_jax.export import names, variants
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.quant import ternary
from nanochat_jax.quant.matmul import matmul
from nanochat_jax.types import Batch

torch = pytest.importorskip("torch", reason="extra 'interop'")
transformers = pytest.importorskip("transformers", reason="extra 'interop'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

PLAIN = ModelConfig(
    vocab_size=128, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=96, mlp="swiglu",
    rope_theta=10000.0, norm_eps=1e-6, dtype="float32",
)  # fmt: skip


def make(cfg):
    """Random weights with visible gains and head."""
    specs = transformer.param_specs(cfg)
    return jax.tree.map(
        lambda p, n: p + n,
        params_lib.init_params(specs, jax.random.key(0)),
        params_lib.init_params(
            jax.tree.map(lambda s: dataclasses.replace(s, init=params_lib.normal(0.05)), specs),
            jax.random.key(1),
        ),
    )


def to_torch(cfg, params, architecture):
    """Our tree as a transformers state dict, by the table that exports use."""
    shown, plain = variants.plain(cfg, params, architecture)
    found = {e.name: names.take(shown, architecture, plain, e) for e in names.entries(shown, architecture)}
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return {name: torch.tensor(np.array(value)) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(kind, tied):
    cfg = dataclasses.replace(PLAIN, tied=tied, qk_norm="before_rope" if kind == "qwen3" else "none")
    options = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_theta": 10000.0, "max_position_embeddings": 256, "attn_implementation": "eager",
    }  # fmt: skip
    model_class, config_class = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    }[kind]
    theirs = model_class(config_class(**options)).eval()
    params = make(cfg)
    theirs.load_state_dict(to_torch(cfg, params, kind))
    tokens = np.random.default_rng(0).integers(0, 128, (2, 40))
    index = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    ones = jnp.ones((2, 40), jnp.int32)
    batch = Batch(jnp.asarray(tokens, jnp.int32), ones, ones * 1.0, ones, index)
    hidden = transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden
    ours = transformer.logits(cfg, params, hidden)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.asarray(ours) - want).max() <= 1e-4


def test_ternary_layer_equals_bitnet():
    """transformers' online-quantized BitNet linear: the same codes, output and gradients."""
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(64, 48, bias=False, online_quant=True)
    w = jax.random.normal(jax.random.key(0), (64, 48)) * 0.2
    x = jax.random.normal(jax.random.key(1), (5, 64))
    dy = jax.random.normal(jax.random.key(2), (5, 48))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.array(w).T))
    theirs_x = torch.tensor(np.array(x), requires_grad=True)
    theirs = layer(theirs_x)
    theirs.backward(torch.tensor(np.array(dy)))
    ours, pullback = jax.vjp(lambda x, w: matmul(x, (w,), "ternary", "int8", 0)[0], x, w)
    dx, dw = pullback(dy)
    gamma = np.abs(np.array(w, np.float64)).mean()
    ratio = float(ternary.scale(w).reshape(())) / gamma  # ours is rounded to 11 significant bits
    assert abs(ratio - 1) < 2**-11
    np.testing.assert_allclose(np.asarray(ours) / ratio, theirs.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(np.asarray(dx) / ratio, theirs_x.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(dw, layer.weight.grad.numpy().T, atol=2e-5)
