"""Attention to a cache that is only read: both implementations against float64, and what must not matter."""

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.kernels import cached

N, B, G, H, K = 3, 3, 2, 4, 8


def arrays(T, L, seed=0, garbage=1e9):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, L, heads, K)).astype(np.float32) for heads in (H, G, G))
    keys, values = (rng.normal(size=(N, B, G, T, K)).astype(np.float32) for _ in range(2))
    length = np.array([0, T // 3, T - L], np.int32)
    for row in range(B):  # a slot that is not in use must not be looked at
        keys[:, row, :, length[row] :] = garbage
        values[:, row, :, length[row] :] = garbage
    return q, k, v, keys, values, length


def numpy_attention(q, k, v, keys, values, number, length, window):
    q, k, v, keys, values = (a.astype(np.float64) for a in (q, k, v, keys, values))
    y = np.zeros(q.shape)
    for b in range(B):
        n = length[b]
        all_k, all_v = (
            np.concatenate([keys[number, b, :, :n].swapaxes(0, 1), k[b]]),
            np.concatenate([values[number, b, :, :n].swapaxes(0, 1), v[b]]),
        )
        for position in range(q.shape[1]):
            at = n + position
            first = max(0, at - window + 1) if window else 0
            for h in range(H):
                g = h // (H // G)
                z = all_k[first : at + 1, g] @ q[b, position, h] / np.sqrt(K)
                p = np.exp(z - z.max())
                y[b, position, h] = (p / p.sum()) @ all_v[first : at + 1, g]
    return y


@pytest.mark.parametrize("impl", cached.IMPLS)
@pytest.mark.parametrize(
    ("T", "L", "window"), [(40, 1, 0), (300, 1, 0), (300, 5, 0), (300, 5, 140), (16, 4, 3)]
)
def test_equals_float64(impl, T, L, window):
    made = arrays(T, L)
    got = cached.attend(*made[:5], (1,), made[5], window, impl)
    np.testing.assert_allclose(got, numpy_attention(*made[:5], 1, made[5], window), atol=2e-5)


def test_the_layer_may_be_known_late():
    q, k, v, keys, values, length = arrays(40, 2)
    want = cached.attend(q, k, v, keys, values, (2,), length)
    got = cached.attend(q, k, v, keys, values, (jnp.int32(2),), length)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_row_does_not_depend_on_the_length_of_others():
    """Bit for bit: their slots are further blocks, in which this row sees nothing."""
    q, k, v, keys, values, length = arrays(600, 1, garbage=1e4)
    run = cached.attend
    for others in (0, 100, 599):
        changed = np.array([others, length[1], others], np.int32)
        np.testing.assert_array_equal(
            run(q, k, v, keys, values, (0,), changed)[1], run(q, k, v, keys, values, (0,), length)[1]
        )


def test_slots_that_nobody_uses_are_not_read():
    q, k, v, keys, values, length = arrays(600, 1)
    length = np.minimum(length, 100)
    keys[..., 128:, :], values[..., 128:, :] = np.nan, np.nan
    assert np.isfinite(cached.attend(q, k, v, keys, values, (0,), length)).all()
