"""FP4 matrices as inference holds them, packed and rounded once: the training forward's numbers, bytes, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nanochat_jax import params as params_lib
from nanochat_jax.config import (
    BLOCKS,
    Config,
    ConfigError,
    Fp4Config,
    InferConfig,
    LoopConfig,
    ModelConfig,
    MtpConfig,
    validate,
)
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine, load, speculative
from nanochat_jax.kernels import fp4, scaled
from nanochat_jax.model import transformer
from nanochat_jax.quant import fp4_packed, matmul, rounded
from nanochat_jax.quant import project as projections

PLAIN = ModelConfig(
    vocab_size=100, dim=32, layers=1, heads=4, kv_heads=4, head_dim=8, mlp_dim=64, quant="mxfp4"
)  # fmt: skip
CFG = dataclasses.replace(PLAIN, layers=2, **BLOCKS["modern"])
MATRICES = {"attn": "qkvo", "mlp": ("gate", "up", "down")}
SCALE_TYPES = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
LEAVES = (fp4_packed.PackedFp4, rounded.Rounded)
formats = pytest.mark.parametrize("name", fp4.FORMATS)


pack = jax.jit(fp4_packed.pack, static_argnums=(1, 2))
serve = jax.jit(fp4_packed.matmul, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(2, 3))
def train(x, w, name, how=Fp4Config()):  # noqa: B008 (frozen)
    return matmul.matmul(x, (w,), name, name, 0, "full", how)[0]


def held(x):
    return isinstance(x, LEAVES)


def init(cfg):
    return params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))


@functools.cache
def params_of(cfg):
    rng = np.random.default_rng(0)
    noisy = lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noisy, jax.jit(init, static_argnums=0)(cfg))


def operands(M=5, m=96, n=64, dtype=jnp.float32):
    w = 0.02 * jax.random.normal(jax.random.key(0), (m, n))
    return jax.random.normal(jax.random.key(1), (1, M, m)).astype(dtype), w


def values_of(leaf, tensor=True):
    """Of a packed leaf, float64 [m, n], from its bytes with ml_dtypes."""
    codes, block = np.asarray(leaf.codes), fp4.FORMATS[leaf.weight]
    levels = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1).view(ml_dtypes.float4_e2m1fn)
    scales = np.asarray(leaf.scales).astype(np.float64).repeat(block, 0).repeat(block, 1)
    return (levels.astype(np.float64) * scales).T * (float(leaf.tensor) if tensor else 1)


# --- one product


@formats
@pytest.mark.parametrize(("impl", "dtype"), [
    ("reference", jnp.float32), ("reference", jnp.bfloat16), ("interpret", jnp.float32),
    pytest.param("interpret", jnp.bfloat16, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_training_forwards_product(name, impl, dtype):
    """MXFP4: no partial sum rounds, so the bits. NVFP4: block scales have mantissas, so to rounding."""
    x, w = operands(dtype=dtype)
    want, leaf = train(x, w, name), pack(w, name, impl)
    got = serve(x, leaf, name)
    assert got.dtype == dtype and got.shape == want.shape
    if name == "mxfp4":
        np.testing.assert_array_equal(got, want)
    else:
        levels, tensor = jax.jit(fp4.scaled_levels, static_argnums=1)(x[0], name)
        rows = np.asarray(levels, np.float64) * float(tensor)
        exact = rows @ values_of(leaf)
        size = np.abs(rows) @ np.abs(values_of(leaf))
        unit = 1e-6 * size + (2.0**-7 * np.abs(exact) if dtype == jnp.bfloat16 else 0)
        assert np.all(np.abs(np.asarray(got[0], np.float64) - exact) <= unit)
        assert np.all(np.abs(np.asarray(want[0], np.float64) - exact) <= unit)


@formats
def test_a_leaf_holds_the_values_that_training_multiplies(name):
    _, w = operands()
    leaf = pack(w, name)
    levels, tensor = jax.jit(fp4.scaled_levels, static_argnames=("name", "tiles"))(w, name=name, tiles=True)
    np.testing.assert_array_equal(values_of(leaf, tensor=False), np.asarray(levels, np.float64))
    assert leaf.tensor == tensor and leaf.scales.dtype == SCALE_TYPES[name]
    np.testing.assert_allclose(fp4_packed.unpack(leaf), values_of(leaf), rtol=1e-6)
    assert leaf.shape == w.shape and leaf.ndim == 2


@formats
def test_bytes_of_the_leaves(name):
    """Half a byte per weight, a byte per tile, 4 per matrix; a stack is its matrices."""
    w = jnp.stack([operands()[1], 2 * operands()[1] + 1])
    leaf = fp4_packed.pack_stack(w, name)
    size = sum(a.nbytes for a in jax.tree.leaves(leaf))
    assert size == w.size // 2 + w.size // fp4.FORMATS[name] ** 2 + 4 * 2
    for i in range(2):
        for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(pack(w[i], name)), strict=True):
            assert a.dtype == b.dtype and np.asarray(a[i]).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("name", "dtype"), [
    ("mxfp4", "bfloat16"), ("fp4_rows", "float32"), pytest.param("fp4_rows", "bfloat16", marks=pytest.mark.slow),
    *(pytest.param(name, dtype, marks=pytest.mark.slow)
      for name in ("nvfp4", "fp8") for dtype in ("float32", "bfloat16")),
])  # fmt: skip
def test_rounded_once_gives_the_bits_of_the_training_forward(name, dtype):
    x, w = operands(dtype=jnp.dtype(dtype))
    how = Fp4Config(outliers=0.02) if name == "fp4_rows" else Fp4Config()
    want = train(x, w, name, how)
    leaf = rounded.round_stack(w[None], name, how, dtype)
    assert leaf.shape == (1, *w.shape) and leaf.ndim == 3 and leaf.codes.dtype == dtype
    got = jax.jit(rounded.matmul, static_argnums=2)(x, jax.tree.map(lambda a: a[0], leaf), name)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, want)


def test_fp4_units_get_the_same_blocks(monkeypatch):
    """Where a GPU has them, the codes and scales reach them as rounding makes them; here a float64 product."""
    seen = []

    def dot(a, a_scales, b, b_scales):
        seen.append(b_scales.shape)
        a, b = (v * jnp.repeat(s.astype(jnp.float32), 16, 1) for v, s in ((a, a_scales), (b, b_scales)))
        return jnp.matmul(a, b.T, precision="highest")

    monkeypatch.setattr(scaled, "native", lambda name: name == "nvfp4")
    monkeypatch.setattr(scaled, "scaled_dot", dot)
    x, w = operands()
    x, w = x[:, :, :32], w[:32]
    got = jax.jit(lambda x, w: fp4_packed.matmul(x, w, "nvfp4"))(x, pack(w, "nvfp4"))
    want = jax.jit(lambda x, w: matmul.matmul(x, (w,), "nvfp4", "nvfp4", 0)[0])(x, w)
    np.testing.assert_array_equal(got, want)
    assert seen == [(64, 32 // 16)] * 2


def test_what_cannot_be_multiplied_is_refused():
    x, w = operands()
    packed = pack(w, "mxfp4")
    for leaf in (
        packed,
        jax.tree.map(lambda a: a[0], rounded.round_stack(w[None], "mxfp4", Fp4Config(), "float32")),
    ):
        with pytest.raises(ValueError, match="'attn/q' has mxfp4 codes, but its rule says 'nvfp4'"):
            projections.Project(projections.PRESETS["nvfp4"])("attn/q", x, leaf)
    with pytest.raises(ValueError, match="packed mxfp4 weights multiply activations in mxfp4, not 'full'"):
        fp4_packed.matmul(x, packed, "full")
    with pytest.raises(ExceptionGroup) as caught:
        fp4_packed.matmul(x, packed.replace(impl="pallas"), "mxfp4")
    assert "made for GPUs, this is cpu" in str(caught.value.exceptions[0])


# --- models


def what(leaf):
    return "latent" if not held(leaf) else f"{type(leaf).__name__} {leaf.weight}"


@pytest.mark.parametrize("quant", projections.PRESETS)
def test_every_preset_is_held_or_refused(quant):
    """Validation and the leaves agree: a form is refused exactly where it would hold nothing so."""
    cfg = dataclasses.replace(CFG, quant=quant)
    params = jax.eval_shape(lambda: init(CFG))
    for form in ("codes", "packed"):
        made = jax.eval_shape(lambda p, form=form: projections.hold(cfg, p, form, "float32"), params)
        block = made["blocks"]
        kinds = {what(block["attn"]["q"]), what(block["mlp"]["down"])} if "ternary" not in quant else set()
        run = Config(model=cfg, infer=InferConfig(weights=form))
        if form not in projections.forms(cfg):
            assert not any("Packed" in kind for kind in kinds)
            with pytest.raises(ConfigError, match=f"'infer.weights' = '{form}' needs .* but model.quant is"):
                validate(run)
        else:
            validate(run)
            assert "latent" not in kinds
            assert ("ternary" in quant or any("Packed" in kind for kind in kinds)) == (
                form == "packed" or "ternary" in quant
            )
    assert load.form(cfg, InferConfig()) in projections.forms(cfg)


def test_each_role_is_held_in_its_format():
    cfg = dataclasses.replace(CFG, quant="fp8_nvfp4")
    hold = lambda: projections.hold(cfg, init(CFG), "packed", "bfloat16", "reference")  # noqa: E731
    block = jax.eval_shape(hold)["blocks"]
    assert what(block["attn"]["q"]) == "Rounded fp8" and block["attn"]["q"].codes.dtype == jnp.bfloat16
    assert what(block["mlp"]["up"]) == "PackedFp4 nvfp4" and block["mlp"]["up"].impl == "reference"


@pytest.mark.parametrize("outside", ["full", "same"])
def test_layers_that_fp4_spares_stay_latent(outside):
    cfg = dataclasses.replace(
        CFG,
        layers=1,
        value_embed_every=0,
        loop=LoopConfig(count=2, before=1, after=1),
        mtp=MtpConfig(depth=1),
        fp4=Fp4Config(outside=outside),
    )
    made = jax.eval_shape(lambda: projections.hold(cfg, init(cfg), "packed", "float32"))
    for stack in ("before", "blocks", "after", "mtp"):
        packed = stack == "blocks" or (outside == "same" and stack != "mtp")
        assert what(made[stack]["attn"]["k"]) == ("PackedFp4 mxfp4" if packed else "latent"), stack


@functools.partial(jax.jit, static_argnums=0)
def hidden(cfg, params):
    batch = engine.batch_of(jnp.arange(12, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32))
    return transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden


MODELS = [("packed", "mxfp4", PLAIN), ("packed", "nvfp4", CFG), ("codes", "fp8_nvfp4", CFG)]


@pytest.mark.parametrize(
    ("form", "quant", "cfg"),
    [MODELS[0], *(pytest.param(*model, marks=pytest.mark.slow) for model in MODELS[1:])],
)
def test_hidden_states_of_a_model(form, quant, cfg):
    """Of the training forward on latent weights. XLA compiles what surrounds the products differently, and
    rounding can move an activation to the neighboring level; another scale or layout would be far outside."""
    params, cfg = params_of(cfg), dataclasses.replace(cfg, quant=quant)
    served = load.served(cfg, params, InferConfig(weights=form))
    want, got = hidden(cfg, params), hidden(cfg, served)
    assert float(jnp.std(got - want)) < 0.02 * float(jnp.std(want))
    down = served["blocks"][-1]["mlp"]["down"]
    served["blocks"][-1]["mlp"]["down"] = down.replace(codes=jnp.roll(down.codes, 1, -1))
    assert float(jnp.std(hidden(cfg, served) - want)) > 0.05 * float(jnp.std(want))


@pytest.mark.slow
def test_hidden_states_op_by_op_are_the_same_bits():
    """MXFP4 without a compiler between the operations: nothing but the products differs, and they do not."""
    params = params_of(PLAIN)
    served = load.served(PLAIN, params, InferConfig(weights="packed"))
    with jax.disable_jit():
        np.testing.assert_array_equal(hidden(PLAIN, transformer.apart(params)), hidden(PLAIN, served))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "quant", "cfg"),
    [("packed", "nvfp4", PLAIN), ("packed", "mxfp4", CFG), ("auto", "fp8_nvfp4", PLAIN)],
)
def test_greedy_text_is_that_of_the_latent_weights(form, quant, cfg):
    params, cfg = params_of(cfg), dataclasses.replace(cfg, quant=quant)
    greedy = InferConfig(max_tokens=6, temperature=0.0, capacity=32)
    served = load.served(cfg, params, dataclasses.replace(greedy, weights=form))
    assert form == "packed" or what(served["blocks"][0]["mlp"]["up"]) == "Rounded nvfp4"
    plain = list(engine.generate(cfg, params, [5, 7, 11], greedy, jax.random.key(0)))
    assert list(engine.generate(cfg, served, [5, 7, 11], greedy, jax.random.key(0))) == plain
    assert len(set(plain)) > 1


def test_bytes_of_a_decode_step():
    """By XLA's memory analysis what a step is given shrinks by the formula. What it says of the unpacked copies:
    plain XLA on CPU has them among a step's temporaries. (A GPU's kernel makes none: test_fp4_kernel.)"""
    cfg = dataclasses.replace(PLAIN, dim=64, mlp_dim=128, head_dim=16)
    latent = jax.eval_shape(lambda: transformer.apart(init(cfg)))
    packed = jax.eval_shape(lambda: load.served(cfg, init(cfg), InferConfig(weights="packed")))

    def memory(params):
        tokens, cache = (
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.eval_shape(lambda: caches.allocate(cfg, 1, 16)),
        )
        run = jax.jit(lambda p, t, c: engine.decode(cfg, p, t, c)[0])
        return run.lower(params, tokens, cache).compile().memory_analysis()

    size = lambda tree: sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    (layer,) = latent["blocks"]
    weights = [math.prod(layer[part][name].shape) for part, names in MATRICES.items() for name in names]
    formula = sum(n // 2 + n // 32**2 + 4 for n in weights)
    leaves = [leaf for leaf in jax.tree.leaves(packed, is_leaf=held) if held(leaf)]
    assert len(leaves) == len(weights) and size(leaves) == formula
    given, wide = memory(packed), memory(latent)
    assert wide.argument_size_in_bytes - given.argument_size_in_bytes == 4 * sum(weights) - formula
    assert given.temp_size_in_bytes >= 2 * max(weights)


@pytest.mark.slow
def test_drafts_of_held_weights_leave_the_text():
    """MXFP4, whose activations share no scale over tokens: reading several at once rounds as one by one."""
    cfg = dataclasses.replace(PLAIN, mtp=MtpConfig(depth=1))
    plain = InferConfig(max_tokens=8, temperature=0.0, capacity=32, weights="packed")
    served = load.served(cfg, params_of(cfg), plain)
    want = list(engine.generate(cfg, served, [5, 7, 11], plain, jax.random.key(0)))
    drafting = dataclasses.replace(plain, draft_tokens=1)
    assert list(speculative.generate(cfg, served, [5, 7, 11], drafting, jax.random.key(0))) == want
