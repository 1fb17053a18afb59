"""The kernel of 8-bit moments in interpret mode against plain XLA and the wrapped transforms; lowering
for CUDA. Nothing here runs on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cuda_lowering import cuda_text

from nanochat_jax.config import CodesConfig, FoamConfig, GroupConfig, OptConfig
from nanochat_jax.kernels import dispatch, int8, int8_pallas
from nanochat_jax.optim import fused, lion, muon, normuon, quantized
from nanochat_jax.optim.build import direction

# jax >= 0.11 deprecates lowering Pallas through Triton; when it goes, "auto" falls back.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")


def as_it_is(grad, moments, numbers):
    """A rule without arithmetic: the direction is the first old moment, the new moments are functions of
    the gradient. Then all implementations must agree bit for bit, whatever a compiler fuses."""
    return moments[0], tuple(abs(grad) if i else grad for i in range(len(moments)))


def halves(grad, moments, numbers):
    """Averages whose products are exact, so that only one rounding is left: bits must agree here, too."""
    moments = tuple(0.5 * m + 0.5 * (abs(grad) if i else grad) for i, m in enumerate(moments))
    return moments[0] * numbers[0], moments


def case(shape, codes, block=128, dtype=jnp.float32, scale_dtype=jnp.float32):
    """(gradient, stored): entries over some decades, a block of zeros, an outlier."""
    rng = np.random.default_rng(0)
    grad = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1, shape)
    grad.reshape(-1)[:block] = 0
    grad.reshape(-1)[-3] = -1e4
    old = jnp.asarray(rng.normal(size=shape), jnp.float32)
    stored = tuple(
        int8.quantize(jnp.abs(old) if i else old, block, code, None, scale_dtype)
        for i, code in enumerate(codes)
    )
    return jnp.asarray(grad, dtype), stored


def step(impl, rule, grad, stored, codes, block=128, keys=None):
    run = jax.jit(lambda g, s, n: int8.update(rule, g, s, codes, n, block, keys, impl))
    return run(grad, stored, (jnp.float32(2.0),))


def same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Rows that a program holds whole or in part, an odd number of them, blocks as long as the row and longer.
SHAPES = [((4, 256), 128), ((3, 5, 32), 16), ((40, 128), 64), ((6, 32), 256), ((1, 4096), 2048)]
CODES = [("linear",), ("dynamic",), ("linear", "dynamic_unsigned"), ("dynamic", "dynamic_unsigned")]


@pytest.mark.parametrize(("rule", "codes", "shape", "block", "noisy"), [
    (halves, ("linear", "dynamic_unsigned"), (3, 5, 32), 16, True),
    *(pytest.param(rule, codes, *split, noisy, marks=pytest.mark.slow)
      for rule in (as_it_is, halves) for codes in CODES for split in SHAPES for noisy in (False, True)),
])  # fmt: skip
def test_bits_of_the_reference(rule, codes, shape, block, noisy, key):
    grad, stored = case(shape, codes, block)
    keys = tuple(jax.random.split(key, len(codes))) if noisy else None
    same(*(step(impl, rule, grad, stored, codes, block, keys) for impl in ("interpret", "reference")))


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)],
)
@pytest.mark.slow
def test_dtypes_of_gradients_and_scales(dtype, scale_dtype):
    codes = ("linear", "dynamic_unsigned")
    grad, stored = case((8, 256), codes, dtype=dtype, scale_dtype=scale_dtype)
    got, want = (step(impl, as_it_is, grad, stored, codes) for impl in ("interpret", "reference"))
    same(got, want)
    assert got[0].dtype == jnp.float32 and [s.dtype for _, s in got[1]] == [scale_dtype] * 2


@pytest.mark.parametrize("code", ["linear", "dynamic_unsigned"])
def test_entries_go_to_the_nearest_level_in_float64(code):
    """The kernel's encoding against a search in float64, as test_quantized has it for the plain form."""
    grad, stored = case((4, 256), (code,))
    grad = abs(grad) if code == "dynamic_unsigned" else grad
    _, ((codes, scales),) = step("interpret", as_it_is, grad, stored, (code,))
    levels = np.arange(-127, 128) if code == "linear" else int8.LEVELS[code].astype(np.float64)
    decoded = levels[np.asarray(codes, np.int64) + (127 if code == "linear" else 0)]
    decoded = decoded.reshape(4, 2, 128) * np.asarray(scales, np.float64)[..., None]
    x = np.asarray(grad, np.float64).reshape(4, 2, 128)
    nearest = np.min(np.abs(x[..., None] - levels * np.asarray(scales, np.float64)[..., None, None]), -1)
    top = np.abs(x).max(-1, keepdims=True)
    assert np.all(np.abs(decoded - x) <= nearest + 2.0**-20 * top)


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased(key):
    x, draws = jnp.asarray(np.random.default_rng(1).normal(size=(2, 128)), jnp.float32), 512
    _, stored = case((2, 128), ("linear",))

    @jax.jit
    def one(key):
        _, ((codes, scales),) = int8.update(as_it_is, x, stored, ("linear",), (), 128, (key,), "interpret")
        return int8.dequantize(codes, scales, 128, "linear")

    values = np.asarray(jax.lax.map(one, jax.random.split(key, draws)), np.float64)
    # Sums of 16 entries: a single one may have a chance of 1 in 1000 for the other level, and never take it.
    sums = (values - np.asarray(x, np.float64)).reshape(draws, 16, 16).sum(-1)
    assert np.all(np.abs(sums.mean(0)) <= 5 * sums.std(0) / np.sqrt(draws))
    assert values.std(0).mean() > 1e-3


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_values_that_are_not_finite_stay_visible(bad):
    codes = ("linear", "dynamic_unsigned")
    grad, stored = case((4, 256), codes)
    _, made = step("interpret", as_it_is, grad.at[1, 7].set(bad), stored, codes)
    for (c, s), code in zip(made, codes, strict=True):
        values = np.asarray(int8.dequantize(c, s, 128, code))
        assert not np.isfinite(values[1, 7]) and np.isfinite(values[2:]).all()


