"""nanochat_jax models in PyTorch, for transformers (`trust_remote_code=True`).

The same logits as the JAX code that trained the model: weightless or weighted RMSNorm, QK-norm before or
after rotation, sub-norms, ReLU^2 and gated MLPs, value embeddings, stream scalars, soft-capped logits,
attention windows, loops over shared layers, several residual streams (mHC), ternary weights with 8-bit
activations, heads for later tokens. This file reads no files and opens no connections.

Weights keep the names and the orientation [d_in, d_out] of the JAX tree. Ternary matrices are stored as
scale * code. The exit gate of looped models is not part of this file: every token runs all loops.
"""
# pyright: reportMissingImports=false

import itertools
import math

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

GATE_INPUTS = 12  # channels that steer the gate of value embeddings


class NanochatJaxConfig(PretrainedConfig):
    """`nanochat_jax` holds the model's settings as the training code names them."""

    model_type = "nanochat_jax"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, nanochat_jax=None, **kwargs):
        self.nanochat_jax = nanochat_jax or {}
        super().__init__(**kwargs)


class Weights(nn.Module):
    """Named parameters in groups, from a nested dict of shapes; a list becomes a ModuleList."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            if isinstance(shape, dict):
                self.add_module(name, Weights(shape))
            elif isinstance(shape, list):
                self.add_module(name, nn.ModuleList(Weights(each) for each in shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def get(self, name):
        """A parameter or group, or None if the model has none of this name."""
        return getattr(self, name, None)


def value_layers(c):
    """Layers of the looped stack that have value embeddings: every k-th, counted from the last."""
    every = c["value_embed_every"]
    return [i for i in range(c["layers"]) if every and (c["layers"] - 1 - i) % every == 0]


def shapes(c):
    """Shape of every weight, nested by name."""
    width, inner, heads = c["dim"], c["mlp_dim"], c["heads"] * c["head_dim"]
    keys, weighted, streams = c["kv_heads"] * c["head_dim"], c["norm"] == "weighted", c["mhc"]["streams"]
    mixing = math.factorial(streams) if c["mhc"]["form"] == "permutation" else streams**2
    attn = {"q": (width, heads), "k": (width, keys), "v": (width, keys), "o": (heads, width)}
    mlp = {"up": (width, inner), "down": (inner, width)}
    if c["mlp"] != "relu2":
        mlp["gate"] = (width, inner)
    if weighted:
        attn["norm"], mlp["norm"] = (width,), (width,)
        if c["sub_norm"]:
            attn["sub_norm"], mlp["sub_norm"] = (heads,), (inner,)
        if c["qk_norm"] != "none":
            attn["q_norm"], attn["k_norm"] = (c["head_dim"],), (c["head_dim"],)
    future = {"attn": dict(attn), "mlp": dict(mlp)}
    if streams > 1:
        numbers = 2 * streams + mixing
        mhc = {"bias": (numbers,)}
        if c["mhc"]["dynamic"]:
            mhc |= {"phi": (streams * width, numbers), "alpha": (3,)}
        attn["mhc"], mlp["mhc"] = mhc, dict(mhc)
    scale = {
        name: ()
        for name in ("residual", "x0")
        if c["residual_scalars" if name == "residual" else "x0_scalars"]
    }
    layer = {"attn": attn, "mlp": mlp} | ({"scale": scale} if scale else {})
    loop = c["loop"]
    out = {"embed": (c["vocab_size"], width), "blocks": [layer] * c["layers"]}
    out |= {name: [layer] * loop[name] for name in ("before", "after") if loop[name]}
    if weighted:
        out["norm"] = (width,)
        if c["embed_norm"]:
            out["embed_norm"] = (width,)
        if loop["norm"]:
            out["loop"] = {"norm": (width,)}
    if not c["tied"]:
        out["head"] = (width, c["vocab_size"])
    if value_layers(c):
        table = {"embed": (c["vocab_size"], keys), "gate": (GATE_INPUTS, c["kv_heads"])}
        out["value"] = [table] * len(value_layers(c))
    if c["mtp"]["depth"]:
        names = ["norm"]
        if c["mtp"]["kind"] == "chained":
            future["join"] = (2 * width, width)
            names += ["hidden_norm", "embed_norm"]
        if weighted:
            future |= dict.fromkeys(names, (width,))
        out["mtp"] = [future] * c["mtp"]["depth"]
    return out


def rms_norm(x, gain, eps):
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if gain is None else y * gain).to(x.dtype)


def ternary_matmul(x, w):
    """x @ w with every row of x rounded to 8 bits; w holds scale * code."""
    wide = x.float()
    inverse = wide.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return ((torch.round(wide * (1 / inverse)) @ w.float()) * inverse).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of [B, L, H, K] with pairs (i, i + K/2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def coefficients(c, p, x, eps):
    """What one sublayer reads from each stream, adds to each, and how streams mix: (pre, post, R)."""
    streams, form = c["streams"], c["form"]
    raw = p.bias.float()
    if c["dynamic"]:
        v = x.flatten(-2).float()
        a = (v @ p.phi.float()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
        a = torch.tanh(a) if form == "unconstrained" else a
        alpha = p.alpha.float().repeat_interleave(
            torch.tensor([streams, streams, len(raw) - 2 * streams], device=raw.device)
        )
        raw = raw + alpha * a
    else:
        raw = raw.expand(*x.shape[:2], -1)
    pre, post, res = raw.split([streams, streams, raw.shape[-1] - 2 * streams], -1)
    if form == "permutation":
        orders = list(itertools.permutations(range(streams)))
        table = torch.eye(streams, device=raw.device)[torch.tensor(orders, device=raw.device)]
        mixed = torch.softmax(res, -1) @ table.flatten(1)
        return torch.sigmoid(pre), 2 * torch.sigmoid(post), mixed.unflatten(-1, (streams, streams))
    res = res.unflatten(-1, (streams, streams))
    if form == "unconstrained":
        return pre, post, res
    for _ in range(c["iterations"]):
        res = res - torch.logsumexp(res, -2, keepdim=True)
        res = res - torch.logsumexp(res, -1, keepdim=True)
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res.exp()


class NanochatJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model: token ids to logits."""

    config_class = NanochatJaxConfig
    base_model_prefix = ""
    _no_split_modules = ("Weights",)
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.c = config.nanochat_jax
        for name, shape in shapes(self.c).items():
            if isinstance(shape, list):
                self.add_module(name, nn.ModuleList(Weights(each) for each in shape))
            elif isinstance(shape, dict):
                self.add_module(name, Weights(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.post_init()

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def get_input_embeddings(self):
        return None

    def get_output_embeddings(self):
        return None

    def project(self, x, w):
        """A product with a matrix of a layer."""
        return ternary_matmul(x, w) if self.c["quant"].startswith("ternary") else x @ w

    def attention(self, p, x, value, context, window, slot):
        c, eps = self.c, self.c["norm_eps"]
        rows, length, _ = x.shape
        h = rms_norm(x, p.get("norm"), eps)
        q, k, v = (self.project(h, p.get(n)).view(rows, length, -1, c["head_dim"]) for n in "qkv")
        if value is not None:
            gate = 3 * torch.sigmoid(h[..., :GATE_INPUTS] @ value.gate)
            v = v + gate[..., None] * value.embed[context["tokens"]].view(v.shape)
        for turn in ("before_rope", "rope", "after_rope"):
            if turn == "rope":
                q, k = (rotate(y, context["cos"], context["sin"]) for y in (q, k))
            elif turn == c["qk_norm"]:
                q = rms_norm(q, p.get("q_norm"), eps) * c["qk_gain"]
                k = rms_norm(k, p.get("k_norm"), eps) * c["qk_gain"]
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if context["cache"] is not None and slot is not None:
            k, v = context["cache"].update(k, v, slot)
        k, v = (y.repeat_interleave(c["heads"] // c["kv_heads"], 1) for y in (k, v))
        visible = context["visible"]
        if window:
            visible = visible & (context["distance"] < window)
        scores = (q.float() @ k.float().transpose(-1, -2)) * c["head_dim"] ** -0.5
        scores = scores.masked_fill(~visible, torch.finfo(torch.float32).min)
        y = (torch.softmax(scores, -1) @ v.float()).to(x.dtype).transpose(1, 2).flatten(-2)
        if c["sub_norm"]:
            y = rms_norm(y, p.get("sub_norm"), eps)
        return self.project(y, p.o)

    def mlp(self, p, x):
        c, eps = self.c, self.c["norm_eps"]
        h = rms_norm(x, p.get("norm"), eps)
        inner = self.project(h, p.up)
        if c["mlp"] == "swiglu":
            inner = nn.functional.silu(self.project(h, p.gate)) * inner
        elif c["mlp"] == "reglu2":
            inner = torch.relu(self.project(h, p.gate)).square() * inner
        else:
            inner = torch.relu(inner).square()
        if c["sub_norm"]:
            inner = rms_norm(inner, p.get("sub_norm"), eps)
        return self.project(inner, p.down)

    def residual(self, p, x, sublayer):
        """The residual behind one sublayer: x + sublayer(x), or the same on several streams."""
        if p.get("mhc") is None:
            return x + sublayer(x)
        pre, post, res = coefficients(self.c["mhc"], p.mhc, x, self.c["norm_eps"])
        wide = x.float()
        y = sublayer((pre[..., None] * wide).sum(-2).to(x.dtype))
        return (res @ wide + post[..., None] * y[..., None, :].float()).to(x.dtype)

    def layer(self, p, x, x0, value, context, window, slot):
        scale = p.get("scale")
        if scale is not None and scale.get("residual") is not None:
            x = scale.residual * x
        if scale is not None and scale.get("x0") is not None:
            x = x + scale.x0 * self.expanded(x0)
        x = self.residual(p.attn, x, lambda h: self.attention(p.attn, h, value, context, window, slot))
        return self.residual(p.mlp, x, lambda h: self.mlp(p.mlp, h))

    def expanded(self, x):
        streams = self.c["mhc"]["streams"]
        return x if streams == 1 else x[..., None, :].expand(*x.shape[:-1], streams, x.shape[-1])

    def context(self, input_ids, attention_mask, position_ids, cache):
        """Rotary tables and the mask, shared by all layers. Keys are counted from the cache's first on."""
        rows, length = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        index = torch.arange(past + length, device=input_ids.device)
        distance = index[past:, None] - index[None]
        visible = (distance >= 0)[None, None]
        if attention_mask is not None:
            real = attention_mask[:, -(past + length) :].bool()
            visible = visible & real[:, None, None]
            if position_ids is None:
                position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if position_ids is None:
            position_ids = index[past:].expand(rows, -1)
        half = torch.arange(0, self.c["head_dim"], 2, device=index.device).float()
        frequencies = self.c["rope_theta"] ** (-half / self.c["head_dim"])
        angles = position_ids[:, -length:, None, None].float() * frequencies
        return {
            "tokens": input_ids, "cache": cache, "visible": visible, "distance": distance,
            "cos": angles.cos().to(self.embed.dtype), "sin": angles.sin().to(self.embed.dtype),
        }  # fmt: skip

    def trunk(self, context):
        """Hidden states [B, L, D] behind the last norm."""
        c, eps = self.c, self.c["norm_eps"]
        x = self.embed[context["tokens"]]
        if c["embed_norm"]:
            x = rms_norm(x, getattr(self, "embed_norm", None), eps)
        x0, x, slot = x, self.expanded(x), itertools.count()
        valued = {layer: number for number, layer in enumerate(value_layers(c))}

        def stack(name, x):
            for i, p in enumerate(getattr(self, name, [])):
                value = self.value[valued[i]] if name == "blocks" and i in valued else None
                window = c["window"][i % len(c["window"])] if c["window"] else 0
                x = self.layer(p, x, x0, value, context, window, next(slot))
            return x

        x = entered = stack("before", x)
        for r in range(c["loop"]["count"]):
            if r and c["loop"]["norm"]:
                gain = self.loop.norm if c["norm"] == "weighted" else None
                if gain is not None:
                    gain = gain.repeat(c["mhc"]["streams"])
                flat = x if c["mhc"]["streams"] == 1 else x.flatten(-2)
                x = rms_norm(flat, gain, eps).view(x.shape)
            if r and c["loop"]["inject"] == "add":
                x = x + entered
            x = stack("blocks", x)
        x = stack("after", x)
        x = x if c["mhc"]["streams"] == 1 else x.float().mean(-2).to(x.dtype)
        return rms_norm(x, getattr(self, "norm", None), eps)

    def logits(self, hidden):
        raw = (hidden @ (self.embed.t() if self.c["tied"] else self.head)).float()
        cap = self.c["softcap"]
        return cap * torch.tanh(raw / cap) if cap else raw

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
        logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        cached = kwargs.pop("use_cache", None)
        cached = not self.training if cached is None else cached
        if past_key_values is None and cached:
            past_key_values = DynamicCache()
        hidden = self.trunk(self.context(input_ids, attention_mask, position_ids, past_key_values))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.logits(hidden[:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.c["vocab_size"], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def future_logits(self, input_ids):
        """Logits [M, B, L, V] of the tokens 2..M + 1 after each position, from whole rows.

        The last positions of a row, whose following tokens are unknown, hold no prediction.
        """
        c, eps = self.c, self.c["norm_eps"]
        context = self.context(input_ids, None, None, None)
        z = u = self.trunk(context)
        window = c["window"][(c["layers"] - 1) % len(c["window"])] if c["window"] else 0
        found = []
        for i, p in enumerate(self.mtp):
            if c["mtp"]["kind"] == "chained":
                passed = nn.functional.pad(input_ids, (0, i + 1))[:, i + 1 :]
                e = rms_norm(self.embed[passed], p.get("embed_norm"), eps)
                y = torch.cat([rms_norm(u, p.get("hidden_norm"), eps), e], -1) @ p.join
            else:
                y = z
            y = self.layer(p, y, None, None, context, window, None)  # on one stream, without scalars
            u = rms_norm(y, p.get("norm"), eps)
            found.append(self.logits(u))
        return torch.stack(found)
