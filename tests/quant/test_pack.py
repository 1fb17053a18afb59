"""Packed ternary leaves: the training forward's bits, sharded products, generation, GGUF blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, ModelConfig
from nanochat_jax.inference import engine, load
from nanochat_jax.kernels import ternary as kernels
from nanochat_jax.model import transformer
from nanochat_jax.quant import gguf_blocks, matmul, pack, ternary
from nanochat_jax.quant import project as projections

CFG = ModelConfig(
    vocab_size=100, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, quant="ternary",
    **BLOCKS["modern"],
)  # fmt: skip


@functools.cache
def params_of(cfg):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    noisy = lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731
    return jax.tree.map(noisy, params)


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 256, 32), (5, 300, 16), (18, 512, 48)])
def test_bits_of_the_training_forward(impl, dtype, shape):
    M, m, n = shape
    w = 0.02 * jax.random.normal(jax.random.key(0), (m, n))
    x = jax.random.normal(jax.random.key(1), (1, M, m)).astype(dtype)
    want = matmul.matmul(x, (w,), "ternary", "int8", 0)[0]
    packed = pack.pack(*ternary.quantize_ternary(w), impl)
    assert packed.shape == w.shape and packed.codes.nbytes == n * -(-m // 256) * 64
    got = pack.matmul(x, packed)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("act", ["int8", "full"])
def test_scales_of_groups_equal_float64(impl, act):
    w, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(512, 32), (5, 512)]))
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    t, gamma = ternary.quantize_ternary(w, 128)
    wide = np.asarray(ternary.dequantize(t, gamma), np.float64)
    rows, inverse = ternary.int8_rows(x) if act == "int8" else (x, jnp.ones((5, 1)))
    want = np.asarray(rows, np.float64) * np.asarray(inverse, np.float64) @ wide
    got = pack.matmul(x, pack.pack(t, gamma, impl), act)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(2, 64, 3), (512, 4)]), st.sampled_from([0, 32]), st.integers(0, 2**31 - 1))
def test_round_trip(shape, group, seed):
    w = jax.random.normal(jax.random.key(seed), shape)
    t, gamma = ternary.quantize_ternary(w, group)
    packed = pack.pack(t, gamma)
    assert packed.shape == shape and packed.ndim == len(shape) and packed.grouped == bool(group)
    for one, two in zip(pack.unpack(packed), (t, gamma), strict=True):
        np.testing.assert_array_equal(one, two)


def test_only_the_named_matrices_are_packed():
    params = params_of(CFG)
    roles = projections.from_config(CFG).ternary_roles()
    packed = projections.hold(CFG, params, "packed", "float32")
    leaf = lambda x: isinstance(x, pack.PackedTernary)  # noqa: E731
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(packed, is_leaf=leaf), jax.tree.leaves(params), strict=True
    ):
        name = params_lib.path_name(path)
        if name.removeprefix("blocks/") in roles:
            assert leaf(new) and new.shape == old.shape
            if "down" in name:  # the other shapes say nothing new
                for one, two in zip(pack.unpack(new), ternary.quantize_ternary(old), strict=True):
                    np.testing.assert_array_equal(one, two)
        else:
            assert new is old
    assert sum(map(leaf, jax.tree.leaves(packed, is_leaf=leaf))) == 6  # this block has no gate


@pytest.mark.slow
@pytest.mark.parametrize(("block", "impl"), [("modern", "auto"), ("portable", "interpret")])
def test_greedy_generation_is_unchanged(block, impl):
    cfg = dataclasses.replace(CFG, layers=2 if impl == "auto" else 1, **BLOCKS[block])
    params = params_of(cfg)
    greedy = InferConfig(max_tokens=6, temperature=0.0, capacity=32)
    packing = dataclasses.replace(greedy, weights="packed", impl=impl)
    packed = load.served(cfg, params, packing)
    assert packed["blocks"][0]["attn"]["q"].impl == impl
    plain = list(engine.generate(cfg, params, [5, 7, 11], greedy, jax.random.key(0)))
    assert list(engine.generate(cfg, packed, [5, 7, 11], packing, jax.random.key(0))) == plain
    assert len(set(plain)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 16])
def test_logits_change_by_rounding_only(group):
    """XLA fuses what surrounds the products differently, and rounding can move an activation to the
    neighboring one of 255 levels; a wrong scale or layout would be far outside."""
    cfg = dataclasses.replace(CFG, quant_group=group)
    params = params_of(cfg)
    packed = load.served(cfg, params, InferConfig(weights="packed"))
    tokens = jnp.arange(16, dtype=jnp.int32)[None]

    @jax.jit
    def logits(params):
        cache = engine.caches.allocate(cfg, 1, 16)
        return engine.prefill(cfg, params, tokens, jnp.array([16], jnp.int32), cache)[0][0, :100]

    want, got = logits(params), logits(packed)
    assert float(jnp.std(got - want)) < 0.02 * float(jnp.std(want))
    down = packed["blocks"][1]["mlp"]["down"]
    packed["blocks"][1]["mlp"]["down"] = down.replace(codes=jnp.roll(down.codes, 1, -1))
    assert float(jnp.std(logits(packed) - want)) > 0.05 * float(jnp.std(want))


def test_a_packed_weight_needs_a_ternary_rule():
    w = pack.pack(*ternary.quantize_ternary(jnp.ones((32, 16))))
    project = projections.Project(projections.PRESETS["full"])
    with pytest.raises(ValueError, match="'attn/q' has ternary codes, but its rule says 'full'"):
        project("attn/q", jnp.ones((1, 32)), w)
    with pytest.raises(ValueError, match="multiply int8 or full activations, not 'nvfp4'"):
        pack.matmul(jnp.ones((1, 32)), w, "nvfp4")


# --- eight devices


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_tensor_parallel_product_equals_the_unsharded_one(impl, split):
    """Bit for bit: the integers are summed before scaling, and all parts share a row's scale."""
    m, n = (256, 256) if split == "outputs" else (2048, 32)
    w = jax.random.normal(jax.random.key(0), (m, n))
    # One part holds the row's maximum: scaling by local maxima would give another sum.
    x = jax.random.normal(jax.random.key(1), (3, m)).at[:, 0].set(9.0)
    packed = pack.pack(*ternary.quantize_ternary(w), impl)
    want = jax.jit(pack.matmul)(x, packed)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    if split == "outputs":
        places = P(), dataclasses.replace(packed, codes=P("tensor"), scale=P())
        axis, out = None, P(None, "tensor")
    else:
        places = P(None, "tensor"), dataclasses.replace(packed, codes=P(None, "tensor"), scale=P())
        axis, out = "tensor", P()
    product = functools.partial(pack.matmul, axis=axis)
    # check_vma: a Pallas call does not say how its output varies over the mesh.
    run = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=places, out_specs=out, check_vma=False))
    np.testing.assert_array_equal(run(x, packed), want)