@pytest.mark.parametrize(
    ("shape", "block", "reason"),
    [
        ((4, 200), 128, "blocks of 128 do not divide rows of 200"),
        ((4, 200), 100, "blocks of 100 are no power of two from 16 to 65536"),
        ((1, 1 << 17), 1 << 17, "blocks of 131072 are no power of two from 16 to 65536"),
        ((4, 64), 8, "blocks of 8 are no power of two from 16 to 65536"),
    ],
)
def test_refusals(shape, block, reason):
    grad, stored = case(shape, ("linear",), block)
    with pytest.raises(ExceptionGroup) as caught:
        step("interpret", halves, grad, stored, ("linear",), block)
    assert reason in str(caught.value.exceptions[0])
    if block == 100:  # the reference serves it
        step("auto", halves, grad, stored, ("linear",), block)
    with pytest.raises(ExceptionGroup) as caught:
        step("pallas", halves, grad, stored, ("linear",), block)
    assert "made for GPUs, this is cpu" in str(caught.value.exceptions[0])


# --- optimizers

SMALL = {"block": 32, "min_size": 256}
MAKE = {
    "muon": (
        lambda: muon.scale_by_muon(0.5, steps=1),
        lambda: fused.muon(0.5, muon.orthogonalizer(1, "polar_express", "original", None, None, "auto")),
    ),
    "normuon": (
        lambda: optax.chain(muon.scale_by_muon(0.5, steps=1), normuon.scale_by_neuron_norm(0.5)),
        lambda: MAKE["muon"][1]()._replace(behind=normuon.scale_by_neuron_norm(0.5)),
    ),
    "lion": (lambda: lion.scale_by_lion(0.9, 0.5), lambda: fused.lion(0.9, 0.5)),
    "adamw": (lambda: optax.scale_by_adam(0.9, 0.95, 1e-10), lambda: fused.adam(0.9, 0.95, 1e-10)),
}
names = pytest.mark.parametrize("name", MAKE)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"blocks": {"w": (2, 16, 32)}, "bias": (4, 4)}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


@pytest.mark.parametrize(("name", "rounding"), [
    *(pytest.param(name, rounding, marks=pytest.mark.slow) for name in MAKE for rounding in quantized.ROUNDINGS),
])  # fmt: skip
def test_three_steps_of_an_optimizer(name, rounding):
    """The state's layout and, up to the last bit of a fused multiplication and addition, its values."""
    make, form = MAKE[name]
    plain = quantized.quantize_state(make(), rounding=rounding, seed=3, **SMALL)
    other = quantized.quantize_state(
        make(), rounding=rounding, seed=3, form=form(), impl="interpret", **SMALL
    )
    state, mine = plain.init(tree(0)), other.init(tree(0))
    same(mine, state)
    for i in range(3):
        # Both from the same state: a tie that fell the other way once would make later steps differ.
        want, state = jax.jit(plain.update)(tree(i + 1), state)
        got, mine = jax.jit(other.update)(tree(i + 1), mine)
        assert jax.tree.structure(mine) == jax.tree.structure(state)
        for (path, a), b in zip(jax.tree.leaves_with_path(mine), jax.tree.leaves(state), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.dtype in (jnp.int8, jnp.uint8):
                apart = np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32))
                assert apart.max() <= 1 and apart.mean() < 2e-3, path
            else:
                np.testing.assert_allclose(a, b, rtol=1e-5)
        # Newton-Schulz enlarges small singular values, and with them a last bit.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        mine = state


