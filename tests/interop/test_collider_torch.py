"""Filtered gradients against torch, where the rule is two lines: a masked loss, and `.detach()` on the keys
and values of dropped tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import losses
from nanochat_jax import params as params_lib
from nanochat_jax.config import FilterConfig, ModelConfig
from nanochat_jax.model import collider, transformer
from nanochat_jax.params import flatten
from nanochat_jax.types import Batch

torch = pytest.importorskip("torch", reason="extra 'interop'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

B, L, V, D, H, K, N = 2, 10, 128, 16, 2, 8, 2
CFG = ModelConfig(
    vocab_size=V, dim=D, layers=N, heads=H, kv_heads=H, head_dim=K, mlp_dim=32,
    filter=FilterConfig(0.6, "random"),
)  # fmt: skip


def norm(x, gain):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + CFG.norm_eps) * gain


def rotate(x):
    angle = torch.arange(L)[:, None] * CFG.rope_theta ** (-torch.arange(K // 2) / (K // 2))[None]
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    a, b = x[..., : K // 2], x[..., K // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def theirs(p, tokens, targets, mask):
    x = p["embed"][tokens]
    seen = torch.tril(torch.ones(L, L, dtype=torch.bool))
    for n in range(N):
        h = norm(x, p["blocks/attn/norm"][n])
        q, k, v = ((h @ p[f"blocks/attn/{name}"][n]).view(B, L, H, K) for name in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (torch.where(mask[..., None, None], a, a.detach()) for a in (k, v))
        scores = torch.einsum("blhk,bthk->bhlt", q, k) / K**0.5
        share = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + torch.einsum("bhlt,bthk->blhk", share, v).reshape(B, L, -1) @ p["blocks/attn/o"][n]
        h = norm(x, p["blocks/mlp/norm"][n])
        gate = torch.nn.functional.silu(h @ p["blocks/mlp/gate"][n])
        x = x + (gate * (h @ p["blocks/mlp/up"][n])) @ p["blocks/mlp/down"][n]
    logits = norm(x, p["norm"]) @ p["head"]
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none")
    return (nll.view(B, L) * mask).sum() / mask.sum()


def test_the_gradient_equals_torch():
    rng = np.random.default_rng(0)
    specs = transformer.param_specs(CFG)
    start = params_lib.init_params(specs, jax.random.key(0))
    params = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), start)
    tokens = rng.integers(0, V, (B, L + 1)).astype(np.int32)
    ones = jnp.ones((B, L), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    batch = Batch(tokens[:, :-1], jnp.asarray(tokens[:, 1:]), ones / (B * L), ones, index)
    batch = batch.replace(tokens=jnp.asarray(batch.tokens))
    key = jax.random.key(7)
    run = jax.jit(jax.value_and_grad(losses.make_loss(CFG, (("next_token", 1.0),), 16), has_aux=True))
    (loss, _), grads = run(params, batch, key)
    score = collider.scores(CFG.filter, jnp.zeros((B, L)), None, batch.weights, key)
    mask = np.zeros((B, L), bool)
    np.put_along_axis(mask, np.asarray(collider.select(score, 6)), True, 1)
    p = {n: torch.tensor(np.asarray(a, np.float64), requires_grad=True) for n, a in flatten(params).items()}
    long = torch.tensor(tokens.astype(np.int64))
    want = theirs(p, long[:, :-1], long[:, 1:], torch.tensor(mask))
    want.backward()
    np.testing.assert_allclose(loss, float(want), rtol=1e-5)
    for name, got in flatten(grads).items():
        oracle = p[name].grad.numpy()
        assert np.linalg.norm(got - oracle) <= 1e-5 * np.linalg.norm(oracle), name
