"""The engine on the real model: nothing another request does changes your tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from astrai import LLM, AsyncEngine, EngineConfig, SamplingParams
from astrai.bench._common import text_prompt
from astrai.front.admission import QueueFull
from astrai.front.intake import PromptTooLong

CHAT = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_slots=8)


@pytest.fixture(scope="module")
def requests(llm: LLM) -> list[tuple[list[int], SamplingParams]]:
    """Ten requests of real text: greedy and sampled, one pair with a common prefix."""
    rng = random.Random(3)
    made = []
    for i in range(10):
        prompt = text_prompt(llm.tokenizer, rng, rng.randint(8, 150))
        params = SamplingParams(
            temperature=0.0 if i % 2 else 0.8,
            top_p=0.95 if i % 4 == 0 else 1.0,
            repetition_penalty=1.1 if i % 3 == 0 else 1.0,
            seed=i,
            max_tokens=rng.randint(5, 40),
            ignore_eos=True,
        )
        made.append((prompt, params))
    made[7] = (made[4][0][:70] + made[7][0][:30], made[7][1])
    return made


def tokens_of(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    outputs = llm.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """Each request with the engine to itself and an empty cache."""
    made = []
    for request in requests:
        llm.engine.scheduler.books.drop_cached()
        made += tokens_of(llm, [request])
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"max_slots": 10},
        {"max_slots": 3, "prefill_budget": 7},
        {"max_slots": 10, "kv_tokens": 320, "page_size": 16},  # far too small: preempts
        {"max_slots": 8, "group_decode": "off"},
        {"max_slots": 8, "group_decode": "position"},
        {"max_slots": 8, "prefix_cache": False},
        {"max_slots": 5, "page_size": 128},
    ],
    ids=str,
)
def test_same_tokens_whatever_else_runs(
    options: dict[str, Any],
    requests: list[tuple[list[int], SamplingParams]],
    alone: list[list[int]],
) -> None:
    llm = LLM("smollm2", **options)
    assert tokens_of(llm, requests) == alone
    if "kv_tokens" in options:
        assert llm.engine.scheduler.n_preemptions > 0
    assert tokens_of(llm, requests[::-1]) == alone[::-1]  # now with prefix hits
    assert llm.engine.scheduler.books.counts.held == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_are_as_steady(
    dtype: str, requests: list[tuple[list[int], SamplingParams]]
) -> None:
    wide = LLM("smollm2", dtype=dtype, max_slots=4)
    made = []
    for request in requests[:5]:
        wide.engine.scheduler.books.drop_cached()
        made += tokens_of(wide, [request])
    small = LLM("smollm2", dtype=dtype, max_slots=4, kv_tokens=256, page_size=16, prefill_budget=11)
    assert tokens_of(small, requests[:5]) == made


def test_chat_answers(llm: LLM) -> None:
    output = llm.chat(CHAT, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)[0]
    assert "4" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason in llm.tokenizer.eos_token_ids
    assert "<|im_end|>" not in output.outputs[0].text


def test_outputs_in_the_shape_that_scripts_expect(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2, n=2)
    prompts = ["The sea is", {"prompt_token_ids": [504, 2677]}, [504, 2677, 314]]
    outputs = llm.generate(prompts, params)
    assert [len(o.outputs) for o in outputs] == [2, 2, 2]
    first = outputs[0]
    assert first.prompt == "The sea is" and first.finished
    one, two = first.outputs
    assert (one.index, two.index) == (0, 1) and one.token_ids == two.token_ids
    assert one.text == llm.tokenizer.decode(one.token_ids)
    assert one.logprobs is not None and len(one.logprobs) == 6
    for token, ranked in zip(one.token_ids, one.logprobs):
        assert next(iter(ranked)) == token and ranked[token].rank == 1 and len(ranked) == 3
    assert one.cumulative_logprob == pytest.approx(
        sum(r[t].logprob for t, r in zip(one.token_ids, one.logprobs))
    )
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(first.prompt_token_ids)
    for token, ranked in zip(first.prompt_token_ids[1:], first.prompt_logprobs[1:]):
        assert ranked is not None and token in ranked


def test_prompt_logprobs_do_not_depend_on_chunks(llm: LLM) -> None:
    prompt = text_prompt(llm.tokenizer, random.Random(1), 150)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    whole = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
    chunked = LLM("smollm2", prefill_budget=17).generate([prompt], params, use_tqdm=False)[0]
    assert chunked.prompt_logprobs == whole and whole is not None and len(whole) == 150


def test_stop_strings_cut_exactly(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    text = llm.generate(["Once upon a time"], free, use_tqdm=False)[0].outputs[0].text
    stop = text[30:37]
    cut = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=[stop, "\0never"])
    output = llm.generate(["Once upon a time"], cut, use_tqdm=False)[0].outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) < 60


def test_refusals_name_the_numbers(llm: LLM) -> None:
    for prompt, message in (
        ("", "prompt is empty: it has 0 tokens"),
        ([1, 49152], "prompt token 1 is 49152, expected 0 <= token < 49152"),
        ([5] * 9000, "prompt of 9000 tokens .* exceeds the context of 8192"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([prompt], SamplingParams(max_tokens=3), use_tqdm=False)
    with pytest.raises(PromptTooLong, match=r"10 tokens \+ max_tokens 9000 exceeds .* 8192"):
        llm.generate([[5] * 10], SamplingParams(max_tokens=9000), use_tqdm=False)
    with pytest.raises(ValueError, match="prompt 1 of 2"):
        llm.generate(["fine", ""], use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling params for 1 prompts"):
        llm.generate(["one"], [SamplingParams()] * 2, use_tqdm=False)
    with pytest.raises(TypeError, match="no option 'gpu_memory'"):
        LLM("smollm2", gpu_memory=0.9)
    assert llm.engine.idle


@pytest.fixture(scope="module")
def served() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(max_slots=4, max_waiting=6))
    engine.start()
    yield engine
    asyncio.run(engine.shutdown())


def test_streams_give_what_the_library_gives(llm: LLM, served: AsyncEngine) -> None:
    params = SamplingParams(temperature=0.7, seed=11, max_tokens=30, n=2, stop=["zzzz"])
    prompt = llm.tokenizer.encode("The history of the sea is")
    expected = llm.generate([prompt], params, use_tqdm=False)[0]

    async def collect() -> list[tuple[str, list[int], str | None]]:
        texts, tokens, ends = ["", ""], [[], []], [None, None]
        async for delta in served.stream(prompt, params, request_id="a"):
            texts[delta.index] += delta.text
            tokens[delta.index] += delta.token_ids
            if delta.finish_reason:
                ends[delta.index] = delta.finish_reason
                assert delta.usage is not None
                assert delta.usage.completion_tokens == len(tokens[delta.index])
        return list(zip(texts, tokens, ends))

    got = asyncio.run(collect())
    assert got == [(o.text, o.token_ids, o.finish_reason) for o in expected.outputs]


def test_closing_a_stream_frees_its_pages_within_a_tick(served: AsyncEngine) -> None:
    async def leave() -> None:
        params = SamplingParams(max_tokens=2000, ignore_eos=True)
        stream = served.stream([5, 6, 7], params, request_id="b")
        await anext(stream)
        assert served.stats()["pages_held"] > 0
        tick = served.stats()["tick"]
        await stream.aclose()
        while served.stats()["pages_held"]:
            await asyncio.sleep(0.001)
        # The tick that was under way, and the one that reads the message.
        assert served.stats()["tick"] <= tick + 3

    asyncio.run(leave())
    assert served.healthy().ok


def test_abort_by_id_and_a_bounded_queue(served: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=1500, ignore_eos=True)

    async def ends(name: str) -> str | None:
        reason = None
        async for delta in served.stream([5, 6], params, request_id=name):
            reason = delta.finish_reason
        return reason

    async def crowd() -> None:
        tasks = [asyncio.create_task(ends(f"c{i}")) for i in range(10)]
        while served.stats()["waiting"] < 6:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match="6 requests wait, at most 6 may"):
            await anext(served.stream([5], params, request_id="d"))
        assert served.abort("c3") and not served.abort("unknown")
        assert await tasks[3] == "abort"
        for i in range(10):
            served.abort(f"c{i}")
        assert set(await asyncio.gather(*tasks)) == {"abort"}

    asyncio.run(crowd())
    assert served.stats()["pages_held"] == 0


def test_pooled_states_are_the_hidden_states_of_the_prompt(llm: LLM, served: AsyncEngine) -> None:
    async def pool(prompt: list[int], pooling: Any) -> torch.Tensor:
        params = SamplingParams(max_tokens=0, pooling=pooling)
        (delta,) = [delta async for delta in served.stream(prompt, params, request_id=pooling)]
        assert (delta.finish_reason, delta.token_ids, delta.text) == ("length", [], "")
        assert delta.usage is not None and delta.usage.completion_tokens == 0
        return torch.tensor(delta.pooled)

    async def pool_all(prompt: list[int]) -> list[torch.Tensor]:
        starts = [prompt[: i + 1] for i in range(len(prompt))]
        asked = [pool(start, "last") for start in starts] + [pool(prompt, "mean")]
        return list(await asyncio.gather(*asked[:6])) + [await work for work in asked[6:]]

    prompt = llm.tokenizer.encode("The capital of France is the city of")
    *lasts, mean = asyncio.run(pool_all(prompt))
    assert torch.allclose(torch.stack(lasts).mean(0), mean, atol=0.05)
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    logits = llm.engine.runner.decoder.logits(lasts[-1][None])  # type: ignore[attr-defined]
    assert logits.argmax() == output.outputs[0].token_ids[0]
    params = SamplingParams(max_tokens=0, pooling="mean")
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert torch.allclose(torch.tensor(output.outputs[0].pooled), mean, atol=0.05)
