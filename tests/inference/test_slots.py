"""Continuous batching: every request gets the text that it would get alone, from any slot, beside anyone.

The equality contract of the cache is here too: any way to cut a sequence gives the logits of one full pass.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import params as params_lib
from nanochat_jax.config import BLOCKS, InferConfig, LoopConfig, ModelConfig
from nanochat_jax.inference import cache as caches
from nanochat_jax.inference import engine, pace, schedule, slots
from nanochat_jax.model import transformer
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Batch

CFG = ModelConfig(
    vocab_size=100, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, quant="ternary",
    **BLOCKS["modern"],
)  # fmt: skip
FULL = dataclasses.replace(CFG, quant="full")
SOLO = InferConfig(capacity=80)


@functools.cache
def params_of(cfg=CFG):
    params = params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0))
    params = params | {"head": jax.random.normal(jax.random.key(9), params["head"].shape)}
    if cfg.loop.gate != "none":  # logits around 0, so that some tokens leave early and others do not
        params["loop"]["gate"]["w"] = jax.random.normal(jax.random.key(3), params["loop"]["gate"]["w"].shape)
    return jax.device_put(params, jax.devices()[0])


def engine_of(cfg=CFG, params=None, **changes):
    made = schedule.Engine(cfg, params or params_of(cfg), known=100, slots=3, capacity=64, chunk=16)
    return dataclasses.replace(made, **changes)


def answer(made, requests, cancel_after=None, state=None, observe=lambda name, value: None):
    """(ids of every request's answer, its end). cancel_after: by request, tokens after which it is left."""
    ids, ends = [[] for _ in requests], [None] * len(requests)

    def job(i):
        def emit(token):
            ids[i].append(token.id)
            return True

        def finish(reason, message):
            assert ends[i] is None, "finished twice"
            ends[i] = (reason, message)

        limit = (cancel_after or {}).get(i)
        gone = (lambda: False) if limit is None else (lambda: len(ids[i]) >= limit)
        return schedule.Job(requests[i], emit, finish, gone)

    waiting = [job(i) for i in range(len(requests))]
    schedule.run(made, lambda idle: waiting.pop(0) if waiting else None, observe, state)
    return ids, ends


def alone(request, cfg=CFG, **changes):
    """The answer by the plain loop over one sequence."""
    own = dataclasses.replace(
        SOLO, max_tokens=request.max_tokens, temperature=request.temperature, top_k=request.top_k,
        top_p=request.top_p, **changes,
    )  # fmt: skip
    key = jax.random.key(request.seed)
    return list(engine.generate(cfg, params_of(cfg), list(request.prompt), own, key))


def some_requests(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        schedule.Request(
            tuple(rng.integers(0, 100, rng.integers(1, 40)).tolist()), int(rng.integers(1, 24)),
            temperature=float(i % 2), top_k=(0, 5)[i % 3 == 0], top_p=(1.0, 0.8)[i % 5 == 0], seed=i,
        )
        for i in range(count)
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def full_logits(cfg, params, tokens_BL):
    index = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None], tokens_BL.shape)
    batch = Batch(tokens_BL, tokens_BL, jnp.ones(tokens_BL.shape), jnp.ones_like(tokens_BL), index)
    hidden = transformer.forward(cfg, projections.from_config(cfg), params, batch).hidden
    return transformer.logits(cfg, params, hidden)


EXTEND = jax.jit(engine.extend, static_argnums=0)
DECODE = jax.jit(engine.decode, static_argnums=0)


