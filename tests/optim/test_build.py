"""The chain that settings describe: groups, decay, clipping, skipping, learning rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import optim
from nanochat_jax.config import (
    GROUPS,
    FireConfig,
    FoamConfig,
    GaloreConfig,
    GroupConfig,
    OptConfig,
    ScheduleConfig,
)
from nanochat_jax.optim import muon
from nanochat_jax.optim.build import add_cautious_decay
from nanochat_jax.params import flatten

CONSTANT = ScheduleConfig(warmup_steps=0, decay_fraction=0.0, floor=1.0)
SHAPES = {
    "embed": (16, 8),
    "value": {"embed": (2, 16, 8)},
    "blocks": {
        "attn": {"q": (2, 8, 8), "k": (2, 8, 4), "v": (2, 8, 4), "o": (2, 8, 8), "norm": (2, 8)},
        "mlp": {"gate": (2, 8, 24), "up": (2, 8, 24), "down": (2, 24, 8), "norm": (2, 8)},
        "value_gate": (2, 8, 4),
        "residual_scale": (2,),
    },
    "norm": (8,),
    "head": (8, 16),
}
# One leaf of each kind and each shape that Newton-Schulz distinguishes: quick to compile.
FEW = {
    "embed": (16, 8),
    "value": {"embed": (2, 16, 8)},
    "blocks": {
        "attn": {"k": (2, 8, 4), "norm": (2, 8)},
        "mlp": {"up": (2, 8, 24)},
        "residual_scale": (2,),
    },
    "norm": (8,),
    "head": (8, 16),
}


def tree(seed, shapes=FEW):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def leaf(of, path):
    for part in path.split("/"):
        of = of[part]
    return np.asarray(of)


def one_update(cfg, p, g, steps=100):
    tx, _ = optim.build(cfg, steps)
    return jax.jit(tx.update)(g, tx.init(p), p)


def test_every_leaf_has_the_right_group():
    got = optim.labels(tree(0, SHAPES))
    assert jax.tree.structure(got) == jax.tree.structure(tree(0, SHAPES))
    assert set(jax.tree.leaves(got)) == set(GROUPS)
    for name in ("q", "k", "v", "o"):
        assert got["blocks"]["attn"][name] == "matrix"
    for name in ("gate", "up", "down"):
        assert got["blocks"]["mlp"][name] == "matrix"
    assert got["embed"] == got["value"]["embed"] == "embed" and got["head"] == "head"
    scalars = got["norm"], got["blocks"]["attn"]["norm"], got["blocks"]["value_gate"]
    assert set(scalars) == {"scalar"} == {got["blocks"]["residual_scale"]}


def test_each_group_is_its_own_transform():
    cfg = dataclasses.replace(OptConfig(), schedule=CONSTANT, clip=0.0)
    p, g = tree(0), tree(1)
    updates, _ = one_update(cfg, p, g)
    for group, paths in {
        "embed": ["embed", "value/embed"],
        "head": ["head"],
        "scalar": ["norm", "blocks/attn/norm", "blocks/residual_scale"],
    }.items():
        own: GroupConfig = getattr(cfg, group)
        alone = optax.adamw(own.lr, own.beta1, own.beta2, own.eps, weight_decay=own.weight_decay)
        for path in paths:
            want, _ = alone.update(leaf(g, path), alone.init(leaf(p, path)), leaf(p, path))
            np.testing.assert_allclose(leaf(updates, path), want, rtol=1e-6)
    alone = muon.muon(cfg.matrix.lr, cfg.matrix.beta1)
    for path in ("blocks/attn/k", "blocks/mlp/up"):
        want, _ = alone.update(leaf(g, path), alone.init(leaf(p, path)), leaf(p, path))
        np.testing.assert_allclose(leaf(updates, path), want, atol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    cfg = OptConfig(
        matrix=GroupConfig(name=name, lr=0.2, beta1=0.8),
        schedule=ScheduleConfig(kind="linear", warmup_steps=5, floor=0.0),
    )
    tx, _ = optim.build(cfg, 60)
    p, target = tree(0), tree(1)
    loss = lambda p: optax.tree.norm(optax.tree.sub(p["blocks"], target["blocks"]), squared=True)  # noqa: E731
    state = tx.init(p)

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    first = float(loss(p))
    for _ in range(60):
        p, state = step(p, state)
    assert float(loss(p)) < 0.7 * first


def test_tied_embedding_and_single_group():
    shapes = {k: v for k, v in FEW.items() if k != "head"}
    updates, _ = one_update(OptConfig(), tree(0, shapes), tree(1, shapes))
    assert jax.tree.structure(updates) == jax.tree.structure(tree(0, shapes))
    updates, _ = one_update(OptConfig(), {"embed": jnp.ones((4, 2))}, {"embed": jnp.ones((4, 2))})
    assert np.all(np.asarray(updates["embed"]) < 0)


def test_decay_is_decoupled_and_off_for_scalars_by_default():
    assert OptConfig().scalar.weight_decay == 0
    off = OptConfig(schedule=CONSTANT, clip=0.0)
    on = dataclasses.replace(off, matrix=dataclasses.replace(off.matrix, weight_decay=0.5))
    p, g = tree(0), tree(1)
    a, b = one_update(off, p, g)[0], one_update(on, p, g)[0]
    difference = leaf(b, "blocks/mlp/up") - leaf(a, "blocks/mlp/up")
    np.testing.assert_allclose(difference, -off.matrix.lr * 0.5 * leaf(p, "blocks/mlp/up"), atol=1e-7)
    for path in ("embed", "head", "norm", "blocks/attn/norm"):
        np.testing.assert_array_equal(leaf(a, path), leaf(b, path))


def test_cautious_decay_only_where_signs_agree():
    w, u = jnp.array([2.0, -2.0, 3.0, 0.0]), jnp.array([1.0, 1.0, -1.0, 1.0])
    tx = add_cautious_decay(0.1)
    got, _ = tx.update(u, tx.init(w), w, loss=0.0)
    np.testing.assert_allclose(got, [1.2, 1.0, -1.0, 1.0], rtol=1e-6)
    cfg = GroupConfig(weight_decay=0.5, lr=0.1, cautious=True)
    p, g = {"head": w}, {"head": u}
    plain = OptConfig(head=dataclasses.replace(cfg, weight_decay=0.0), schedule=CONSTANT, clip=0.0)
    a = one_update(plain, p, g)[0]["head"]
    b = one_update(dataclasses.replace(plain, head=cfg), p, g)[0]["head"]
    np.testing.assert_allclose(b - a, [-0.1, 0, 0, 0], atol=1e-6)
    with pytest.raises(ValueError):
        tx.update(u, tx.init(w))


@pytest.mark.parametrize("cautious", [False, True])
def test_decay_follows_a_cosine_to_zero(cautious):
    group = GroupConfig(name="lion", lr=0.1, weight_decay=1.0, cautious=cautious)
    tx, _ = optim.build(OptConfig(head=group, schedule=CONSTANT, decay_to_zero=True, clip=0.0), 8)
    p, g = {"head": jnp.ones(1)}, {"head": jnp.ones(1)}
    state, got = tx.init(p), []
    for _ in range(10):
        updates, state = tx.update(g, state, p)
        got.append(float(updates["head"][0]))
    share = 0.5 + 0.5 * np.cos(np.pi * np.minimum(np.arange(10) / 8, 1))
    np.testing.assert_allclose(got, -0.1 * (1 + share), rtol=1e-5)


def test_clip_comes_first():
    """The direction of a first Adam step is blind to scale, but its moments are not."""
    cfg = OptConfig(schedule=CONSTANT, clip=1.0)
    p, big = (
        {"head": jnp.zeros(4), "norm": jnp.zeros(2)},
        {"head": jnp.full(4, 30.0), "norm": jnp.full(2, 40.0)},
    )
    norm = float(optax.tree.norm(big))
    _, clipped = one_update(cfg, p, big)
    _, scaled = one_update(dataclasses.replace(cfg, clip=0.0), p, jax.tree.map(lambda g: g / norm, big))
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_learning_rates_are_those_applied():
    schedule = ScheduleConfig(warmup_steps=4, decay_fraction=0.5, floor=0.1)
    cfg = OptConfig(head=GroupConfig(name="lion", lr=0.3), schedule=schedule)
    tx, rates = optim.build(cfg, 12)
    assert set(rates) == set(GROUPS)
    p, g = {"head": jnp.zeros(2)}, {"head": jnp.ones(2)}
    state = tx.init(p)
    for t in range(14):
        updates, state = tx.update(g, state, p)
        shown = optim.learning_rates(rates, t)
        assert set(shown) == {f"opt/lr_{group}" for group in GROUPS}
        np.testing.assert_allclose(-updates["head"], shown["opt/lr_head"], rtol=1e-6)
        np.testing.assert_allclose(shown["opt/lr_matrix"] / shown["opt/lr_head"], 0.02 / 0.3, rtol=1e-5)
    traced = jax.jit(lambda t: optim.learning_rates(rates, t))(jnp.int32(0))
    np.testing.assert_allclose(traced["opt/lr_head"], 0.3 / 4, rtol=1e-6)


def test_extension_starts_where_the_run_ended():
    schedule = ScheduleConfig(warmup_steps=2, decay_fraction=0.4, floor=0.1, rewarm_steps=5)
    cfg = OptConfig(schedule=schedule)
    last = optim.check_extension(schedule, 20, 40, 20)
    _, rates = optim.build(cfg, 40, start_factor=last, start_step=20)
    np.testing.assert_allclose(rates["head"](20) / cfg.head.lr, last + (1 - last) / 5, rtol=1e-5)
    np.testing.assert_allclose(rates["head"](24) / cfg.head.lr, 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "bad"),
    [("blocks/mlp/up", np.nan), ("blocks/mlp/up", np.inf), ("embed", np.nan), ("norm", np.inf)],
)
def test_a_bad_gradient_changes_nothing(path, bad):
    group = GroupConfig(weight_decay=0.1, cautious=True)
    tx, _ = optim.build(
        OptConfig(head=group, matrix=GroupConfig(name="muon", weight_decay=0.1, steps=2)), 100
    )
    update = jax.jit(tx.update)
    p = tree(0)
    updates, state = update(tree(1), tx.init(p), p)
    p = optax.apply_updates(p, updates)
    keys = path.split("/")
    spoiled = tree(2)
    node = spoiled
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = node[keys[-1]].at[(0,) * node[keys[-1]].ndim].set(bad)
    updates, after = update(spoiled, state, p)
    for old, new in zip(
        jax.tree.leaves((p, state.inner)),
        jax.tree.leaves((optax.apply_updates(p, updates), after.inner)),
        strict=True,
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert {k: float(v) for k, v in optim.metrics(after).items()} == {
        "opt/skipped": 1.0,
        "opt/skipped_in_a_row": 1.0,
    }
    updates, after = update(tree(3), after, p)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert float(optim.metrics(after)["opt/skipped_in_a_row"]) == 0


def test_skipping_off_is_absence():
    cfg = dataclasses.replace(OptConfig(), skip_nonfinite=0)
    p, g = tree(0), tree(1)
    plain, state = one_update(cfg, p, g)
    assert optim.metrics(state) == {}
    wrapped, _ = one_update(OptConfig(), p, g)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(wrapped), strict=True):
        np.testing.assert_array_equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="known: muon, normuon, adamw, lion"):
        optim.build(OptConfig(head=GroupConfig(name="sgd")), 100)
    with pytest.raises(ValueError, match="blocks/value_gate") as caught:
        tx, _ = optim.build(OptConfig(scalar=GroupConfig(name="muon")), 100)
        tx.init({**tree(0), "blocks": {"value_gate": jnp.ones(2)}})
    assert "norm" in str(caught.value)


@pytest.mark.parametrize("scale", ["original", "rms", "spectral"])
def test_galore_keeps_the_size_of_muons_updates(scale):
    """The factor by shape is that of the matrix, not of its projection."""
    shapes = {"attn": {"q": (2, 64, 64)}, "mlp": {"up": (2, 64, 256), "down": (2, 256, 64)}}
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    tree = {"blocks": jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))}
    rms = []
    for settings in (GaloreConfig(), GaloreConfig(rank=16, min_dim=64)):
        matrix = GroupConfig(name="muon", lr=1.0, scale=scale)
        tx, _ = optim.build(OptConfig(matrix=matrix, galore=settings, schedule=CONSTANT, clip=0.0), 10)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        rms.append(jax.tree.map(lambda u: float(jnp.sqrt(jnp.mean(u * u))), updates))
    for plain, projected in zip(*map(jax.tree.leaves, rms), strict=True):
        np.testing.assert_allclose(projected, plain, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"galore": GaloreConfig(rank=8, min_dim=64)}, ["projector/blocks/mlp/up", "inner/mu/blocks/mlp/up"]),
        ({"foam": FoamConfig(level=1)}, ["mu/blocks/mlp/up"]),
        (
            {"foam": FoamConfig(level=1), "galore": GaloreConfig(rank=8, min_dim=64)},
            ["projector/blocks/mlp/up", "inner/mu/blocks/mlp/up"],
        ),
        ({"fire": FireConfig(steps=(3,))}, ["inner/1/inner_states/matrix"]),
    ],
)
def test_wrappers_reach_the_matrix_group_and_no_other(settings, paths):
    tree = {"blocks": {"mlp": {"up": jnp.ones((1, 64, 128))}}, "embed": jnp.ones((64, 128))}
    tx, _ = optim.build(OptConfig(schedule=CONSTANT, skip_nonfinite=0, **settings), 10)
    found = flatten(jax.eval_shape(tx.init, tree))
    for path in paths:
        assert any(path in name for name in found), (path, list(found))
    embed = [x.shape for name, x in found.items() if name.endswith("/embed")]
    assert embed == [(64, 128), (64, 128)]  # AdamW's moments, whole
