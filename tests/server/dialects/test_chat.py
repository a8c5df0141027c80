"""Conversations through chat templates, and answers as the official client sees them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import GrammarError, StructuredOutput
from astrai.models.tokenizer import ByteTokenizer
from astrai.server.chat.format import ChatFormat, ChatPrompt, Conversation, TemplateRefusal
from astrai.server.chat.tools import Tool, Toolset
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving

# Templates with the traits of their families.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
HERMES = """
{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>
{% endif %}
{%- for m in messages %}<{{ m.role }}>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments":
{%- if call.function.arguments is string %} TEXT {{ call.function.arguments }}
{%- else %} {{ call.function.arguments | tojson }}{% endif %}}</tool_call>{% endfor %}
</{{ m.role }}>
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
THINKING = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
LLAMA = """
{%- if tools is not none %}{"name": function name, "parameters": dictionary of argument name}
{% endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif -%}
<call>{{ m.tool_calls[0].function.arguments | tojson }}
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}
{% endfor %}"""

WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
)
USER: Any = {"role": "user", "content": "Oslo and Rome?"}
TALK: Any = [
    {"role": "developer", "content": "Be kind."},
    USER,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Two calls.",
        "tool_calls": [
            {
                "id": f"c{i}",
                "type": "function",
                "function": {"name": "get_weather", "arguments": arguments},
            }
            for i, arguments in enumerate(('{"city": "Oslo"}', "oops"))
        ],
    },
    {"role": "tool", "tool_call_id": "c0", "content": "cold"},
    {"role": "tool", "tool_call_id": "c1", "content": "warm"},
]


class Templated(ByteTokenizer):
    def __init__(self, template: str, special: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._chat_template = template
        self._backend.add_special_tokens(list(special))
        self.special_ids |= frozenset(range(258, 258 + len(special)))
        self.vocab_size += len(special)


def prompted(template: str, content: StructuredOutput | None = None, **fields: Any) -> ChatPrompt:
    fields.setdefault("messages", [USER])
    return ChatFormat(Templated(template)).prompt(Conversation(**fields), content)


def text_of(prompt: ChatPrompt) -> str:
    return bytes(token for token in prompt.ids if token < 256).decode()


# ── what the model reads ────────────────────────────────────────────────────────────────────────


def test_a_template_that_knows_tools_gets_them() -> None:
    text = text_of(prompted(HERMES, messages=TALK, toolset=Toolset((WEATHER,))))
    described = json.dumps(WEATHER.described())
    assert text == (
        f"<tools>{described}</tools>\n<system>Be kind.</system>\n<user>Oslo and Rome?</user>\n"
        "<assistant><think>Two calls.</think>"
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
        '<tool_call>{"name": "get_weather", "arguments": TEXT oops}</tool_call></assistant>\n'
        "<tool>cold</tool>\n<tool>warm</tool>\n<assistant>"
    )


def test_a_template_of_one_call_a_message_gets_them_one_by_one() -> None:
    results = TALK[:3] + TALK[:2:-1]  # in another order than the calls
    text = text_of(prompted(LLAMA, messages=results, toolset=Toolset((WEATHER,))))
    calls = '<call>{"city": "Oslo"}<tool>cold<call>"oops"<tool>warm'
    assert text.endswith("<user>Oslo and Rome?" + calls)
    twice = [*results, *results[2:], {"role": "tool", "tool_call_id": "c9", "content": "?"}]
    text = text_of(prompted(LLAMA, messages=twice, toolset=Toolset((WEATHER,))))
    assert text.endswith(calls + calls + "<tool>?")


def test_a_template_that_knows_no_tools_is_told_of_them() -> None:
    text = text_of(prompted(PLAIN, messages=TALK, toolset=Toolset((WEATHER,))))
    assert text.startswith("<system>Be kind.\n\nYou can call functions.")
    assert json.dumps(WEATHER.described()) in text
    assert text.endswith(
        "<assistant><tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_weather", "arguments": "oops"}\n</tool_call></assistant>\n'
        "<user><tool_response>\ncold\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
        "</user>\n<assistant>"
    )
    assert text_of(prompted(PLAIN)) == "<user>Oslo and Rome?</user>\n<assistant>"


def test_without_a_system_role_the_user_tells() -> None:
    text = text_of(prompted(NO_SYSTEM + PLAIN, toolset=Toolset((WEATHER,))))
    assert text.startswith("<user>You can call functions.")
    assert text.endswith("plain text.\n\nOslo and Rome?</user>\n<assistant>")
    with pytest.raises(TemplateRefusal, match="no system"):
        prompted(NO_SYSTEM + PLAIN, messages=TALK, toolset=Toolset((WEATHER,)))


