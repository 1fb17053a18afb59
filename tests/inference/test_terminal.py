"""The chat in the terminal, with a model whose answers follow from its prompt."""

import jax

from nanochat_jax import chat, params
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import BLOCKS, ModelConfig
from nanochat_jax.inference import schedule, terminal
from nanochat_jax.model import transformer

TOKENIZER = tokenizers.byte_tokenizer()
CFG = ModelConfig(
    vocab_size=266, dim=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=32, **BLOCKS["modern"]
)


def conversation(lines, capacity=96, interrupted=lambda: False, system=""):
    """(what was written, prompts that were read)."""
    made = params.init_params(transformer.param_specs(CFG), jax.random.key(0))
    made |= {"head": 0.05 * jax.random.normal(jax.random.key(1), made["head"].shape)}
    engine = schedule.Engine(CFG, jax.device_put(made, jax.devices()[0]), 266, 1, capacity, 32)
    waiting, written, prompts = list(lines), [], []
    real = schedule._admit

    def admit(engine, slots, slot, request):
        prompts.append(request)
        return real(engine, slots, slot, request)

    schedule._admit = admit
    try:
        request = schedule.Request((), 8, temperature=1.0, seed=1, bias=dict.fromkeys(range(10), -100.0))
        terminal.talk(
            engine, TOKENIZER, lambda: waiting.pop(0) if waiting else None, written.append, request,
            interrupted, system,
        )  # fmt: skip
    finally:
        schedule._admit = real
    return "".join(written), prompts


def turn(role, content):
    return {"role": role, "content": content}


def test_turns_are_remembered_and_forgotten():
    text, prompts = conversation(["hi", " ", "ho", "/clear", "hi"], system="Be brief.")
    first, second, third = (p.prompt for p in prompts)
    system = turn("system", "Be brief.")
    assert list(first) == chat.prompt(TOKENIZER, [system, turn("user", "hi")]) == list(third)
    answer = text.split("\n")[0]
    assert list(second) != list(first) and [p.seed for p in prompts] == [1, 2, 3]
    if "\ufffd" not in answer:
        history = [system, turn("user", "hi"), turn("assistant", answer), turn("user", "ho")]
        assert list(second) == chat.prompt(TOKENIZER, history)


def test_a_long_conversation_loses_its_beginning():
    text, prompts = conversation(["a" * 30] * 4 + ["b" * 200])
    assert "(the oldest turn is forgotten)" in text and all(len(p.prompt) + 8 <= 96 for p in prompts)
    assert "(this line is too long: 204 tokens, the context has 96)" in text and len(prompts) == 4


def test_an_interrupted_answer_ends():
    counts = iter(range(100))
    _, whole = conversation(["hi"])
    text, _ = conversation(["hi"], interrupted=lambda: next(counts) > 3)
    assert len(whole) == 1 and text.endswith("\n")
