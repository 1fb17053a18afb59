"""Bodies of requests, checked: JSON in, one frozen record out, or an error that names the field.

Nothing is clamped: a number outside its range is an error. What OpenAI's API has and this one has not is
refused where ignoring it would change the answer.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

MAX_BODY = 1 << 20  # bytes
MAX_DEPTH = 32  # of nested JSON
MAX_MESSAGES, MAX_CHARACTERS = 256, 16_384  # characters in each message
MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASED = 8, 4, 64, 300
MAX_TOP_CHAT, MAX_TOP_COMPLETION = 20, 5

# name -> (type, least, most, default)
NUMBERS: dict[str, tuple[type, float, float, Any]] = {
    "temperature": (float, 0, 2, 1.0),
    "top_p": (float, 0, 1, 1.0),
    "top_k": (int, 0, 2**31 - 1, 0),
    "min_p": (float, 0, 1, 0.0),
    "repetition_penalty": (float, 0, 2, 1.0),
    "presence_penalty": (float, -2, 2, 0.0),
    "frequency_penalty": (float, -2, 2, 0.0),
    "seed": (int, -(2**63), 2**63 - 1, None),
    "n": (int, 1, MAX_CHOICES, 1),
    "max_tokens": (int, 0, 2**31 - 1, None),
    "max_completion_tokens": (int, 0, 2**31 - 1, None),
}
POSITIVE = ("top_p", "repetition_penalty")  # the least value itself is excluded
COMMON = {*NUMBERS, "model", "logit_bias", "stop", "stream", "stream_options", "logprobs", "user"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What would change the answer if it were ignored -> the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none"), "functions": (None, []), "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}), "audio": (None,), "modalities": (None, ["text"]),
    "prediction": (None,), "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1),
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error: the status and the fields of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """{"error": ..}, as clients expect it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """A checked request, of chat or of completions."""

    messages: tuple[dict[str, str], ...] = ()  # role in system, user, assistant; content
    prompts: tuple[str | tuple[int, ...], ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)  # NUMBERS
    bias: dict[int, float] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    model: str = ""
    stream: bool = False
    usage: bool = False  # a last chunk with the usage
    top: int = -1  # alternatives with each token; -1 = no log probabilities at all
    unknown: tuple[str, ...] = ()  # fields that nothing reads


def chat(body: bytes, vocab_size: int) -> Wanted:
    """Check a body of /v1/chat/completions. Raises: ApiError 400."""
    data = _object(body)
    messages = _messages(data)
    asked, top = _boolean(data, "logprobs"), data.get("top_logprobs")
    if top is not None and not asked:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs")
    count = _number("top_logprobs", top, int, 0, MAX_TOP_CHAT, 0)
    known = COMMON | {"messages", "top_logprobs"}
    return Wanted(messages, top=count if asked else -1, **_common(data, vocab_size, known))