def test_no_choice_is_no_tools() -> None:
    prompt = prompted(HERMES, toolset=Toolset((WEATHER,), "none"))
    assert "get_weather" not in text_of(prompt)
    assert prompt.structured is None


def test_the_last_message_goes_on() -> None:
    messages = [USER, {"role": "assistant", "content": "It is "}]
    prompt = prompted(PLAIN, messages=messages, continue_final_message=True)
    assert text_of(prompt) == "<user>Oslo and Rome?</user>\n<assistant>It is "
    forgets = "{% for m in messages[:1] %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateRefusal, match="does not show the last message"):
        prompted(forgets, messages=messages, continue_final_message=True)


# ── what the model writes ───────────────────────────────────────────────────────────────────────


def kinds(prompt: ChatPrompt, answer: str) -> list[str]:
    if prompt.reader is None:
        return ["plain"]
    reader = prompt.reader()
    return [type(part).__name__ for part in reader.feed(answer) + reader.close()]


@pytest.mark.parametrize(
    ("template", "fields", "answer", "parts"),
    [
        (PLAIN, {}, "a", ["plain"]),
        (HERMES, {}, "<think>a</think>b", ["ReasoningPart", "TextPart"]),
        (HERMES, {}, "a</think>b", ["TextPart"]),
        (HERMES, {"template_kwargs": {"enable_thinking": False}}, "<think>a", ["plain"]),
        (THINKING, {}, "a</think>b", ["ReasoningPart", "TextPart"]),
        (
            THINKING,
            {
                "messages": [USER, {"role": "assistant", "content": "<think>\na"}],
                "continue_final_message": True,
            },
            "b</think>c",
            ["ReasoningPart", "TextPart"],
        ),
        (
            THINKING,
            {
                "messages": [USER, {"role": "assistant", "content": "<think>a</think>b"}],
                "continue_final_message": True,
            },
            "<think>c",
            ["plain"],
        ),
    ],
)
def test_who_thinks_when(
    template: str, fields: dict[str, Any], answer: str, parts: list[str]
) -> None:
    assert kinds(prompted(template, **fields), answer) == parts


def test_what_is_constrained() -> None:
    strict = Tool("f", strict=True)
    schema = StructuredOutput(json_schema="{}", source="response_format")

    def source(template: str, toolset: Toolset, content: StructuredOutput | None = None) -> Any:
        structured = prompted(template, content, toolset=toolset).structured
        return structured and (structured.kind, structured.source)

    assert source(HERMES, Toolset((WEATHER,))) is None
    assert source(HERMES, Toolset((WEATHER,), "required")) == ("grammar", "tool_choice")
    assert source(HERMES, Toolset((WEATHER,), "named", "get_weather")) == ("grammar", "tool_choice")
    assert source(HERMES, Toolset((WEATHER,), parallel=False)) == ("grammar", "tools")
    assert source(HERMES, Toolset((WEATHER, strict))) == ("grammar", "tools")
    assert source(HERMES, Toolset((WEATHER,), "none"), schema) == ("grammar", "response_format")
    assert source(PLAIN, Toolset(), schema) == ("json_schema", "response_format")
    assert source(PLAIN, Toolset((WEATHER,)), schema) == ("grammar", "tools")
    own = StructuredOutput(grammar='start: "a"', source="guided_grammar")
    assert source(HERMES, Toolset(), own) == ("grammar", "guided_grammar")
    with pytest.raises(GrammarError, match="guided_grammar"):
        source(THINKING, Toolset(), own)


def test_a_special_marker_is_named_by_its_id_and_shown() -> None:
    chat = ChatFormat(Templated(HERMES, special=("<tool_call>", "</think>")))
    conversation = Conversation(messages=[USER], toolset=Toolset((WEATHER,), "required"))
    prompt = chat.prompt(conversation)
    assert prompt.structured is not None
    grammar = prompt.structured.grammar or ""
    assert "call: <[258]> " in grammar and "inside: /(.|\\n)*/ <[259]>" in grammar
    params = SamplingParams()
    assert not prompt.applied(params).skip_special_tokens
    assert prompted(HERMES).applied(params).skip_special_tokens
    plain = ChatFormat(Templated(PLAIN)).prompt(Conversation(messages=[USER]))
    assert plain.applied(params) == params


