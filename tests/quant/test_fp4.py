"""FP4 numerics: levels, packing, scales and rotations against ml_dtypes, scipy and float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import validation
from nanochat_jax.kernels import fp4
from nanochat_jax.quant import fp4_products

E2M1 = ml_dtypes.float4_e2m1fn
SCALE_TYPES = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
QUANTIZE = jax.jit(fp4.quantize, static_argnames=("name", "tiles"))
DEQUANTIZE = jax.jit(fp4.dequantize, static_argnums=(1, 2))


def oracle(v, name, tiles=False):
    """(code bits, scale bits, float64 values) from the formats' definitions, in float32 loops."""
    block = fp4.FORMATS[name]
    v = np.asarray(v, np.float32)
    rows, columns = (block if tiles else 1), block
    codes = np.zeros(v.shape, np.uint8)
    values = np.zeros(v.shape)
    scales = np.zeros((v.shape[0] // rows, v.shape[1] // columns), SCALE_TYPES[name])
    top = np.abs(v).max()
    s_enc = np.float32(min(np.float64(np.float32(6 * 448) / top) if top else np.inf, 2.0**116))
    s_dec = np.float32(1) / s_enc if name == "nvfp4" else np.float32(1)
    for i, j in np.ndindex(scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        amax = np.abs(v[part]).max()
        if amax == 0:
            scale = np.float32(1)
        elif name == "nvfp4":
            scale = np.clip(amax / np.float32(6) * s_enc, np.float32(2**-9), np.float32(448))
        else:
            scale = np.float32(2.0 ** max(np.frexp(np.float64(amax))[1] - 1 - 2, -126))
        scales[i, j] = scale.astype(SCALE_TYPES[name])
        unit = scales[i, j].astype(np.float32) * s_dec
        levels = (v[part] / unit).astype(E2M1)
        codes[part] = levels.view(np.uint8)
        values[part] = levels.astype(np.float64) * np.float64(scales[i, j]) * np.float64(s_dec)
    return codes, scales.view(np.uint8), values


def error(approximate, exact):
    exact = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(approximate, np.float64) - exact) / np.linalg.norm(exact))


# --- levels


def twelve_bits():
    """All numbers with 12 significant bits and 2^-5 <= |z| <= 8, zeros, and some beyond the range."""
    positive = np.concatenate(
        [np.arange(2**11, 2**12) * 2.0 ** (e - 11) for e in range(-5, 3)] + [[0, 8, 100]]
    )
    return np.concatenate([positive, -positive]).astype(np.float32)


def test_nearest_is_the_cast():
    z = np.concatenate([twelve_bits(), np.random.default_rng(0).normal(size=20000).astype(np.float32) * 3])
    got = fp4.encode(fp4.nearest(jnp.asarray(z)))
    np.testing.assert_array_equal(got, z.astype(E2M1).view(np.uint8))


def test_decode_is_the_inverse_of_encode():
    codes = np.arange(16, dtype=np.uint8)
    levels = fp4.decode(jnp.asarray(codes))
    np.testing.assert_array_equal(levels, codes.view(E2M1).astype(np.float32))
    np.testing.assert_array_equal(fp4.encode(levels), codes)  # -0 included


def test_stochastic_takes_the_two_neighbours_and_is_right_on_average():
    z = np.linspace(-6, 6, 97).astype(np.float32)
    draws = 4096
    u = fp4.uniform(jax.random.key(1), (draws, 97))
    got = np.asarray(fp4.stochastic(jnp.broadcast_to(z, (draws, 97)), u), np.float64)
    levels = np.unique(np.concatenate([fp4.LEVELS, -fp4.LEVELS]))
    below = levels[np.searchsorted(levels, z, side="right") - 1]
    above = levels[np.searchsorted(levels, z, side="left")]
    assert np.all((got == below) | (got == above))
    spread = np.sqrt((above - z) * (z - below))
    assert np.all(np.abs(got.mean(0) - z) <= 4 * spread / np.sqrt(draws) + 1e-9)
    np.testing.assert_allclose(got.std(0), spread, atol=0.06)
    assert np.all(np.abs(fp4.stochastic(jnp.full((8,), 7.0), u[0, :8])) == 6)


@pytest.mark.parametrize("u", [2.0**-21, 1 - 2.0**-21])
def test_stochastic_keeps_exact_levels(u):
    levels = fp4.decode(jnp.arange(16, dtype=jnp.uint8))
    np.testing.assert_array_equal(fp4.stochastic(levels, jnp.full((16,), u)), levels)


def test_uniform_numbers_are_uniform_and_unrelated():
    a, b = (np.asarray(fp4.uniform(jax.random.key(k), (128, 512)), np.float64) for k in (0, 1))
    assert a.min() >= 2.0**-21 and a.max() <= 1 - 2.0**-21
    counts = np.histogram(a, 64, (0, 1))[0]
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 4 * np.sqrt(2 * 63)
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])]
    assert all(abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4 / 256 for x, y in pairs)


