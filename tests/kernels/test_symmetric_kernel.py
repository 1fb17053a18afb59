"""The kernel of symmetric products in interpret mode against float64; lowering for CUDA. Nothing here
runs on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_lowering import cuda_text

from nanochat_jax.config import GroupConfig, OptConfig
from nanochat_jax.kernels import dispatch, symmetric, symmetric_pallas
from nanochat_jax.optim import muon
from nanochat_jax.optim.build import direction

# jax >= 0.11 deprecates lowering Pallas through Triton; when it goes, "auto" falls back.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

# One tile, part of one, several with a shorter last one, stacks.
SHAPES = [(5, 7), (16, 16), (40, 130), (3, 20, 48), (130, 33), (300, 70)]
gram = jax.jit(symmetric.gram, static_argnums=1)


def case(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize(("dtype", "shape"), [
    (jnp.bfloat16, (300, 70)), (jnp.float32, (2, 2, 17, 9)),
    *(pytest.param(dtype, shape, marks=pytest.mark.slow) for dtype in (jnp.bfloat16, jnp.float32) for shape in SHAPES),
])  # fmt: skip
def test_gram_in_float64(impl, dtype, shape):
    x = case(shape, dtype)
    wide = np.asarray(x, np.float64)
    exact, size = (a @ np.swapaxes(a, -1, -2) for a in (wide, np.abs(wide)))
    got = gram(x, impl)
    assert got.shape == exact.shape and got.dtype == dtype
    rounding = 0 if dtype == jnp.float32 else 2.0**-8
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= rounding * np.abs(exact) + 1e-6 * size)
    if impl == "interpret":
        np.testing.assert_array_equal(got, got.mT)


@pytest.mark.parametrize("shape", [(2, 150, 150)])
def test_products_of_polynomials(shape):
    """A^2 and (A^2 + A) A of a Gram matrix, in float64."""
    a = case(shape)
    a = a @ a.mT / shape[-1]
    b = a @ a + a
    for x, y in ((a, a), (b, a)):
        got = symmetric.commuting(x, y, "interpret")
        exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
        np.testing.assert_array_equal(got, got.mT)


def test_a_product_that_is_not_symmetric_would_show():
    """The kernel mirrors what it computes: below the diagonal it repeats what is above."""
    x, y = case((32, 32)), case((32, 32)) + 1
    got = symmetric.commuting(x, y, "interpret")
    upper = np.triu(np.asarray(x @ y.mT))
    np.testing.assert_allclose(got, upper + np.triu(upper, 1).T, rtol=1e-5, atol=1e-5)


def test_every_pair_of_tiles_once():
    """The arithmetic of a pair's number, for as many tiles as 30000 rows have and around powers of two."""
    tiles, pair = 240, jax.jit(symmetric_pallas.pair)
    i, j = pair(jnp.arange(tiles * (tiles + 1) // 2))
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [
        (a, b) for b in range(tiles) for a in range(b + 1)
    ]
    for column in (2**9, 2**10 - 1, 2**10, 1447):
        for p, want in (
            (column * (column + 1) // 2, (0, column)),
            (column * (column + 3) // 2, (column, column)),
        ):
            assert tuple(int(v) for v in pair(jnp.int32(p))) == want


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "span"), [((40, 24), 1), ((2, 20, 48), 3)])
def test_newton_schulz_on_the_kernel(shape, span):
    x = case(shape)
    got, want = (
        jax.jit(lambda x, impl=impl: muon.newton_schulz(x, 5, span=span, impl=impl))(x)
        for impl in ("interpret", "reference")
    )
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_off_gpu_auto_is_the_product_as_before(dtype):
    x = case((3, 20, 48), dtype)
    for y in (x, x.mT):
        np.testing.assert_array_equal(symmetric.gram(y), muon.dot(y, y.mT))
    square = x @ x.mT
    np.testing.assert_array_equal(symmetric.commuting(square, square), muon.dot(square, square))


def test_where_the_kernel_is_chosen(monkeypatch):
    """opt.matrix.ns_impl = auto on a machine that claims a GPU: bfloat16 of at least 1024 rows."""
    with pytest.raises(ExceptionGroup) as caught:
        symmetric.gram(case((16, 16)), "pallas")
    assert "made for GPUs, this is cpu" in str(caught.value.exceptions[0])
    with pytest.raises(ExceptionGroup) as caught:
        symmetric.gram(case((16, 16), jnp.float16), "interpret")
    assert "tensor cores need bfloat16 or float32" in str(caught.value.exceptions[0])
    calls = []

    def kernel(x, y):
        calls.append((x.shape, y is None))
        return symmetric._reference(x, y)

    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "refuse", lambda check: None)
    monkeypatch.setattr(symmetric, "_pallas", kernel)

    def trace(shape, **changes):
        group = GroupConfig(name="muon", steps=1, **{"ns_dtype": "bfloat16"} | changes)
        tx, params = (
            direction("matrix", OptConfig(matrix=group)),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
        jax.eval_shape(lambda g: tx.update({"w": g}, tx.init({"w": g}), {"w": g}), params)
        made = list(calls)
        calls.clear()
        return made

    assert trace((2, 1024, 4096)) == [((2, 1024, 4096), True), ((2, 1024, 1024), False)]
    assert trace((4096, 2048)) == [((2048, 4096), True), ((2048, 2048), False)]
    assert trace((1000, 4096)) == [] and trace((1024, 4096), ns_dtype="float32") == []
    assert trace((1024, 4096), ns_impl="reference") == []


def test_the_check_of_the_probe(monkeypatch):
    monkeypatch.setattr(symmetric, "_pallas", symmetric.IMPLS["interpret"])
    symmetric.check_on_device()
    monkeypatch.setattr(symmetric, "_pallas", lambda x, y: symmetric._reference(x, y).at[0, 1, 0].add(1))
    with pytest.raises(ValueError, match="wrong product of 256 x 512"):
        symmetric.check_on_device()

    def crooked(x, y):
        made = symmetric._reference(x, y)
        least = jnp.unravel_index(jnp.argmin(jnp.abs(made)), made.shape)
        return made.at[least].add(2e-3)  # within the tolerance, but its mirror image stays

    monkeypatch.setattr(symmetric, "_pallas", crooked)
    with pytest.raises(ValueError, match="is not symmetric"):
        symmetric.check_on_device()


def test_sharded_stack_equals_the_whole():
    """Inside shard_map each device multiplies its own matrices."""
    mesh = jax.make_mesh((8,), ("layer",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, x = jax.sharding.PartitionSpec("layer"), case((8, 20, 24))
    run = jax.shard_map(
        lambda x: symmetric.gram(x, "interpret"), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(run)(x), gram(x, "interpret"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024, 4096), (3, 300, 200)])
def test_lowers_for_cuda(dtype, shape):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert "triton" in cuda_text(lambda x: symmetric_pallas.dot(x, x), x)
    square = jax.ShapeDtypeStruct((2, 256, 256), dtype)
    assert "triton" in cuda_text(symmetric_pallas.dot, square, square)