def completion(body: bytes, vocab_size: int) -> Wanted:
    """Check a body of /v1/completions. Raises: ApiError 400."""
    data = _object(body)
    top = _number("logprobs", data.get("logprobs"), int, 0, MAX_TOP_COMPLETION, -1)
    return Wanted(
        prompts=_prompts(data.get("prompt"), vocab_size), top=top,
        **_common(data, vocab_size, COMMON | {"prompt"}),
    )  # fmt: skip


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, without NaN, lone surrogates or deep nesting."""
    depth = most = 0
    quoted = escaped = False
    for byte in body:  # before parsing: a parser may recurse
        if quoted:
            quoted, escaped = escaped or byte != 0x22, not escaped and byte == 0x5C
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            most = max(most, depth)
        elif byte in b"]}":
            depth -= 1
    if most > MAX_DEPTH:
        raise ApiError(400, f"the JSON is nested deeper than {MAX_DEPTH} levels")
    try:
        data = json.loads(body, parse_constant=_no_constant)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8, or holds half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(data)}")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _common(data: dict[str, Any], vocab_size: int, known: set[str]) -> dict[str, Any]:
    for name, nothing in REFUSED.items():
        if name in data and not any(data[name] == value for value in nothing):
            raise ApiError(400, f"'{name}' is not supported", name, "unsupported_parameter")
    numbers = {
        name: _number(name, data.get(name), *limits, name in POSITIVE) for name, limits in NUMBERS.items()
    }
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, f"'model' must be a string, got {_kind(model)}", "model")
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, f"'stream_options' must be an object, got {_kind(options)}", "stream_options")
    stream = _boolean(data, "stream")
    if options is not None and not stream:
        raise ApiError(400, "'stream_options' needs 'stream': true", "stream_options")
    return {
        "numbers": numbers, "bias": _bias(data.get("logit_bias"), vocab_size), "stops": _stops(data.get("stop")),
        "model": model or "", "stream": stream, "usage": _boolean(options or {}, "include_usage"),
        "unknown": tuple(sorted(set(data) - known - set(REFUSED))),
    }  # fmt: skip


def _kind(value: Any) -> str:
    names = {bool: "a boolean", dict: "an object", list: "an array", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")


def _number(
    name: str, value: Any, kind: type, least: float, most: float, default: Any, open_below: bool = False
) -> Any:
    if value is None:
        return default
    whole = kind is int and isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, (int, kind)) or whole):
        wanted = "an integer" if kind is int else "a number"
        raise ApiError(400, f"'{name}' must be {wanted}, got {_kind(value)}", name)
    if not (math.isfinite(value) and least <= value <= most) or (open_below and value == least):
        span = f"{'(' if open_below else '['}{least}, {most}]"
        raise ApiError(400, f"'{name}' must be in {span}, got {value}", name)
    return kind(value)


def _boolean(data: dict[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"'{name}' must be true or false, got {_kind(value)}", name)
    return bool(value)


def _bias(value: Any, vocab_size: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASED:
        raise ApiError(400, f"'logit_bias' must be an object of at most {MAX_BIASED} ids", "logit_bias")
    found = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise ApiError(400, f"'logit_bias' has no id '{key[:20]}': 0..{vocab_size - 1}", "logit_bias")
        found[int(key)] = _number("logit_bias", number, float, -100, 100, 0.0)
    return found


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ApiError(400, f"'stop' must be a string or at most {MAX_STOPS} strings", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise ApiError(400, f"'stop' needs strings of 1..{MAX_STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _messages(data: dict[str, Any]) -> tuple[dict[str, str], ...]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"'messages' must be an array of 1..{MAX_MESSAGES} messages", "messages")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(messages))


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object, got {_kind(message)}", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise ApiError(400, f"'{where}.role' must be one of {known}, got {role!r:.40}", f"{where}.role")
    if isinstance(content, list):
        for part in content:
            if not (
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            ):
                raise ApiError(400, f"'{where}.content' has a part that is not text", f"{where}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"'{where}.content' must be text, got {_kind(content)}", f"{where}.content")
    if len(content) > MAX_CHARACTERS:
        raise ApiError(
            400,
            f"'{where}.content' has {len(content)} characters, at most {MAX_CHARACTERS}",
            f"{where}.content",
        )
    return {"role": ROLES[role], "content": content}


def _prompts(value: Any, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """A string, strings, ids, or lists of ids, as a tuple of prompts."""
    single = isinstance(value, str) or (
        isinstance(value, list) and value and not isinstance(value[0], (str, list))
    )
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MAX_CHOICES:
        raise ApiError(400, f"'prompt' must be text, token ids, or 1..{MAX_CHOICES} of these", "prompt")
    found: list[str | tuple[int, ...]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append(prompt)
        elif (
            isinstance(prompt, list)
            and prompt
            and all(type(i) is int and 0 <= i < vocab_size for i in prompt)
        ):
            found.append(tuple(prompt))
        else:
            raise ApiError(400, f"'prompt' must be text or ids in 0..{vocab_size - 1}", "prompt")
    return tuple(found)
