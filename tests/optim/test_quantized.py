"""8-bit state against brute force in float64, the wrapped transforms in float32, and byte counts."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_transforms import share_left

from nanochat_jax import parallel
from nanochat_jax import params as params_lib
from nanochat_jax.config import MeshConfig
from nanochat_jax.kernels import int8
from nanochat_jax.optim import lion, muon
from nanochat_jax.optim import quantized as q
from nanochat_jax.types import TrainState

few = hypothesis.settings(max_examples=10, deadline=None)
codes_of = pytest.mark.parametrize("code", int8.CODES)
EPS = 2.0**-22  # a few float32 roundings
# (n, block): whole blocks, a shorter last one, a row shorter than a block, single elements.
SPLITS = st.sampled_from([(64, 16), (70, 32), (5, 80), (3, 1)])
quantize = jax.jit(q.quantize, static_argnums=(1, 2, 4))
dequantize = jax.jit(q.dequantize, static_argnums=(2, 3))


def normal(shape, seed=0, decades=0.0):
    """Normal entries; with `decades` their sizes are spread over that many powers of ten."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** -rng.uniform(0, decades, shape)).astype(np.float32)


def levels(code):
    """Multiples of the scale, float64."""
    return np.arange(-127, 128) if code == "linear" else int8.LEVELS[code].astype(np.float64)


def draw(shape, seed, decades, code):
    x = normal(shape, seed, decades)
    return abs(x) if code == "dynamic_unsigned" else x


def bounds(x, code, top):
    """The levels just below and above each entry of one block, float64."""
    grid = levels(code) * (top / 127 if code == "linear" else top)
    below = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 2)
    return grid[below], grid[below + 1]


# ---- quantize and dequantize