@settings(max_examples=12)
@given(st.integers(0, 2**31 - 1))
def test_any_cut_gives_the_logits_of_one_pass(seed):
    """Rows advance by different numbers of tokens in each call; unused cache slots hold large garbage.

    In full precision: with activations rounded to 8 bits, a sum in another order now and then rounds
    the other way, by a whole step.
    """
    params, rng, L, T = params_of(FULL), np.random.default_rng(seed), 16, 4
    tokens = rng.integers(0, 100, (2, L)).astype(np.int32)
    expected = np.asarray(full_logits(FULL, params, jnp.asarray(tokens)))[..., :100]
    cache = jax.tree.map(
        lambda a: a if a.ndim == 1 else jnp.full(a.shape, 1e9, a.dtype), caches.allocate(FULL, 2, L + T)
    )
    done, got = np.zeros(2, int), np.zeros_like(expected)
    while (done < L).any():
        if rng.random() < 0.5:
            valid = rng.integers(0, np.minimum(T, L - done) + 1).astype(np.int32)
            piece = np.zeros((2, T), np.int32)
            for row in range(2):
                piece[row, : valid[row]] = tokens[row, done[row] : done[row] + valid[row]]
            logits, cache = EXTEND(FULL, params, jnp.asarray(piece), jnp.asarray(valid), cache)
        else:
            valid = rng.integers(0, (done < L) + 1).astype(np.int32)
            piece = tokens[np.arange(2), np.minimum(done, L - 1)]
            logits, cache = DECODE(FULL, params, jnp.asarray(piece), cache, None, jnp.asarray(valid > 0))
            logits = logits[:, None]
        for row in range(2):
            got[row, done[row] : done[row] + valid[row]] = np.asarray(logits)[row, : valid[row], :100]
        done += valid
        np.testing.assert_array_equal(np.asarray(cache.length), done)
    np.testing.assert_allclose(got, expected, atol=2e-5 * expected.std())


def test_text_does_not_depend_on_slot_or_neighbours():
    requests = some_requests(8)
    ids, ends = answer(engine_of(), requests)
    assert ends == [("length", "")] * 8
    assert ids == [alone(request) for request in requests]
    again, _ = answer(engine_of(), requests[::-1])
    assert again == ids[::-1]


def test_nothing_compiles_after_the_warm_up():
    made = engine_of()
    state, programs = schedule.warm_up(made), (slots.fill, slots.step, slots.admit)
    before = [program._cache_size() for program in programs]
    request = schedule.Request((1, 2, 3), 4, top=2, bias={3: 1.0}, seed=-1, stop_ids=frozenset({99}))
    answer(made, [request, *some_requests(4, seed=1)], state=state)
    assert [program._cache_size() for program in programs] == before


def test_slots_are_donated():
    made = engine_of()
    before = schedule.allocate(made)
    after, _ = schedule._step(made, before, np.ones(3, bool), False)
    assert before.cache.k.is_deleted() and not after.cache.k.is_deleted()


def heard(made, requests):
    """Every token of the answers with its numbers, by request; steps' counts of tokens."""
    said, counts = [[] for _ in requests], []

    def job(i):
        return schedule.Job(requests[i], lambda token: said[i].append(token) or True, lambda *end: None)

    def counted(engine, slots, active, tops, drafts=0, count=1, *, step=schedule._step):
        counts.append(count)
        return step(engine, slots, active, tops, drafts, count)

    waiting = [job(i) for i in range(len(requests))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_step", counted)
        schedule.run(made, lambda idle: waiting.pop(0) if waiting else None)
    return said, counts


@pytest.mark.parametrize("seconds", [1e-9, pace.MOMENT / 3])
def test_no_bit_depends_on_how_many_tokens_a_turn_adds(monkeypatch, seconds):
    """Times decide about time only: ids, probabilities and alternatives are the same to the last bit."""
    requests = [dataclasses.replace(r, top=2, max_tokens=13 + 7 * i) for i, r in enumerate(some_requests(4))]
    one, counts = heard(engine_of(burst=1), requests)
    assert set(counts) == {1}
    monkeypatch.setattr(pace, "smooth", lambda *known: seconds)
    many, counts = heard(engine_of(burst=5), requests)
    assert max(counts) == min(5, round(pace.MOMENT / seconds)) and many == one


def test_a_turn_adds_no_more_than_any_row_may_have():
    ask = functools.partial(schedule.Request, temperature=0.0)
    made = engine_of(capacity=64, chunk=2, burst=50)  # more slots for what is too much than for a piece
    requests = [ask((1, 2), 62), ask((3,), 5), ask(tuple(range(40)), 24)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "smooth", lambda *known: 1e-9)
        said, counts = heard(made, requests)
    assert [len(tokens) for tokens in said] == [62, 5, 24]
    assert [[token.id for token in tokens] for tokens in said] == [alone(request) for request in requests]
    assert max(counts) > 5 and sum(counts) <= 62


def test_several_steps_are_single_ones():
    made = engine_of(burst=4)
    state = schedule._admit(made, schedule.allocate(made), 1, schedule.Request((4, 5), 9, seed=3))
    state, _ = schedule._fill(made, state, schedule._Reading(1, 1, 0), (4, 5))
    active = np.array([False, True, False])
    apart, singly = jax.tree.map(jnp.copy, state), []
    for _ in range(3):
        apart, drawn = schedule._step(made, apart, active, True)
        singly.append(drawn)
    together, drawn = schedule._step(made, state, active, True, count=3)
    chex.assert_trees_all_equal(together, apart)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda a: a[:3], drawn), jax.tree.map(lambda *a: jnp.stack([x[0] for x in a]), *singly)
    )