@pytest.mark.parametrize("name", [pytest.param("muon", marks=pytest.mark.slow), "lion", "adamw"])
def test_rules_are_the_transforms_bit_for_bit(name):
    """Op by op, without a compiler in between, the elementwise form gives the wrapped transform's bits."""
    make, form = MAKE[name]
    inner, form = make(), form()
    state = inner.init(tree(0))
    with jax.disable_jit():
        for i in range(2):
            grads = tree(i + 1)
            want, after = inner.update(grads, state)
            numbers = form.numbers(jnp.asarray(i + 1, jnp.int32))
            fields = [jax.tree.leaves(getattr(state, field)) for field in form.fields]
            made = [
                form.rule(g, moments, numbers)
                for g, *moments in zip(jax.tree.leaves(grads), *fields, strict=True)
            ]
            for g, w, (direction, _) in zip(jax.tree.leaves(grads), jax.tree.leaves(want), made, strict=True):
                np.testing.assert_array_equal(form.finish(g, direction), w)
            for j, field in enumerate(form.fields):
                for (_, new), w in zip(made, jax.tree.leaves(getattr(after, field)), strict=True):
                    np.testing.assert_array_equal(new[j], w)
            state = after


@names
def test_a_passing_probe_selects_the_kernel(name, monkeypatch):
    """opt.codes.impl = auto on a machine that claims a GPU; "reference" leaves the kernel alone."""
    calls = []

    def kernel(rule, grad, *rest):
        calls.append(grad.shape)
        return int8.IMPLS["reference"](rule, grad, *rest)

    monkeypatch.setattr(dispatch, "refuse", lambda check: None)
    monkeypatch.setattr(int8, "_pallas", kernel)
    params = {"blocks": {"attn": {"q": jnp.zeros((2, 64, 128))}}}

    def first_update(impl, **changes):
        cfg = OptConfig(matrix=GroupConfig(name=name, state_bits=8), codes=CodesConfig(impl=impl), **changes)
        tx = direction("matrix", cfg)
        return jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)

    first_update("auto")
    assert calls == [(2, 64, 128)]
    first_update("reference")
    assert len(calls) == 1
    if name != "normuon":  # whose state cannot be folded
        first_update("auto", foam=FoamConfig(level=1))  # folded moments are not the form's
    assert len(calls) == 1


def test_off_gpu_the_plain_way_is_taken(monkeypatch):
    """Without a kernel a form changes nothing: the traced update is the one without a form."""
    make, form = MAKE["adamw"]
    texts = []
    for given in (None, form()):
        tx = quantized.quantize_state(make(), form=given, **SMALL)
        texts.append(str(jax.make_jaxpr(tx.update)(tree(0), tx.init(tree(0)))))
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_check_of_the_probe(monkeypatch):
    monkeypatch.setattr(int8, "_pallas", int8.IMPLS["interpret"])
    int8.check_on_device()
    right = int8._reference

    def wrong(rule, grad, stored, codes, numbers, block, keys):
        direction, made = right(rule, grad, stored, codes, numbers, block, keys)
        return direction, tuple((c.at[0, 0].add(2), s) for c, s in made)

    monkeypatch.setattr(int8, "_pallas", wrong)
    with pytest.raises(ValueError, match="wrong moments in linear, nearest"):
        int8.check_on_device()


# --- lowering


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("noisy", "momentum"), [(False, "dynamic"), (True, "linear")])
def test_lowers_for_cuda(name, noisy, momentum):
    form, block, shape = MAKE[name][1](), 128, (48, 128)
    codes = (momentum, "dynamic_unsigned")[: len(form.fields)]
    of = jax.ShapeDtypeStruct
    stored = [
        (of(shape, jnp.int8 if code == "linear" else jnp.uint8), of(shape[:1], jnp.float32)) for code in codes
    ]
    salts = [of((2,), jnp.uint32) if noisy else None for _ in codes]
    numbers = [of((), jnp.float32)] * len(form.numbers(jnp.asarray(1)))
    text = cuda_text(
        lambda g, s, n, z: int8_pallas.update(form.rule, g, s, codes, n, z), of(shape, jnp.float32), stored, numbers, salts
    )  # fmt: skip
    assert "triton" in text and "div.rn.f32" in text and block
