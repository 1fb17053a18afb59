"""Filtered backward passes against automatic differentiation of the objective that they state."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax import losses, parallel
from nanochat_jax import params as params_lib
from nanochat_jax.config import (
    FilterConfig,
    Fp4Config,
    LoopConfig,
    MeshConfig,
    MhcConfig,
    ModelConfig,
    MtpConfig,
)
from nanochat_jax.model import block, collider, flops, transformer
from nanochat_jax.params import flatten
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

B, L, V = 2, 12, 40
TERMS = (("next_token", 1.0), ("z", 0.1))
KEEP = FilterConfig(0.5, "random")
CFG = ModelConfig(
    vocab_size=V, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=32, filter=KEEP
)  # fmt: skip
SLOW_FORMS = ("streams", "modern", "fp4", "loops")
FORMS = {
    "plain": {},
    "scanned": {"layers": 2, "unroll": 1, "heads": 4, "kv_heads": 2},
    "loops": {"loop": LoopConfig(2, norm=True)},
    "streams": {"mhc": MhcConfig(2, iterations=3)},
    "ternary": {"quant": "ternary"},
    # dy of each row in FP4: a row's codes are the same, whether or not rows of zeros stand beside it
    "fp4": {
        "quant": "mxfp4_grad", "fp4": Fp4Config(stochastic="none", products="dgrad"), "dim": 32,
        "kv_heads": 2, "head_dim": 16,
    },
    "modern": {
        "mlp": "relu2", "norm": "weightless", "sub_norm": True, "embed_norm": True, "qk_norm": "after_rope",
        "qk_gain": 1.2, "softcap": 15.0, "value_embed_every": 1, "residual_scalars": True,
        "x0_scalars": True, "window": (5,),
    },
}  # fmt: skip


def of(cfg=CFG, **changes):
    return dataclasses.replace(cfg, **changes)


@functools.cache
def weights_of(cfg):
    """Initial parameters with noise, so that none is 0 or 1 everywhere."""
    noisy = jax.jit(lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0)))()
    leaves, tree = jax.tree.flatten(noisy)
    rng = np.random.default_rng(1)
    return tree.unflatten([p + jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype) for p in leaves])


def rows(b=B, seed=0):
    """Two documents a row, and padding at the end of the first row."""
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, V, (b, L + 1)), jnp.int32)
    cut = rng.integers(2, L - 2, (b, 1))
    index = np.broadcast_to(np.arange(L), (b, L))
    weights = np.where(index == cut - 1, 0.0, 1.0)
    weights[0, -2:] = 0
    weights /= weights.sum()
    return Batch(
        tokens[:, :-1], tokens[:, 1:], jnp.asarray(weights, jnp.float32),
        jnp.asarray(1 + (index >= cut), jnp.int32), jnp.asarray(np.where(index >= cut, index - cut, index), jnp.int32),
    )  # fmt: skip


def chosen(cfg, batch, key):
    """The mask [B, L] of the kept tokens, for scores that do not depend on the model."""
    score = collider.scores(cfg.filter, jnp.zeros(batch.tokens.shape), None, batch.weights, key)
    index = collider.select(score, collider.kept_count(cfg.filter, batch.tokens.shape[1]))
    return np.any(np.asarray(index)[:, :, None] == np.arange(batch.tokens.shape[1])[None, None], 1)


def stated(cfg, batch, mask, monkeypatch, constant_keys=True):
    """The objective in two lines: masked weights, and constant keys and values of dropped tokens."""
    kept = np.asarray(batch.weights) * mask
    kept *= np.asarray(batch.weights).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1e-9)
    attend = block.kernels.attend

    def stopped(q, k, v, *others, **settings):
        k, v = (jnp.where(mask[:, :, None, None], a, jax.lax.stop_gradient(a)) for a in (k, v))
        return attend(q, k, v, *others, **settings)

    loss_fn = losses.make_loss(of(cfg, filter=FilterConfig()), TERMS, 16)
    masked = batch.replace(weights=jnp.asarray(kept, jnp.float32))

    def value(params, key):
        with monkeypatch.context() as patch:
            if constant_keys:
                patch.setattr(block.kernels, "attend", stopped)
            return loss_fn(params, masked, key)[0]

    return value


def close(got, want, tolerance=1e-6):
    """The whole gradient to `tolerance` of its size, and every leaf to 20 times that of its own."""
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    sizes, wrong = {}, {}
    for name in want:
        a, b = (np.asarray(t[name], np.float64) for t in (got, want))
        sizes[name], wrong[name] = np.linalg.norm(b), np.linalg.norm(a - b)
        assert wrong[name] <= 20 * tolerance * sizes[name], (name, wrong[name] / sizes[name])
    assert np.linalg.norm([*wrong.values()]) <= tolerance * np.linalg.norm([*sizes.values()])


def grads_of(cfg, batch, key):
    run = jax.jit(jax.value_and_grad(losses.make_loss(cfg, TERMS, 16), has_aux=True))
    return run(weights_of(of(cfg, filter=FilterConfig())), batch, key)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form in SLOW_FORMS else form for form in FORMS]
)
def test_the_gradient_is_that_of_the_stated_objective(form, key, monkeypatch):
    cfg, batch = of(**FORMS[form]), rows()
    (loss, _), grads = grads_of(cfg, batch, key)
    mask = chosen(cfg, batch, key)
    plain = weights_of(of(cfg, filter=FilterConfig()))
    want, oracle = jax.jit(jax.value_and_grad(stated(cfg, batch, mask, monkeypatch)))(plain, key)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    close(grads, oracle)
    if form == "plain":  # Rho-1, without the constants, is another gradient
        rho = jax.jit(jax.grad(stated(cfg, batch, mask, monkeypatch, constant_keys=False)))(plain, key)
        a, b = (jnp.concatenate([g.reshape(-1) for g in jax.tree.leaves(t)]) for t in (grads, rho))
        cosine = float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
        assert 0.5 < cosine < 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chained", "parallel"])
def test_further_tokens_are_learned_from_kept_ones(kind, key, monkeypatch):
    """Dropped tokens are constants for the layers behind the trunk, and their targets have no weight."""
    terms = (("next_token", 1.0), ("mtp", 0.3))
    cfg, batch = of(mtp=MtpConfig(2, kind)), rows()
    plain, mask = of(cfg, filter=FilterConfig()), chosen(cfg, batch, key)
    weights = weights_of(plain)
    future = np.asarray(losses.make_prepare(cfg)(batch, None).future, np.float64)
    kept_future = future * mask[:, None]
    assert 0 < np.count_nonzero(kept_future) < np.count_nonzero(future)
    kept_future *= future.sum(-1, keepdims=True) / np.maximum(kept_future.sum(-1, keepdims=True), 1e-9)
    kept = np.asarray(batch.weights) * mask
    kept *= np.asarray(batch.weights).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1e-9)
    masked = batch.replace(
        weights=jnp.asarray(kept, jnp.float32), future=jnp.asarray(kept_future, jnp.float32)
    )
    attend, ahead = block.kernels.attend, losses.mtp.future_hidden

    def stopped(q, k, v, *others, **settings):
        k, v = (jnp.where(mask[:, :, None, None], a, jax.lax.stop_gradient(a)) for a in (k, v))
        return attend(q, k, v, *others, **settings)

    def behind(cfg, project, layer, p, embed, hidden, targets):
        with monkeypatch.context() as patch:
            patch.setattr(block.kernels, "attend", attend)
            hidden = jnp.where(mask[:, :, None], hidden, jax.lax.stop_gradient(hidden))
            return ahead(cfg, project, layer, p, embed, hidden, targets)

    with monkeypatch.context() as patch:
        patch.setattr(block.kernels, "attend", stopped)
        patch.setattr(losses.mtp, "future_hidden", behind)
        oracle = jax.value_and_grad(losses.make_loss(plain, terms, 16), has_aux=True)
        (want, _), expected = oracle(weights, masked, key)
    (loss, _), grads = jax.jit(jax.value_and_grad(losses.make_loss(cfg, terms, 16), has_aux=True))(
        weights, batch, key
    )
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    close(grads, expected, 3e-6)  # the oracle runs operation by operation, and sums more rows


@pytest.mark.parametrize("length", [8, 12, 96, 256, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.6, 0.93, 1.0])
def test_kept_tokens_come_in_numbers_that_divide_well(length, keep):
    """Prime counts would leave the loss with chunks of one token."""
    k = collider.kept_count(FilterConfig(keep), length)
    assert 1 <= k <= length and (keep < 1 or k == length)
    assert abs(k / length - keep) <= 1 / 16 or k * 8 <= length
    if length >= 1024 and length % 128 == 0:
        assert k % 128 == 0


# --- what does not reach the gradient


def test_dropped_tokens_reach_nothing_backward(key):
    """Neither their targets nor, in the table of embeddings, their own rows."""
    batch = rows()
    dropped = ~chosen(CFG, batch, key)
    b, t = np.argwhere(dropped & (np.asarray(batch.weights) > 0))[0]
    tokens = jnp.where(batch.tokens == V - 1, 1, batch.tokens).at[b, t].set(V - 1)  # stands nowhere else
    batch = batch.replace(tokens=tokens)
    (_, metrics), grads = grads_of(CFG, batch, key)
    kept = batch.tokens[tuple(np.argwhere(~dropped & (np.asarray(batch.weights) > 0))[0])]
    assert not np.any(grads["embed"][V - 1]) and np.any(grads["embed"][kept])
    changed = batch.replace(targets=batch.targets.at[b, t].set((batch.targets[b, t] + 1) % V))
    (_, other_metrics), other = grads_of(CFG, changed, key)
    jax.tree.map(np.testing.assert_array_equal, other, grads)
    assert other_metrics["loss/next_token"] != metrics["loss/next_token"]
    assert other_metrics["filter/kept_nll"] == metrics["filter/kept_nll"]


def test_keeping_every_row_is_the_plain_gradient(key):
    batch, whole = rows(), of(filter=FilterConfig(0.99, "random"))  # rounds to all 12
    (loss, metrics), grads = grads_of(whole, batch, key)
    (want, plain_metrics), plain = grads_of(of(filter=FilterConfig()), batch, key)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    close(grads, plain)
    for name, value in plain_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["filter/kept_share"], 1, rtol=1e-6)


def test_without_filter_nothing_of_it_is_called(key, monkeypatch):
    for name in ("layer", "scores", "inject", "passenger", "gather_rows"):
        monkeypatch.setattr(collider, name, None)
    cfg = of(filter=FilterConfig())
    shapes = jax.eval_shape(losses.make_loss(cfg, TERMS, 16), weights_of(cfg), rows(), key)
    assert not any(name.startswith("filter/") for name in shapes[1])
    with pytest.raises(TypeError):
        jax.eval_shape(losses.make_loss(CFG, TERMS, 16), weights_of(cfg), rows(), key)


def test_pieces_and_shards_add_up(key):
    cfg = of(filter=FilterConfig(0.5, "excess", 0.1))
    batch = rows(8)
    noise = np.random.default_rng(4).normal(size=batch.tokens.shape)
    batch = batch.replace(reference=jnp.asarray(30 * noise, jnp.float32))  # decides alone
    tx = optax.sgd(1.0)
    made = []
    mesh = parallel.mesh(MeshConfig(data=4, fsdp=2))
    for pieces, spread in ((1, False), (2, True)):
        step = jax.jit(steps.make_train_step(losses.make_loss(cfg, TERMS, 16), tx, 0, pieces))
        state = steps.new_state(weights_of(of(filter=FilterConfig())), tx)
        given = batch
        if spread:
            given = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        made.append(step(state, given))
    (one, metrics), (two, split_metrics) = made
    close(two.params, one.params)
    for name in (
        "loss/total",
        "loss/next_token",
        "filter/kept_nll",
        "filter/dropped_nll",
        "filter/kept_share",
    ):
        np.testing.assert_allclose(split_metrics[name], metrics[name], rtol=1e-5)


# --- running averages, and first steps without a filter


def test_averages_against_numpy():
    """Ids that are absent, masked or infinite keep theirs; those of microbatches add up."""
    rng, decay = np.random.default_rng(0), 0.75
    cfg = FilterConfig(0.5, "ema", decay=decay)
    tx = collider.averaging(optax.sgd(0.5), cfg, V)
    params = {"w": jnp.ones(3)}
    state, want = tx.init(params), np.full(V, np.log(V))
    for _ in range(5):
        ids, nll = rng.integers(0, V // 2, (4, 9)), rng.exponential(3, (4, 9))
        weights = rng.integers(0, 2, (4, 9)).astype(float)
        nll[weights == 0], nll[ids == 3] = np.nan, np.inf
        for i in set(ids[weights > 0].tolist()) - {3}:
            want[i] = decay * want[i] + (1 - decay) * nll[(ids == i) & (weights > 0)].mean()
        pieces = [
            collider.seen(
                *(jnp.asarray(a[half], t) for a, t in ((nll, "f4"), (ids, "i4"), (weights, "f4"))), V
            )
            for half in (slice(0, 2), slice(2, 4))
        ]
        seen = jax.tree.map(jnp.add, *pieces)
        updates, state = tx.update({"w": jnp.ones(3)}, state, params, metrics={collider.SEEN: seen})  # type: ignore[call-arg]
        np.testing.assert_array_equal(updates["w"], -0.5)
        np.testing.assert_allclose(state.table, want, rtol=1e-5)
    np.testing.assert_array_equal(collider.recall(state, jnp.asarray([[5]])), state.table[5].reshape(1, 1))


@pytest.mark.parametrize("cfg", [FilterConfig(), KEEP])
def test_no_averages_where_nobody_reads_them(cfg):
    tx = optax.sgd(0.5)
    assert collider.averaging(tx, cfg, V) is tx and collider.recall(tx.init({}), jnp.zeros((1, 1))) is None


@pytest.mark.slow
def test_first_steps_learn_from_all_tokens_and_then_the_averages_choose(key):
    """Step 0 is the unfiltered one, step 1 that of "excess" over the table that step 0 left. One trace."""
    cfg, batch = of(layers=1, filter=FilterConfig(0.5, "ema", decay=0.5, warmup=1)), rows(4)
    whole = of(cfg, filter=FilterConfig())
    plain_tx = optax.sgd(1.0)
    tx = collider.averaging(plain_tx, cfg.filter, 128)
    loss_fn, first = losses.make_loss(cfg, TERMS, 16), losses.make_loss(cfg, TERMS, 16, first=True)
    step = jax.jit(steps.make_train_step(loss_fn, tx, 0, 2, losses.make_prepare(cfg), first=(1, first)))
    state = steps.new_state(weights_of(whole), tx)
    one, metrics = step(state, batch)
    plain = jax.jit(steps.make_train_step(losses.make_loss(whole, TERMS, 16), plain_tx, 0))
    wanted, wanted_metrics = plain(steps.new_state(state.params, plain_tx), batch)
    close(one.params, wanted.params)
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["filter/kept_nll"], metrics["loss/next_token"], rtol=1e-6)
    np.testing.assert_allclose(metrics["filter/kept_share"], 1, rtol=1e-6)
    nll = losses.make_token_nll(whole, 16)(state.params, batch)
    sums, counts = (np.asarray(a) for a in collider.seen(nll, batch.targets, batch.weights, 128))
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.log(128))
    np.testing.assert_allclose(one.opt_state.table, (np.log(128) + mean) / 2, rtol=1e-5)

    two, metrics = step(one, batch)
    excess = of(cfg, filter=FilterConfig(0.5, "excess"))
    filtered = jax.jit(steps.make_train_step(losses.make_loss(excess, TERMS, 16), plain_tx, 0))
    given = batch.replace(reference=one.opt_state.table[batch.targets])
    again = steps.new_state(one.params, plain_tx)
    wanted, wanted_metrics = filtered(again, given)
    close(two.params, wanted.params)
    np.testing.assert_allclose(metrics["filter/kept_nll"], wanted_metrics["filter/kept_nll"], rtol=1e-5)
    assert metrics["filter/kept_share"] < 0.8 and step._cache_size() == 1


# --- work


def products(jaxpr, found):
    """Shapes of all dot_general outputs, those of inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                products(inner, found)
    return found


