"""Requests in, tokens out: continuous batching over the slots of one cache (the host's side).

One turn of the loop: leave out who has gone, give a free slot to the next request, read at most one piece
of a prompt, add a token to all active rows. So nobody waits for another's long prompt or long answer.
The host reads a draw while the device works on the next one; what a row draws too many when it ends is
thrown away.

Where a step is short, the host's part of it counts (a millisecond on a CPU), and while no prompt is read a turn
adds as many tokens as fit into a moment (`pace.burst`). That decides about time only: no bit depends on it.

A prompt that begins like what a slot still holds (the turns of a chat) is copied from there and read from
the first difference on.

With drafts (inference/speculative.py) a step gives each row one token or more: the same tokens.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from nanochat_jax.config import ModelConfig, padded_vocab
from nanochat_jax.inference import pace, speculative
from nanochat_jax.inference import slots as device
from nanochat_jax.inference.sample import Controls
from nanochat_jax.types import Params

REUSED_LEAST = 16  # tokens in common that are worth a copy
State = device.Slots | speculative.State  # the latter with drafts


@dataclass(frozen=True)
class Engine:
    """A model ready to answer. Sizes are static: each makes a program of its own."""

    cfg: ModelConfig
    params: Params
    known: int  # ids that the tokenizer knows; others are never drawn
    slots: int = 8  # requests answered at the same time
    capacity: int = 1024  # prompt and answer together, in tokens
    chunk: int = 256  # most tokens of a prompt that are read at once; a power of two
    exit_quantile: float = 1.0  # see InferConfig
    draft_tokens: int = 0  # see InferConfig
    draft_loops: int = 0
    burst: int = pace.TURN  # most steps in a turn; with drafts so many tokens, foreseen or not


@dataclass(frozen=True)
class Request:
    """One answer that is wanted; the numbers are those of inference.sample.Controls."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0  # any 64-bit integer
    stop_ids: frozenset[int] = frozenset()
    top: int = 0  # alternatives wanted with each token, at most slots.TOP


class Token(NamedTuple):
    """A token of an answer; probabilities are the model's own, before all controls."""

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]  # (id, log probability) of the likeliest


@dataclass(frozen=True)
class Job:
    """A request and who waits for it; all functions are called by the thread of `run`.

    emit: takes a token; False ends the answer ("stop"). finish: called once at the end, with "stop" (a
    stop id, or emit said so), "length", "cancelled" or "error", and for the last a sentence.
    cancelled: asked before every step and every token.
    """

    request: Request
    emit: Callable[[Token], bool]
    finish: Callable[[str, str], None]
    cancelled: Callable[[], bool] = lambda: False


class _Reading(NamedTuple):
    """The prompt that is being read."""

    slot: int
    source: int  # slot that holds the first `start` tokens
    start: int
    first: bool = True  # nothing of it has been read


def check(engine: Engine, request: Request) -> None:
    """Raises: ValueError if the prompt is empty, holds an unknown id, or does not fit with the answer."""
    prompt, last = request.prompt, engine.cfg.vocab_size - 1
    if not prompt or not 0 <= min(prompt) <= max(prompt) <= last:
        raise ValueError(f"a prompt needs token ids in 0..{last}, got {list(prompt[:8])}")
    if request.max_tokens < 0 or len(prompt) + request.max_tokens > engine.capacity:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_tokens = {request.max_tokens} exceed the capacity of "
            f"{engine.capacity}"
        )


def allocate(engine: Engine) -> State:
    """Empty slots of the engine, beside its parameters."""
    # Room for the padding of the last piece, and for what the last turn draws too many: a write that does not
    # fit would be moved to the left.
    if engine.draft_tokens:
        room = max(engine.chunk, speculative.room(engine.cfg, engine.draft_tokens, engine.burst))
        state: State = speculative.allocate(
            engine.cfg, engine.slots, engine.capacity + room, engine.draft_loops
        )
    else:
        state = device.allocate(engine.cfg, engine.slots, engine.capacity + max(engine.chunk, engine.burst))
    return jax.device_put(state, jax.tree.leaves(engine.params)[0].sharding)


