"""The FP4 kernels' own code in interpret mode: nearest rounding against ml_dtypes, stochastic rounding
against the plain form bit by bit, values and products in float64; lowering for CUDA. Nothing runs on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from cuda_lowering import cuda_text

from nanochat_jax.config import Fp4Config
from nanochat_jax.kernels import dispatch, fp4, fp4_pallas, triton
from nanochat_jax.quant import fp4_packed
from nanochat_jax.quant.matmul import matmul

# jax >= 0.11 deprecates lowering Pallas through Triton; when it goes, "auto" falls back.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

SCALE_TYPES = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
# Rows that are no multiple of a tile, one block only, several tiles, leading axes.
SHAPES = {"nvfp4": [(1, 16), (3, 48), (2, 5, 512)], "mxfp4": [(5, 96), (40, 256)]}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
cases = pytest.mark.parametrize(("name", "shape"), CASES)
quantize = jax.jit(fp4.quantize_packed, static_argnums=(1, 3))
levels = jax.jit(fp4.scaled_levels, static_argnames=("name", "tiles", "impl"))
dequantize = jax.jit(fp4.dequantize_packed, static_argnums=(1, 2, 3))


def spread(shape, seed=0):
    """Normal entries whose sizes differ by block, with zeros, a block of zeros, ties and an outlier."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, (*shape[:-1], 1))
    flat = v.reshape(-1)
    flat[:16] = np.resize([6, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5, -5, 0, -0.0], 16)
    if flat.size > 64:
        flat[32:64], flat[-1] = 0, 500
    return v.astype(np.float32)


def oracle(v, name):
    """(codes, bits of the scales) by the formats' definitions with ml_dtypes; rows of blocks."""
    blocks = v.reshape(-1, fp4.FORMATS[name])
    top = np.abs(blocks).max(-1, keepdims=True)
    if name == "nvfp4":
        enlarge = np.minimum(np.float32(6 * 448) / top.max(), np.float32(2.0**116))
        wanted = np.clip(top / np.float32(6) * enlarge, np.float32(2**-9), np.float32(448))
        unit = np.float32(1) / enlarge
    else:
        wanted, unit = np.exp2(np.frexp(np.maximum(top, 1e-30))[1] - 3.0), np.float32(1)
    scales = np.where(top == 0, np.float32(1), wanted.astype(np.float32)).astype(SCALE_TYPES[name])
    codes = (blocks / (scales.astype(np.float32) * unit)).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes.reshape(v.shape), scales.view(np.uint8).reshape(*v.shape[:-1], -1)