def test_garbage_of_earlier_requests_has_no_effect():
    requests = some_requests(4, seed=2)
    state = schedule.allocate(engine_of())
    dirty = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a, state.cache
    )
    assert answer(engine_of(), requests, state=state._replace(cache=dirty)) == answer(engine_of(), requests)


def test_ends_of_answers():
    first = alone(schedule.Request((5, 6), 6, temperature=0.0))
    requests = [
        schedule.Request((5, 6), 6, temperature=0.0, stop_ids=frozenset(first[:1])),
        schedule.Request((5, 6), 6, temperature=0.0, stop_ids=frozenset(first[-1:])),
        schedule.Request((5, 6), 0),
        schedule.Request(tuple(range(63)), 1, temperature=0.0),
        schedule.Request(tuple(range(63)), 2),
        schedule.Request((), 2),
        schedule.Request((100,), 2),
        schedule.Request((5, 6), 20, temperature=0.0),
    ]
    ids, ends = answer(engine_of(), requests, cancel_after={7: 3})
    assert ids[:3] == [[], first[: first.index(first[-1])], []] and len(ids[3]) == 1
    assert [reason for reason, _ in ends] == [
        "stop", "stop", "length", "length", "error", "error", "error", "cancelled"
    ]  # fmt: skip
    assert ends[4][1] == "63 prompt tokens and max_tokens = 2 exceed the capacity of 64"
    assert "token ids in 0..99" in ends[5][1] and "token ids in 0..99" in ends[6][1]
    assert ids[7] == first[:3]


def test_emit_may_end_the_answer():
    said, ends = [], []
    job = schedule.Job(
        schedule.Request((5, 6), 20), lambda token: said.append(token.id) or len(said) < 2,
        lambda *end: ends.append(end),
    )  # fmt: skip
    waiting = [job]
    schedule.run(engine_of(), lambda idle: waiting.pop() if waiting else None)
    assert len(said) == 2 and ends == [("stop", "")]


def test_shared_beginnings_are_read_once():
    """Turns of a chat, and another conversation with the same beginning while the first is running."""
    common = tuple(np.random.default_rng(3).integers(0, 100, 24).tolist())
    greedy = functools.partial(schedule.Request, max_tokens=8, temperature=0.0)
    requests = [greedy((*common, 1)), greedy((*common, 2, 3)), greedy((7, 8, 9)), greedy((*common, 1, 4))]
    told = {"reused_tokens": 0.0, "prompt_tokens": 0.0}

    def observe(name, value):
        told[name] = told.get(name, 0) + value

    ids, _ = answer(engine_of(), requests, observe=observe)
    assert ids == [alone(request) for request in requests]
    assert told["prompt_tokens"] == 25 + 26 + 3 + 26 and told["reused_tokens"] >= 24 + 24
    assert told["tokens"] == 32


