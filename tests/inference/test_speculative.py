"""Drafts change how many tokens a step yields, and nothing else: not a token, greedy or sampled."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slots import answer, full_logits, some_requests

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, LoopConfig, MhcConfig, ModelConfig, MtpConfig
from nanochat_jax.inference import engine, pace, schedule, slots, speculative
from nanochat_jax.inference.sample import neutral
from nanochat_jax.model import transformer

# Few ids, so that drafts of an untrained model come true now and then.
CFG = ModelConfig(vocab_size=6, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64)
LOOPS = LoopConfig(count=3, before=1, after=1, norm=True, gate="shared")
# name -> (model, loops of the drafts, most drafts)
KINDS = {
    "chained": (dataclasses.replace(CFG, mtp=MtpConfig(depth=2, kind="chained")), 0, 2),
    "one": (dataclasses.replace(CFG, layers=1, mtp=MtpConfig(depth=1)), 0, 1),
    "parallel": (dataclasses.replace(CFG, mtp=MtpConfig(depth=3, kind="parallel")), 0, 3),
    "loops": (dataclasses.replace(CFG, layers=1, loop=LOOPS), 1, 4),
    "streams": (
        dataclasses.replace(
            CFG, mtp=MtpConfig(depth=1), mhc=MhcConfig(streams=2, form="permutation"), window=(4, 0)
        ), 0, 1,
    ),
    "ternary": (
        dataclasses.replace(CFG, quant="ternary", mtp=MtpConfig(depth=2), **BLOCKS["modern"]), 0, 2
    ),
    "ternary_loops": (
        dataclasses.replace(CFG, quant="ternary", layers=1, loop=LoopConfig(count=2), **BLOCKS["portable"]),
        1, 2,
    ),
}  # fmt: skip
FAST = ("one",)
some_kinds = pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)


@functools.cache
def params_of(cfg):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    if not cfg.tied:
        params = params | {"head": jax.random.normal(jax.random.key(9), params["head"].shape)}
    return jax.device_put(params, jax.devices()[0])


def texts(kind, prompt, seed, **changes):
    """(plain ids, ids with drafts, what was seen of drafts)."""
    cfg, loops, most = KINDS[kind]
    plain = InferConfig(capacity=96, **changes)
    drafting = dataclasses.replace(plain, draft_tokens=most, draft_loops=loops)
    params, key, tell = params_of(cfg), jax.random.key(seed), []
    want = list(engine.generate(cfg, params, prompt, plain, key))
    with pytest.MonkeyPatch.context() as patch:  # every length, and most often all: whatever the times say
        patch.setattr(pace, "wanted", lambda seen: seen.lengths[min(seen.steps % 6, len(seen.lengths) - 1)])
        return want, list(speculative.generate(cfg, params, prompt, drafting, key, tell)), tell


def one_step(cfg, loops, drafts, state):
    """(state, Steps of one step) with all rows active."""
    active = np.ones(len(state.slots.row.token), bool)
    state, steps = speculative.step(
        cfg, loops, drafts, 1, params_of(cfg), state, np.int32(1), active, np.False_
    )
    return state, jax.tree.map(lambda a: a[0], steps)


@some_kinds
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_text_is_the_plain_one(kind, temperature):
    found = 0.0
    for seed, prompt in enumerate(([3], [1, 2, 3, 4, 5], list(range(6)) * 6)):
        want, got, (seen,) = texts(kind, prompt, seed, max_tokens=48, temperature=temperature)
        assert got == want
        found += sum(seen.right)
    # Else nothing was tested but rejections; the random layers of these kinds never foresee a token.
    assert found > 0 or kind in ("streams", "ternary") or (kind, temperature) == ("chained", 0)
    assert temperature == 0 or len(set(want)) > 1


@pytest.mark.slow
@some_kinds
def test_controls_and_lengths(kind):
    for most in (1, 2, 5):
        want, got, _ = texts(kind, [2, 5], most, max_tokens=most, temperature=1.3, top_k=4, top_p=0.9)
        assert got == want and len(got) == most
    with pytest.raises(ValueError, match=r"exceed infer.capacity = 96"):
        texts(kind, [1] * 90, 0, max_tokens=10)


@pytest.mark.slow
def test_drafts_that_are_always_right():
    """Loops that change nothing: the first one says what all of them say, so every draft comes true."""
    cfg, loops, most = KINDS["loops"]
    cfg = dataclasses.replace(cfg, loop=dataclasses.replace(LOOPS, norm=False))
    params = params_of(cfg) | {}
    blocks = jax.tree.map(lambda a: a, params["blocks"])
    blocks["attn"]["o"], blocks["mlp"]["down"] = (
        jnp.zeros_like(a) for a in (blocks["attn"]["o"], blocks["mlp"]["down"])
    )
    params["blocks"] = blocks
    for temperature in (0.0, 1.0):
        given = InferConfig(capacity=64, max_tokens=41, temperature=temperature)
        drafting = dataclasses.replace(given, draft_tokens=most, draft_loops=loops)
        want = list(engine.generate(cfg, params, [1, 2], given, jax.random.key(1)))
        tell = []
        assert list(speculative.generate(cfg, params, [1, 2], drafting, jax.random.key(1), tell)) == want
        assert tell[0].right == tell[0].tried and tell[0].tried[0] > 0


def states(cfg, loops, most, prompt, keys):
    """Slots that have read the prompt and drawn the first token of the answer."""
    B, ahead = len(keys), np.zeros(cfg.mtp.depth, np.int32)
    state = speculative.allocate(cfg, B, 32 + speculative.room(cfg, most), loops)
    one = jax.tree.map(lambda a: a[0], neutral(1))
    tokens, zeros = np.zeros(8, np.int32), np.zeros(128, np.float32)
    tokens[: len(prompt)] = prompt
    for b in range(B):
        own = slots.admit(state.slots, np.int32(b), keys[b], one, zeros > 0, zeros)
        state, _ = speculative.fill(
            cfg, params_of(cfg), state._replace(slots=own), np.int32(b), np.int32(b), tokens, np.int32(0),
            np.int32(len(prompt)), np.True_, np.True_, ahead,
        )  # fmt: skip
    return state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chained", "loops"])
def test_the_exact_distribution_by_enumeration(kind, monkeypatch):
    """All that can happen to three tokens of two ids, with its probability, against the model's product.

    With two ids a draw depends on one number, the difference g of their noise, which has the logistic
    distribution: the draw after a prefix is 0 iff g > -(z_0 - z_1). Between two such limits of all
    prefixes of a length nothing may change; so each place has finitely many cases. Several g stand for
    each case, which drafts see as different noise: what they draft must not matter.
    """
    cfg, loops, _ = KINDS[kind]
    cfg, prompt, n = dataclasses.replace(cfg, vocab_size=2), [1, 0, 1], 3

    def gap(said):
        z = full_logits(cfg, params_of(cfg), jnp.asarray([[*prompt, *said]], jnp.int32))[0, -1]
        return float(z[0]) - float(z[1])

    def below(g):  # the logistic distribution function
        return 1 / (1 + np.exp(-g))

    cases = []
    for k in range(n):
        limits = sorted(-gap(said) for said in itertools.product((0, 1), repeat=k))
        edges = np.array([0.0, *(below(g) for g in limits), 1.0])
        for low, high in itertools.pairwise(edges):
            points = low + (high - low) * np.array([0.1, 0.9])
            cases.append((k, high - low, np.log(points) - np.log1p(-points)))
    each = [[case for case in cases if case[0] == k] for k in range(n)]
    rows = [
        (picked, [float(case[2][i]) for case, i in zip(picked, which, strict=True)])
        for picked in itertools.product(*each)
        for which in itertools.product((0, 1), repeat=n)
    ]
    table = jnp.asarray([[*g, 0, 0, 0, 0] for _, g in rows], jnp.float32)

    def noise(row, ahead, live_B):
        number = row.key[:, 1].astype(jnp.int32)
        g = table[number, jnp.minimum(row.draws + ahead, n + 3)]
        return jnp.zeros(row.seen.shape, jnp.float32).at[:, 0].set(g)

    monkeypatch.setattr(slots, "noise", noise)
    jax.clear_caches()  # programs that were made with the true noise
    drafts, B = 2, len(rows)
    keys = [jax.random.wrap_key_data(np.array([0, b], np.uint32), impl="threefry2x32") for b in range(B)]
    state = states(cfg, loops, drafts, prompt, keys)
    said, early = [[int(t)] for t in state.slots.row.token], 0
    while min(map(len, said)) < n:
        state, steps = one_step(cfg, loops, drafts, state)
        for b in range(B):
            early += int(steps.count[b]) > 1
            said[b] += np.asarray(steps.drawn.token)[: int(steps.count[b]), b].tolist()
    jax.clear_caches()
    assert 0 < early < 2 * B  # some drafts came true, and some did not
    found: dict[tuple, float] = {}
    outcome: dict[tuple, tuple] = {}
    for (picked, _), text in zip(rows, said, strict=True):
        case = tuple(id(c) for c in picked)
        assert outcome.setdefault(case, tuple(text[:n])) == tuple(text[:n])  # whatever was drafted
        chance = np.prod([c[1] for c in picked]) / 2**n
        found[tuple(text[:n])] = found.get(tuple(text[:n]), 0.0) + chance
    distance = 0.0
    for text in itertools.product((0, 1), repeat=n):
        want = 1.0
        for k, token in enumerate(text):
            zero = below(gap(text[:k]))
            want *= zero if token == 0 else 1 - zero
        distance += abs(want - found.get(text, 0.0)) / 2
    assert abs(sum(found.values()) - 1) < 1e-12 and distance < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chained", "parallel"])
def test_drafts_are_those_of_training(kind):
    """After any steps, the next drafts are the MTP layers' argmax over the whole text, as in training."""
    from nanochat_jax.model import mtp
    from nanochat_jax.quant import project as projections

    cfg, _, most = KINDS[kind]
    params, prompt = params_of(cfg), [1, 5, 2]
    state = states(cfg, 0, most, prompt, [jax.random.key(0)])
    text, drafted = [*prompt, int(state.slots.row.token[0])], []
    real = speculative._by_layers

    for drafts in (0, most, 0, 1, most, most, *[0] * (2 * pace.TURN), most, 1):
        _, guesses = real(cfg, params, state, [jnp.zeros(state.slots.row.seen.shape)] * most)
        drafted = [int(g[0]) for g in guesses]
        tokens = jnp.asarray([text + drafted], jnp.int32)  # the chained form reads drafts
        batch = engine.batch_of(tokens[:, :-1], jnp.zeros((1,), jnp.int32)).replace(targets=tokens[:, 1:])
        project = projections.from_config(cfg)
        hidden = transformer.forward(cfg, project, params, batch).hidden
        future = mtp.future_hidden(
            cfg, project, transformer.last_layer(cfg, project, batch), params["mtp"], params["embed"], hidden,
            batch.targets,
        )  # fmt: skip
        z = transformer.logits(cfg, params, future[:, 0, len(text) - 2])
        assert drafted == np.argmax(z, -1).tolist()
        state, steps = one_step(cfg, 0, drafts, state)
        text += np.asarray(steps.drawn.token)[: int(steps.count[0]), 0].tolist()