def test_nibble_order():
    assert fp4.pack(jnp.array([1, 2, 15, 0], jnp.uint8)).tolist() == [0x21, 0x0F]
    with pytest.raises(ValueError, match="two codes share a byte"):
        fp4.pack(jnp.zeros((3,), jnp.uint8))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=24, max_size=24))
def test_unpack_is_the_inverse_of_pack(codes):
    codes = np.array(codes, np.uint8).reshape(3, 8)
    packed = fp4.pack(jnp.asarray(codes))
    assert packed.shape == (3, 4) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(fp4.unpack(packed), codes)


# --- blocks


def test_the_formats_are_those_of_the_settings():
    assert fp4.FORMATS == validation.FP4_BLOCK


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("name", fp4.FORMATS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(-25, 30), spread=st.sampled_from((0.0, 1.0, 4.0)))
def test_nearest_quantizer_equals_the_definition_bit_for_bit(name, tiles, seed, size, spread):
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(64, 64)) * 10.0 ** (size + spread * rng.normal(size=(64, 1)))
    v = np.clip(v, -1e38, 1e38).astype(np.float32)
    v[np.abs(v) < 1e-34] = 0  # no subnormal levels, see the header of fp4
    v[:32, :32] = 0
    got = QUANTIZE(jnp.asarray(v), name=name, tiles=tiles)
    codes, scales, values = oracle(v, name, tiles)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(np.asarray(got.scales).view(np.uint8), scales)
    np.testing.assert_allclose(DEQUANTIZE(got, name, tiles), values, rtol=3e-7)
    short, tensor = fp4.scaled_levels(jnp.asarray(v), name, tiles=tiles)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(short, np.float64) * float(tensor), values, rtol=3e-7)


def test_scales_next_to_ties_are_rounded_after_an_exact_division():
    """A product with the reciprocal of 6 would reach the tie from below and round up."""
    ties = np.concatenate([np.arange(17, 32, 2) * 2.0**e for e in range(-4, 4)]).astype(np.float32)
    maxima = np.concatenate(
        [np.nextafter(6 * ties, np.float32(0)), 6 * ties, [2688]]
    )  # 2688: no tensor scale
    v = np.zeros((len(maxima), 16), np.float32)
    v[:, 3] = maxima
    got = QUANTIZE(jnp.asarray(v), name="nvfp4")
    assert float(got.tensor) == 1
    np.testing.assert_array_equal(np.asarray(got.scales).view(np.uint8), oracle(v, "nvfp4")[1])


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_powers_of_ten_at_both_ends_and_zeros(name):
    for size in (1e30, 1e-30, 3e-38, 0.0):
        v = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)).clip(-3, 3) * size, jnp.float32)
        back = DEQUANTIZE(QUANTIZE(v, name=name), name)
        if size > 1e-36:
            assert error(back, v) < 0.15
        else:
            assert np.all(np.isfinite(back)) and float(jnp.abs(back).max()) <= size * 4
    zero = QUANTIZE(jnp.zeros((4, 32)), name=name)
    assert np.all(np.asarray(zero.scales, np.float32) == 1) and not np.any(zero.codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", fp4.FORMATS)
def test_nan_is_not_hidden(name, bad):
    v = jnp.ones((2, 64)).at[0, 3].set(bad)
    back = np.asarray(DEQUANTIZE(QUANTIZE(v, name=name), name))
    assert np.all(np.isnan(back[0, :16]))
    if name == "mxfp4":
        assert np.all(back[1] == 1)


def test_blocks_must_divide():
    with pytest.raises(
        ValueError, match=r"mxfp4 needs a multiple of 32, got an axis of 48 in shape \(64, 48\)"
    ):
        fp4.quantize(jnp.ones((64, 48)), "mxfp4")
    with pytest.raises(ValueError, match="nvfp4 needs a multiple of 16, got an axis of 24"):
        fp4.quantize(jnp.ones((24, 48)), "nvfp4", tiles=True)


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_tiles_of_the_transpose_are_the_transposed_tiles(name, key):
    w = jax.random.normal(key, (32, 96))
    a, b = QUANTIZE(w, name=name, tiles=True), QUANTIZE(w.T, name=name, tiles=True)
    np.testing.assert_array_equal(a.codes.T, b.codes)
    np.testing.assert_array_equal(np.asarray(a.scales, np.float32).T, np.asarray(b.scales, np.float32))


@pytest.mark.parametrize("name", fp4.FORMATS)
def test_stochastic_blocks_are_right_on_average(name):
    """Every element, the largest of a block included: nothing is clipped."""
    v = jax.random.normal(jax.random.key(2), (4, 64)) * jnp.array([[1.0], [1e-3], [1e4], [7.0]])
    draws = 3000
    keys = jax.random.split(jax.random.key(3), draws)
    back = jax.jit(jax.vmap(lambda k: fp4.dequantize(fp4.quantize(v, name, k), name)))(keys)
    back = np.asarray(back, np.float64)
    sigma = back.std(0) / np.sqrt(draws)
    assert np.all(np.abs(back.mean(0) - v) <= 4.5 * sigma + 1e-5 * np.abs(v))  # 256 elements: 4.5


# Relative errors on N(0, 1), measured with independent code when the formats were chosen.
@pytest.mark.parametrize(
    ("name", "tiles", "rounds", "expected"),
    [
        ("nvfp4", False, False, 0.0951), ("nvfp4", True, False, 0.1114), ("mxfp4", False, False, 0.1150),
        ("mxfp4", False, True, 0.1677), ("nvfp4", False, True, 0.1489),
    ],
)  # fmt: skip
def test_error_on_gaussian_data(name, tiles, rounds, expected):
    v = jax.random.normal(jax.random.key(0), (512, 512))
    back = DEQUANTIZE(
        QUANTIZE(v, name=name, key=jax.random.key(1) if rounds else None, tiles=tiles), name, tiles
    )
    np.testing.assert_allclose(error(back, v), expected, rtol=0.02)


def test_noise_does_not_depend_on_the_devices(key):
    v = jax.random.normal(key, (64, 64))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(v, jax.NamedSharding(mesh, jax.P("data", None)))
    for name in fp4.FORMATS:
        one, four = (QUANTIZE(part, name=name, key=key) for part in (v, split))
        np.testing.assert_array_equal(one.codes, four.codes)
        assert np.any(one.codes != QUANTIZE(v, name=name, key=jax.random.key(9)).codes)


# --- rotation


@pytest.mark.parametrize("width", [1, 2, 16, 32, 64, 128])
def test_hadamard_equals_scipy_and_is_orthogonal(width):
    matrix = fp4_products.hadamard(width)
    np.testing.assert_allclose(matrix, scipy.linalg.hadamard(width) / np.sqrt(width), rtol=1e-6)
    np.testing.assert_allclose(matrix.astype(np.float64) @ matrix.T, np.eye(width), atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "fixed", "random"])
