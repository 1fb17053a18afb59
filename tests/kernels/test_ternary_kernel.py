"""The packed ternary product: layout, exact integers from every implementation, refusals, the probe,
and lowering for CUDA. Nothing here runs on a GPU."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from cuda_lowering import cuda_text
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.kernels import dispatch, ternary, ternary_pallas, triton, tuning
from nanochat_jax.kernels.tuning import Blocks

# jax >= 0.11 deprecates lowering Pallas through Triton; when it goes, "auto" falls back (kernels/ternary.py).
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

GEMV, GEMM = Blocks("gemv", 64, 16, 1, 4, 1), Blocks("gemm", 16, 32, 1, 4, 3)


def case(M, N, K, dtype=np.int8, seed=0):
    """(x, t, codes): activations in dtype that hold integers, ternary [N, K], packed."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (M, K))
    t = rng.integers(-1, 2, (N, K)).astype(np.int8)
    return jnp.asarray(q, dtype), t, ternary.pack(jnp.asarray(t))


def integers(x, t):
    return np.asarray(x).astype(np.int64) @ t.T.astype(np.int64)


# --- layout


def test_golden_bytes():
    """Input 64 j + r of a group is bits 2j, 2j + 1 of byte r; code = t + 1; padding has code 1."""
    t = np.zeros((1, 256), np.int8)
    t[0, [0, 64, 128, 192]] = [-1, 0, 1, 1]  # codes 0, 1, 2, 2 from the lowest bits up
    t[0, 1] = -1
    packed = np.asarray(ternary.pack(jnp.asarray(t)))
    assert packed.shape == (1, 64) and packed[0, 0] == 0b10100100 and packed[0, 1] == 0b01010100
    assert set(packed[0, 2:].tolist()) == {0b01010101}
    np.testing.assert_array_equal(ternary.pack(jnp.zeros((2, 3), jnp.int8)), np.full((2, 64), 0x55))


def test_every_position_of_a_group_meets_its_own_activation():
    t = np.eye(256, dtype=np.int8)
    x = jnp.arange(256, dtype=jnp.int32)[None] - 128
    x = jnp.clip(x, -127, 127).astype(jnp.int8)
    for impl in ("reference", "interpret"):
        got = ternary.ternary_dot(x, ternary.pack(jnp.asarray(t)), impl=impl)
        np.testing.assert_array_equal(got, x)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 64, 255, 256, 257, 600]), st.integers(0, 2**31 - 1))
