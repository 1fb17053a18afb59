"""The web side: an ASGI application over a Service. Routes, limits, and who may ask."""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from nanochat_jax.serve import fields, metrics, replies
from nanochat_jax.serve.answers import respond
from nanochat_jax.serve.fields import ApiError
from nanochat_jax.serve.service import Event, Gone, Service

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]
log = logging.getLogger("nanochat_jax")
PAGE = Path(__file__).parent / "chat.html"
JSON = "application/json"
MAX_HEADERS = 16 * 1024  # bytes
FORGOTTEN = 8 * fields.MAX_BODY  # bytes of a request that is too large which are still read


def make_app(service: Service) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Build the ASGI application. It answers http scopes only, and never raises for a bad request."""
    page = PAGE.read_bytes()
    policy = _policy(page.decode())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"no {scope['type']}")
        started, status, route = time.monotonic(), [0], _route(scope)
        identity = uuid.uuid4().hex

        async def counted(message: dict) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [
                    *message["headers"], (b"x-request-id", identity.encode()), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        try:
            await _answer(service, route, scope, receive, counted, identity, page, policy)
        except ApiError as error:
            retry = () if error.status in (429, 503) else (("x-should-retry", "false"),)
            await reply(counted, error.status, replies.encode(error.body()), JSON, (*error.headers, *retry))
        except Exception:
            log.exception("a request failed")
            if not status[0]:
                error = ApiError(500, "the server failed on this request")
                await reply(counted, 500, replies.encode(error.body()), JSON, (("x-should-retry", "false"),))
        service.metrics.add(
            "requests_total", route=route if route in ROUTES else "other", status=str(status[0])
        )
        if route.startswith("POST"):
            service.metrics.observe("request_seconds", time.monotonic() - started)

    return app


ROUTES = (
    "GET /", "GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{id}",
    "POST /v1/chat/completions", "POST /v1/completions",
)  # fmt: skip
OPEN = ("GET /", "GET /health", "GET /ready")  # without a key


def _route(scope: Scope) -> str:
    path = scope["path"]
    if path.startswith("/v1/models/") and len(path) > len("/v1/models/"):
        path = "/v1/models/{id}"
    return f"{'GET' if scope['method'] == 'HEAD' else scope['method']} {path}"


async def _answer(
    service: Service,
    route: str,
    scope: Scope,
    receive: Receive,
    send: Send,
    identity: str,
    page: bytes,
    policy: str,
) -> None:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
        raise ApiError(431, f"the headers may have {MAX_HEADERS} bytes")
    _check_host(service, headers)
    if route not in ROUTES:
        path = route.split(" ", 1)[1]
        allowed = [known.split()[0] for known in ROUTES if known.split()[1] == path]
        if allowed:
            raise ApiError(405, f"{path} takes {allowed[0]}", headers=(("Allow", allowed[0]),))
        raise ApiError(404, f"there is nothing at {path[:200]}")
    if route not in OPEN:
        _check_key(service, headers)
    if route == "GET /":
        safe = (
            ("Content-Security-Policy", policy),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-cache"),
        )
        await reply(send, 200, page, "text/html; charset=utf-8", safe)
    elif route == "GET /health":
        fine = not service.failed.is_set() and (
            not service.ready.is_set() or time.monotonic() - service.beat[0] < 5
        )
        body = {"status": "ok" if fine else "failed"}
        await reply(send, 200 if fine else 503, replies.encode(body), JSON)
    elif route == "GET /ready":
        ready = service.ready.is_set() and not service.draining.is_set() and not service.failed.is_set()
        await reply(send, 200 if ready else 503, replies.encode({"ready": ready}), JSON)
    elif route == "GET /metrics":
        service.metrics.set("queue_depth", service.inbox.qsize())
        await reply(send, 200, service.metrics.page().encode(), metrics.CONTENT_TYPE)
    elif route == "GET /v1/models":
        await reply(send, 200, replies.encode(replies.models(service)), JSON)
    elif route == "GET /v1/models/{id}":
        name = scope["path"].removeprefix("/v1/models/")
        await reply(send, 200, replies.encode(replies.model(service, name)), JSON)
    else:
        await _generate(service, route, headers, receive, send, identity)


async def _generate(
    service: Service, route: str, headers: dict[str, str], receive: Receive, send: Send, identity: str
) -> None:
    service.open_requests[0] += 1
    gone, watch = threading.Event(), None
    events: asyncio.Queue[Event] = asyncio.Queue()
    try:
        body = await _body(receive, headers, service.limits.read_timeout)
        parse = fields.chat if "chat" in route else fields.completion
        wanted = parse(body, service.engine.known)
        if service.limits.log_prompts:
            log.info("%s %s", identity, body.decode(errors="replace"))
        if wanted.unknown:
            service.metrics.add("unknown_fields_total", len(wanted.unknown))
            if service.limits.strict:
                raise ApiError(400, f"unknown field '{wanted.unknown[0][:80]}'", wanted.unknown[0])
        if wanted.model and wanted.model != service.name:
            replies.model(service, wanted.model)

        async def watched() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            events.put_nowait(Gone())

        watch = asyncio.create_task(watched())
        await respond(service, wanted, events, gone, send, identity)
    finally:
        gone.set()
        service.open_requests[0] -= 1
        if watch is not None:
            watch.cancel()


async def _body(receive: Receive, headers: dict[str, str], seconds: float) -> bytes:
    """The request's body. Raises: ApiError 413 or 400 (it did not come in time).

    A body that is somewhat too large is read to its end and forgotten, for most clients read no answer
    before they have sent everything; one that is far too large is cut off.
    """
    close = (("Connection", "close"),)
    too_large = ApiError(413, f"the body may have {fields.MAX_BODY} bytes", headers=close)
    size = headers.get("content-length", "0")
    if size.isdigit() and int(size) > FORGOTTEN:
        raise too_large
    data, seen = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away")
                part = message.get("body", b"")
                seen += len(part)
                if seen <= fields.MAX_BODY:
                    data += part
                if seen > FORGOTTEN or (seen > fields.MAX_BODY and not message.get("more_body")):
                    raise too_large
                if not message.get("more_body"):
                    return bytes(data)
    except TimeoutError:
        late = ApiError(400, f"the body did not arrive within {seconds:g} s", headers=close)
        raise (too_large if seen > fields.MAX_BODY else late) from None


async def reply(
    send: Send, status: int, body: bytes, kind: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """A whole answer."""
    own = [("content-type", kind), ("content-length", str(len(body))), *headers]
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in own]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _check_host(service: Service, headers: dict[str, str]) -> None:
    """A page elsewhere may point a name of its own at this machine; it cannot change the Host header."""
    host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
    if "*" not in service.limits.hosts and host not in service.limits.hosts:
        raise ApiError(403, f"the host '{host[:80]}' is not served here; --hosts names those that are")


def _check_key(service: Service, headers: dict[str, str]) -> None:
    key = service.limits.api_key
    given = headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
        raise ApiError(
            401, "the API key is missing or wrong: Authorization: Bearer <key>", code="invalid_api_key",
            headers=(("WWW-Authenticate", "Bearer"),),
        )  # fmt: skip


def _policy(page: str) -> str:
    """The page's content security policy: its own script and style by their hashes, and nothing else."""

    def hashed(tag: str) -> str:
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inner]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
