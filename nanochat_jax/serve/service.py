"""The model's thread and its inbox: requests of the web side become jobs, tokens become events."""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_jax import chat
from nanochat_jax.inference import schedule
from nanochat_jax.inference.text import reader
from nanochat_jax.serve.fields import ApiError, Wanted
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger("nanochat_jax")
BUFFER, PATIENCE = 256, 5.0  # events that wait for a slow reader, and seconds that they may be too many


@dataclass(frozen=True)
class Limits:
    """What the server allows; see docs/serve.md."""

    max_queue: int = 64
    deadline: float = 120.0  # seconds for a whole request
    read_timeout: float = 10.0  # seconds for a body to arrive
    drain: float = 30.0  # seconds that running answers get after SIGTERM
    keepalive: float = 15.0  # seconds of silence in a stream before a comment
    api_key: str = ""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")  # of the Host header; "*" = any
    strict: bool = False  # refuse unknown fields
    log_prompts: bool = False


@dataclass(frozen=True)
class Service:
    """A model, and the state that its thread and the web side share."""

    engine: schedule.Engine
    tokenizer: Tokenizer
    name: str  # model id
    fingerprint: str = ""
    created: int = 0
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    inbox: queue.Queue = field(default_factory=queue.Queue)
    ready: threading.Event = field(default_factory=threading.Event)  # programs are compiled
    draining: threading.Event = field(default_factory=threading.Event)  # no new requests
    closing: threading.Event = field(default_factory=threading.Event)  # the model's thread shall end
    failed: threading.Event = field(default_factory=threading.Event)  # it has ended by an error
    beat: list[float] = field(default_factory=lambda: [time.monotonic()])  # when it last went round
    open_requests: list[int] = field(default_factory=lambda: [0])


class Piece(NamedTuple):
    """Some text of a choice, and the tokens that came with it."""

    index: int
    text: str
    tokens: tuple[schedule.Token, ...] = ()


class End(NamedTuple):
    """A choice is complete: "stop", "length", "cancelled" or "error"."""

    index: int
    reason: str
    message: str = ""


class Gone(NamedTuple):
    """The client went away."""


Event = Piece | End | Gone


def work(service: Service) -> None:
    """The model's thread: compile, answer until `closing`; on an error answer all who wait, and say so."""
    started, recent = time.monotonic(), [time.monotonic(), 0.0]

    def take(idle: bool) -> schedule.Job | None:
        while True:
            service.beat[0] = time.monotonic()
            try:
                return service.inbox.get(timeout=0.1) if idle else service.inbox.get_nowait()
            except queue.Empty:
                if not idle or service.closing.is_set():
                    return None

    def observe(name: str, value: float) -> None:
        metrics, now = service.metrics, time.monotonic()
        if name == "tokens":
            recent[1] += value
            metrics.add("tokens_generated_total", value)
            if now - recent[0] >= 1:
                metrics.set("tokens_per_second", recent[1] / (now - recent[0]))
                recent[:] = [now, 0.0]
        elif name == "depth":
            metrics.set("loop_mean", 0.99 * (metrics.get("loop_mean") or value) + 0.01 * value)
        elif name.startswith("accepted_"):
            metrics.set("spec_acceptance", value, head=name.removeprefix("accepted_"))
        elif name == "drafts":
            metrics.set("spec_drafts", value)
        elif name in ("prompt_tokens", "reused_tokens"):
            metrics.add(f"{name}_total", value)
        else:
            service.beat[0] = now
            metrics.set(name, value)

    try:
        slots = schedule.warm_up(service.engine)
        service.metrics.add("model_load_seconds", time.monotonic() - started)
        service.ready.set()
        schedule.run(service.engine, take, observe, slots)
    except BaseException:
        log.exception("the model's thread failed")
        service.failed.set()
    finally:
        service.ready.clear()
        while not service.inbox.empty():
            service.inbox.get_nowait().finish("error", "the server is stopping")