def test_what_is_decided_is_said() -> None:
    assert ChatFormat(Templated(HERMES)).line() == "tool calls hermes, reasoning think"
    assert ChatFormat(Templated(PLAIN)).line() == (
        "tool calls generic (told in the system message), reasoning none"
    )
    assert ChatFormat(Templated(PLAIN), "none").line() == "tool calls none, reasoning none"


def test_parsers_by_name() -> None:
    conversation = Conversation(messages=[USER], toolset=Toolset((WEATHER,)))
    off = ChatFormat(Templated(HERMES), "none", "none")
    with pytest.raises(ValueError, match="tools are not served"):
        off.prompt(conversation)
    assert off.prompt(Conversation(messages=[USER])).reader is None
    llama = ChatFormat(Templated(PLAIN), "llama3").prompt(conversation)
    assert '"parameters": <object of arguments>' in text_of(llama)
    assert kinds(llama, '{"name": "get_weather", "parameters": {}}') == ["ToolCallPart"] * 2


# ── over HTTP ───────────────────────────────────────────────────────────────────────────────────

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": WEATHER.parameters,
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ANSWER = (
    "<think>\nBoth, then.\n</think>\n\nI look — 你好.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def fake() -> FakeEngine:
    engine = FakeEngine()
    engine.tokenizer = Templated(HERMES)
    return engine


def client_of(url: str) -> openai.OpenAI:
    http_client: Any = httpx.Client(trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http_client
    )


@pytest.fixture(scope="module")
def client(fake: FakeEngine) -> Iterator[openai.OpenAI]:
    with serving(fake) as url, client_of(url) as client:
        yield client


@pytest.fixture
def says(fake: FakeEngine) -> Iterator[FakeEngine]:
    was, fake.says = fake.says, ANSWER
    yield fake
    fake.says = was


def streamed(client: openai.OpenAI, **asked: Any) -> dict[str, Any]:
    """The message that the chunks of choice 0 add up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    message["logprobs"] = []
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            if choice.index:
                continue
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                if call.id is not None:
                    assert call.type == "function" and call.index == len(message["tool_calls"])
                    message["tool_calls"].append([call.function.name, ""])
                message["tool_calls"][call.index][1] += call.function.arguments or ""
            if choice.logprobs is not None:
                message["logprobs"] += [token.token for token in choice.logprobs.content or ()]
            message["finish_reason"] = choice.finish_reason
    return message


ASK: dict[str, Any] = {"model": "fake", "messages": [USER], "tools": TOOLS}


def test_a_whole_answer_and_a_streamed_one(client: openai.OpenAI, says: FakeEngine) -> None:
    (choice,) = client.chat.completions.create(**ASK).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look — 你好."
    assert choice.message.model_extra == {"reasoning_content": "Both, then."}
    calls = [call for call in choice.message.tool_calls or () if call.type == "function"]
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Zürich"}),
        ("now", {}),
    ]
    assert all(call.id.startswith("call_") and len(call.id) == 29 for call in calls)
    assert streamed(client, **ASK) == {
        "content": choice.message.content,
        "reasoning_content": "Both, then.",
        "tool_calls": [[call.function.name, call.function.arguments] for call in calls],
        "logprobs": [],
        "finish_reason": "tool_calls",
    }


def test_only_calls_is_no_content(client: openai.OpenAI, says: FakeEngine) -> None:
    says.says = ANSWER[ANSWER.index("<tool_call>") :]
    (choice,) = client.chat.completions.create(**ASK).choices
    assert choice.message.content is None
    says.says = ""


def test_every_choice_has_its_own_calls(client: openai.OpenAI, says: FakeEngine) -> None:
    choices = client.chat.completions.create(**ASK, n=3).choices
    ids = {call.id for choice in choices for call in choice.message.tool_calls or ()}
    assert len(ids) == 6
    assert streamed(client, **ASK, n=3)["finish_reason"] == "tool_calls"


def test_every_token_has_its_logprob_once(client: openai.OpenAI, says: FakeEngine) -> None:
    asked = {**ASK, "logprobs": True, "top_logprobs": 1}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None
    tokens = [token.token for token in choice.logprobs.content or ()]
    assert len(tokens) == len(ANSWER.encode())
    assert streamed(client, **asked)["logprobs"] == tokens


def test_an_answer_cut_short_has_no_finished_call(client: openai.OpenAI, says: FakeEngine) -> None:
    limit = len(ANSWER.encode()) - 80
    whole = client.chat.completions.create(**ASK, max_tokens=limit).choices[0]
    assert whole.finish_reason == "length"
    assert streamed(client, **ASK, max_tokens=limit)["finish_reason"] == "length"


def test_tools_are_bounded_in_number_and_depth(client: openai.OpenAI) -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    many: Any = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]
    nested: Any = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    for tools, says in ((many, "129 entries, expected at most 128"), (nested, "deeper than 64")):
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(model="fake", messages=[USER], tools=tools)


def test_an_answer_that_stops_in_a_call_made_none(client: openai.OpenAI, says: FakeEngine) -> None:
    says.says = ANSWER[: ANSWER.rindex("}\n</tool_call>")]  # the last call is still open
    (choice,) = client.chat.completions.create(**ASK).choices
    assert choice.finish_reason == "stop"
    message = streamed(client, **ASK)
    assert message["finish_reason"] == "stop" and len(message["tool_calls"]) == 2
    says.says += "}"
    assert client.chat.completions.create(**ASK).choices[0].finish_reason == "tool_calls"
    assert streamed(client, **ASK)["finish_reason"] == "tool_calls"


def test_without_tools_it_is_text(client: openai.OpenAI, says: FakeEngine) -> None:
    (choice,) = client.chat.completions.create(model="fake", messages=[USER]).choices
    assert choice.message.content == ANSWER.split("</think>\n\n")[1]
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    none = client.chat.completions.create(**ASK, tool_choice="none").choices[0]
    assert none.message.content == choice.message.content


def test_what_reaches_the_engine(client: openai.OpenAI, says: FakeEngine) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=TALK, tools=TOOLS, tool_choice="required"
    )
    assert says.params is not None and says.params.structured is not None
    assert says.params.structured.source == "tool_choice"
    text = bytes(token for token in says.prompts[reply.id] if token < 256).decode()
    assert '"arguments": {"city": "Oslo"}}</tool_call>' in text and "<tool>warm" in text
    named: Any = {"type": "function", "function": {"name": "now"}}
    client.chat.completions.create(**ASK, tool_choice=named)
    assert "get_weather" not in (says.params.structured.grammar or "")
    client.chat.completions.create(**ASK, parallel_tool_calls=False)
    assert says.params.structured.source == "tools"
    last: Any = {"role": "assistant", "content": "It is"}
    reply = client.chat.completions.create(
        model="fake", messages=[USER, last], extra_body={"continue_final_message": True}
    )
    assert bytes(says.prompts[reply.id]).decode().endswith("<assistant>It is")


FUNCTION = {"name": "f"}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {**FUNCTION, "colour": 1}}]},
            "tools[0].function.colour",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {**FUNCTION, "parameters": {"type": "string"}}}
                ]
            },
            "tools[0].function.parameters.type",
        ),
        ({"tools": [{"type": "function", "function": FUNCTION}] * 2}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "now"}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    ],
)
def test_a_bad_field_is_named(client: openai.OpenAI, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, extra_body=extra)
    assert caught.value.param == param
    assert param.split("[")[0].split(".")[0] in caught.value.message


# ── the real model ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def real() -> Iterator[openai.OpenAI]:
    pytest.importorskip("llguidance")
    from astrai import AsyncEngine, EngineConfig

    engine = AsyncEngine(EngineConfig(model="smollm2", max_slots=4, kv_tokens=4096))
    with serving(engine) as url, client_of(url) as client:
        yield client
    gc.collect()


REAL: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city",
                "parameters": {
                    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                    "required": ["city"],
                },
            },
        },
        TOOLS[1],
    ],
    "temperature": 0,
    "max_tokens": 120,
}


def test_calls_that_must_be_are(real: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        asked = {**REAL, "tool_choice": choice, "parallel_tool_calls": False}
        (whole,) = real.chat.completions.create(**asked).choices
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        (call,) = whole.message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        if choice is named:
            assert call.function.name == "get_weather"
            assert arguments in ({"city": "Oslo"}, {"city": "Rome"})
        again = streamed(real, **asked)
        assert again["tool_calls"] == [[call.function.name, call.function.arguments]]
        assert again["finish_reason"] == "tool_calls"


def test_a_call_its_result_and_an_answer(real: openai.OpenAI) -> None:
    asked = {**REAL, "tool_choice": "required", "parallel_tool_calls": False}
    message = real.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'}
    talk = [*REAL["messages"], message.model_dump(exclude_none=True), result]
    (choice,) = real.chat.completions.create(
        **{**REAL, "messages": talk, "tool_choice": "none", "max_tokens": 16}
    ).choices
    assert choice.message.content and choice.message.tool_calls is None