# --- many requests


def engine_of(kind, **changes):
    cfg, loops, most = KINDS[kind]
    made = schedule.Engine(
        cfg, params_of(cfg), known=cfg.vocab_size, slots=3, capacity=64, chunk=16, draft_tokens=most,
        draft_loops=loops,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def requests_of(count, **changes):
    return [
        dataclasses.replace(r, prompt=tuple(t % 6 for t in r.prompt), frequency=0.3 * (i % 2), **changes)
        for i, r in enumerate(some_requests(count, seed=7))
    ]


@pytest.mark.slow
@some_kinds
def test_served_texts_are_the_plain_ones(kind):
    """Rows that advance differently, prompts in pieces, slots used again, penalties, stop ids."""
    requests, made = requests_of(7), engine_of(kind)
    plain = dataclasses.replace(made, draft_tokens=0, draft_loops=0)
    told = {}
    state = schedule.warm_up(made)
    before = speculative.step._cache_size(), speculative.fill._cache_size()
    got = answer(made, requests, state=state, observe=lambda name, value: told.update({name: value}))
    assert (speculative.step._cache_size(), speculative.fill._cache_size()) == before
    assert got == answer(plain, requests)
    assert 0 < told["accepted_1"] < 1
    assert answer(dataclasses.replace(made, burst=1), requests) == got
    ids, _ = got
    stopped = [
        dataclasses.replace(r, stop_ids=frozenset(ids[i][len(ids[i]) // 2 :][:1]))
        for i, r in enumerate(requests)
    ]
    assert answer(made, stopped) == answer(plain, stopped)


# --- how many


def test_pace_takes_the_best_rate():
    """Costs 1, 1.1, 1.5 of 0, 1, 2 drafts: it depends on the share that comes true."""

    def after(*counts_by_length):
        seen = pace.start(2)
        assert seen.lengths == (0, 1, 2)
        for _ in range(3 * pace.TURN * pace.RUNS + 100):
            length = pace.wanted(seen)
            seen = pace.seen(seen, length, counts_by_length[length], (1.0, 1.1, 1.5)[length])
        assert not pace.trying(seen)
        return pace.wanted(seen)

    assert after([1], [2], [3]) == 2  # all come true
    assert after([1], [1], [1]) == 0  # none: plain
    assert after([1] * 4, [2, 2, 1, 2], [2, 2, 1, 2]) == 1  # first ones mostly, second ones never
    assert after([1] * 4, [1, 1, 1, 2], [1, 1, 1, 2]) == 1  # 1.25 tokens for 1.1
    assert after([1] * 8, [1] * 7 + [2], [1] * 7 + [2]) == 0  # 1.125 tokens for 1.1: not worth it


def test_as_many_steps_as_fit_into_a_moment():
    assert pace.burst(0.0) == pace.burst(2 * pace.MOMENT) == pace.burst(pace.MOMENT) == 1
    assert pace.burst(pace.MOMENT / 2.5) == 2
    assert pace.smooth(0.0, None) == 0.0 and pace.smooth(0.0, 3.0) == 3.0 == pace.smooth(3.0, None)
    seconds = 1.0
    for _ in range(40):
        before, seconds = seconds, pace.smooth(seconds, 2.0)
        assert before < seconds <= 2.0
    assert seconds > 1.99


def test_pace_measures_first_and_again():
    seen = pace.start(4)
    assert seen.lengths == (0, 1, 2, 4) and pace.start(1).lengths == (0, 1) and pace.line(seen) == ""
    before = None
    for k in range(2 * 4 * pace.TURN):
        length = pace.wanted(seen)
        assert pace.trying(seen) and length == seen.lengths[k // pace.TURN % 4]  # in turns
        compiled = 9.0 if k < 4 * pace.TURN and k % pace.TURN == 1 else 1.0
        seen = pace.seen(seen, length, [length + 1], compiled if length == before else None)
        before = length
    assert not pace.trying(seen) and pace.wanted(seen) == 4 and pace.rate(seen, 4) == 5.0
    assert all(len(seconds) == pace.RUNS for seconds in seen.seconds)
    for _ in range(pace.RENEW):
        seen = pace.seen(seen, 4, [1])
    assert pace.trying(seen) and pace.wanted(seen) == 0


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=30))
def test_shares_are_those_of_recent_steps(steps):
    seen, right, tried = pace.start(3), np.zeros(3), np.zeros(3)
    for counts in steps:
        seen = pace.seen(seen, 3, counts)
        for k in range(3):
            reached = [c for c in counts if c > k]
            if reached:
                right[k] = right[k] * (1 - pace.FORGET) + sum(c > k + 1 for c in reached)
                tried[k] = tried[k] * (1 - pace.FORGET) + len(reached)
    np.testing.assert_allclose(seen.right, right, rtol=1e-9)
    np.testing.assert_allclose(seen.tried, tried, rtol=1e-9)
    shares = pace.shares(seen)
    np.testing.assert_allclose(shares, np.divide(right, tried, where=tried > 0, out=np.zeros(3)), rtol=1e-9)
    np.testing.assert_allclose(pace.expected(shares), 1 + np.sum(np.cumprod(shares)), rtol=1e-9)


def test_pace_hopes_where_little_was_seen():
    """With what few drafts leave open, drafting goes on; many that fail end it."""
    seen = pace.start(1)
    for k in range(2 * pace.RUNS):
        length = k % 2
        seen = pace.seen(seen, length, [1 + length * (k < pace.RUNS)], 1.0 + 0.41 * length)
    assert pace.shares(seen) == (pytest.approx(0.5, abs=0.05),) and pace.wanted(seen) == 1
    for _ in range(16):
        seen = pace.seen(seen, 1, [1, 2])
    assert pace.shares(seen) == (pytest.approx(0.5, abs=0.05),) and pace.wanted(seen) == 0