def requests_of(service: Service, wanted: Wanted) -> list[schedule.Request]:
    """One request per choice: all choices of the first prompt, then of the next.

    Raises: ApiError 400 if a prompt does not fit, or chat is asked of a tokenizer without turns.
    """
    tokenizer, engine, numbers = service.tokenizer, service.engine, wanted.numbers
    if wanted.messages:
        if not chat.supports(tokenizer):
            raise ApiError(400, "this model's tokenizer has no marks for chat turns; use /v1/completions")
        prompts = [chat.prompt(tokenizer, wanted.messages)]
    else:
        prompts = [
            [tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else list(p)
            for p in wanted.prompts
        ]
    most = numbers["max_completion_tokens"]
    most = numbers["max_tokens"] if most is None else most
    if most is None:
        most = engine.capacity if wanted.messages else 16  # as OpenAI's two routes
    seed = secrets.randbits(63) if numbers["seed"] is None else numbers["seed"]
    found = []
    for prompt in prompts:
        if len(prompt) + 1 > engine.capacity:
            message = (
                f"the prompt has {len(prompt)} tokens; the context has {engine.capacity}, one for the answer"
            )
            raise ApiError(
                400, message, "messages" if wanted.messages else "prompt", "context_length_exceeded"
            )
        room = min(most, engine.capacity - len(prompt))
        for choice in range(numbers["n"]):
            own_seed = (seed + choice + 2**63) % 2**64 - 2**63
            made = schedule.Request(
                tuple(prompt), room, numbers["temperature"], numbers["top_k"], numbers["top_p"],
                numbers["min_p"], numbers["repetition_penalty"], numbers["presence_penalty"],
                numbers["frequency_penalty"], wanted.bias, own_seed, chat.stop_ids(tokenizer),
                max(0, wanted.top),
            )  # fmt: skip
            found.append(made)
    return found


def submit(
    service: Service, requests: list[schedule.Request], wanted: Wanted, gone: threading.Event,
    events: asyncio.Queue[Event],
) -> None:  # fmt: skip
    """Queue the requests of one client; what happens to them comes in `events`.

    Setting `gone` takes them back. Call from the event loop only: nobody else fills the inbox.
    Raises: ApiError 429 if the queue is full, 503 if the server is not serving.
    """
    metrics = service.metrics
    if service.failed.is_set():
        raise ApiError(503, "the model has failed; the server is stopping", code="engine_failed")
    if service.draining.is_set() or service.closing.is_set():
        metrics.add("rejected_total", reason="draining")
        raise ApiError(503, "the server is stopping", code="stopping", headers=(("Retry-After", "5"),))
    if not service.ready.is_set():
        metrics.add("rejected_total", reason="warming_up")
        raise ApiError(503, "the model is being prepared", code="warming_up", headers=(("Retry-After", "2"),))
    waiting = service.inbox.qsize()
    if waiting + len(requests) > service.limits.max_queue:
        metrics.add("rejected_total", reason="queue_full")
        tokens = sum(r.max_tokens for r in requests) * (1 + waiting / service.engine.slots)
        wait = max(1, min(60, round(tokens / max(1.0, metrics.get("tokens_per_second")))))
        raise ApiError(
            429, f"{waiting} requests wait already; try again in {wait} s", code="queue_full",
            headers=(("Retry-After", str(wait)),),
        )  # fmt: skip
    loop = asyncio.get_running_loop()

    def put(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop has ended before the model's thread
            gone.set()

    for index, request in enumerate(requests):
        service.inbox.put(_job(service, index, request, wanted, events, put, gone))


def _job(
    service: Service, index: int, request: schedule.Request, wanted: Wanted, events: asyncio.Queue[Event],
    put: Callable[[Event], None], gone: threading.Event,
) -> schedule.Job:  # fmt: skip
    feed, decode, metrics = reader(wanted.stops), service.tokenizer.decode_bytes, service.metrics
    came, last, full_since, started = time.monotonic(), 0.0, 0.0, False
    stopped, held = False, []  # tokens whose text waits

    def cancelled() -> bool:
        nonlocal started
        if not started and not gone.is_set():  # first asked when the job is taken from the inbox
            metrics.observe("queue_seconds", time.monotonic() - came)
        started = True
        return gone.is_set()

    def emit(token: schedule.Token) -> bool:
        nonlocal last, full_since, stopped
        now = time.monotonic()
        metrics.observe("inter_token_seconds" if last else "ttft_seconds", now - (last or came))
        last = now
        text, stopped = feed(decode([token.id]), False)
        held.append(token)
        if text or wanted.top >= 0:
            put(Piece(index, text, tuple(held)))
            held.clear()
        full_since = (full_since or now) if events.qsize() > BUFFER else 0.0
        if full_since and now - full_since > PATIENCE:
            gone.set()
        return not stopped and not gone.is_set()

    def finish(reason: str, message: str) -> None:
        text, _ = feed(b"", True)
        if text or held:
            put(Piece(index, text, tuple(held)))
        if gone.is_set():
            metrics.add("cancelled_total")
        put(End(index, reason, message))

    return schedule.Job(request, emit, finish, cancelled)
