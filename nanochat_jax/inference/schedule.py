"""Requests in, tokens out: continuous batching over the slots of one cache (the host's side).

One turn of the loop: leave out who has gone, give a free slot to the next request, read at most one piece
of a prompt, add one token to all active rows. So nobody waits for another's long prompt or long answer.
The host reads a draw while the device works on the next one; the token that a row draws too many when it
ends is thrown away.

A prompt that begins like what a slot still holds (the turns of a chat) is copied from there and read from
the first difference on.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from nanochat_jax.config import ModelConfig, padded_vocab
from nanochat_jax.inference import slots as device
from nanochat_jax.inference.sample import Controls
from nanochat_jax.types import Params

REUSED_LEAST = 16  # tokens in common that are worth a copy


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
    cancelled: asked before every step.
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


def allocate(engine: Engine) -> device.Slots:
    """Empty slots of the engine, beside its parameters."""
    # Room for the padding of the last piece: a write that does not fit would be moved to the left.
    slots = device.allocate(engine.cfg, engine.slots, engine.capacity + engine.chunk)
    return jax.device_put(slots, jax.tree.leaves(engine.params)[0].sharding)


def pieces(engine: Engine) -> tuple[int, ...]:
    """Lengths that pieces of a prompt are padded to."""
    least = min(32, engine.chunk)
    return tuple(least << i for i in range((engine.chunk // least).bit_length()))


def warm_up(engine: Engine) -> device.Slots:
    """Compile every program that `run` will need; returns empty slots for it."""
    slots = _admit(engine, allocate(engine), 0, Request((0,), 1))
    for size in pieces(engine):
        slots, _ = _fill(engine, slots, _Reading(0, 0, 0), (0,) * size, True)
    slots, drawn = _step(engine, slots, np.zeros(engine.slots, bool), False)
    jax.block_until_ready(drawn)
    return slots


def run(
    engine: Engine,
    take: Callable[[bool], Job | None],
    observe: Callable[[str, float], None] = lambda name, value: None,
    slots: device.Slots | None = None,
) -> None:
    """Answer jobs until there are none.

    take: called with True when there is nothing to do: waits for a job, None ends `run`; called with False
    when a slot is free beside working ones: a job that waits already, or None. Jobs start in this order.
    observe: is told "prompt_tokens", "reused_tokens", "tokens" and "depth" as they come, and after each
    turn "active_slots" and "kv_tokens". slots: from `warm_up`; None allocates them.
    A request that cannot be answered ends with "error" and leaves the others alone.
    """
    slots = allocate(engine) if slots is None else slots
    jobs: list[Job | None] = [None] * engine.slots
    held: list[list[int]] = [[] for _ in jobs]  # tokens that the slot's cache holds for sure
    said: list[list[int]] = [[] for _ in jobs]  # tokens of the answer that the host has read
    draws = [0] * engine.slots  # dispatched draws of the answer; 0 while its prompt is read
    used = [0] * engine.slots  # turn in which the slot was last given away
    reading: _Reading | None = None
    unread: deque[tuple[device.Drawn, list[tuple[int, Job]]]] = deque()
    turn = 0

    def end(slot: int, reason: str, message: str = "") -> None:
        nonlocal reading
        job, jobs[slot] = jobs[slot], None
        draws[slot] = 0
        if reading is not None and reading.slot == slot:
            reading = None
        if job is not None:
            job.finish(reason, message)

    def hear(slot: int, job: Job, token: Token, finite: bool) -> None:
        """Hand out a token that was drawn, and end the answer if it was the last."""
        if not finite:
            held[slot] = []
            end(slot, "error", f"non-finite logits at token {len(said[slot])} of the answer (slot {slot})")
        elif token.id in job.request.stop_ids:
            held[slot] += said[slot][-1:]
            end(slot, "stop")
        else:
            held[slot] += said[slot][-1:]
            said[slot].append(token.id)
            observe("tokens", 1)
            if not job.emit(token):
                end(slot, "stop")
            elif len(said[slot]) >= job.request.max_tokens:
                end(slot, "length")

    while True:
        turn += 1
        for slot, job in enumerate(jobs):
            if job is not None and job.cancelled():
                end(slot, "cancelled")
        busy = any(job is not None for job in jobs)
        if reading is None and None in jobs:
            job = take(not busy and not unread)
            if job is None and not busy and not unread:
                return
            if job is not None and _starts(engine, job):
                reading = _place(job.request.prompt, jobs, held, used)
                slot = reading.slot
                jobs[slot], said[slot], used[slot] = job, [], turn
                held[slot] = list(job.request.prompt[: reading.start])
                slots = _admit(engine, slots, slot, job.request)
                observe("prompt_tokens", len(job.request.prompt))
                observe("reused_tokens", reading.start)
        worked = False
        if reading is not None:
            slot, job = reading.slot, jobs[reading.slot]
            assert job is not None
            piece = job.request.prompt[reading.start : reading.start + engine.chunk]
            last = reading.start + len(piece) == len(job.request.prompt)
            slots, drawn = _fill(engine, slots, reading, piece, last)
            held[slot] += piece
            reading = None if last else _Reading(slot, slot, reading.start + len(piece))
            if last:
                draws[slot] = 1
                unread.append((drawn, [(slot, job)]))
            worked = True
        active = [
            (slot, job) for slot, job in enumerate(jobs)
            if job is not None and 0 < draws[slot] < job.request.max_tokens
        ]  # fmt: skip
        if active:
            mask = np.zeros(engine.slots, bool)
            mask[[slot for slot, _ in active]] = True
            slots, drawn = _step(engine, slots, mask, any(job.request.top for _, job in active))
            for slot, _ in active:
                draws[slot] += 1
            unread.append((drawn, active))
            worked = True
        while len(unread) > (1 if worked else 0):
            drawn, rows = unread.popleft()
            read = jax.device_get(drawn)
            single = len(read.token) == 1 and engine.slots > 1
            for slot, job in rows:
                if jobs[slot] is job:
                    row = 0 if single else slot
                    hear(slot, job, _token(read, row, job.request.top), bool(read.finite[row]))
                    if read.depth[row]:
                        observe("depth", float(read.depth[row]))
        observe("active_slots", sum(job is not None for job in jobs))
        observe("kv_tokens", sum(len(h) for h, job in zip(held, jobs, strict=True) if job is not None))


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


def _place(prompt: tuple[int, ...], jobs: list, held: list[list[int]], used: list[int]) -> _Reading:
    """A free slot for the prompt, and what it can begin with. The last token is always read anew: its
    logits are wanted."""
    common = [_common(prompt[:-1], tokens) for tokens in held]
    free = [slot for slot, job in enumerate(jobs) if job is None]
    source = max(range(len(jobs)), key=lambda slot: (common[slot], jobs[slot] is None))
    if common[source] < REUSED_LEAST:
        slot = min(free, key=lambda slot: used[slot])
        return _Reading(slot, slot, 0)
    others = [slot for slot in free if slot != source]
    # In its own place only if nothing is lost by that, or there is no other: the next request may begin alike.
    own = jobs[source] is None and (not others or common[source] == len(held[source]))
    slot = source if own else min(others, key=lambda slot: used[slot])
    return _Reading(slot, source, common[source])


def _common(a: tuple[int, ...], b: list[int]) -> int:
    """Tokens that both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _admit(engine: Engine, slots: device.Slots, slot: int, request: Request) -> device.Slots:
    seen = np.zeros(padded_vocab(engine.cfg), bool)
    seen[list(request.prompt)] = True
    numbers = (
        request.temperature, request.top_k, request.top_p, request.min_p, request.repetition,
        request.presence, request.frequency,
    )  # fmt: skip
    kinds = (np.float32, np.int32, *(np.float32,) * 5)
    controls = Controls(*(kind(value) for kind, value in zip(kinds, numbers, strict=True)))
    bias = device.meaningless(engine.cfg, engine.known, request.bias)
    return device.admit(slots, np.int32(slot), _key(request.seed), controls, seen, bias)


def _key(seed: int) -> jax.Array:
    """jax.random.key(seed), for 64 bits."""
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _fill(
    engine: Engine, slots: device.Slots, at: _Reading, piece: tuple[int, ...], last: bool
) -> tuple[device.Slots, device.Drawn]:
    tokens = np.zeros(next(size for size in pieces(engine) if size >= len(piece)), np.int32)
    tokens[: len(piece)] = piece
    return device.fill(
        engine.cfg, engine.params, slots, np.int32(at.source), np.int32(at.slot), tokens,
        np.int32(at.start), np.int32(len(piece)), np.bool_(last),
    )  # fmt: skip


def _step(
    engine: Engine, slots: device.Slots, active: np.ndarray, tops: bool
) -> tuple[device.Slots, device.Drawn]:
    quantile = np.float32(engine.exit_quantile) if engine.exit_quantile < 1 else None
    return device.step(engine.cfg, engine.params, slots, active, np.bool_(tops), quantile)


def _token(read: device.Drawn, row: int, top: int) -> Token:
    likeliest = zip(read.top_ids[row, :top].tolist(), read.top_log_probs[row, :top].tolist(), strict=True)
    return Token(int(read.token[row]), float(read.log_prob[row]), tuple(likeliest))