def test_a_prompt_is_read_between_the_tokens_of_others():
    """A row that answers gets a token for every piece of another's long prompt."""
    events = []

    def job(name, prompt, count):
        return schedule.Job(
            schedule.Request(prompt, count), lambda token: events.append(name) or True, lambda *end: None
        )

    waiting = [job("a", (1,), 12), job("b", tuple(range(48)), 1)]
    schedule.run(engine_of(), lambda idle: waiting.pop(0) if waiting else None)
    assert events.index("b") >= 3 and events.count("a") == 12  # 48 tokens are three pieces of 16


def test_non_finite_logits_end_one_request_only():
    params = params_of()
    bad = params | {"embed": params["embed"].at[7].set(jnp.nan)}
    made = engine_of(params=bad)
    good = [schedule.Request((3, 4, 5), 6, temperature=0.0, bias={7: -100.0}, seed=i) for i in range(3)]
    ids, ends = answer(made, [schedule.Request((7, 1), 5), *good])
    assert ends[0] == ("error", "non-finite logits at token 0 of the answer (slot 0)") and ids[0] == []
    assert ends[1:] == [("length", "")] * 3 and ids[1] == ids[2] == ids[3] == answer(engine_of(), good)[0][0]


def test_a_failure_is_told_to_everybody(monkeypatch):
    ends, waiting = [], []
    for i in range(2):
        request = schedule.Request((5, 6 + i), 20)
        waiting.append(schedule.Job(request, lambda token: True, lambda *end: ends.append(end)))
    steps, real = iter(range(9)), schedule._step
    monkeypatch.setattr(schedule, "_step", lambda *words: real(*words) if next(steps) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        schedule.run(engine_of(), lambda idle: waiting.pop() if waiting else None)
    assert ends == [("error", "the model failed")] * 2


def test_controls_reach_the_draw():
    base = schedule.Request((5, 6), 20, temperature=0.0)
    change = functools.partial(dataclasses.replace, base)
    requests = [
        change(bias={42: 100.0}),
        change(bias={42: 100.0}, frequency=2.0, presence=2.0),
        change(frequency=2.0, bias=dict.fromkeys(range(20, 100), -90.0)),
        change(temperature=1.5, seed=1 << 40),
        change(temperature=1.5, seed=2 << 40),
        change(repetition=1.9),
        base,
    ]
    ids, _ = answer(engine_of(known=60), requests)
    assert ids[0] == [42] * 20 == ids[1]
    assert max(ids[2]) < 20 and len(set(ids[2])) > 8  # greedy alone would walk in a circle
    assert ids[3] != ids[4] and ids[5] != ids[6]
    assert all(max(row) < 60 for row in ids)  # ids that the tokenizer does not know


def test_log_probabilities_are_the_models_own():
    tokens = []
    request = schedule.Request((5, 6, 7), 5, temperature=0.0, top=3, bias={9: 50.0})
    waiting = [schedule.Job(request, lambda token: tokens.append(token) or True, lambda *end: None)]
    schedule.run(engine_of(), lambda idle: waiting.pop() if waiting else None)
    row = [5, 6, 7] + [token.id for token in tokens]
    logits = np.asarray(full_logits(CFG, params_of(), jnp.asarray([row], jnp.int32)))[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits.max(-1, keepdims=True)
    for i, token in enumerate(tokens):
        assert token.id == 9 and abs(token.log_prob - log_probs[i + 2, 9]) < 1e-4
        assert [index for index, _ in token.top] == np.argsort(-log_probs[i + 2], kind="stable")[:3].tolist()


@pytest.mark.slow
def test_early_exit_of_a_row_does_not_depend_on_the_others():
    cfg = dataclasses.replace(CFG, layers=1, loop=LoopConfig(count=3, gate="shared"))
    requests, depths = some_requests(5, seed=4), []
    ids, _ = answer(
        engine_of(cfg, exit_quantile=0.5), requests,
        observe=lambda name, value: depths.append(value) if name == "depth" else None,
    )  # fmt: skip
    assert ids == [alone(request, cfg, exit_quantile=0.5) for request in requests]
    assert len(set(depths)) > 1 and set(depths) <= {1.0, 2.0, 3.0}