@pytest.mark.parametrize("width", [16, 64])
def test_rotation_keeps_norms_and_products_and_has_an_inverse(kind, width, key):
    sign = fp4_products.signs(kind, width, key)
    assert set(np.asarray(sign).tolist()) == ({1.0} if kind == "none" else {-1.0, 1.0})
    a, b = jax.random.normal(key, (2, 8, 128))
    ra, rb = (np.asarray(fp4_products.rotate(v, sign), np.float64) for v in (a, b))
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(np.linalg.norm(ra, axis=1), np.linalg.norm(a64, axis=1), rtol=1e-5)
    np.testing.assert_allclose(ra @ rb.T, a64 @ b64.T, atol=1e-4)
    np.testing.assert_allclose(fp4_products.unrotate(fp4_products.rotate(a, sign), sign), a, atol=1e-5)
    factor = np.diag(sign) @ scipy.linalg.hadamard(width) / np.sqrt(width)
    np.testing.assert_allclose(ra[:, :width], a64[:, :width] @ factor, atol=1e-5)


def test_signs():
    same = [fp4_products.signs("fixed", 64, k) for k in (None, jax.random.key(1), jax.random.key(2))]
    assert all(np.array_equal(s, same[0]) for s in same) and abs(float(same[0].sum())) < 32
    a, b = (fp4_products.signs("random", 64, jax.random.key(k)) for k in (1, 2))
    assert np.any(np.asarray(a) != np.asarray(b))
    with pytest.raises(ValueError, match="random signs need a key"):
        fp4_products.signs("random", 64)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_rotation_helps_mxfp4_against_outliers(width):
    """Nearest rounding of products along tokens, some of which are 20 times the others."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 512)).astype(np.float32)
    a[:, rng.choice(512, 16, replace=False)] *= 20
    sign = fp4_products.signs("fixed", width)
    exact = a.astype(np.float64) @ b.T

    def product(turn):
        qa, qb = (DEQUANTIZE(QUANTIZE(turn(jnp.asarray(v)), name="mxfp4"), "mxfp4") for v in (a, b))
        return np.asarray(qa, np.float64) @ np.asarray(qb).T

    assert error(product(lambda v: fp4_products.rotate(v, sign)), exact) < 0.8 * error(
        product(lambda v: v), exact
    )
