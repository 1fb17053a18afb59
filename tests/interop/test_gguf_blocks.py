"""Bytes of GGUF's ternary blocks against the gguf package, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.quant import gguf_blocks, pack

quants = pytest.importorskip("gguf.quants", reason="gguf")
constants = pytest.importorskip("gguf.constants", reason="gguf")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def matrix(m=768, n=24, scale=0.40625, seed=0):
    """Codes [m, n] with a block of zeros, and a scale that float16 holds."""
    t = np.random.default_rng(seed).integers(-1, 2, (m, n)).astype(np.int8)
    t[256:512, 3] = 0
    return t, np.full((1, 1), scale, np.float32)


@pytest.mark.parametrize("name", gguf_blocks.FORMATS)
def test_bytes_equal_those_of_the_package(name):
    t, gamma = matrix()
    kind = constants.GGMLQuantizationType[name]
    want = quants.quantize(np.ascontiguousarray((gamma * t).T), kind)
    packed = pack.pack(jnp.asarray(t), jnp.asarray(gamma))
    ours = gguf_blocks.to_blocks(packed, name)
    np.testing.assert_array_equal(ours, want)
    np.testing.assert_array_equal(quants.dequantize(ours, kind), (gamma * t).T)
    back = gguf_blocks.from_blocks(want, name)
    np.testing.assert_array_equal(back.codes, packed.codes)
    np.testing.assert_array_equal(back.scale, packed.scale)
    np.testing.assert_array_equal(gguf_blocks.to_blocks(back, name), want)


@pytest.mark.parametrize("name", gguf_blocks.FORMATS)
def test_a_scale_per_block(name):
    t, _ = matrix()
    gamma = np.random.default_rng(1).uniform(0.1, 2, (3, 1, 24)).astype(np.float16).astype(np.float32)
    weights = (gamma * t.reshape(3, 256, 24)).reshape(768, 24)
    kind = constants.GGMLQuantizationType[name]
    want = quants.quantize(np.ascontiguousarray(weights.T), kind)
    packed = pack.pack(jnp.asarray(t), jnp.asarray(gamma))
    np.testing.assert_array_equal(gguf_blocks.to_blocks(packed, name), want)
    back = gguf_blocks.from_blocks(want, name)
    np.testing.assert_array_equal(back.codes, packed.codes)
    np.testing.assert_array_equal(gguf_blocks.to_blocks(back, name), want)
