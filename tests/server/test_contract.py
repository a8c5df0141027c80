"""The official client against a live server: what it can ask must come back as it expects."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import serving, wait_for

HI: Any = [{"role": "user", "content": "Say hello in one word."}]


def real_engine() -> Any:
    from astrai import AsyncEngine, EngineConfig

    return AsyncEngine(EngineConfig(model="smollm2", max_slots=4, kv_tokens=4096))


def open_streams(engine: Any) -> int:
    if isinstance(engine, FakeEngine):
        return len(engine.open)
    stats = engine.stats()
    return int(stats["running"] + stats["waiting"] + stats["pages_held"])


class Served:
    def __init__(self, engine: Any, url: str) -> None:
        self.engine = engine
        self.url = url
        self.model = engine.model_name
        self.client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            http_client=httpx.Client(trust_env=False),
        )


def anthropic_client(url: str) -> anthropic.Anthropic:
    http_client = httpx2.Client(trust_env=False)
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, http_client=http_client)


@pytest.fixture(scope="module", params=["fake", "real"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    engine = FakeEngine() if request.param == "fake" else real_engine()
    with serving(engine) as url:
        served = Served(engine, url)
        yield served
        served.client.close()
    gc.collect()


def test_models(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert model.id == served.model
    assert served.client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model=served.model, messages=HI, max_tokens=8, temperature=0
    )
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert 1 <= reply.usage.completion_tokens <= 8
    total = reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.total_tokens == total
    assert reply._request_id == reply.id


def test_a_streamed_chat_says_what_a_whole_one_says(served: Served) -> None:
    asked: dict[str, Any] = {
        "model": served.model,
        "messages": HI,
        "max_completion_tokens": 24,
        "seed": 7,
        "temperature": 0.8,
        "n": 3,
    }
    whole = served.client.chat.completions.create(**asked)
    texts = ["", "", ""]
    reasons: list[str | None] = [None] * 3
    usage = None
    stream = served.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions_of_text_and_of_ids(served: Served) -> None:
    ids = served.engine.tokenizer.encode("The capital of France is")
    prompts: list[Any] = ["The capital of France is", ["One", "Two"], ids, [ids, ids[:3]]]
    for prompt, n in zip(prompts, (1, 2, 1, 2)):
        reply = served.client.completions.create(
            model=served.model, prompt=prompt, max_tokens=5, temperature=0
        )
        assert [choice.index for choice in reply.choices] == list(range(n))
        assert all(choice.finish_reason == "length" for choice in reply.choices)
        assert reply.usage is not None and reply.usage.completion_tokens == 5 * n
        streamed = [""] * n
        for chunk in served.client.completions.create(
            model=served.model, prompt=prompt, max_tokens=5, temperature=0, stream=True
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in reply.choices]


def test_logprobs(served: Served) -> None:
    reply = served.client.chat.completions.create(
        model=served.model, messages=HI, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert reply.usage is not None and len(logprobs.content) == reply.usage.completion_tokens
    for token in logprobs.content:
        assert token.logprob <= 0
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 3
        assert token.token == token.top_logprobs[0].token  # greedy
    completion = served.client.completions.create(
        model=served.model, prompt="One two", max_tokens=4, logprobs=2, temperature=0
    )
    flat = completion.choices[0].logprobs
    assert flat is not None and flat.tokens is not None and flat.token_logprobs is not None
    assert len(flat.tokens) == len(flat.token_logprobs) == 4


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
)
def test_bad_fields_are_named(served: Served, extra: dict[str, Any], param: str) -> None:
    if param == "logit_bias" and isinstance(served.engine, FakeEngine):
        pytest.skip("the engine checks the vocabulary")
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(
            **{"model": served.model, "messages": HI, "max_tokens": 4, **extra}
        )
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_prompt_that_does_not_fit(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model=served.model, prompt=[1] * 5000, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert "5000" in caught.value.message
    assert str(served.engine.max_model_len) in caught.value.message


def test_the_wrong_model(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.chat.completions.create(model="gpt-none", messages=HI)
    assert caught.value.param == "model"


def test_leaving_a_stream_frees_its_pages(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "hang and tell me a very long story"}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    for _ in range(3):
        next(chunks)
    assert open_streams(served.engine) > 0
    stream.close()
    wait_for(lambda: open_streams(served.engine) == 0, seconds=5)


def test_many_at_once_with_the_async_client(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        text = ""
        async with await client.completions.create(
            model=served.model,
            prompt=f"{i} plus one is",
            max_tokens=4 + i,
            temperature=0,
            stream=True,
        ) as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
        return text

    async def run() -> list[str]:
        http_client = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=http_client
        ) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(12)))

    together = asyncio.run(run())
    for i in (0, 11):
        alone = served.client.completions.create(
            model=served.model, prompt=f"{i} plus one is", max_tokens=4 + i, temperature=0
        )
        assert alone.choices[0].text == together[i]


def test_scores_of_a_prompt_are_those_of_its_generation(served: Served) -> None:
    """`echo` with max_tokens 0 gives each token the score it had when it was drawn."""
    drawn = served.client.completions.create(
        model=served.model, prompt="The sky", max_tokens=6, temperature=0, logprobs=0
    )
    text, scores = drawn.choices[0].text, drawn.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None
    scored = served.client.completions.create(
        model=served.model, prompt="The sky" + text, max_tokens=0, echo=True, logprobs=0
    )
    (choice,) = scored.choices
    assert choice.text == "The sky" + text
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None and choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs[0] is None
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset)
    if not isinstance(served.engine, FakeEngine):
        last = choice.logprobs.token_logprobs[-len(scores.token_logprobs) :]
        assert last == pytest.approx(scores.token_logprobs, abs=0.05)


def test_embeddings(served: Served) -> None:
    texts = ["The cat sat on the mat.", "A cat is on a mat.", "Interest rates rose again."]
    reply = served.client.embeddings.create(model=served.model, input=texts)
    vectors = [item.embedding for item in reply.data]
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-3) for vector in vectors)
    ids: Any = [served.engine.tokenizer.encode(text) for text in texts]
    again = served.client.embeddings.create(model=served.model, input=ids, encoding_format="float")
    assert reply.usage == again.usage
    if isinstance(served.engine, FakeEngine):
        return

    def alike(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(vectors[i], again.data[j].embedding, strict=True))

    assert alike(0, 0) > 0.999
    assert alike(0, 1) > alike(0, 2)


def test_a_response(served: Served) -> None:
    asked: dict[str, Any] = {
        "model": served.model, "input": HI, "max_output_tokens": 12, "temperature": 0,
    }  # fmt: skip
    whole = served.client.responses.create(**asked)
    chat = served.client.chat.completions.create(
        model=served.model, messages=HI, max_tokens=12, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None and chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    text = ""
    for event in served.client.responses.create(**asked, stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == whole.output_text
    assert event.type in ("response.completed", "response.incomplete")


def test_a_message(served: Served) -> None:
    client = anthropic_client(served.url)
    asked: dict[str, Any] = {
        "model": served.model, "messages": HI, "max_tokens": 12, "extra_body": {"temperature": 0},
    }  # fmt: skip
    whole = client.messages.create(**asked)
    chat = served.client.chat.completions.create(
        model=served.model, messages=HI, max_tokens=12, temperature=0
    )
    (block,) = whole.content
    assert block.type == "text" and block.text == chat.choices[0].message.content
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
    counted = client.messages.count_tokens(model=served.model, messages=HI)
    assert chat.usage is not None and counted.input_tokens == chat.usage.prompt_tokens
    if not isinstance(served.engine, FakeEngine):
        word = block.text.split()[0]
        stopped = client.messages.create(**asked, stop_sequences=[word])
        assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word


def test_a_required_call_in_every_dialect(served: Served) -> None:
    """The grammar makes the call; each dialect carries the same arguments."""
    if isinstance(served.engine, FakeEngine):
        pytest.skip("it follows no grammar")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    ask: Any = [{"role": "user", "content": "Weather in Rome?"}]
    function = {"name": "weather", "parameters": schema}
    sampled = {"temperature": 0, "seed": 1}
    chat = served.client.chat.completions.create(
        model=served.model,
        messages=ask,
        tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body=sampled,
    )
    (called,) = chat.choices[0].message.tool_calls or ()
    assert called.type == "function"
    expected = json.loads(called.function.arguments)
    assert set(expected) == {"city"} and expected["city"] in ("Oslo", "Rome")
    response = served.client.responses.create(
        model=served.model,
        input=ask,
        tools=[{"type": "function", "strict": None, **function}],  # type: ignore[list-item]
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body=sampled,
    )
    (item,) = response.output
    assert item.type == "function_call" and json.loads(item.arguments) == expected
    message = anthropic_client(served.url).messages.create(
        model=served.model,
        messages=ask,
        max_tokens=200,
        tools=[{"name": "weather", "input_schema": schema}],  # type: ignore[list-item]
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=sampled,
    )
    (block,) = message.content
    assert block.type == "tool_use" and block.input == expected
    assert message.stop_reason == "tool_use"


def test_tokens_there_and_back(served: Served) -> None:
    http = httpx.Client(base_url=served.url, trust_env=False)
    text = "Grüße, 世界 🙂!"
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == served.engine.tokenizer.encode(text)
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_why_a_request_took_its_time(served: Served) -> None:
    if isinstance(served.engine, FakeEngine):
        pytest.skip("it emits no events")
    reply = served.client.completions.create(model=served.model, prompt="One", max_tokens=2)
    http = httpx.Client(base_url=served.url, trust_env=False)
    assert http.get(f"/v1/requests/{reply.id}").json()["state"] == "ended"
    assert http.get(f"/v1/requests/{reply.id}/why").json()["text"]


def test_health(served: Served) -> None:
    response = httpx.get(f"{served.url}/health", trust_env=False)
    assert response.status_code == 200
    assert response.json()["status"] == "ok"