@few
@hypothesis.given(st.integers(0, 2**31), SPLITS, st.sampled_from(int8.CODES), st.floats(0, 8))
def test_every_entry_goes_to_the_nearest_level(seed, split, code, decades):
    n, block = split
    x = draw((2, 3, n), seed, decades, code) * np.float32(10.0 ** (seed % 9 - 4))
    codes, scales = quantize(jnp.asarray(x), block, code)
    assert codes.shape == x.shape and scales.shape == (2, 3, -(-n // block))
    assert codes.dtype == (jnp.int8 if code == "linear" else jnp.uint8)
    got = np.asarray(dequantize(codes, scales, block, code))
    for i in range(0, n, block):
        part, back = x[..., i : i + block].astype(np.float64), got[..., i : i + block]
        top = abs(part).max(-1, keepdims=True)
        grid = levels(code) * (top / 127 if code == "linear" else top)[..., None]
        nearest = abs(part[..., None] - grid).min(-1)
        assert np.all(abs(part - back) <= nearest + 8 * EPS * top)
        if code == "linear":
            assert np.all(abs(part - back) <= np.asarray(scales)[..., i // block, None] / 2 + EPS * top)


@few
@hypothesis.given(
    st.integers(0, 2**31), st.sampled_from([1, 40]), st.sampled_from(int8.CODES), st.floats(0, 8)
)
def test_stochastic_rounding_takes_a_neighbouring_level(seed, n, code, decades):
    x = draw((4, n), seed, decades, code)
    got = np.asarray(dequantize(*quantize(jnp.asarray(x), n, code, jax.random.key(seed)), n, code))
    for row, back in zip(x.astype(np.float64), got, strict=True):
        below, above = bounds(row, code, abs(row).max())
        slack = 8 * EPS * abs(row).max()
        assert np.all((abs(back - below) <= slack) | (abs(back - above) <= slack))


@codes_of
def test_stochastic_rounding_is_unbiased(code):
    count, values = 20_000, np.array([1.0, 0.6, 0.31, 0.1003, 0.0777, 0.012, 3e-4, 2e-7], np.float32)
    if code != "dynamic_unsigned":
        values[1::2] *= -1
    keys = jax.random.split(jax.random.key(3), count // 100)
    rows = jnp.tile(values, (100, 1))
    one = lambda key: dequantize(*quantize(rows, 8, code, key), 8, code)  # noqa: E731
    got = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64).reshape(count, 8)
    below, above = bounds(values.astype(np.float64), code, 1.0)
    sigma = np.sqrt((values - below) * (above - values) / count)
    assert np.all(abs(got.mean(0) - values) <= 4 * sigma + EPS)
    assert np.count_nonzero(got.std(0) > 1e-9) >= 5  # it does round at random
    # nearest would be off by far more
    nearest = np.asarray(dequantize(*quantize(rows[:1], 8, code), 8, code))[0]
    assert np.any(abs(nearest - values) > 8 * sigma + EPS)


def test_noise_is_unrelated_between_elements_and_keys():
    a, b = (np.asarray(int8._uniform(jax.random.key(i), (64, 128))).ravel() for i in (0, 1))
    assert a.min() >= 0 and a.max() < 1
    for u, v in ((a, b), (a[1:], a[:-1]), (a[128:], a[:-128]), (a[::2], a[1::2])):
        assert abs(np.corrcoef(u, v)[0, 1]) < 4 / np.sqrt(len(u))
    counts = np.histogram(a, 16, (0, 1))[0]
    assert np.sum((counts - 512) ** 2 / 512) < 38  # chi-square, 15 degrees of freedom, p = 0.001


@few
@hypothesis.given(
    st.integers(0, 2**31), st.sampled_from(int8.CODES), st.sampled_from([jnp.float32, jnp.bfloat16])
)
def test_requantizing_changes_nothing(seed, code, scale_dtype):
    x = draw((3, 96), seed, 3.0, code)
    if code == "dynamic":  # -1 is not a level of it: a block led by a negative entry shrinks to 0.993
        x[:, ::32] = 10
    first = quantize(jnp.asarray(x), 32, code, None, scale_dtype)
    again = quantize(dequantize(*first, 32, code), 32, code, None, scale_dtype)
    assert first[1].dtype == scale_dtype
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_allclose(first[1].astype(jnp.float32), again[1].astype(jnp.float32), rtol=EPS)


@few
@hypothesis.given(st.integers(0, 2**31), st.sampled_from(int8.CODES))
def test_nested_smaller_blocks_have_smaller_scales(seed, code):
    """So the error bound, a fixed share of the scale, never grows; nor does the mean error here."""
    x = draw((4, 512), seed, 2.0, code)
    errors, previous = [], np.inf
    for block in (512, 64, 8):
        codes, scales = quantize(jnp.asarray(x), block, code)
        wide = np.repeat(np.asarray(scales), block, axis=-1)
        assert np.all(wide <= previous)
        previous = wide
        errors.append(np.mean(abs(dequantize(codes, scales, block, code) - x)))
    assert errors == sorted(errors, reverse=True)


@few
@hypothesis.given(st.integers(0, 2**31), st.sampled_from(int8.CODES))
def test_blocks_are_independent(seed, code):
    n, block = 70, 32
    x = jnp.asarray(draw((2, n), seed, 1.0, code))
    codes, scales = quantize(x, block, code)
    for i in range(0, n, block):
        alone = quantize(x[:, i : i + block], block, code)
        np.testing.assert_array_equal(codes[:, i : i + block], alone[0])
        np.testing.assert_array_equal(scales[:, i // block], alone[1][:, 0])


@codes_of
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38])
def test_zero_blocks_are_exactly_zero(code, tiny):
    x = jnp.concatenate([jnp.full((1, 4), tiny), jnp.ones((1, 4)), jnp.zeros((1, 3))], axis=-1)
    for key in (None, jax.random.key(0)):
        back = dequantize(*quantize(x, 4, code, key), 4, code)
        np.testing.assert_array_equal(back, np.where(np.arange(11) // 4 == 1, 1.0, 0.0)[None])


@codes_of
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_visible(code, bad):
    x = jnp.ones((1, 8)).at[0, 2].set(bad)
    back = np.asarray(dequantize(*quantize(x, 4, code), 4, code))
    assert not np.all(np.isfinite(back[:, :4])) and np.all(back[:, 4:] == 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q.quantize(jnp.ones(4), 4, "tree"), "no code 'tree'; known: linear"),
        (lambda: q.quantize(jnp.ones(4), 0, "linear"), "at least 1 element, got 0"),
        (lambda: q.quantize(jnp.ones([]), 4, "linear"), "got a scalar"),
        (lambda: q.dequantize(jnp.ones(4), jnp.ones(1), 4, "x"), "no code 'x'"),
        (lambda: q.quantize_state(optax.scale_by_adam(), {"mu": "x"}), "no code 'x'"),
        (lambda: q.quantize_state(optax.scale_by_adam(), block=-1), "got -1"),
        (lambda: q.quantize_state(optax.scale_by_adam(), rounding="up"), "no rounding 'up'"),
        (lambda: q.quantize_state(optax.scale_by_adam(), scale_dtype=jnp.int8), "got int8"),
        (lambda: q.quantize_state(optax.sgd(1.0)).init(jnp.ones((2, 2))), "no field mu or nu shaped"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the wrapper

SMALL = {"block": 8, "min_size": 1}
GROUP = {"mlp": {"up": (8, 8, 32), "down": (8, 32, 16)}}


def tree(seed, shapes=GROUP):
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    return {
        "blocks": treedef.unflatten([jnp.asarray(normal(s, seed + 99 * i)) for i, s in enumerate(leaves)])
    }


def layout(state):
    """path -> (shape, dtype name) of every leaf."""
    return {path: (x.shape, x.dtype.name) for path, x in params_lib.flatten(state).items()}


DIRECTIONS = {
    "muon": lambda: muon.scale_by_muon(steps=2),
    "lion": lion.scale_by_lion,
    "adam": optax.scale_by_adam,
}
directions = pytest.mark.parametrize("make", DIRECTIONS.values(), ids=DIRECTIONS)


@pytest.mark.parametrize(
    ("name", "rounding"),
    [("muon", "nearest"), ("lion", "stochastic"), ("adam", "nearest"), ("adam", "stochastic")],
)
def test_equals_the_inner_transform_with_rounded_moments(name, rounding):
    """The wrapper written out: run inner in float32, replace its moments by what storage keeps."""
    inner = DIRECTIONS[name]()
    tx = q.quantize_state(inner, rounding=rounding, seed=5, **SMALL)
    plain, state = inner.init(tree(0)), tx.init(tree(0))

    def stored(name, x, i, count):
        path = params_lib.flatten(tree(0))
        key = jax.random.fold_in(jax.random.key(5), count) if rounding == "stochastic" else None
        key = key if key is None else params_lib.fold_name(key, f"{name}/{list(path)[i]}")
        return q.dequantize(*q.quantize(x, 8, q.ADAM[name], key), 8, q.ADAM[name])

    for i in range(3):
        want, plain = inner.update(tree(i + 1), plain)
        for name in set(q.ADAM) & set(plain._fields):
            leaves, treedef = jax.tree.flatten(getattr(plain, name))
            kept = [stored(name, x, j, jnp.asarray(i + 1)) for j, x in enumerate(leaves)]
            plain = plain._replace(**{name: treedef.unflatten(kept)})
        got, state = tx.update(tree(i + 1), state)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert int(state.count) == i + 1


@directions
def test_small_leaves_are_left_alone_bit_for_bit(make):
    inner, tx = make(), q.quantize_state(make(), min_size=4097)
    plain, state = inner.init(tree(0)), tx.init(tree(0))
    for i in range(3):
        want, plain = inner.update(tree(i + 1), plain)
        got, state = tx.update(tree(i + 1), state)
        jax.tree.map(np.testing.assert_array_equal, (got, state.inner), (want, plain))
    assert jax.tree.leaves(state.scales) == []


def test_layout_of_the_state():
    params = {"w": jnp.zeros((2, 64, 72)), "bias": jnp.zeros(9000), "small": jnp.zeros((4, 4))}
    state = q.quantize_state(optax.scale_by_adam(), block=32).init(params)
    assert layout(state) == {
        "count": ((), "int32"),
        "inner/count": ((), "int32"),
        **{f"inner/{f}/{p}": (params[p].shape, "float32") for f in ("mu", "nu") for p in ("bias", "small")},
        "inner/mu/w": ((2, 64, 72), "int8"),
        "inner/nu/w": ((2, 64, 72), "uint8"),
        "scales/mu/w": ((2, 64, 3), "float32"),
        "scales/nu/w": ((2, 64, 3), "float32"),
    }


def test_finds_moments_wherever_they_are():
    def quantized(inner, params, **options):
        found = layout(q.quantize_state(inner, **SMALL, **options).init(params))
        return {path for path, (_, dtype) in found.items() if dtype in ("int8", "uint8")}

    w = {"w": jnp.zeros((4, 8)), "mu": jnp.zeros((4, 8))}
    chain = optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9))
    assert quantized(chain, w) == {f"inner/1/{f}/{p}" for f in ("mu", "nu") for p in w}
    # a parameter called like a field is not a field
    assert quantized(chain, w, codes={"trace": "dynamic"}) == {"inner/2/trace/w", "inner/2/trace/mu"}
    assert quantized(muon.scale_by_muon(), jnp.zeros((4, 8))) == {"inner/mu"}
    assert quantized(optax.lion(0.1), [jnp.zeros((4, 8))]) == {"inner/0/mu/0"}
    named = lion.scale_by_lion().init({"w": jnp.zeros((4, 8))})  # parameters in a NamedTuple
    named = named._replace(count=jnp.zeros((2, 2)))
    found = {"inner/mu/mu/w", "inner/mu/count"}
    assert quantized(optax.scale_by_adam(), named, codes={"mu": "linear"}) == found
    parts = optax.partition({"a": optax.scale_by_adam(), "b": optax.scale_by_lion()}, {"w": "a", "mu": "b"})
    assert quantized(parts, w) == {
        "inner/inner_states/a/inner_state/mu/w",
        "inner/inner_states/a/inner_state/nu/w",
        "inner/inner_states/b/inner_state/mu/mu",
    }


def test_fields_of_another_shape_are_not_moments():
    inner = optax.scale_by_lion()
    low_rank = optax.GradientTransformation(lambda p: inner.init(p[:2]), inner.update)
    with pytest.raises(ValueError, match="no field mu or nu shaped like the parameters"):
        q.quantize_state(low_rank, **SMALL).init(jnp.zeros((4, 8)))


def test_initial_moments_are_not_constants_to_the_compiler():
    """Encoding them while compiling took seconds per million parameters."""
    tx = q.quantize_state(optax.scale_by_adam())
    assert "optimization_barrier" in jax.jit(tx.init).lower(jnp.zeros((64, 64))).as_text()


def test_bytes_of_the_state():
    params = {"w": jnp.zeros((2, 64, 2048)), "v": jnp.zeros((32, 4096))}
    size = sum(p.size for p in jax.tree.leaves(params))
    table = {(1, 128): 1.03125, (1, 256): 1.015625, (1, 2048): 1.001953125}
    table |= {(2, 128): 2.0625, (2, 256): 2.03125, (2, 2048): 2.00390625}
    for (moments, block), want in table.items():
        for scale_dtype, scale_bytes in ((jnp.float32, 4), (jnp.bfloat16, 2)):
            formula = q.bytes_per_parameter(moments, block, scale_bytes)
            assert scale_bytes == 2 or formula == want
            for make in (DIRECTIONS["muon"], lion.scale_by_lion) if moments == 1 else (optax.scale_by_adam,):
                tx = q.quantize_state(make(), block=block, scale_dtype=scale_dtype)
                state = jax.eval_shape(tx.init, params)
                counts = 2 * 4  # ours and inner's
                assert (
                    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == size * formula + counts
                )
    assert q.bytes_per_parameter(1, 128, 2) == 1.015625


@directions
def test_updates_and_moments_keep_their_dtypes(make):
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), tree(1))
    tx = q.quantize_state(make(), scale_dtype=jnp.bfloat16, **SMALL)
    state = tx.init(grads)
    updates, after = tx.update(grads, state)
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}
    assert {s.dtype.name for s in jax.tree.leaves(after.scales)} == {"bfloat16"}
    assert layout(after) == layout(state)


def stored_codes(seed, count, names=("a",)):
    """Codes of one step, stochastically rounded, with `count` updates before."""
    tx = q.quantize_state(lion.scale_by_lion(), rounding="stochastic", seed=seed, **SMALL)
    grads = {name: jnp.asarray(normal((64, 64))) for name in names}
    state = tx.init(grads)._replace(count=jnp.asarray(count))
    return tx.update(grads, state)[1].inner.mu


def test_stochastic_rounding_depends_on_seed_step_and_path_alone():
    first = np.asarray(stored_codes(0, 0)["a"], np.int32)
    np.testing.assert_array_equal(first, stored_codes(0, 0)["a"])
    both = stored_codes(0, 0, ("0", "a", "b"))  # in another tree order
    np.testing.assert_array_equal(first, both["a"])
    others = [stored_codes(1, 0)["a"], stored_codes(0, 1)["a"], both["b"]]
    x = normal((64, 64))
    exact = 127 * x.reshape(64, 8, 8) / abs(x.reshape(64, 8, 8)).max(-1, keepdims=True)
    error = (first - exact.reshape(64, 64)).ravel()
    for other in others:  # equal gradients, so that only the noise differs: 1/6 of the errors' variance
        noise = (np.asarray(other, np.int32) - exact.reshape(64, 64)).ravel()
        assert abs(np.corrcoef(error, noise)[0, 1]) < 4 / 64


def test_nearest_rounding_freezes_an_average_and_stochastic_does_not():
    """Entries at a tenth of the block's maximum, whose average should fall to a twentieth."""
    start, grads = jnp.full((64, 64), 0.1).at[:, 0].set(1.0), jnp.full((64, 64), 0.05).at[:, 0].set(1.0)
    want = 0.05 + 0.05 * 0.99**60

    def average(rounding):
        tx = q.quantize_state(optax.ema(0.99, debias=False), {"ema": "linear"}, 64, rounding)
        state = tx.init(start)
        codes, scales = q.quantize(start, 64, "linear")
        state = state._replace(
            inner=state.inner._replace(ema=codes), scales=state.scales._replace(ema=scales)
        )
        update = jax.jit(tx.update)
        for _ in range(60):
            _, state = update(grads, state)
        return float(np.mean(q.dequantize(state.inner.ema, state.scales.ema, 64, "linear")[:, 1:]))

    assert average("nearest") > 0.099
    # 60 roundings of up to half a level, 1/254, averaged over 4032 entries
    assert abs(average("stochastic") - want) < 5 * 60**0.5 / 254 / 4032**0.5


def test_bfloat16_scales_freeze_slow_averages():
    """Why they are not for second moments: 0.999 of a scale rounds back to the scale."""
    for scale_dtype, want in ((jnp.float32, 0.999**50), (jnp.bfloat16, 1.0)):
        tx = q.quantize_state(
            optax.ema(0.999, debias=False), {"ema": "dynamic_unsigned"}, 64, scale_dtype=scale_dtype
        )
        state = tx.init(jnp.ones((64, 64)))
        codes, scales = q.quantize(jnp.ones((64, 64)), 64, "dynamic_unsigned", None, scale_dtype)
        inner = state.inner._replace(ema=codes)
        state, update = (
            state._replace(inner=inner, scales=inner._replace(count=optax.MaskedNode(), ema=scales)),
            jax.jit(tx.update),
        )
        for _ in range(50):
            _, state = update(jnp.zeros((64, 64)), state)
        np.testing.assert_allclose(
            q.dequantize(state.inner.ema, state.scales.ema, 64, "dynamic_unsigned"), want, rtol=1e-5
        )


def test_directions_of_muon_stay_close_to_float32():
    """Cosine to float32 Muon's direction for the same 200 gradients of a two-layer regression.

    Newton-Schulz lifts small singular values, and with them the rounding of the momentum; so the
    cosine is above 0.999 only towards the end. The linear code does better than the dynamic one.
    """
    key = jax.random.key(0)
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    teacher = {"a": draw(0, 32, 128) / 6, "b": draw(1, 128, 32) / 11}
    student = {"a": draw(2, 32, 128) / 6, "b": draw(3, 128, 32) / 11}
    plain = muon.scale_by_muon(scale="rms")
    arms = [q.quantize_state(plain, {"mu": code}) for code in ("linear", "dynamic")]

    def loss(p, i):
        x = jax.random.normal(jax.random.fold_in(key, 100 + i), (64, 32))
        forward = lambda p: jnp.maximum(x @ p["a"], 0) @ p["b"]  # noqa: E731
        return jnp.mean(jnp.square(forward(p) - forward(teacher)))

    def cosine(u, v):
        pairs = [(u[n].ravel(), v[n].ravel()) for n in u]
        return jnp.stack([a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b) for a, b in pairs]).min()

    def step(carry, i):
        p, plain_state, states = carry
        grads = jax.grad(loss)(p, i)
        want, plain_state = plain.update(grads, plain_state)
        found = [tx.update(grads, state) for tx, state in zip(arms, states, strict=True)]
        p = jax.tree.map(lambda p, u: p - 0.02 * (1 - i / 200) * u, p, want)
        cosines = jnp.stack([cosine(want, got) for got, _ in found])
        return (p, plain_state, [state for _, state in found]), cosines

    start = (student, plain.init(student), [tx.init(student) for tx in arms])
    _, cosines = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(200)))()
    linear, dynamic = np.asarray(cosines).T
    assert linear.min() > 0.98 and linear.mean() > 0.997 and linear[-1] > 0.999
    assert linear.mean() > dynamic.mean() > 0.99


