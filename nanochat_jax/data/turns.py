"""Conversations as documents: a row of a table becomes JSON that is stored, and that becomes token ids.

A row is a list of messages {"role", "content"}: perhaps one of the system, then turns of user and
assistant, the assistant last. Other keys of a message are left out. The ids are those of `chat.render`,
in which what is learned can be told from the ids alone.
"""

import json
from collections.abc import Callable
from typing import Any

from nanochat_jax import chat
from nanochat_jax.tokenizer import Tokenizer


def stored(messages: Any) -> bytes | str:
    """UTF-8 JSON of a row's messages, or the reason why they are no conversation to learn from.

    Reasons: "no conversation" (no list of messages with role and content), "unknown role", "empty turn",
    "not alternating" (the system not first, or not user and assistant in turns), "no answer" (the
    assistant has not the last word), "undecodable" (half a surrogate pair).
    """
    if not isinstance(messages, list) or not messages:
        return "no conversation"
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            return "no conversation"
        if message["role"] not in chat.ROLES:
            return "unknown role"
        if not message["content"].strip():
            return "empty turn"
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    expected = [("user", "assistant")[i % 2] for i in range(len(spoken))]
    if [message["role"] for message in spoken] != expected:
        return "not alternating"
    if len(spoken) % 2 or not spoken:
        return "no answer"
    kept = [{key: message[key] for key in ("role", "content")} for message in messages]
    try:
        return json.dumps(kept, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "undecodable"


def encoder(tokenizer: Tokenizer, kind: str) -> Callable[[str], list[int]]:
    """Build encode(document) -> ids without BOS, for documents of data.kind = `kind`."""
    if kind == "text":
        return tokenizer.encode
    return lambda document: chat.render(tokenizer, json.loads(document)).ids[1:]


def plain(document: str, kind: str) -> str:
    """The text of a document, for a tokenizer to be trained on."""
    if kind == "text":
        return document
    return "\n".join(message["content"] for message in json.loads(document))