def test_products_are_over_kept_rows(key):
    """Counted in the traced program, before any compiler: floating-point operations, and scores."""
    D, N, T = 64, 4, 48
    cfg = ModelConfig(vocab_size=128, dim=D, layers=N, heads=2, kv_heads=2, head_dim=32, mlp_dim=4 * D)
    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(ints, ints, jax.ShapeDtypeStruct((B, T), jnp.float32), ints, ints)  # type: ignore[arg-type]
    shapes = jax.eval_shape(lambda: params_lib.init_params(transformer.param_specs(cfg), key))

    def gradient(**changes):
        return jax.jit(jax.grad(losses.make_loss(of(cfg, **changes), TERMS, B * T), has_aux=True))

    def work(**changes):
        return gradient(**changes).lower(shapes, batch, key).cost_analysis()["flops"]  # type: ignore[index]

    plain, again = work(), work(remat="block")
    at = {r: work(filter=FilterConfig(r, "random")) for r in (0.25, 0.5, 0.75)}
    assert at[0.5] <= 0.87 * plain and at[0.5] <= 0.68 * again, (at, plain, again)
    assert abs(at[0.75] - 2 * at[0.5] + at[0.25]) < 0.01 * plain  # linear in r
    traced = jax.make_jaxpr(gradient(filter=FilterConfig(0.25, "random")))(shapes, batch, key)
    shapes_4 = [shape for shape in products(traced.jaxpr, []) if len(shape) > 3]
    assert sum(shape.count(T) == 2 for shape in shapes_4) == N  # scores of whole rows: the forward pass alone
    assert sum({T, T // 4} <= set(shape) for shape in shapes_4) >= 2 * N


def test_the_formula_counts_the_backward_of_kept_tokens():
    per_token = flops.train_flops_per_token
    assert per_token(CFG, L) == pytest.approx(per_token(of(filter=FilterConfig()), L) * (1 + 2 * 0.5) / 3)
    # Layers of further tokens are differentiated on all rows (`only_kept`).
    more, both = of(mtp=MtpConfig(depth=2), filter=FilterConfig()), of(mtp=MtpConfig(depth=2))
    assert per_token(both, L) - per_token(CFG, L) == pytest.approx(
        per_token(more, L) - per_token(of(filter=FilterConfig()), L)
    )


# --- the choice


@hypothesis.given(
    st.sampled_from(("excess", "loss", "middle", "random")), st.integers(0, 2**31 - 1), st.integers(1, 9),
    st.sampled_from((0.0, 0.1, 0.3)),
)  # fmt: skip
@hypothesis.settings(max_examples=25)
def test_the_choice_is_what_the_score_says(kind, seed, k, trim):
    rng = np.random.default_rng(seed)
    T = 10
    nll = rng.integers(0, 6, (3, T)).astype(np.float32)  # with ties
    reference = rng.integers(0, 3, (3, T)).astype(np.float32)
    weights = (rng.random((3, T)) < 0.8).astype(np.float32)
    cfg = FilterConfig(0.5, kind, trim)
    score = collider.scores(
        cfg, jnp.asarray(nll), jnp.asarray(reference), jnp.asarray(weights), jax.random.key(seed)
    )
    index = np.asarray(collider.select(score, k))
    assert index.shape == (3, k) and np.all(np.diff(index, axis=1) > 0)
    for row in range(3):
        known = np.flatnonzero(weights[row])
        picked = [t for t in index[row] if weights[row, t]]
        assert len(picked) == min(k, len(known))  # padding only where nothing else is left
        if kind == "random":
            continue
        value = nll[row] - (reference[row] if kind == "excess" else 0)
        order = sorted(known, key=lambda t: (-value[t], t))  # the highest first, the earlier of equal ones
        if kind == "middle":
            middle = (len(known) - 1) / 2
            ranks = {t: abs(i - middle) for i, t in enumerate(order)}
            order = sorted(known, key=lambda t: (ranks[t], t))
        else:
            first = int(np.floor(np.float32(trim) * len(known)))
            order = order[first:] + order[:first]
        assert picked == sorted(order[: len(picked)])
    sums = np.asarray(collider.kept_weights(jnp.asarray(weights), jnp.asarray(index))).sum(1)
    np.testing.assert_allclose(sums, weights.sum(1), rtol=1e-6)


def test_random_choice_is_uniform_and_keyed():
    T, k, draws = 12, 3, 800
    score = collider.scores(KEEP, jnp.zeros((draws, T)), None, jnp.ones((draws, T)), jax.random.key(5))
    counts = np.bincount(np.asarray(collider.select(score, k)).reshape(-1), minlength=T)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    other = collider.scores(KEEP, jnp.zeros((draws, T)), None, jnp.ones((draws, T)), jax.random.key(6))
    assert not np.array_equal(score, other)


def test_excess_needs_a_reference(key):
    with pytest.raises(ValueError, match=r"needs batch\.reference"):
        collider.scores(FilterConfig(0.5), jnp.zeros((1, 4)), None, jnp.ones((1, 4)), key)


def test_metrics_are_means_of_kept_and_dropped():
    nll, weights = np.array([[1.0, 2, 3, 4]], np.float32), np.array([[0.25, 0.25, 0.5, 0]], np.float32)
    made = collider.metrics(jnp.asarray(nll), jnp.asarray(weights), jnp.array([[0, 2]]))
    np.testing.assert_allclose(made["filter/kept_nll"], (0.25 * 1 + 0.5 * 3) / 0.75, rtol=1e-6)
    np.testing.assert_allclose(made["filter/dropped_nll"], 2, rtol=1e-6)
    np.testing.assert_allclose(made["filter/kept_share"], 0.75, rtol=1e-6)