@cases
@pytest.mark.parametrize("impl", ["reference", "interpret"])
def test_nearest_is_the_formats_definition_bit_for_bit(name, shape, impl):
    v = spread(shape)
    codes, scales = oracle(v, name)
    got = quantize(v, name, None, impl)
    assert got.codes.shape == (*shape[:-1], shape[-1] // 2) and got.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(got.codes, codes[..., 0::2] | (codes[..., 1::2] << 4))
    np.testing.assert_array_equal(np.asarray(got.scales).view(np.uint8), scales)


def same(got, want):
    """Equal bits, the sign of zero included."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@functools.partial(jax.jit, static_argnums=(1, 3))
def all_of(v, name, key, impl):
    return fp4.quantize_packed(v, name, key, impl), fp4.scaled_levels(v, name, key, impl=impl)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("nvfp4", (3, 48), jnp.float32),
        ("mxfp4", (40, 64), jnp.bfloat16),
        *(pytest.param(name, shape, jnp.float32, marks=pytest.mark.slow) for name, shape in CASES),
    ],
)
def test_stochastic_rounding_has_the_bits_of_the_reference(name, shape, dtype, key):
    v = jnp.asarray(spread(shape, 1), dtype)
    same(all_of(v, name, key, "interpret"), all_of(v, name, key, "reference"))


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_stochastic_rounding_is_unbiased(name):
    """The mean over keys is the value, within 5 standard errors."""
    v = jnp.asarray(np.random.default_rng(3).normal(size=(8, 64)), jnp.float32)
    draws = 256

    @jax.jit
    def one(key):
        packed = fp4.quantize_packed(v, name, key, "interpret")
        return fp4.dequantize_packed(packed, name, impl="reference")

    values = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(4), draws)), np.float64)
    # Sums of 16 entries: a single one may have a chance of 1 in 1000 for the other level, and never take it.
    sums = (values - np.asarray(v, np.float64)).reshape(draws, 32, 16).sum(-1)
    assert np.all(np.abs(sums.mean(0)) <= 5 * sums.std(0) / np.sqrt(draws))
    assert values.std(0).mean() > 0.01


@pytest.mark.parametrize(("name", "bad"), [("nvfp4", np.nan), ("nvfp4", np.inf), ("mxfp4", np.nan)])
@pytest.mark.slow
def test_what_is_not_finite_stays_visible(name, bad):
    v = spread((3, 48) if name == "nvfp4" else (5, 96))
    v[2, 5] = bad
    got, want = (quantize(v, name, None, impl) for impl in ("interpret", "reference"))
    np.testing.assert_array_equal(
        np.asarray(got.scales).astype(np.float32), np.asarray(want.scales).astype(np.float32)
    )
    np.testing.assert_array_equal(
        dequantize(got, name, jnp.float32, "interpret"), dequantize(want, name, jnp.float32, "reference")
    )
    assert np.isnan(dequantize(got, name, jnp.float32, "interpret")[2, 5])


def random_blocks(name, rows, width):
    """(packed blocks, their values in float64) of random codes and scales."""
    rng, block = np.random.default_rng(rows), fp4.FORMATS[name]
    codes = rng.integers(0, 256, (rows, width // 2), np.uint8)
    scales = (2.0 ** rng.integers(-3, 4, (rows, width // block))).astype(SCALE_TYPES[name])
    levels = np.stack([codes & 15, codes >> 4], -1).reshape(rows, width).view(ml_dtypes.float4_e2m1fn)
    values = levels.astype(np.float64) * np.repeat(scales.astype(np.float64), block, -1)
    return fp4.Blocks(jnp.asarray(codes), jnp.asarray(scales), jnp.float32(0.5)), 0.5 * values


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize(("name", "sizes"), [("nvfp4", (70, 16, 48)), ("mxfp4", (3, 65, 96))])
def test_products_of_packed_operands(name, sizes, impl):
    M, N, K = sizes
    (a, x), (b, y) = (random_blocks(name, rows, K) for rows in (M, N))
    got = jax.jit(fp4.packed_dot, static_argnums=(2, 3))(a, b, name, impl)
    assert got.shape == (M, N) and got.dtype == jnp.float32
    assert np.all(np.abs(got - x @ y.T) <= 1e-6 * (np.abs(x) @ np.abs(y).T) + 1e-30)


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize(("name", "sizes"), [("nvfp4", (3, 16, 48)), ("mxfp4", (18, 96, 160))])
def test_products_with_scales_of_square_tiles(name, sizes, impl):
    """One scale for a tile of the right operand is that scale for each of its rows."""
    M, N, K = sizes
    (a, x), (b, _) = (random_blocks(name, rows, K) for rows in (M, N))
    tiles = b._replace(scales=b.scales[:: fp4.FORMATS[name]])
    assert len(np.unique(np.asarray(tiles.scales).astype(np.float32))) > 1
    rows = b._replace(scales=jnp.repeat(tiles.scales, fp4.FORMATS[name], 0))
    y = np.asarray(fp4.dequantize_packed(rows, name, impl="reference"), np.float64)
    got = jax.jit(fp4.packed_dot, static_argnums=(2, 3))(a, tiles, name, impl)
    assert np.all(np.abs(got - x @ y.T) <= 1e-6 * (np.abs(x) @ np.abs(y).T) + 1e-30)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("nvfp4", (3, 48), jnp.float32), ("mxfp4", (40, 256), jnp.bfloat16), ("nvfp4", (9, 512), jnp.bfloat16)],
)
def test_dequantize(name, shape, dtype):
    packed, values = random_blocks(name, *shape)
    got = dequantize(packed, name, dtype, "interpret")
    same(got, dequantize(packed, name, dtype, "reference"))
    np.testing.assert_array_equal(np.asarray(got, np.float64), values)  # 6 bits: exact in bfloat16


def test_refusals():
    v = np.ones((4, 48), np.float32)
    with pytest.raises(ValueError, match="mxfp4 needs a multiple of 32, got an axis of 48"):
        fp4.quantize_packed(v, "mxfp4", impl="interpret")
    with pytest.raises(ExceptionGroup) as caught:
        fp4.quantize(v[:, :32], "nvfp4", tiles=True, impl="interpret")
    assert "square tiles are left to plain XLA" in str(caught.value.exceptions[0])
    with pytest.raises(ExceptionGroup) as caught:
        fp4.quantize(v, "nvfp4", impl="pallas")
    assert "made for GPUs, this is cpu" in str(caught.value.exceptions[0])
    with pytest.raises(ValueError, match="operands have 48 and 32 inputs"):
        a, b = (fp4.Blocks(jnp.ones((4, n), jnp.uint8), v[:, :1], v[0, 0]) for n in (24, 16))
        fp4.packed_dot(a, b, "nvfp4")


# --- dispatch


@pytest.mark.slow
def test_the_check_of_the_probe(monkeypatch):
    """It passes on the kernels' own code, and fails when they are wrong."""
    for table, name in (
        (fp4.QUANTIZE, "_pallas"),
        (fp4.DEQUANTIZE, "_dequantize_pallas"),
        (fp4.DOT, "_dot_pallas"),
    ):
        monkeypatch.setattr(fp4, name, table["interpret"])
    fp4.check_on_device()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="wrong product in nvfp4"):
        patch.setattr(fp4, "_dot_pallas", lambda *operands: 1.001 * fp4._dot_reference(*operands))
        fp4.check_on_device()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="wrong values of nvfp4"):
        patch.setattr(fp4, "_dequantize_pallas", lambda *a: fp4._dequantize_reference(*a) * 1.001)
        fp4.check_on_device()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="wrong packed in nvfp4, nearest"):
        patch.setattr(fp4, "_pallas", lambda v, *rest: fp4._reference(1.01 * v, *rest))
        fp4.check_on_device()


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_a_passing_probe_selects_the_kernel_in_training(name, key, monkeypatch):
    """model.fp4.impl = auto on a machine that claims a GPU: activations and both backward products round in
    the kernel, square tiles of weights in plain XLA; "reference" leaves the kernel alone."""
    calls = []

    def kernel(v, name, key, tiles, result):
        if tiles:
            raise NotImplementedError
        calls.append(v.shape)
        return fp4.QUANTIZE["reference"](v, name, key, tiles, result)

    monkeypatch.setattr(dispatch, "refuse", lambda check: None)
    monkeypatch.setitem(fp4.QUANTIZE, "pallas", kernel)

    def trace(impl):
        how = dataclasses.replace(Fp4Config(stochastic="both"), impl=impl)
        run = lambda x, w: matmul(x, (w,), name, name, 0, name, how, key)[0]  # noqa: E731
        jax.eval_shape(lambda x, w: jax.vjp(run, x, w)[1](run(x, w)), jnp.ones((24, 32)), jnp.ones((32, 64)))

    trace("auto")
    tokens = -(-24 // fp4.FORMATS[name]) * fp4.FORMATS[name]
    assert calls[0] == (24, 32) and {(24, 64), (32, tokens), (64, tokens)} <= set(calls)
    calls.clear()
    trace("reference")
    assert not calls


def test_a_passing_probe_selects_the_packed_product(monkeypatch):
    """infer.impl = auto on a machine that claims a GPU, one of several: packed weights lie on one. Many rows are
    left to plain XLA."""
    calls = []
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "probe", lambda check: "")
    monkeypatch.setattr(fp4, "_dot_pallas", lambda a, b, name: calls.append(len(a.codes)) or jnp.ones((1, 1)))
    assert jax.device_count() == 8
    for rows in (1, fp4.MAX_ROWS, fp4.MAX_ROWS + 1):
        a, b = (
            fp4.Blocks(jnp.zeros((n, 16), jnp.uint8), jnp.ones((n, 1), jnp.float8_e8m0fnu), jnp.float32(1))
            for n in (rows, 2)
        )
        jax.eval_shape(functools.partial(fp4.packed_dot, name="mxfp4"), a, b)
        jax.eval_shape(functools.partial(fp4.packed_dot, name="mxfp4", impl="reference"), a, b)
    assert calls == [1, fp4.MAX_ROWS]