def test_round_trip(m, seed):
    n = 3
    t = np.random.default_rng(seed).integers(-1, 2, (n, m)).astype(np.int8)
    codes = ternary.pack(jnp.asarray(t))
    assert codes.shape == (n, -(-m // 256) * 64) and codes.dtype == jnp.uint8
    np.testing.assert_array_equal(ternary.unpack(codes, m), t)
    np.testing.assert_array_equal(ternary.pack(ternary.unpack(codes, m)), codes)


def test_wrong_sizes_are_errors():
    x, _, codes = case(2, 16, 300)
    with pytest.raises(ValueError, match=r"x has 300 inputs, packed in 128 bytes, but codes have 64"):
        ternary.ternary_dot(x, codes[:, :64])
    with pytest.raises(ValueError, match=r"fits neither 16 outputs nor groups of 300 inputs"):
        ternary.ternary_dot(x, codes, jnp.ones((7, 16)))
    with pytest.raises(ValueError, match="must be int8, bfloat16 or float32, got float16"):
        ternary.ternary_dot(x.astype(jnp.float16), codes)
    with pytest.raises(ValueError, match="600 inputs take 192 bytes per output"):
        ternary.unpack(codes, 600)


# --- implementations x shapes x scales

SHAPES = [
    (1, 64, 256), (2, 48, 512), (3, 16, 300), (15, 16, 768), (16, 32, 1024), (17, 80, 320), (70, 64, 512),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_gives_the_exact_integers(impl, shape):
    x, t, codes = case(*shape)
    got = ternary.ternary_dot(x, codes, impl=impl)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, integers(x, t))


@pytest.mark.parametrize("value", [-127, 127])
def test_extreme_sums(value):
    """The largest sums in absolute value, and no weight at all."""
    x = jnp.full((4, 1024), value, jnp.int8)
    t = np.concatenate([np.ones((16, 1024)), -np.ones((16, 1024)), np.zeros((16, 1024))]).astype(np.int8)
    for impl in ("reference", "interpret"):
        got = ternary.ternary_dot(x, ternary.pack(jnp.asarray(t)), impl=impl)
        np.testing.assert_array_equal(got, integers(x, t))


@pytest.mark.parametrize(("M", "blocks"), [
    (1, GEMM), (1, GEMV._replace(split_k=2, bn=32)), (2, GEMV._replace(split_k=8)), (2, GEMV._replace(bm=16)),
    (5, GEMM._replace(split_k=2, bn=64)), (7, GEMM._replace(bm=64)), (40, GEMM._replace(bm=32, split_k=3)),
])  # fmt: skip
def test_every_cut_gives_the_same_integers(M, blocks):
    x, t, codes = case(M, 96, 1280)  # five groups: parts of unequal length
    got = ternary_pallas.dot(x, codes, None, blocks, interpret=True)
    np.testing.assert_array_equal(got, integers(x, t))


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("shape", [(1, 32, 512), (16, 32, 300), (70, 64, 256)])
def test_bfloat16_activations(impl, shape):
    """Products with -1, 0, 1 are exact; only the order of the float32 sums differs from float64."""
    _, t, codes = case(*shape)
    x = jax.random.normal(jax.random.key(1), (shape[0], shape[2])).astype(jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    bound = 1e-6 * np.abs(x64) @ np.abs(t.T)
    assert np.all(np.abs(ternary.ternary_dot(x, codes, impl=impl) - x64 @ t.T) <= bound + 1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_activations_of_any_size(dtype):
    """From 1e-15 to 1e15 in one product, and rows without a nonzero weight: relative to what is summed."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(3, 512)) * 10.0 ** rng.integers(-15, 16, (3, 1)), dtype)
    t = rng.integers(-1, 2, (48, 512)).astype(np.int8)
    t[16:32] = 0
    x64 = np.asarray(x, np.float64)
    got = ternary.ternary_dot(x, ternary.pack(jnp.asarray(t)), impl="interpret")
    assert np.all(np.abs(got - x64 @ t.T) <= 1e-6 * np.abs(x64).sum(1, keepdims=True))
    x = jnp.asarray([[1.0, jnp.nan], [1.0, jnp.inf]], dtype)
    got = ternary.ternary_dot(x, ternary.pack(jnp.ones((16, 2), jnp.int8)), impl="interpret")
    assert not np.isfinite(got).any()


@pytest.mark.parametrize("impl", ["reference", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("K", "group"), [(512, 64), (512, 128), (1024, 512), (320, 64), (384, 192)])
@pytest.mark.parametrize("M", [3, 20])
def test_scales_of_groups(impl, dtype, K, group, M):
    x, t, codes = case(M, 32, K, dtype)
    scale = np.random.default_rng(1).uniform(0.1, 3, (K // group, 32)).astype(np.float32)
    weights = t.T * np.repeat(scale, group, 0).astype(np.float64)
    want = np.asarray(x, np.float64) @ weights
    got = ternary.ternary_dot(x, codes, jnp.asarray(scale), impl=impl)
    bound = 1e-6 * np.abs(np.asarray(x, np.float64)) @ np.abs(weights)
    assert np.all(np.abs(got - want) <= bound)


@pytest.mark.parametrize(
    ("arguments", "blocks", "reason"),
    [
        ((2, 40, 256), GEMV, "40 outputs are no multiple of 16"),
        ((3, 32, 256), GEMV, "a gemv takes at most 2 rows of int8 and one scale, got 3 of int8"),
        (
            (1, 32, 256, jnp.bfloat16),
            GEMV,
            "a gemv takes at most 2 rows of int8 and one scale, got 1 of bfloat16",
        ),
    ],
)
def test_refusals(arguments, blocks, reason):
    x, _, codes = case(*arguments)
    with pytest.raises(NotImplementedError, match=reason):
        ternary_pallas.dot(x, codes, None, blocks, interpret=True)
    if arguments[1] == 40:  # the reference serves it
        x, t, codes = case(*arguments)
        np.testing.assert_array_equal(ternary.ternary_dot(x, codes), integers(x, t))


def test_groups_that_cut_planes_are_refused_and_served_by_the_reference():
    x, t, codes = case(2, 16, 256)
    scale = jnp.ones((8, 16))
    with pytest.raises(NotImplementedError, match="groups of 32 inputs are no multiple of 64"):
        ternary_pallas.dot(x, codes, scale, GEMM, interpret=True)
    np.testing.assert_allclose(ternary.ternary_dot(x, codes, scale), integers(x, t), rtol=1e-6)


# --- dispatch


def test_off_gpu_auto_is_the_reference_and_the_kernel_says_why_not():
    x, t, codes = case(2, 16, 256)
    np.testing.assert_array_equal(ternary.ternary_dot(x, codes), integers(x, t))
    with pytest.raises(ExceptionGroup) as caught:
        ternary.ternary_dot(x, codes, impl="pallas")
    assert "made for GPUs, this is cpu" in str(caught.value.exceptions[0])
    with pytest.raises(ValueError, match="unknown implementation 'triton'; known: auto, pallas, reference"):
        ternary.ternary_dot(x, codes, impl="triton")


@pytest.mark.multiprocess
def test_a_failing_probe_falls_back_with_one_line(monkeypatch, caplog):
    """On a machine that claims a GPU: the child cannot compile the kernel, which is said once."""
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    dispatch.probe.cache_clear()
    x, t, codes = case(2, 16, 256)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            np.testing.assert_array_equal(ternary.ternary_dot(x, codes), integers(x, t))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "falling back to plain XLA: " in lines[0] and "\n" not in lines[0]
    assert "made for GPUs, this is cpu" in lines[0]
    dispatch.probe.cache_clear()


@pytest.mark.multiprocess
def test_probe_verdicts():
    assert dispatch.probe("math:gcd") == ""  # gcd() is 0 and raises nothing
    assert dispatch.probe("math:sqrt").startswith("TypeError")
    assert "no answer within 0.2 s" in dispatch.probe("signal:pause", 0.2)
    assert "-6" in dispatch.probe("os:abort") or "134" in dispatch.probe("os:abort")


@pytest.mark.slow
def test_the_check_of_the_probe(monkeypatch):
    """It passes on the kernel's own code, and fails when a weight or a scale is wrong."""
    monkeypatch.setattr(ternary, "_pallas", ternary.IMPLS["interpret"])
    ternary.check_on_device()
    monkeypatch.setattr(ternary, "_pallas", lambda x, c, s: ternary._reference(x, c ^ 1, s))
    with pytest.raises(ValueError, match="wrong product of 1 rows of int8"):
        ternary.check_on_device()
    doubled = lambda x, c, s: ternary._reference(x, c, None if s is None else s * 1.001)  # noqa: E731
    monkeypatch.setattr(ternary, "_pallas", doubled)
    with pytest.raises(ValueError, match="wrong sum over groups of 1 rows of int8"):
        ternary.check_on_device()


def kernel_on_a_gpu(monkeypatch):
    """As on a GPU whose probe passes, the reference in the kernel's place. Returns the list of the rows' shapes
    that it is called with."""
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "probe", lambda check: "")
    called = []

    def kernel(*arguments, **named):
        called.append(arguments[0].shape)
        return ternary._reference(*arguments)

    monkeypatch.setattr(ternary, "_pallas", kernel)
    return called


def test_a_passing_probe_selects_the_kernel(monkeypatch):
    called = kernel_on_a_gpu(monkeypatch)
    for rows, dtype in ((1, jnp.int8), (256, jnp.int8), (257, jnp.int8), (129, jnp.bfloat16)):
        x, _, codes = case(rows, 16, 256, dtype)
        ternary.ternary_dot(x, codes)
    assert called == [(1, 256), (256, 256)]  # above so many rows unpacking first is faster
    measured = {tuning.key(jax.devices()[0].device_kind, jnp.int8, 1, 16, 256): {"impl": "reference"}}
    monkeypatch.setattr(tuning, "table", lambda: measured)
    ternary.ternary_dot(*case(1, 16, 256)[::2])
    assert len(called) == 2


def test_where_several_devices_are(monkeypatch):
    """One of several GPUs runs the kernel on its own leaves, and so does each in a shard_map over all; under a
    mesh in context, where the compiler may split operands that the kernel would gather, plain XLA runs."""
    kinds = jax.sharding.AxisType
    called = kernel_on_a_gpu(monkeypatch)
    x, t, codes = case(4, 16, 512)
    exact = integers(x, t)
    run = lambda x, codes: ternary.ternary_dot(x, codes)  # noqa: E731
    assert jax.device_count() == 8
    np.testing.assert_array_equal(jax.jit(run)(x, codes), exact)
    assert called.pop() == (4, 512) and not called

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kinds.Auto,) * 2)
    parts = {"in_specs": (P("data"), P("tensor")), "out_specs": P("data", "tensor"), "check_vma": False}
    np.testing.assert_array_equal(jax.jit(jax.shard_map(run, mesh=mesh, **parts))(x, codes), exact)
    assert called.pop() == (2, 512) and not called

    places = (NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor")))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, places[0]), jax.device_put(codes, places[1])
        np.testing.assert_array_equal(jax.jit(lambda x, codes: run(x, codes))(*split), exact)
    parts = {"in_specs": (P("data"), P()), "out_specs": P("data"), "check_vma": False}
    some = jax.shard_map(lambda x, codes: run(x, codes), mesh=mesh, axis_names={"data"}, **parts)
    np.testing.assert_array_equal(jax.jit(some)(x, codes), exact)
    assert not called  # only some axes of the mesh are in the shard_map's hands


def test_the_table_overrides_the_constants(tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    path = tmp_path / "tuned.json"
    wanted = GEMM._replace(bn=64, num_stages=2)
    tuning.write({tuning.key(kind, jnp.int8, 3, 64, 256): {"blocks": wanted._asdict()}}, path)
    tuning.write({"another": {}}, path)
    assert len(json.loads(path.read_text())) == 2
    monkeypatch.setattr(tuning, "TABLE", path)
    read = tuning.table(path)
    monkeypatch.setattr(tuning, "table", lambda: read)
    assert tuning.blocks(jnp.int8, 2, 64, 256) == wanted  # same bucket, 2-4
    assert tuning.blocks(jnp.int8, 5, 64, 256) == tuning.constants(jnp.int8, 5, 64, 256)


def test_buckets_and_constants():
    assert [tuning.bucket(m) for m in (1, 2, 4, 5, 16, 17, 64, 65, 256, 257)] == [
        "1", "2-4", "2-4", "5-16", "5-16", "17-64", "17-64", "65-256", "65-256", ">256"
    ]  # fmt: skip
    for rows in (1, 4, 16, 64, 128, 4096):
        for dtype in (jnp.int8, jnp.bfloat16):
            b = tuning.constants(dtype, rows, 4096, 4096)
            assert b.form == ("gemv" if rows == 1 and dtype == jnp.int8 else "gemm") and b.bm <= 64
            assert len(tuning.candidates(dtype, rows)) <= 40
            assert tuning.constants(dtype, rows, 4096, 4096, grouped=True).form == "gemm"


# --- the instructions that a card runs and interpret mode does not


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("j", range(4))
def test_words_are_taken_apart_as_in_interpret_mode(dtype, j, monkeypatch):
    packed = np.random.default_rng(0).integers(0, 256, (16, 64)).astype(np.uint8)
    want = np.asarray(ternary_pallas._operand(jnp.asarray(packed), j, dtype, interpret=True))
    monkeypatch.setattr(ternary_pallas, "plt", ptx.Primitives())
    got = ternary_pallas._operand(packed, j, dtype, interpret=False)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def test_products_of_four_bytes(monkeypatch):
    """Unsigned times signed bytes, at their extremes too; NumPy's integers are the oracle."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (8, 4)).astype(np.uint8), rng.integers(-128, 128, (8, 4)).astype(np.int8)
    a[0], b[0], b[1] = 255, -128, 127
    total = rng.integers(-(2**20), 2**20, 8).astype(np.int32)
    exact = total + np.sum(a.astype(np.int64) * b, -1)
    words = [np.ascontiguousarray(v).view(np.int32)[:, 0] for v in (a, b)]
    np.testing.assert_array_equal(triton.dot4(*map(jnp.asarray, (*words, total)), interpret=True), exact)
    monkeypatch.setattr(triton, "plt", ptx.Primitives())
    np.testing.assert_array_equal(triton.dot4(*words, total, interpret=False), exact)


# --- lowering: everything but Triton's own compiler


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_lowers_for_cuda(dtype, grouped, rows):
    """What interpret mode allows and a GPU does not shows here, without a GPU."""
    n, m = 128, 11 * 256
    blocks = tuning.constants(dtype, rows, n, m, grouped)._replace(split_k=2)
    scale = jax.ShapeDtypeStruct((m // 128, n), jnp.float32) if grouped else None
    arguments = (jax.ShapeDtypeStruct((rows, m), dtype), jax.ShapeDtypeStruct((n, m // 4), jnp.uint8), scale)
    text = cuda_text(lambda x, c, s: ternary_pallas.dot(x, c, s, blocks), *arguments)
    assert "__gpu$xla.gpu.triton" in text or "triton" in text
