"""Residual streams against the hyper-connections of DeepSeek-V4 in transformers.

Their matrix is applied transposed and its logits are ours transposed; they add 1e-6 to `pre` and to
every denominator, or another `hc_eps`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import MhcConfig
from nanochat_jax.model import mhc

torch = pytest.importorskip("torch", reason="extra 'interop'")
deepseek = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers with DeepSeek-V4"
)
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

B, L, S, D = 2, 7, 4, 16
CFG = MhcConfig(S)


def make(seed, eps):
    """One connection in both systems, with visible token-dependent parts."""
    config = deepseek.DeepseekV4Config(
        hidden_size=D, hc_mult=S, hc_sinkhorn_iters=CFG.iterations, hc_eps=eps, rms_norm_eps=1e-6
    )
    theirs = deepseek.DeepseekV4HyperConnection(config)
    rng = np.random.default_rng(seed)
    fn, base = rng.normal(size=(24, S * D)) / np.sqrt(S * D), rng.normal(size=24)
    scale = np.array([0.8, -1.1, 1.3])
    with torch.no_grad():
        for name, value in (("fn", fn), ("base", base), ("scale", scale)):
            getattr(theirs, name).copy_(torch.tensor(value))
    flip = np.arange(24)  # their entry (j, k) of the mixing logits is our (k, j)
    flip[2 * S :] = 2 * S + np.arange(S * S).reshape(S, S).T.reshape(-1)
    ours = {"phi": fn.T[:, flip], "bias": base[flip], "alpha": scale}
    return theirs, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ours), flip


def streams(seed):
    return np.random.default_rng(seed).normal(size=(B, L, S, D)).astype(np.float32)


def test_coefficients_equal_those_of_deepseek():
    theirs, p, _ = make(0, 1e-6)
    x = streams(1)
    with torch.no_grad():
        post, comb, collapsed = (a.numpy() for a in theirs(torch.tensor(x)))
    mix = mhc.coefficients(CFG, p, jnp.asarray(x))
    np.testing.assert_allclose(mix.post, post, atol=1e-5)
    np.testing.assert_allclose(mix.res, comb.swapaxes(-1, -2), atol=5e-5)
    np.testing.assert_allclose(mhc.read(mix, x), collapsed, atol=2e-5)
    assert np.abs(comb - comb.swapaxes(-1, -2)).max() > 0.1  # the transposition matters


class Sublayer(torch.nn.Module):
    """Stands for attention or MLP."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, h, **ignored):
        return (torch.sin(3 * h), None) if self.pair else torch.cos(2 * h)


def test_a_layer_and_its_gradients_equal_those_of_deepseek():
    """Their own decoder layer, with sine and cosine for attention and MLP."""
    parts = [make(seed, 1e-12) for seed in (2, 3)]
    layer = deepseek.DeepseekV4DecoderLayer.__new__(deepseek.DeepseekV4DecoderLayer)
    torch.nn.Module.__init__(layer)
    layer.attn_hc, layer.ffn_hc = parts[0][0], parts[1][0]
    layer.self_attn, layer.mlp = Sublayer(True), Sublayer(False)
    layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
    x, weight = streams(4), streams(5)
    x_torch = torch.tensor(x, requires_grad=True)
    out = deepseek.DeepseekV4DecoderLayer.forward(layer, x_torch, input_ids=None)
    (out * torch.tensor(weight)).sum().backward()

    def ours(params, x):
        for p, f in zip(params, (lambda h: jnp.sin(3 * h), lambda h: jnp.cos(2 * h)), strict=True):
            mix = mhc.coefficients(CFG, p, x)
            x = mhc.write(mix, x, f(mhc.read(mix, x)))
        return x

    params = [part[1] for part in parts]
    np.testing.assert_allclose(ours(params, jnp.asarray(x)), out.detach().numpy(), atol=2e-5)
    slopes, dx = jax.grad(lambda p, x: jnp.sum(weight * ours(p, x)), (0, 1))(params, jnp.asarray(x))
    np.testing.assert_allclose(dx, x_torch.grad.numpy(), atol=5e-4)  # values up to 50
    for (theirs, _, flip), slope in zip(parts, slopes, strict=True):
        for got, want in (
            (slope["phi"], theirs.fn.grad.numpy().T[:, flip]), (slope["bias"], theirs.base.grad.numpy()[flip]),
            (slope["alpha"], theirs.scale.grad.numpy()),
        ):  # fmt: skip
            np.testing.assert_allclose(got, want, atol=5e-5 * np.abs(want).max())
