"""JSON of answers in OpenAI's shapes, whole and as chunks of a stream."""

import json
from collections.abc import Sequence
from typing import Any

from nanochat_jax.inference.schedule import Token
from nanochat_jax.serve.fields import ApiError
from nanochat_jax.serve.service import Service

DONE = b"data: [DONE]\n\n"


def head(service: Service, identity: str, created: int, kind: str) -> dict[str, Any]:
    """What all answers and chunks of a request have in common."""
    return {
        "id": identity, "object": kind, "created": created, "model": service.name,
        "system_fingerprint": service.fingerprint,
    }  # fmt: skip


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


def chat_choice(service: Service, index: int, text: str, reason: str, tokens: Sequence[Token] | None) -> dict:
    """A whole answer of /v1/chat/completions."""
    message = {"role": "assistant", "content": text, "refusal": None}
    logs = None if tokens is None else chat_logprobs(service, tokens)
    return {"index": index, "message": message, "finish_reason": reason, "logprobs": logs}


def chat_delta(
    service: Service, index: int, delta: dict[str, str], reason: str | None, tokens: Sequence[Token] | None
) -> dict:
    """A piece of an answer of /v1/chat/completions."""
    logs = None if tokens is None else chat_logprobs(service, tokens)
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logs}


def text_choice(
    service: Service,
    index: int,
    text: str,
    reason: str | None,
    tokens: Sequence[Token] | None,
    offset: int = 0,
) -> dict:
    """An answer of /v1/completions, or a piece of one that begins `offset` characters in."""
    logs = None if tokens is None else text_logprobs(service, tokens, offset)
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logs}


def chat_logprobs(service: Service, tokens: Sequence[Token]) -> dict[str, Any]:
    """Log probabilities in the chat route's shape."""

    def entry(index: int, log_prob: float) -> dict[str, Any]:
        raw = service.tokenizer.decode_bytes([index]) if index < service.tokenizer.vocab_size else b""
        return {"token": raw.decode(errors="replace"), "logprob": log_prob, "bytes": list(raw)}

    content = [
        entry(token.id, token.log_prob) | {"top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(service: Service, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
    """Log probabilities in the completions route's shape; offsets count characters of the answer."""

    def text(index: int) -> str:
        return service.tokenizer.decode([index]) if index < service.tokenizer.vocab_size else ""

    names, offsets = [text(token.id) for token in tokens], []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names, "token_logprobs": [token.log_prob for token in tokens], "text_offset": offsets,
        "top_logprobs": [{text(index): value for index, value in token.top} for token in tokens],
    }  # fmt: skip


def event(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(data) + b"\n\n"


def encode(data: Any) -> bytes:
    """Compact JSON; never NaN, which JSON has not."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def models(service: Service) -> dict[str, Any]:
    """The list of /v1/models."""
    return {"object": "list", "data": [model(service, service.name)]}


def model(service: Service, name: str) -> dict[str, Any]:
    """One entry of it. Raises: ApiError 404."""
    if name != service.name:
        raise ApiError(404, f"no model '{name[:80]}'; served: {service.name}", "model", "model_not_found")
    return {"id": name, "object": "model", "created": service.created, "owned_by": "nanochat_jax"}
