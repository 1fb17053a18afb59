"""8-bit codes and Adam with 8-bit state against bitsandbytes, whose blocks are runs of the flat array.

Rows here are multiples of a block, so that both cut the same blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.kernels import int8
from nanochat_jax.optim import quantized as q

torch = pytest.importorskip("torch", reason="extra 'interop'")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

BLOCK = 256
SIGNED = {"dynamic": True, "dynamic_unsigned": False}


def data(code, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 512)) * 10.0 ** -rng.uniform(0, 6, (64, 512))
    return (x if SIGNED[code] else abs(x)).astype(np.float32)


@pytest.mark.parametrize("code", SIGNED)
def test_levels(code):
    want = bnb.functional.create_dynamic_map(signed=SIGNED[code]).numpy()
    np.testing.assert_allclose(int8.LEVELS[code], want, rtol=1e-6)


@pytest.mark.parametrize("code", SIGNED)
@pytest.mark.parametrize("peer", ["search", "table"])
def test_codes_scales_and_values(code, peer):
    """Its CPU path for float64 tries all levels; that for float32 looks up one of 2^16 cells."""
    x = data(code)
    levels = bnb.functional.create_dynamic_map(signed=SIGNED[code])
    x_torch = torch.tensor(x, dtype=torch.float64 if peer == "search" else torch.float32)
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(x_torch, levels, BLOCK)
    codes, scales = q.quantize(jnp.asarray(x), BLOCK, code)
    np.testing.assert_array_equal(np.asarray(scales).ravel(), absmax.numpy())
    ours, theirs = np.asarray(codes), theirs.numpy().reshape(x.shape)
    multiples = x.astype(np.float64) / np.repeat(np.asarray(scales, np.float64), BLOCK, -1)
    error, peer_error = (abs(multiples - levels.numpy()[c]) for c in (ours, theirs))
    assert np.all(error <= peer_error + 1e-7)
    if peer == "search":  # other codes only at ties
        assert np.mean(ours != theirs) < 1e-3 and np.all(peer_error <= error + 1e-7)
    else:
        assert np.all(peer_error <= error + 2.0**-15)
    kept = torch.tensor(np.array(codes))
    back = bnb.functional.dequantize_blockwise(kept, absmax=absmax, code=levels, blocksize=BLOCK)
    np.testing.assert_allclose(q.dequantize(codes, scales, BLOCK, code), back.numpy(), rtol=1e-6)


def test_adam_trajectory():
    """20 steps of Adam8bit on a quadratic with noise, the same gradients' formula on both sides."""
    rng = np.random.default_rng(1)
    start, target = rng.normal(size=(2, 64, 512)).astype(np.float32)
    noise = rng.normal(size=(20, 64, 512)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    peer = bnb.optim.Adam8bit([theirs], lr=0.01, min_8bit_size=4096)
    tx = q.quantize_state(optax.adam(0.01), {"mu": "dynamic", "nu": "dynamic_unsigned"}, BLOCK)
    plain = optax.adam(0.01)
    ours = full = jnp.asarray(start)
    state, plain_state = tx.init(ours), plain.init(full)
    update, plain_update = jax.jit(tx.update), jax.jit(plain.update)
    for step in noise:
        theirs.grad = (theirs.detach() - torch.tensor(target)) + torch.tensor(step)
        peer.step()
        updates, state = update(ours - target + step, state)
        ours = ours + updates
        updates, plain_state = plain_update(full - target + step, plain_state)
        full = full + updates
    assert peer.state[theirs]["state1"].dtype == torch.uint8  # it did run in 8 bits
    moved = np.linalg.norm(theirs.detach().numpy() - start)
    distance = lambda p: np.linalg.norm(np.asarray(p) - theirs.detach().numpy()) / moved  # noqa: E731
    print(f"distance to the peer {distance(ours):.5f}, of float32 Adam {distance(full):.5f}")
    assert distance(ours) < 0.02
    assert distance(ours) < distance(full) / 2  # nearer than by being Adam
