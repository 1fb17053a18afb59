"""The chat template: marks between texts, what is learned, and the same in Jinja."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax import chat
from nanochat_jax import tokenizer as tokenizers

TOKENIZER = tokenizers.byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["<|user_end|>", "<|bos|>"]
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(chat.ROLES), "content": TEXT}), max_size=5)


@given(MESSAGES)
def test_marks_are_where_the_turns_are(messages):
    ids, learned = chat.render(TOKENIZER, messages)
    marks = [i for i in ids if i < len(tokenizers.SPECIAL)]
    names = [f"<|{m['role']}_{end}|>" for m in messages for end in ("start", "end")]
    assert marks == [TOKENIZER.bos_id, *(TOKENIZER.special_id(name) for name in names)]
    said = "".join(m["content"] + "<|assistant_end|>" for m in messages if m["role"] == "assistant")
    assert TOKENIZER.decode(i for i, own in zip(ids, learned, strict=True) if own) == said
    assert chat.prompt(TOKENIZER, messages) == [*ids, TOKENIZER.special_id("<|assistant_start|>")]


@given(MESSAGES, st.integers(0, 60))
def test_what_is_learned_can_be_told_from_the_ids(messages, cut):
    """Of a whole conversation and of its beginning."""
    ids, learned = chat.render(TOKENIZER, messages)
    told = chat.learner(TOKENIZER)(np.array(ids[: cut + 1], np.uint16))
    assert told.dtype == bool and told.tolist() == learned[: cut + 1]


@given(MESSAGES, st.booleans())
def test_jinja_says_the_same(messages, ask):
    jinja2 = pytest.importorskip("jinja2")
    made = jinja2.Template(chat.TEMPLATE).render(
        messages=messages, bos_token=tokenizers.BOS, add_generation_prompt=ask
    )
    messages = [m | {"content": m["content"].replace("<|", "< |")} for m in messages]
    ids = chat.prompt(TOKENIZER, messages) if ask else chat.render(TOKENIZER, messages).ids
    assert made == TOKENIZER.decode(ids)


def test_mistakes():
    with pytest.raises(ValueError, match=r"no role 'tool' in a chat; known: system, user, assistant"):
        chat.render(TOKENIZER, [{"role": "tool", "content": ""}])
    bare = tokenizers.Tokenizer(TOKENIZER.core, {tokenizers.BOS: 0}, "")
    assert chat.supports(TOKENIZER) and not chat.supports(bare)
    with pytest.raises(ValueError, match="no marks for chat turns"):
        chat.prompt(bare, [])