def test_donated_state_is_reused_and_float32_moments_are_never_all_alive():
    """The default schedule of XLA on CPU is breadth first, for concurrency: it keeps three copies even
    of plain Muon's moments. The program allows better: the schedule that saves memory needs less
    than one, all temporaries included."""
    grads = {f"w{i:02d}": jnp.asarray(normal((256, 256), i)) for i in range(16)}
    options = {
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    }
    for make, moments in ((optax.scale_by_adam, 2), (lion.scale_by_lion, 1)):
        tx = q.quantize_state(make())
        state = tx.init(grads)
        compiled = jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile(compiler_options=options)
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < moments * sum(g.nbytes for g in grads.values())
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
        compiled(grads, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_shardings_by_path_serve_codes_and_scales():
    axes = {"w": ("layer", "embed", "ffn"), "up": ("layer", "embed", None)}
    specs = {k: params_lib.ParamSpec((4, 16, 32), a, params_lib.zeros) for k, a in axes.items()}
    mesh = parallel.mesh(MeshConfig(fsdp=4, tensor=2))
    params = params_lib.init_params(specs, jax.random.key(0))
    opt_state = q.quantize_state(optax.scale_by_adam(), **SMALL).init(params)
    state = TrainState(jnp.zeros([], jnp.int32), params, opt_state)
    found = parallel.state_shardings(state, specs, mesh).opt_state
    for name in ("mu", "nu"):
        assert getattr(found.inner, name)["w"].spec == PartitionSpec(None, "fsdp", "tensor")
        assert getattr(found.scales, name)["w"].spec == PartitionSpec(None, "fsdp")
        assert getattr(found.scales, name)["up"].spec == PartitionSpec(None, "fsdp")


# ---- what every transform must do

# name -> learning rate -> complete transform
ROWS = {
    "muon": lambda lr: optax.chain(
        q.quantize_state(muon.scale_by_muon(steps=2), **SMALL), optax.scale_by_learning_rate(lr)
    ),
    "lion_dynamic": lambda lr: q.quantize_state(lion.lion(lr), {"mu": "dynamic"}, **SMALL),
    "adam_stochastic": lambda lr: q.quantize_state(optax.adam(lr), rounding="stochastic", **SMALL),
}
rows = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)


