"""The official client, in strict validation mode."""
# ruff: noqa: E402 (without the client the file is skipped before it imports more)

import asyncio

import pytest

httpx = pytest.importorskip("httpx")

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from serving import ONLY_TEXT, make_engine, served

pytestmark = pytest.mark.interop
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
BODY = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 3, "logit_bias": ONLY_TEXT}


@pytest.fixture(scope="module")
def port():
    with served(make_engine()) as (_, port):
        yield port


def client(port, kind=openai.OpenAI, **settings):
    base = f"http://127.0.0.1:{port}/v1"
    return kind(base_url=base, api_key="none", **({"_strict_response_validation": True} | settings))


def test_whole_answers(port):
    with client(port) as ask:
        answer = ask.chat.completions.create(**BODY, n=2, logprobs=True, top_logprobs=2)
        assert answer.choices[1].message.role == "assistant" and answer.choices[0].finish_reason == "length"
        assert (
            answer.usage.completion_tokens == 16 and answer._request_id and answer.id.startswith("chatcmpl-")
        )
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
        text = ask.completions.create(
            model="tiny", prompt=["a", "b"], max_tokens=3, logprobs=2, extra_body={"top_k": 5}
        )
        assert [choice.index for choice in text.choices] == [0, 1]
        assert [model.id for model in ask.models.list()] == ["tiny"] and ask.models.retrieve(
            "tiny"
        ).id == "tiny"


def test_streams(port):
    with client(port) as ask:
        whole = ask.chat.completions.create(**BODY).choices[0].message.content
        chunks = list(
            ask.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
        assert chunks[-1].usage.completion_tokens == 8 and chunks[-1].choices == []
        stop = whole[3:5]  # the helper takes an answer that was cut off for an error
        with ask.chat.completions.stream(**BODY, stop=stop) as stream:
            stream.until_done()
            assert stream.get_final_completion().choices[0].message.content == whole[: whole.index(stop)]
    # Strictly the client's type of a piece of text wants a reason in every piece; OpenAI sends null, too.
    with client(port, _strict_response_validation=False) as ask:
        body = {"prompt": "a", "max_tokens": 3, "logit_bias": ONLY_TEXT}
        text = list(ask.completions.create(model="tiny", stream=True, **body))
        assert text[-1].choices[0].finish_reason == "length"


def test_the_asynchronous_client(port):
    async def many():
        async with client(port, openai.AsyncOpenAI) as ask:
            answers = await asyncio.gather(*(ask.chat.completions.create(**BODY) for _ in range(12)))
            return {answer.choices[0].message.content for answer in answers}

    assert len(asyncio.run(many())) == 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"temperature": 3}, "BadRequestError"),
        ({"model": "other"}, "NotFoundError"),
        ({"messages": [{"role": "user", "content": "a" * 400}]}, "BadRequestError"),
    ],
)
def test_errors_are_raised_once(port, changes, error):
    attempts = []
    hooks = {"request": [attempts.append]}
    with (
        client(port, http_client=httpx.Client(event_hooks=hooks)) as ask,
        pytest.raises(getattr(openai, error)),
    ):
        ask.chat.completions.create(**(BODY | changes))
    assert len(attempts) == 1


def test_a_wrong_key(port):
    with (
        served(make_engine(), api_key="right", work=lambda made: made.ready.set()) as (_, closed),
        client(closed) as ask,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        ask.models.list()


def test_a_full_queue_is_tried_again():
    attempts = []
    hooks = {"request": [attempts.append]}
    with (
        served(make_engine(), max_queue=0, work=lambda made: made.ready.set()) as (_, full),
        client(full, http_client=httpx.Client(event_hooks=hooks)) as ask,
        pytest.raises(openai.RateLimitError),
    ):
        ask.chat.completions.create(**BODY)
    assert len(attempts) == 3