def pieces(engine: Engine) -> tuple[int, ...]:
    """Lengths that pieces of a prompt are padded to."""
    least = min(32, engine.chunk)
    return tuple(least << i for i in range((engine.chunk // least).bit_length()))


def warm_up(engine: Engine) -> State:
    """Compile every program that `run` will need; returns empty slots for it."""
    slots = _admit(engine, allocate(engine), 0, Request((0,), 1))
    for size in pieces(engine):
        slots, _ = _fill(engine, slots, _Reading(0, 0, 0), (0,) * size)
    for drafts in (*(pace.start(engine.draft_tokens).lengths if engine.draft_tokens else ()), None):
        slots, drawn = _step(engine, slots, np.zeros(engine.slots, bool), False, drafts)
        jax.block_until_ready(drawn)
    return slots


def run(
    engine: Engine,
    take: Callable[[bool], Job | None],
    observe: Callable[[str, float], None] = lambda name, value: None,
    slots: State | None = None,
) -> None:
    """Answer jobs until there are none.

    take: called with True when there is nothing to do: waits for a job, None ends `run`; called with False
    when a slot is free beside working ones: a job that waits already, or None. Jobs start in this order.
    observe: is told "prompt_tokens", "reused_tokens", "tokens" and "depth" as they come, after each turn
    "active_slots" and "kv_tokens", and with drafts after each step "drafts" (tokens drafted ahead) and
    "accepted_k", the share of k-th drafts that come true. slots: from `warm_up`; None allocates them.
    A request that cannot be answered ends with "error" and leaves the others alone.
    """
    slots = allocate(engine) if slots is None else slots
    table = _Table.of(engine.slots)
    reading: _Reading | None = None
    seen = pace.start(engine.draft_tokens) if engine.draft_tokens else None
    last = _Heard(None)
    try:
        while True:
            for slot, job in enumerate(table.jobs):
                if job is not None and job.cancelled():
                    _end(table, slot, "cancelled")
            if reading is not None and table.jobs[reading.slot] is None:
                reading = None
            if reading is None and None in table.jobs:
                idle = not table.unread and all(job is None for job in table.jobs)
                job = take(idle)
                if job is None and idle:
                    return
                if job is not None and _starts(engine, job):
                    reading = _place(job.request.prompt, table)
                    slots = _admit(engine, slots, reading.slot, job.request)
                    _seat(table, reading, job)
                    observe("prompt_tokens", len(job.request.prompt))
                    observe("reused_tokens", reading.start)
            before, read = len(table.unread), reading is not None
            if reading is not None:
                slots, reading = _read_piece(engine, table, slots, reading)
            drafts = None if seen is None else pace.wanted(seen, not read)
            most = max(1, engine.burst // ((drafts or 0) + 1))  # what is drawn behind an answer's end is lost
            tried = seen is not None and pace.trying(seen)
            drafts = drafts if drafts or tried else None
            burst = 1 if read else most if tried else min(most, pace.burst(last.seconds))
            slots = _step_active(engine, table, slots, drafts, burst, read)
            worked = reading is not None or len(table.unread) > before
            while len(table.unread) > worked:
                seen, last = _hand_out(table, observe, seen, last)
            observe("active_slots", sum(job is not None for job in table.jobs))
            observe(
                "kv_tokens", sum(len(table.held[i]) for i, job in enumerate(table.jobs) if job is not None)
            )
    except BaseException:
        for slot in range(engine.slots):
            _end(table, slot, "error", "the model failed")
        raise


class _Drawing(NamedTuple):
    """Dispatched draws, and (row of the draw, slot, job) that they are for."""

    drawn: device.Drawn | speculative.Steps
    rows: list[tuple[int, int, Job]]
    count: int = 0  # steps; 0 = a prompt's draw
    drafts: int = 0
    behind: bool = False  # a piece of a prompt was read before this step


class _Heard(NamedTuple):
    """When a turn's tokens were there, how many were drafted for each step of it, and what such a step takes."""

    at: float | None  # None: it was a prompt's draw
    drafts: int = 0
    seconds: float = 0.0  # 0 = not known yet


@dataclass(frozen=True)
class _Table:
    """What the host knows of each slot; `run` changes it."""

    jobs: list[Job | None]
    held: list[list[int]]  # tokens that the slot's cache holds for sure
    said: list[list[int]]  # tokens of the answer that the host has read
    draws: list[int]  # dispatched draws of the answer, with drafts at least; 0 while its prompt is read
    used: list[int]  # when the slot was last given away
    unread: deque[_Drawing]  # in the order of their dispatch

    @staticmethod
    def of(slots: int) -> "_Table":
        """All slots free."""
        return _Table(
            [None] * slots,
            [[] for _ in range(slots)],
            [[] for _ in range(slots)],
            [0] * slots,
            [0] * slots,
            deque(),
        )


def _seat(table: _Table, at: _Reading, job: Job) -> None:
    """Give the slot to the job."""
    table.jobs[at.slot], table.said[at.slot], table.draws[at.slot] = job, [], 0
    table.used[at.slot] = 1 + max(table.used)
    table.held[at.slot] = list(job.request.prompt[: at.start])


def _end(table: _Table, slot: int, reason: str, message: str = "") -> None:
    """Free the slot and tell who waits. What its cache holds stays, for a prompt that begins alike."""
    job, table.jobs[slot] = table.jobs[slot], None
    table.draws[slot] = 0
    if job is not None:
        job.finish(reason, message)


def _read_piece(engine: Engine, table: _Table, slots: State, at: _Reading) -> tuple[State, _Reading | None]:
    """Read the next piece of a prompt; with the last one the first token of the answer is drawn."""
    job = table.jobs[at.slot]
    assert job is not None
    piece = job.request.prompt[at.start : at.start + engine.chunk]
    end = at.start + len(piece)
    last = end == len(job.request.prompt)
    slots, drawn = _fill(engine, slots, at, job.request.prompt)
    table.held[at.slot] += piece
    if not last:
        return slots, _Reading(at.slot, at.slot, end, first=False)
    table.draws[at.slot] = 1
    table.unread.append(_Drawing(drawn, [(0, at.slot, job)]))
    return slots, None


def _step_active(
    engine: Engine, table: _Table, slots: State, drafts: int | None, burst: int, behind: bool
) -> State:
    """Add tokens to every row whose answer may have one more, by `burst` steps if any may have so many."""
    active = [
        (slot, slot, job) for slot, job in enumerate(table.jobs)
        if job is not None and 0 < table.draws[slot] < job.request.max_tokens
    ]  # fmt: skip
    if not active:
        return slots
    count = min(burst, max(job.request.max_tokens - table.draws[slot] for _, slot, job in active))
    mask = np.zeros(engine.slots, bool)
    for _, slot, _ in active:
        mask[slot] = True
        table.draws[slot] += count
    slots, drawn = _step(engine, slots, mask, any(job.request.top for _, _, job in active), drafts, count)
    table.unread.append(_Drawing(drawn, active, count, drafts or 0, behind))
    return slots


def _hand_out(
    table: _Table, observe: Callable[[str, float], None], seen: pace.Pace | None, last: _Heard
) -> tuple[pace.Pace | None, _Heard]:
    """Wait for the oldest draws and give their tokens to those who still want them. last: the ones before.
    Returns what is known of drafts, and of these draws."""
    oldest = table.unread.popleft()
    read, now = jax.device_get(oldest.drawn), time.perf_counter()
    steps = list(_steps(read, oldest.count))
    # A single step that follows one of another length is over sooner or later than among its like.
    alike = last.drafts == oldest.drafts or oldest.count > 1
    each = (now - last.at) / len(steps) if last.at is not None and alike and not oldest.behind else None
    known = last.seconds if last.drafts == oldest.drafts else 0.0
    heard = _Heard(now, oldest.drafts, pace.smooth(known, each)) if oldest.count else last._replace(at=None)
    if seen is not None and oldest.count:
        for i, (_, counts) in enumerate(steps):
            own = [int(counts[row]) for row, _, _ in oldest.rows]
            seen = pace.seen(seen, oldest.drafts, own, None if i else each)
        observe("drafts", oldest.drafts)
        for place in range(oldest.drafts):
            if seen.tried[place]:
                observe(f"accepted_{place + 1}", pace.shares(seen)[place])
    for row, slot, job in oldest.rows:
        if table.jobs[slot] is job:
            table.draws[slot] += sum(int(counts[row]) - 1 for _, counts in steps)
        for drawn in (drawn for draws, counts in steps for drawn in draws[: counts[row]]):
            if table.jobs[slot] is job and job.cancelled():
                _end(table, slot, "cancelled")
            if table.jobs[slot] is not job:
                break  # the answer has ended meanwhile: drawn too many
            if drawn.depth[row]:
                observe("depth", float(drawn.depth[row]))
            _hear(table, slot, job, _token(drawn, row, job.request.top), bool(drawn.finite[row]), observe)
    return seen, heard


def _steps(
    read: device.Drawn | speculative.Steps, count: int
) -> Iterator[tuple[list[device.Drawn], np.ndarray]]:
    """Of every step its draws, fields [B, ..], and how many of them are each row's tokens."""
    if isinstance(read, speculative.Steps):
        for i in range(count):
            drawn = (a[i] for a in read.drawn)
            yield [device.Drawn(*each) for each in zip(*drawn, strict=True)], np.asarray(read.count[i])
        return
    for i in range(count or 1):
        drawn = device.Drawn(*(a[i] for a in read)) if count else read
        yield [drawn], np.ones(len(drawn.token), np.int32)


def _hear(
    table: _Table, slot: int, job: Job, token: Token, finite: bool, observe: Callable[[str, float], None]
) -> None:
    """Hand out one token, and end the answer if it was the last."""
    said = table.said[slot]
    if not finite:
        table.held[slot] = []
        _end(table, slot, "error", f"non-finite logits at token {len(said)} of the answer (slot {slot})")
        return
    table.held[slot] += said[-1:]  # it was fed when this token was drawn
    if token.id in job.request.stop_ids:
        _end(table, slot, "stop")
        return
    said.append(token.id)
    observe("tokens", 1)
    if not job.emit(token):
        _end(table, slot, "stop")
    elif len(said) >= job.request.max_tokens:
        _end(table, slot, "length")


def _starts(engine: Engine, job: Job) -> bool:
    """Whether the job needs a slot; if not, it is finished here."""
    try:
        check(engine, job.request)
    except ValueError as error:
        job.finish("error", str(error))
        return False
    if job.cancelled() or job.request.max_tokens == 0:
        job.finish("cancelled" if job.cancelled() else "length", "")
        return False
    return True


def _place(prompt: tuple[int, ...], table: _Table) -> _Reading:
    """A free slot for the prompt, and what it can begin with. The last token is always read anew: its
    logits are wanted."""
    jobs, held, used = table.jobs, table.held, table.used
    common = [_common(prompt[:-1], tokens) for tokens in held]
    free = [slot for slot, job in enumerate(jobs) if job is None]
    source = max(range(len(jobs)), key=lambda slot: (common[slot], jobs[slot] is None))
    if common[source] < REUSED_LEAST:
        slot = min(free, key=lambda slot: used[slot])
        return _Reading(slot, slot, 0)
    others = [slot for slot in free if slot != source]
    # In its own place only if nothing is lost by that, or there is no other: the next one may begin alike.
    own = jobs[source] is None and (not others or common[source] == len(held[source]))
    slot = source if own else min(others, key=lambda slot: used[slot])
    return _Reading(slot, source, common[source])


def _common(a: tuple[int, ...], b: list[int]) -> int:
    """Tokens that both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _admit(engine: Engine, slots: State, slot: int, request: Request) -> State:
    seen = np.zeros(padded_vocab(engine.cfg), bool)
    seen[list(request.prompt)] = True
    numbers = (
        request.temperature, request.top_k, request.top_p, request.min_p, request.repetition,
        request.presence, request.frequency,
    )  # fmt: skip
    kinds = (np.float32, np.int32, *(np.float32,) * 5)
    controls = Controls(*(kind(value) for kind, value in zip(kinds, numbers, strict=True)))
    bias = device.meaningless(engine.cfg, engine.known, request.bias)
    words = np.int32(slot), _key(request.seed), controls, seen, bias
    if isinstance(slots, speculative.State):
        return speculative.admit(slots, *words)
    return device.admit(slots, *words)


def _key(seed: int) -> jax.Array:
    """jax.random.key(seed), for 64 bits."""
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _fill(engine: Engine, slots: State, at: _Reading, prompt: tuple[int, ...]) -> tuple[State, device.Drawn]:
    piece = prompt[at.start : at.start + engine.chunk]
    tokens = np.zeros(next(size for size in pieces(engine) if size >= len(piece)), np.int32)
    tokens[: len(piece)] = piece
    end = at.start + len(piece)
    places = (
        np.int32(at.source), np.int32(at.slot), tokens, np.int32(at.start), np.int32(len(piece)),
        np.bool_(end == len(prompt)),
    )  # fmt: skip
    if not isinstance(slots, speculative.State):
        return device.fill(engine.cfg, engine.params, slots, *places)
    ahead = np.zeros(engine.cfg.mtp.depth, np.int32)
    following = prompt[end : end + len(ahead)]
    ahead[: len(following)] = following
    return speculative.fill(engine.cfg, engine.params, slots, *places, np.bool_(at.first), ahead)


def _step(
    engine: Engine, slots: State, active: np.ndarray, tops: bool, drafts: int | None = None, count: int = 1
) -> tuple[State, device.Drawn | speculative.Steps]:
    """drafts: None = nothing is kept for drafting, either."""
    words = np.int32(count), active, np.bool_(tops)
    if isinstance(slots, speculative.State):
        if drafts is not None:
            return speculative.step(
                engine.cfg, engine.draft_loops, drafts, engine.burst, engine.params, slots, *words
            )
        plain, drawn = device.step(engine.cfg, engine.burst, engine.params, slots.slots, *words)
        return slots._replace(slots=plain), drawn
    quantile = np.float32(engine.exit_quantile) if engine.exit_quantile < 1 else None
    return device.step(engine.cfg, engine.burst, engine.params, slots, *words, quantile)


def _token(read: device.Drawn, row: int, top: int) -> Token:
    likeliest = zip(read.top_ids[row, :top].tolist(), read.top_log_probs[row, :top].tolist(), strict=True)
    return Token(int(read.token[row]), float(read.log_prob[row]), tuple(likeliest))
