"""Multi-token prediction against plain formulas with whole logits, on rows packed with documents."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from nanochat_jax import losses, optim
from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, ModelConfig, MtpConfig
from nanochat_jax.data import packing
from nanochat_jax.model import flops, mtp, transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

V, L, M = 60, 12, 3
CFG = ModelConfig(
    vocab_size=V, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=24, dtype="float32"
)
KINDS = ("chained", "parallel")
TERMS = (("next_token", 1.0), ("mtp", 0.2))
OFFSETS = np.asarray([0, 5, 7, 8, 16, 21, 49])  # documents, also shorter than the depth


def of(kind, depth=M, **changes):
    return dataclasses.replace(CFG, mtp=MtpConfig(depth=depth, kind=kind), **changes)


def packed(rows=4, unique=False):
    """Rows with several documents. unique: no token occurs twice in a row."""
    rng = np.random.default_rng(0)
    ids = np.arange(OFFSETS[-1]) if unique else rng.integers(0, V, OFFSETS[-1])
    windows = [packing.window(ids, OFFSETS, i, L, True) for i in range(rows)]
    return Batch(**{name: jnp.asarray(np.stack([w[name] for w in windows])) for name in windows[0]})


def initial(cfg):
    """Initial values plus noise, so that no gain is 1 and the head is visible."""

    @jax.jit
    def noisy(key):
        leaves, tree = jax.tree.flatten(params_lib.init_params(transformer.param_specs(cfg), key))
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
        )

    return noisy(jax.random.key(1))


def valid(rows=4):
    """Brute force from the documents' ends: which (row, offset, position) has a target to learn."""
    document = np.searchsorted(OFFSETS, np.arange(OFFSETS[-1]), side="right")
    ok = np.zeros((rows, M, L))
    for b in range(rows):
        for i in range(1, M + 1):
            for t in range(L):
                here, there = b * L + t, b * L + t + i + 1
                ok[b, i - 1, t] = t + i < L and document[here] == document[there]
    return ok


# --- the plain formulas, for NumPy in float64 and for automatic differentiation


def norm(xp, x, gain):
    return x / xp.sqrt(xp.mean(x * x, -1, keepdims=True) + CFG.norm_eps) * gain[None, None]


