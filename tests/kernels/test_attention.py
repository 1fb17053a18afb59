"""Every attention implementation against a float64 softmax, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.kernels import attention, dispatch


def inputs(length, heads=4, groups=2, width=16, batch=2):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(batch, length, n, width)), jnp.float32) for n in (heads, groups, groups)
    )
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return q, k, v, index, jnp.where(index < length // 3, 1, 2)


def oracle(q, k, v, index, segments, window):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    share = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, share, 2), np.repeat(v, share, 2)
    scores = np.einsum("blhk,bthk->bhlt", q, k) / np.sqrt(q.shape[3])
    distance = np.asarray(index)[:, :, None] - np.asarray(index)[:, None]
    mask = (distance >= 0) & (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None])
    if window:
        mask &= distance < window
    scores = np.where(mask[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhlt,bthk->blhk", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("impl", ["blocked", "reference", "auto"])
@pytest.mark.parametrize("window", [0, 7, 200])
def test_output_equals_the_oracle(impl, window):
    q, k, v, index, segments = inputs(256)
    got = attention.attend(q, k, v, index, index, segments, segments, window, impl=impl)
    np.testing.assert_allclose(got, oracle(q, k, v, index, segments, window), atol=2e-6)


@pytest.mark.parametrize("window", [0, 50])
def test_written_out_gradient_equals_the_automatic_one(window):
    q, k, v, index, segments = inputs(256)

    def loss(impl, *qkv):
        y = attention.attend(*qkv, index, index, segments, segments, window, impl=impl)
        return jnp.sum(jnp.sin(y))

    for a, b in zip(
        jax.grad(lambda *x: loss("blocked", *x), (0, 1, 2))(q, k, v),
        jax.grad(lambda *x: loss("reference", *x), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)  # float32 rounding of sums of 256


@pytest.mark.parametrize("window", [0, 50])
def test_some_queries_of_a_row_equal_the_automatic_gradient(window):
    """Not a multiple of the block, and no token's own position: what a filtered backward pass asks for."""
    q, k, v, index, segments = inputs(256)
    rows = np.sort(np.random.default_rng(1).permutation(256)[:150])
    q, some, own = q[:, rows], index[:, rows], segments[:, rows]

    def loss(impl, *qkv):
        y = attention.attend(*qkv, some, index, own, segments, window, aligned=False, impl=impl)
        return jnp.sum(jnp.sin(y)), y

    (one, got), (two, want) = (
        jax.grad(lambda *x, i=impl: loss(i, *x), (0, 1, 2), has_aux=True)(q, k, v)
        for impl in ("blocked", "reference")
    )
    np.testing.assert_allclose(got, want, atol=2e-6)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)


def test_refusals_name_their_reasons():
    q, k, v, index, segments = inputs(100)
    with pytest.raises(ExceptionGroup) as caught:
        attention.attend(q, k, v, index, index, segments, segments, impl="blocked")
    assert "multiple of 128" in str(caught.value.exceptions[0])
    with pytest.raises(ExceptionGroup) as caught:
        attention.attend(q, k, v, index, index, segments, segments, impl="cudnn")
    assert "needs an NVIDIA GPU" in str(caught.value.exceptions[0])
    with pytest.raises(ValueError, match="unknown implementation 'flash'; known: auto, blocked"):
        attention.attend(q, k, v, index, index, segments, segments, impl="flash")


def test_fastest_times_only_what_runs():
    def refuses(x):
        raise NotImplementedError("never")

    assert dispatch.fastest({"no": refuses, "yes": lambda x: x + 1}, lambda: (np.ones(3),)) == "yes"
