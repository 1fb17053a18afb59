"""What every transform must do: one row per optimizer or wrapper.

Quantized, GaLore, FOAM and FIRE answer to the same properties in their own files, in nestings and with
what is theirs alone.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax import optim
from nanochat_jax.config import GroupConfig, OptConfig, ScheduleConfig
from nanochat_jax.optim import lion, muon, normuon, skip
from nanochat_jax.optim.build import add_cautious_decay

CONSTANT = ScheduleConfig(warmup_steps=0, decay_fraction=0.0, floor=1.0)


def built(name):
    def make(learning_rate):
        matrix = GroupConfig(name=name, lr=learning_rate, weight_decay=0.01, steps=2)
        return optim.build(OptConfig(matrix=matrix, schedule=CONSTANT), 1000)[0]

    return make


# name -> learning rate -> complete transform
ROWS = {
    "muon": muon.muon,
    "muon_plain": lambda learning_rate: muon.muon(
        learning_rate, 0.9, 0.01, 2, "jordan", "rms", nesterov=False
    ),
    "lion": lion.lion,
    "cautious_decay": lambda learning_rate: optax.chain(
        lion.scale_by_lion(), add_cautious_decay(0.01), optax.scale_by_learning_rate(learning_rate)
    ),
    "normuon": lambda learning_rate: optax.chain(
        muon.scale_by_muon(), normuon.scale_by_neuron_norm(), optax.scale_by_learning_rate(learning_rate)
    ),
    "skip_spikes": lambda learning_rate: skip.skip_spikes(lion.lion(learning_rate), 6.0, 8),
    "skip": lambda learning_rate: skip.skip_nonfinite(lion.lion(learning_rate)),
    **{f"built_{name}": built(name) for name in optim.OPTIMIZERS},
}
# Sizes that 8 divides, so that every axis can be sharded.
SHAPES = {"attn": {"q": (8, 8, 8)}, "mlp": {"up": (8, 8, 32), "down": (8, 32, 8)}}
# Newton-Schulz amplifies rounding at small singular values by up to 1e3; times a rate of 0.1.
TOLERANCE = 5e-5

rows = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return {"blocks": jax.tree.map(draw, SHAPES, is_leaf=lambda s: isinstance(s, tuple))}


def assert_close(a, b, atol=TOLERANCE):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def run(tx, count=3, update=None, state=None):
    """Parameters and state after some updates."""
    p, state, update = tree(0), tx.init(tree(0)) if state is None else state, update or jax.jit(tx.update)
    for i in range(count):
        updates, state = update(tree(i + 1), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


def kind(x):
    return jnp.shape(x), jnp.asarray(x).dtype, jnp.asarray(x).weak_type


@rows
def test_accepts_extra_args(make):
    tx = make(0.1)
    with_args, _ = tx.update(tree(1), tx.init(tree(0)), tree(0), loss=1.0, unknown="x")
    without, _ = tx.update(tree(1), tx.init(tree(0)), tree(0))
    assert_close(with_args, without, 0)


@rows
def test_state_keeps_its_types_and_compiles_once(make):
    tx, traces = make(0.1), []

    @jax.jit
    def update(g, state, p):
        traces.append(1)
        return tx.update(g, state, p)

    state = jax.jit(tx.init)(tree(0))
    _, after = run(tx, 3, update, state)
    assert len(traces) == 1
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    shapes = jax.eval_shape(tx.init, tree(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: kind(x)[:2], state)


@rows
def test_jit_equals_no_jit(make):
    tx = make(0.1)
    p, state = run(tx, update=tx.update)
    q, jitted = run(tx)
    assert_close(p, q)
    assert_close(state, jitted)


def share_left(tx, p, target, count):
    """What is left of |p - target|^2 after `count` updates at a rate that falls to 0."""
    tx = optax.chain(tx, optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, count)))
    loss = lambda p: optax.tree.norm(optax.tree.sub(p, target), squared=True)  # noqa: E731

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    state, first = tx.init(p), float(loss(p))
    for _ in range(count):
        p, state = step(p, state)
    return float(loss(p)) / first


def check_donation_and_resumption(tx, before):
    """The state is updated in place, and a run that goes on from saved numbers is the same run."""
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = run(tx, before, update, tx.init(tree(0)))
    saved = [np.array(x) for x in jax.tree.leaves(state)]
    p, _ = run(tx, 3, update, state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    structure = jax.tree.structure(jax.eval_shape(tx.init, tree(0)))
    q, _ = run(tx, 3, update, jax.tree.unflatten(structure, map(jnp.asarray, saved)))
    assert_close(p, q, 0)


@rows
def test_minimizes_a_matrix_quadratic(make):
    assert share_left(make(0.3), tree(0), tree(7), 80) < 0.1


@rows
def test_inside_chain(make):
    p, _ = run(make(0.1))
    q, _ = run(optax.chain(optax.identity(), make(0.05), optax.scale(2.0)))
    assert_close(p, q)  # half the rate, doubled


@rows
def test_inside_masked_and_partition(make):
    p, _ = run(make(0.1))
    mask = {"blocks": {"attn": {"q": False}, "mlp": {"up": True, "down": True}}}
    q, _ = run(optax.masked(make(0.1), mask))
    labels = jax.tree.map(lambda m: "on" if m else "off", mask)
    r, _ = run(optax.partition({"on": make(0.1), "off": optax.set_to_zero()}, labels))
    clip_free = {k: v["blocks"]["mlp"] for k, v in {"p": p, "q": q, "r": r}.items()}
    assert_close(clip_free["q"], clip_free["r"])
    if "built" not in str(make):  # clipping sees fewer leaves under a mask
        assert_close(clip_free["p"], clip_free["q"])
    np.testing.assert_array_equal(r["blocks"]["attn"]["q"], tree(0)["blocks"]["attn"]["q"])


@rows
def test_inside_multi_steps(make):
    tx = make(0.1)
    many = optax.MultiSteps(tx, 2)
    p, g, h = tree(0), tree(1), tree(2)
    state = many.init(p)
    update = jax.jit(many.update)
    first, state = update(g, state, p)
    assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(first))
    second, _ = update(h, state, p)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, g, h)
    assert_close(second, tx.update(mean, tx.init(p), p)[0])


@rows
def test_inside_inject_hyperparams(make):
    p, _ = run(optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.1))
    assert_close(p, run(make(0.1))[0])


@rows
def test_round_trip_through_numpy(make):
    tx = make(0.1)
    p, state = run(tx, 2)
    leaves = [np.asarray(x).copy() for x in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, tree(0))), leaves)
    a, _ = tx.update(tree(5), state, p)
    b, _ = tx.update(tree(5), jax.tree.map(jnp.asarray, restored), p)
    assert_close(a, b, 0)


# Only Newton-Schulz mixes the elements of a leaf: it meets every layout, the others one.
LAYOUTS = {"layers": ("x",), "rows": (None, "x"), "columns": (None, None, "x"), "both": (None, "x", "y")}
CASES = [("muon", layout) for layout in LAYOUTS]
CASES += [(row, "both") for row in ("lion", "cautious_decay", "built_muon", "built_adamw")]


@pytest.mark.parametrize(("row", "layout"), CASES)
def test_sharded_equals_unsharded(row, layout):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS was set before this file was read")
    make, spec = ROWS[row], LAYOUTS[layout]
    sizes, names = ((4, 2), ("x", "y")) if "y" in spec else ((8,), ("x",))
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    on_mesh = lambda x: NamedSharding(mesh, PartitionSpec(*spec) if jnp.ndim(x) == 3 else PartitionSpec())  # noqa: E731
    tx = make(0.1)
    shardings = jax.tree.map(on_mesh, jax.eval_shape(tx.init, tree(0)))
    put = lambda t: jax.device_put(t, jax.tree.map(on_mesh, t))  # noqa: E731
    p, state = put(tree(0)), jax.jit(tx.init, out_shardings=shardings)(put(tree(0)))
    update = jax.jit(tx.update)  # no out_shardings: the partitioner must keep them by itself
    for i in range(3):
        updates, state = update(put(tree(i + 1)), state, p)
        p = optax.apply_updates(p, updates)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    assert_close(jax.device_get(p), run(tx)[0])