def test_local_scales_would_differ():
    """What the maximum over all parts is for."""
    x = jnp.array([[9.0, 1.0], [0.3, 0.2]])
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def rows(axis):
        body = functools.partial(ternary.int8_rows, axis=axis)
        out = (P(None, "t"), P(None, "t"))
        return jax.shard_map(body, mesh=mesh, in_specs=P(None, "t"), out_specs=out)(x)[0]

    whole = ternary.int8_rows(x)[0]
    np.testing.assert_array_equal(rows("t"), whole)
    assert np.any(rows(None) != whole)


# --- GGUF blocks (bytes against the gguf package: tests/interop/test_gguf_blocks.py)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(gguf_blocks.FORMATS)), st.integers(0, 2**31 - 1))
def test_blocks_round_trip(name, seed):
    rng = np.random.default_rng(seed)
    t = rng.integers(-1, 2, (512, 3)).astype(np.int8)
    gamma = np.float32(np.float16(rng.uniform(1e-3, 10))).reshape(1, 1)
    packed = pack.pack(t, gamma)
    rows = gguf_blocks.to_blocks(packed, name)
    assert rows.shape == (3, 2 * {"TQ1_0": 54, "TQ2_0": 66}[name])
    back = gguf_blocks.from_blocks(rows, name)
    np.testing.assert_array_equal(back.codes, packed.codes)
    np.testing.assert_array_equal(back.scale, packed.scale)


def test_what_blocks_cannot_hold_is_refused():
    t = np.ones((512, 2), np.int8)
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="TQ2_0 needs inputs in multiples of 256, got 300"):
        gguf_blocks.to_blocks(pack.pack(t[:300], one), "TQ2_0")
    with pytest.raises(ValueError, match="TQ1_0 has one scale per 256 inputs, got one per 128"):
        gguf_blocks.to_blocks(pack.pack(t, np.ones((4, 1, 2), np.float32)), "TQ1_0")
    for scale in (0.1, 1e-9, 1e6):
        with pytest.raises(ValueError, match="stores scales as float16, and"):
            gguf_blocks.to_blocks(pack.pack(t, one * np.float32(scale)), "TQ2_0")
    with pytest.raises(ValueError, match="have a multiple of 66 bytes, got 65"):
        gguf_blocks.from_blocks(np.zeros((1, 65), np.uint8), "TQ2_0")
    with pytest.raises(ValueError, match="digit 3"):
        gguf_blocks.from_blocks(np.full((1, 66), 255, np.uint8), "TQ2_0")
    zeros = pack.pack(0 * t, one)
    np.testing.assert_array_equal(
        kernels.unpack(gguf_blocks.from_blocks(gguf_blocks.to_blocks(zeros, "TQ1_0"), "TQ1_0").codes, 512), 0
    )
