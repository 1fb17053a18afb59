"""Multi-token prediction against torch, written as the papers state it: every document alone, module k on the
positions that have a token k + 1 later, so without masks, segments or weights. Logits and all gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import losses
from nanochat_jax import params as params_lib
from nanochat_jax.config import ModelConfig, MtpConfig
from nanochat_jax.model import mtp, transformer
from nanochat_jax.params import flatten
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

torch = pytest.importorskip("torch", reason="extra 'interop'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

L, V, D, H, K, M, DECAY, SHARE = 14, 128, 16, 2, 8, 2, 0.5, 0.2
CFG = ModelConfig(vocab_size=V, dim=D, layers=2, heads=H, kv_heads=H, head_dim=K, mlp_dim=24, dtype="float32")
CUTS = (5, 9)  # where each row's second document begins


def norm(x, gain):
    return torch.nn.functional.rms_norm(x, (D,), gain, CFG.norm_eps)


def rotate(x):
    angle = torch.arange(len(x))[:, None] * CFG.rope_theta ** (-torch.arange(K // 2) / (K // 2))[None]
    turn = torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.complex128)
    turned = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def block(p, at, n, x):
    """A transformer block on one document [T, D]."""
    h = norm(x, p[f"{at}/attn/norm"][n])
    q, k, v = ((h @ p[f"{at}/attn/{name}"][n]).view(-1, H, K) for name in "qkv")
    q, k, v = (a.transpose(0, 1)[None] for a in (rotate(q), rotate(k), v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    x = x + y.reshape(-1, D) @ p[f"{at}/attn/o"][n]
    h = norm(x, p[f"{at}/mlp/norm"][n])
    gate = torch.nn.functional.silu(h @ p[f"{at}/mlp/gate"][n])
    return x + (gate * (h @ p[f"{at}/mlp/up"][n])) @ p[f"{at}/mlp/down"][n]


def of_document(p, kind, tokens):
    """Logits of the next token, [T - 1, V], and of offset k, [T - 1 - k, V], for one document of T tokens."""
    x = p["embed"][tokens[:-1]]
    for n in range(CFG.layers):
        x = block(p, "blocks", n, x)
    h = trunk = norm(x, p["norm"])
    made = [trunk @ p["head"]]
    for k in range(1, M + 1):
        left = len(tokens) - 1 - k
        if kind == "chained":  # arXiv:2412.19437, equations 21 to 23
            known = p["embed"][tokens[k : k + left]]
            pair = torch.cat(
                [norm(h[:left], p["mtp/hidden_norm"][k - 1]), norm(known, p["mtp/embed_norm"][k - 1])], -1
            )
            h = block(p, "mtp", k - 1, pair @ p["mtp/join"][k - 1])
            out = h
        else:  # arXiv:2404.19737: heads beside one another on the trunk
            out = block(p, "mtp", k - 1, trunk)[:left]
        made.append(norm(out, p["mtp/norm"][k - 1]) @ p["head"])
    return made


@pytest.mark.parametrize("kind", ["chained", "parallel"])
def test_logits_and_gradients_equal_torch(kind):
    cfg = dataclasses.replace(CFG, mtp=MtpConfig(M, kind, DECAY))
    rng = np.random.default_rng(0)
    start = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    params = jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), start)
    tokens = rng.integers(0, V, (2, L + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(L, dtype=np.int32), (2, L))
    cut = np.asarray(CUTS)[:, None]
    weights = np.where(index == cut - 1, 0.0, 1.0).astype(np.float32)
    batch = Batch(*(jnp.asarray(a) for a in (
        tokens[:, :-1], tokens[:, 1:], weights / weights.sum(), 1 + (index >= cut).astype(np.int32),
        np.where(index >= cut, index - cut, index).astype(np.int32),
    )))  # fmt: skip

    p = {n: torch.tensor(np.asarray(a, np.float64), requires_grad=True) for n, a in flatten(params).items()}
    documents = [(b, at, end) for b, c in enumerate(CUTS) for at, end in ((0, c), (c, L + 1))]
    long = torch.tensor(tokens.astype(np.int64))
    made = [of_document(p, kind, long[b, at:end]) for b, at, end in documents]
    means = []
    for k in range(M + 1):
        logits = torch.cat([of[k] for of in made])
        wanted = torch.cat([long[b, at + k + 1 : end] for b, at, end in documents])
        means.append(torch.nn.functional.cross_entropy(logits, wanted))
    total = means[0] + SHARE * sum(DECAY ** (k - 1) * means[k] for k in range(1, M + 1))
    total.backward()

    @jax.jit
    def all_logits(params):
        project = projections.from_config(cfg)
        output = transformer.forward(cfg, project, params, batch)
        further = mtp.future_hidden(
            cfg, project, transformer.last_layer(cfg, project, batch), params["mtp"], params["embed"],
            output.hidden, batch.targets,
        )  # fmt: skip
        return transformer.logits(cfg, params, jnp.concatenate([output.hidden[None], further]))

    got = np.asarray(all_logits(params))
    for (b, at, end), of in zip(documents, made, strict=True):
        for k, oracle in enumerate(of):
            ours = got[k, b, at : end - 1 - k]
            np.testing.assert_allclose(ours, oracle.detach(), atol=1e-5 * float(oracle.abs().max()))

    loss_fn = losses.make_loss(cfg, (("next_token", 1.0), ("mtp", SHARE)), 16)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(loss, float(total), rtol=1e-5)
    for k in range(1, M + 1):
        np.testing.assert_allclose(metrics[f"loss/mtp_{k}"], float(means[k]), rtol=1e-5)
    for name, gradient in flatten(grads).items():
        oracle = p[name].grad.numpy()
        assert np.linalg.norm(oracle) > 0, name
        assert np.linalg.norm(gradient - oracle) <= 1e-5 * np.linalg.norm(oracle), name