def rotate(xp, x, positions):
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * CFG.rope_theta ** (-np.arange(half) / half)[None, None, None]
    a, b, cos, sin = x[..., :half], x[..., half:], xp.cos(angle), xp.sin(angle)
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def layer(xp, p, x, batch):
    """SwiGLU block with one key/value head for all query heads."""
    h = norm(xp, x, p["attn"]["norm"])
    q, k, v = ((h @ p["attn"][n]).reshape(*h.shape[:2], -1, CFG.head_dim) for n in "qkv")
    q, k = rotate(xp, q, batch["positions"]), rotate(xp, k, batch["positions"])
    k, v = (xp.repeat(a, CFG.heads // CFG.kv_heads, axis=2) for a in (k, v))
    scores = xp.einsum("bthk,bshk->bhts", q, k) / CFG.head_dim**0.5
    seen = np.tril(np.ones((L, L), bool))[None] & (
        np.asarray(batch["segments"])[:, :, None] == np.asarray(batch["segments"])[:, None]
    )
    scores = xp.where(seen[:, None], scores, -1e30)
    share = xp.exp(scores - scores.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    y = xp.einsum("bhts,bshk->bthk", share, v).reshape(*x.shape[:2], -1)
    x = x + y @ p["attn"]["o"]
    h = norm(xp, x, p["mlp"]["norm"])
    gate = h @ p["mlp"]["gate"]
    return x + (gate / (1 + xp.exp(-gate)) * (h @ p["mlp"]["up"])) @ p["mlp"]["down"]


def plain_losses(xp, kind, params, z, batch, ok):
    """[L_1 .. L_M] with whole logits; `ok` [B, M, L] says what counts."""
    u, found, targets = z, [], np.asarray(batch["targets"])
    for m in range(M):
        p = jax.tree.map(lambda a, m=m: a[m], params["mtp"])
        if kind == "parallel":
            u = layer(xp, p, z, batch)
        else:
            passed = np.zeros_like(targets)
            passed[:, : L - m] = targets[:, m:]
            pair = [norm(xp, u, p["hidden_norm"]), norm(xp, params["embed"][passed], p["embed_norm"])]
            u = layer(xp, p, xp.concatenate(pair, -1) @ p["join"], batch)
        logits = (norm(xp, u, p["norm"]) @ params["head"])[..., :V]
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - xp.log(xp.exp(logits - top).sum(-1, keepdims=True))
        later = np.zeros_like(targets)
        later[:, : L - m - 1] = targets[:, m + 1 :]
        rows, columns = np.indices(later.shape)
        nll = -(ok[:, m] * log_p[rows, columns, later]).sum()
        found.append(nll / ok[:, m].sum())
    return found


def fields(batch):
    return {name: np.asarray(getattr(batch, name)) for name in ("targets", "segments", "positions")}


@pytest.mark.parametrize("kind", ["chained", pytest.param("parallel", marks=pytest.mark.slow)])
def test_loss_and_all_gradients(kind):
    """Each L_i in float64; the gradients of every weight, trunk and shared tables included."""
    cfg, batch, ok = of(kind), steps.normalize(packed()), valid()
    params = initial(cfg)

    def hidden(params):
        return transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden

    loss_fn = functools.partial(losses.make_loss(cfg, TERMS, 16), batch=batch, key=jax.random.key(0))
    (total, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    z = np.asarray(jax.jit(hidden)(params), np.float64)
    want = plain_losses(np, kind, wide, z, fields(batch), ok)
    np.testing.assert_allclose([metrics[f"loss/mtp_{i}"] for i in (1, 2, 3)], want, rtol=1e-5)
    shares = np.asarray([1, 0.5, 0.25])
    np.testing.assert_allclose(metrics["loss/mtp"], shares @ want / shares.sum(), rtol=1e-5)
    np.testing.assert_allclose(total, metrics["loss/next_token"] + 0.2 * shares @ want, rtol=1e-5)

    def plain(params):
        z = hidden(params)
        log_p = jax.nn.log_softmax((z @ params["head"])[..., :V])
        main = -jnp.sum(batch.weights * jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0])
        found = plain_losses(jnp, kind, params, z, fields(batch), ok)
        return main + 0.2 * sum(w * x for w, x in zip((1.0, 0.5, 0.25), found, strict=True))

    want_grads = params_lib.flatten(jax.jit(jax.grad(plain))(params))
    for path, got in params_lib.flatten(grads).items():
        largest = float(jnp.abs(want_grads[path]).max())
        assert largest > 0, f"{path} has no gradient"
        np.testing.assert_allclose(got, want_grads[path], atol=2e-5 * largest, err_msg=path)


def test_weights_against_brute_force():
    """What counts follows from the documents alone; each offset's weights are equal and sum to 1."""
    weights = np.asarray(mtp.future_weights(steps.normalize(packed()), M))
    ok = valid()
    assert 0 < ok[:, 2].sum() < ok[:, 0].sum()
    np.testing.assert_allclose(weights, ok / ok.sum((0, 2), keepdims=True), rtol=1e-6)


@hypothesis.given(st.lists(st.sampled_from((0.0, 1.0, 0.25)), min_size=6, max_size=6), st.integers(1, 7))
@hypothesis.settings(max_examples=25, deadline=None)
def test_weights_of_any_mask(mask, depth):
    """A target counts with its own weight if none from the next one to it is masked."""
    w = np.asarray([mask], np.float32)
    batch = Batch(w, w, jnp.asarray(w), jnp.ones((1, 6), jnp.int32), w)  # type: ignore[arg-type]
    got = np.asarray(mtp.future_weights(batch, depth))
    assert got.shape == (1, depth, 6) and np.isfinite(got).all()
    for i in range(1, depth + 1):
        raw = [mask[t + i] if t + i < 6 and min(mask[t : t + i + 1]) > 0 else 0.0 for t in range(6)]
        want = np.asarray(raw) * (sum(mask) / sum(raw) if sum(raw) else 0.0)
        np.testing.assert_allclose(got[0, i - 1], want, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_causality_and_documents_by_gradient(kind):
    """Offset i at t depends on tokens up to t (parallel) or t + i (chained) of its own document; never
    on its target."""
    cfg, batch = of(kind), packed(1, unique=True)
    params, ok = initial(cfg), valid(1)[0]
    project = projections.from_config(cfg)

    @jax.jit
    @jax.jacrev
    def outputs(embed):
        p = params | {"embed": embed}
        z = transformer.forward(cfg, project, p, batch).hidden
        block = transformer.last_layer(cfg, project, batch)
        u = mtp.future_hidden(cfg, project, block, p["mtp"], embed, z, batch.targets)
        return jnp.sum(u[:, 0] * jnp.linspace(1, 2, u.shape[-1])[None, None], -1)  # [M, L]

    reach = np.abs(np.asarray(outputs(params["embed"]))).max(-1)  # [M, L, V]
    document = np.searchsorted(OFFSETS, np.arange(L + 1), side="right")
    for i in range(1, M + 1):
        for t in np.flatnonzero(ok[i - 1]):
            last = t + i if kind == "chained" else t
            seen = {s for s in range(L + 1) if s <= last and document[s] == document[t]}
            assert set(np.flatnonzero(reach[i - 1, t] > 0)) == seen and t + i + 1 not in seen


def test_what_is_not_valid_has_no_influence(key):
    """Targets of weight 0 may be anything: neither the loss nor a gradient changes by a bit."""
    cfg, batch = of("chained"), packed()
    params = initial(cfg)
    other = batch.replace(targets=jnp.where(batch.weights > 0, batch.targets, 3))
    assert not np.array_equal(batch.targets, other.targets)
    run = jax.jit(jax.value_and_grad(losses.make_loss(cfg, TERMS, 16), has_aux=True))
    for a, b in zip(
        jax.tree.leaves(run(params, batch, key)), jax.tree.leaves(run(params, other, key)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_depth_zero_is_absence(key):
    """No weights, no work on the batch; and the trunk's initial values and loss do not see the depth."""
    batch = packed()
    assert mtp.param_specs(CFG, {}) == {} and losses.make_prepare(CFG)(batch, None) is batch
    plain = params_lib.init_params(transformer.param_specs(CFG), key)
    more = params_lib.init_params(transformer.param_specs(of("chained")), key)
    further = more.pop("mtp")
    jax.tree.map(np.testing.assert_array_equal, plain, more)
    only = TERMS[:1]
    run = jax.value_and_grad(losses.make_loss(CFG, only, 16), has_aux=True)
    with_depth = jax.value_and_grad(losses.make_loss(of("chained"), only, 16), has_aux=True)
    (want, want_metrics), want_grads = run(plain, batch, key)
    (got, metrics), grads = with_depth(plain | {"mtp": further}, batch, key)
    assert got == want and metrics == want_metrics
    assert all(not np.any(g) for g in jax.tree.leaves(grads.pop("mtp")))
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
    with pytest.raises(ValueError, match="needs model"):
        losses.make_loss(CFG, TERMS)


def test_evaluation_ignores_it(key):
    cfg, batch = of("parallel"), packed()
    params = initial(cfg)
    trunk = {name: value for name, value in params.items() if name != "mtp"}
    nll = losses.make_token_nll(cfg, 16)(params, batch)
    np.testing.assert_array_equal(nll, losses.make_token_nll(CFG, 16)(trunk, batch))


@pytest.mark.slow
def test_microbatches_add_up():
    """Rows with different numbers of valid targets: pieces give the whole batch's step."""
    cfg, batch = of("chained", depth=2), packed()
    params = initial(cfg)
    loss_fn, tx = losses.make_loss(cfg, TERMS, 16), optax.sgd(1.0)

    prepare = losses.make_prepare(cfg)

    def run(microbatches):
        step = jax.jit(steps.make_train_step(loss_fn, tx, 0, microbatches, prepare))
        return step(steps.new_state(params, tx), batch)

    whole, metrics = run(1)
    pieces, piece_metrics = run(2)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(pieces.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for name in ("loss/total", "loss/mtp", "loss/mtp_1", "loss/mtp_2"):
        np.testing.assert_allclose(metrics[name], piece_metrics[name], rtol=1e-5)
    # Weights of each piece alone are others: the check above would see them.
    normal = steps.normalize(batch)
    alone = [mtp.future_weights(jax.tree.map(lambda a, i=i: a[i::2], normal), 2) for i in range(2)]
    assert float(jnp.abs(alone[0] - mtp.future_weights(normal, 2)[::2]).max()) > 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_depth_times_vocabulary(kind):
    """From depth 1 to 4 the gradient's temporaries grow by less than half a gradient of the head, and
    by far less than one offset's logits. A head gradient or logits per offset would be three."""
    rows, length, vocab = 2, 64, 65536

    def temporaries(depth):
        cfg = of(kind, depth, vocab_size=vocab)
        shapes = jax.eval_shape(
            lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
        )
        ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        batch = Batch(ints, ints, jax.ShapeDtypeStruct(ints.shape, jnp.float32), ints, ints)
        loss_fn = losses.make_loss(cfg, TERMS, 16)
        run = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, jax.random.key(0))[0]))
        return run.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) - temporaries(1) < 4 * CFG.dim * vocab / 2 < 4 * rows * length * vocab / 8


class Recorder:
    """A projection that notes the roles it is asked for."""

    def __init__(self):
        self.roles = []

    def __call__(self, role, x, w):
        return self.several((role,), x, (w,))[0]

    def several(self, roles, x, ws):
        self.roles += roles
        return tuple(x @ w for w in ws)


def test_roles_groups_and_formats():
    """Block matrices are ternary and Muon's; the join is Muon's in full precision; norms are scalars."""
    cfg, batch = of("chained", depth=1), packed()
    params, recorder = initial(cfg), Recorder()
    z = jnp.zeros((*batch.tokens.shape, cfg.dim))
    mtp.future_hidden(
        cfg, recorder, transformer.last_layer(cfg, recorder, batch),  # type: ignore[arg-type]
        params["mtp"], params["embed"], z, batch.targets,
    )  # fmt: skip
    assert set(recorder.roles) == {*projections.BLOCK_ROLES, "mtp/join"}
    ternary = projections.from_config(dataclasses.replace(cfg, quant="ternary"))
    assert {ternary.precision(role).weight for role in projections.BLOCK_ROLES} == {"ternary"}
    assert ternary.precision("mtp/join") == projections.Precision()
    groups = params_lib.flatten(optim.labels({"mtp": params["mtp"]}))
    for path, leaf in params_lib.flatten({"mtp": params["mtp"]}).items():
        assert groups[path] == ("matrix" if leaf.ndim == 3 else "scalar"), path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "block"), [("chained", "modern"), ("parallel", "seed")])
def test_every_weight_learns(kind, block, key):
    """With the options of other blocks, ternary, rematerialization, tied or not, and bfloat16."""
    options = BLOCKS[block] | {"quant_group": 8 if block == "seed" else 0}
    cfg = of(kind, 2, quant="ternary", remat="block", **options)
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    loss_fn = losses.make_loss(cfg, TERMS, 16)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, steps.normalize(packed()), key)[0]))(initial(cfg))
    for path, grad in params_lib.flatten(grads["mtp"]).items():
        size = jnp.abs(grad).max(axis=tuple(range(1, grad.ndim)))
        assert bool(jnp.isfinite(grad).all()) and bool((size > 0).all()), path


def test_flops_formula_agrees_with_the_compiler(key):
    cfg = of("chained", 1, dim=128, heads=4, kv_heads=4, head_dim=32, mlp_dim=512, vocab_size=1024)
    ints = jnp.ones((2, 64), jnp.int32)
    batch = Batch(ints, ints, ints / 128.0, ints, ints)
    params = params_lib.init_params(transformer.param_specs(cfg), key)
    loss_fn = losses.make_loss(cfg, TERMS, 128)
    lowered = jax.jit(jax.grad(lambda p: loss_fn(p, batch, key)[0])).lower(params)
    counted = lowered.compile().cost_analysis()["flops"]
    assert 0.9 < flops.train_flops_per_token(cfg, 64) * 128 / counted < 1.05