def assert_close(a, b):
    """Equal up to the rare entries whose code falls on the other side of a tie: other programs round
    otherwise in the last bit. One level of a block of 8 moves an update by a few percent."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        assert np.mean(abs(x - y) > 1e-4) < 0.02 and np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(x)


def run(tx, update=None, state=None, put=lambda t: t):
    """Parameters and state after three updates."""
    p, state, update = (
        put(tree(0)),
        tx.init(tree(0)) if state is None else state,
        update or jax.jit(tx.update),
    )
    for i in range(3):
        updates, state = update(put(tree(i + 1)), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


@rows
def test_one_trace_stable_types_extra_arguments(make):
    tx, traces = make(0.1), []

    @jax.jit
    def update(g, state, p):
        traces.append(1)
        return tx.update(g, state, p, loss=1.0, unknown="x")

    state = jax.jit(tx.init)(tree(0))
    p, after = run(tx, update, state)
    assert len(traces) == 1
    assert_close(p, run(tx)[0])
    kind = lambda x: (x.shape, x.dtype, x.weak_type)  # noqa: E731
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    assert layout(jax.eval_shape(tx.init, tree(0))) == layout(state)


@pytest.mark.slow
@rows
def test_jit_equals_no_jit(make):
    tx = make(0.1)
    assert_close(run(tx, tx.update)[0], run(tx)[0])


@pytest.mark.slow
@rows
def test_minimizes_a_matrix_quadratic(make):
    assert share_left(make(0.3), tree(0), tree(7), 80) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("make", [ROWS["muon"], ROWS["adam_stochastic"]], ids=["muon", "adam_stochastic"])
def test_inside_chain_masked_partition_and_inject_hyperparams(make):
    p, _ = run(make(0.1))
    half = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.05)
    assert_close(p, run(optax.chain(optax.identity(), half, optax.scale(2.0)))[0])
    mask = {"blocks": {"mlp": {"up": True, "down": False}}}
    masked = run(optax.masked(make(0.1), mask))[0]["blocks"]["mlp"]["up"]
    labels = jax.tree.map(lambda m: "on" if m else "off", mask)
    parts = run(optax.partition({"on": make(0.1), "off": optax.set_to_zero()}, labels))[0]["blocks"]["mlp"]
    # The paths of the moments, and so the noise, are the same inside both.
    assert_close([p["blocks"]["mlp"]["up"]] * 2, [masked, parts["up"]])
    np.testing.assert_array_equal(parts["down"], tree(0)["blocks"]["mlp"]["down"])


@pytest.mark.slow
@rows
def test_inside_multi_steps(make):
    tx = make(0.1)
    many = optax.MultiSteps(tx, 2)
    p, g, h = tree(0), tree(1), tree(2)
    update = jax.jit(many.update)
    first, state = update(g, many.init(p), p)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(first))
    second, _ = update(h, state, p)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, g, h)
    assert_close(second, tx.update(mean, tx.init(p), p)[0])


def test_round_trip_through_numpy():
    tx = ROWS["adam_stochastic"](0.1)
    p, state = run(tx)
    leaves = [np.asarray(x).copy() for x in jax.tree.leaves(state)]
    treedef = jax.tree.structure(jax.eval_shape(tx.init, tree(0)))
    restored = treedef.unflatten([jnp.asarray(x) for x in leaves])
    update = jax.jit(tx.update)
    jax.tree.map(np.testing.assert_array_equal, update(tree(5), state, p), update(tree(5), restored, p))


# The last: a shard's columns are half a block, so that every scale needs two devices.
LAYOUTS = {"layers": ("x",), "rows": (None, "x"), "columns": (None, None, "y"), "half": (None, None, "x")}
CASES = [("muon", "layers"), ("muon", "rows"), ("lion_dynamic", "columns"), ("adam_stochastic", "half")]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "where"), CASES)
def test_sharded_equals_unsharded(row, where):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS was set before this file was read")
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(*LAYOUTS[where])

    def on_mesh(x):
        fits = x.ndim == 3 and not any(x.shape[i] % 4 for i in range(len(spec)) if spec[i])
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    put = lambda t: jax.device_put(t, jax.tree.map(on_mesh, t))  # noqa: E731
    tx = ROWS[row](0.1)
    shardings = jax.tree.map(on_mesh, jax.eval_shape(tx.init, tree(0)))
    init = jax.jit(tx.init, out_shardings=shardings)(put(tree(0)))
    update = jax.jit(tx.update, out_shardings=(jax.tree.map(on_mesh, tree(0)), shardings))
    p, state = run(tx, update, init, put)
    want, plain = run(tx)
    assert_close(jax.device_get(p), want)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        if x.dtype in (jnp.int8, jnp.uint8):
            off = abs(np.asarray(x, np.int32) - np.asarray(y, np.int32))
            assert off.max() <= 1 and off.mean() < 0.01
