"""The chat template, in one place: turns to token ids, for training, serving and export.

    <|bos|> <|system_start|> .. <|system_end|> <|user_start|> .. <|user_end|> <|assistant_start|> .. <|assistant_end|>

Marks are ids, put between the encoded texts; what a text contains is characters only, so that a message
which spells a mark cannot forge a turn. `TEMPLATE` says the same in Jinja, for libraries that read exports.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from nanochat_jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

# In text a mark cannot be told from its letters, so a message that spells one has it broken up.
TEMPLATE = """
{{- '<|bos|>' -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('no role ' + message['role'] + ' in a chat; known: system, user, assistant') -}}
{%- endif -%}
{{- '<|' + message['role'] + '_start|>' + (message['content'] | replace('<|', '< |')) + '<|' + message['role'] + '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
""".strip()


class Rendered(NamedTuple):
    """A conversation as ids, and which of them are learned: the assistant's texts and their end marks."""

    ids: list[int]
    learned: list[bool]


def supports(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the marks of all roles."""
    return all(mark in tokenizer.special for role in ROLES for mark in _marks(role))


def render(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]]) -> Rendered:
    """A whole conversation, for training.

    Args: messages: each with "role" (one of ROLES) and "content".
    Raises: ValueError for another role, or a tokenizer without the marks.
    """
    if not supports(tokenizer):
        raise ValueError("the tokenizer has no marks for chat turns, such as <|user_start|>")
    ids, learned = [tokenizer.bos_id], [False]
    for message in messages:
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"no role '{role}' in a chat; known: {', '.join(ROLES)}")
        start, end = (tokenizer.special_id(mark) for mark in _marks(role))
        text = tokenizer.encode(message["content"])
        ids += [start, *text, end]
        learned += [False, *[role == "assistant"] * (len(text) + 1)]
    return Rendered(ids, learned)


def learner(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """Build learned(ids [n]) -> bool [n], which says of rendered ids what `render` says of them.

    Marks tell, because no text can hold one; so nothing but the ids need be stored, and the beginning of a
    conversation is enough to know what is learned there.
    """
    return functools.partial(_learned, *(tokenizer.special_id(mark) for mark in _marks("assistant")))


def _learned(start: int, end: int, ids: np.ndarray) -> np.ndarray:
    speaking = np.cumsum((ids == start).astype(np.int32) - (ids == end))  # 1 behind a start, 0 behind an end
    return np.concatenate([[False], speaking[:-1] > 0])


def prompt(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]]) -> list[int]:
    """The conversation up to where the assistant speaks next. Raises: ValueError as `render`."""
    return [*render(tokenizer, messages).ids, tokenizer.special_id("<|assistant_start|>")]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer: every mark, since none is text."""
    return frozenset(tokenizer.special.values())


def _marks(role: str) -> tuple[str, str]:
    return f"<|{role}_start|>", f"<|{role}_end|>"