def test_kernels_leave_split_arrays_alone(monkeypatch):
    """On several devices only inside a shard_map over all of them: a kernel hides its operands' layout."""
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "probe", lambda check: "")
    assert jax.device_count() == 8
    with pytest.raises(NotImplementedError, match="arrays may be split over 8 devices"):
        dispatch.refuse("a:b")
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec, seen = jax.sharding.PartitionSpec("a"), []
    for axes in ({"a", "b"}, {"a"}):
        split = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
        jax.eval_shape(jax.jit(split(lambda x: seen.append(dispatch.whole()) or x)), jnp.ones((8,)))
    assert seen == [True, False]
    monkeypatch.setattr(dispatch, "devices", lambda: jax.devices()[:1])
    dispatch.refuse("a:b")


def test_sharded_rows_of_mxfp4_are_those_of_the_whole():
    """Inside shard_map each device quantizes its rows; nearest rounding has no scale over all of them."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, v = jax.sharding.PartitionSpec("rows"), spread((40, 256))
    run = jax.shard_map(
        lambda v: fp4.quantize_packed(v, "mxfp4", impl="interpret")[:2],
        mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False,
    )  # fmt: skip
    same(jax.jit(run)(v), quantize(v, "mxfp4", None, "reference")[:2])


# --- the instructions that a card runs and interpret mode does not


def test_codes_are_unpacked_as_in_interpret_mode(monkeypatch):
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    want = [np.asarray(part) for part in fp4_pallas._unpacked(jnp.asarray(codes), plain=True)]
    monkeypatch.setattr(fp4_pallas, "plt", ptx.Primitives())
    for got, plain in zip(fp4_pallas._unpacked(codes, plain=False), want, strict=True):
        np.testing.assert_array_equal(got.astype(np.float32), plain.astype(np.float32))


def test_quotients_by_a_corrected_reciprocal_are_exactly_rounded(monkeypatch):
    """Against NumPy's division, among them quotients an ulp beside the middles between levels."""
    rng = np.random.default_rng(0)
    b = rng.integers(127 << 23, 128 << 23, 200_000).astype(np.uint32).view(np.float32)
    middles = rng.choice(np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1 / 3]), len(b))
    a = (b * middles).view(np.uint32) + rng.integers(-1, 2, len(b)).astype(np.uint32)
    a = np.concatenate([a[::2].view(np.float32), 2.0 ** rng.uniform(-99, 3, len(b) // 2).astype(np.float32)])
    monkeypatch.setattr(triton, "plt", ptx.Primitives())
    monkeypatch.setattr(triton, "jnp", np)
    inverse = triton.divide(np.ones_like(b), b, interpret=False)
    np.testing.assert_array_equal(triton.divide_many(a, b, inverse, interpret=False), a / b)


@pytest.mark.parametrize("noisy", [False, True])
def test_codes_are_found_as_in_interpret_mode(noisy, monkeypatch):
    """Near the middles between levels and at the levels, where an ulp decides."""
    rng = np.random.default_rng(0)
    near = rng.choice(np.float32([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7]), 50_000)
    a = near + rng.choice(np.float32([0, 0, 1e-3, -1e-3, 2.0**-22, -(2.0**-22)]), len(near)) * near
    bits = rng.integers(0, 2**32, len(near), dtype=np.uint32)

    def codes(array, interpret):
        if noisy:
            return fp4_pallas._stochastic(array(a), array(bits), interpret)
        return fp4_pallas._nearest(array(a), interpret)

    want = np.asarray(codes(jnp.asarray, True))
    monkeypatch.setattr(triton, "plt", ptx.Primitives())
    monkeypatch.setattr(triton, "jnp", np)
    np.testing.assert_array_equal(np.asarray(codes(np.asarray, False)), want)


# --- lowering


@pytest.mark.parametrize("name", fp4.FORMATS)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "width", "dtype"), [(100, 11 * 256, jnp.bfloat16), (8, 96, jnp.float32)])
def test_quantize_lowers_for_cuda(name, noisy, packed, rows, width, dtype):
    shapes = [jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((2,), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((2,), jnp.uint32)] if noisy else []
    text = cuda_text(lambda v, n, s=None: fp4_pallas.quantize(v, n, name, s, packed), *shapes)
    assert "triton" in text
    assert ("div.rn.f32" in text) == (name == "nvfp4" or noisy)  # powers of two need no division


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_the_other_kernels_lower_for_cuda(name):
    u8 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint8)  # noqa: E731
    block = fp4.FORMATS[name]
    codes, scales = u8(40, 384), u8(40, 768 // block)
    tensor = jax.ShapeDtypeStruct((1,), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert "triton" in cuda_text(
            lambda c, s, t, dtype=dtype: fp4_pallas.dequantize(c, s, t, name, dtype), codes, scales, tensor
        )
    assert "triton" in cuda_text(lambda c, s: fp4_pallas.dot((c, s), (c, s), name), codes, scales)


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_packed_weights_are_not_unpacked_on_a_gpu(name, monkeypatch):
    """The program for CUDA hands packed bytes to the kernel: no array of it has the matrix's size."""
    monkeypatch.setattr(dispatch, "need_gpu", lambda interpret=False: None)
    m, n = 160, 224
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, m), (m, n)))

    def program(impl):
        leaf = jax.eval_shape(lambda w: fp4_packed.pack(w, name, "reference").replace(impl=impl), w)
        return cuda_text(lambda x, w: fp4_packed.matmul(x, w, name), x, leaf)

    unpacked = (f"tensor<{n}x{m}x", f"tensor<{m}x{n}x")
    text = program("pallas")
    assert "triton" in text and f"tensor<{n}x{m // 2}xui8>" in text
    assert not any(shape in text for shape in unpacked)
    assert any(shape in program("reference") for shape in unpacked)
