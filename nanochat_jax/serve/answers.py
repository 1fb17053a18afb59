"""From events of the model's thread to an answer: whole, or as server-sent events."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from nanochat_jax.inference.schedule import Request, Token
from nanochat_jax.serve import replies
from nanochat_jax.serve.fields import ApiError, Wanted
from nanochat_jax.serve.service import End, Event, Gone, Piece, Service, requests_of, submit

Send = Callable[[dict], Awaitable[None]]
TICK = 1.0  # seconds between looks at the clock and at the model's thread
NO_RETRY = (("x-should-retry", "false"),)


async def respond(
    service: Service,
    wanted: Wanted,
    events: asyncio.Queue[Event],
    gone: threading.Event,
    send: Send,
    identity: str,
) -> None:
    """Submit a checked request and send its answer. A client that went away gets nothing more.

    Raises: ApiError before anything was sent; behind that an error becomes an event of the stream.
    """
    requests = requests_of(service, wanted)
    submit(service, requests, wanted, gone, events)
    made = time.time()
    identity = f"{'chatcmpl' if wanted.messages else 'cmpl'}-{identity}"
    answer = _stream if wanted.stream else _whole
    await answer(service, wanted, requests, events, send, identity, int(made))


async def _collected(
    service: Service, events: asyncio.Queue[Event], choices: int
) -> AsyncIterator[Piece | End | None]:
    """Events until all choices have ended; None after a silence of `limits.keepalive` seconds.

    Raises: ApiError if one ends by an error, the deadline passes, or the model's thread has died.
    """
    limits, begun = service.limits, time.monotonic()
    spoke, left = begun, choices
    while left:
        try:
            event = await asyncio.wait_for(events.get(), min(TICK, limits.keepalive, limits.deadline))
        except TimeoutError:
            event = None
        now = time.monotonic()
        if isinstance(event, Gone):
            return
        if now - begun > limits.deadline:
            raise ApiError(
                504, f"the request took longer than {limits.deadline:g} s", code="deadline", headers=NO_RETRY
            )
        if event is None:
            if service.failed.is_set() and events.empty():
                raise ApiError(500, "the model has failed", code="engine_failed", headers=NO_RETRY)
            if now - spoke >= limits.keepalive:
                spoke = now
                yield None
            continue
        spoke = now
        if isinstance(event, End):
            if event.reason == "cancelled":
                return
            if event.reason == "error":
                raise ApiError(500, event.message, code="engine_error", headers=NO_RETRY)
            left -= 1
        yield event


async def _whole(
    service: Service, wanted: Wanted, requests: list[Request], events: asyncio.Queue[Event], send: Send,
    identity: str, created: int,
) -> None:  # fmt: skip
    texts, reasons = [""] * len(requests), ["length"] * len(requests)
    tokens: list[list[Token]] = [[] for _ in requests]
    ended = 0
    async for event in _collected(service, events, len(requests)):
        if isinstance(event, Piece):
            texts[event.index] += event.text
            tokens[event.index] += event.tokens
        elif isinstance(event, End):
            reasons[event.index], ended = event.reason, ended + 1
    if ended < len(requests):
        return  # nobody is there any more
    make = replies.chat_choice if wanted.messages else replies.text_choice
    kind = "chat.completion" if wanted.messages else "text_completion"
    logs = [t if wanted.top >= 0 else None for t in tokens]
    choices = [make(service, i, texts[i], reasons[i], logs[i]) for i in range(len(requests))]
    counts = replies.usage(_prompt_tokens(wanted, requests), sum(map(len, tokens)))
    body = replies.encode(
        replies.head(service, identity, created, kind) | {"choices": choices, "usage": counts}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    service: Service, wanted: Wanted, requests: list[Request], events: asyncio.Queue[Event], send: Send,
    identity: str, created: int,
) -> None:  # fmt: skip
    chat = bool(wanted.messages)
    head = replies.head(service, identity, created, "chat.completion.chunk" if chat else "text_completion")
    head |= {"usage": None} if wanted.usage else {}
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def put(data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def choice(index: int, text: str, reason: str | None, tokens: tuple[Token, ...]) -> None:
        logs = tokens if wanted.top >= 0 and tokens else None
        if chat:
            made = replies.chat_delta(service, index, {} if reason else {"content": text}, reason, logs)
        else:
            made = replies.text_choice(service, index, text, reason, logs, offsets[index])
        offsets[index] += sum(len(service.tokenizer.decode([token.id])) for token in tokens)
        await put(replies.event(head | {"choices": [made]}))

    counted, ended, offsets = 0, 0, [0] * len(requests)
    if chat:
        for index in range(len(requests)):
            first = replies.chat_delta(service, index, {"role": "assistant", "content": ""}, None, None)
            await put(replies.event(head | {"choices": [first]}))
    try:
        async for event in _collected(service, events, len(requests)):
            if event is None:
                await put(b": keepalive\n\n")
            elif isinstance(event, Piece):
                counted += len(event.tokens)
                await choice(event.index, event.text, None, event.tokens)
            else:
                ended += 1
                await choice(event.index, "", event.reason, ())
    except ApiError as error:
        await put(replies.event(error.body()), more=False)
        return
    if ended == len(requests):
        if wanted.usage:
            counts = replies.usage(_prompt_tokens(wanted, requests), counted)
            await put(replies.event(head | {"choices": [], "usage": counts}))
        await put(replies.DONE)
    await put(b"", more=False)


def _prompt_tokens(wanted: Wanted, requests: list[Request]) -> int:
    """Tokens of the prompts, each counted once for all its choices."""
    return sum(len(request.prompt) for request in requests[:: wanted.numbers["n"]])
