from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai.front.structured import GrammarError, StructuredOutput
from astrai.server.chat.parts import Part, TextPart, ToolCallPart
from astrai.server.chat.tools import MAX_SCHEMA_BYTES, Tool, Toolset, style_of, styles
from astrai.server.chat.tools.grammar import MAX_CALLS, Thought, content_grammar, tool_grammar
from astrai.server.chat.tools.reader import ToolReader
from tests.server.chat.split import cut, read, same_however_cut

NAMES = {"get_weather", "search", "now"}


def call(index: int, name: str, arguments: str) -> Part:
    return ToolCallPart(index, "id", name, arguments)


def said(text: str) -> Part:
    return TextPart(text)


def reader(style: str) -> ToolReader:
    return ToolReader(styles()[style], NAMES)


# What models of these families write, and what it is.
RECORDED: dict[str, tuple[str, str, list[Part]]] = {
    "one call": (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        [call(0, "get_weather", '{"city": "Oslo"}')],
    ),
    "text, then two calls": (
        "hermes",
        "Let me look both up.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "São Paulo", "days": [1, 2]}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [
            said("Let me look both up."),
            call(0, "get_weather", '{"city": "São Paulo", "days": [1, 2]}'),
            call(1, "now", "{}"),
        ],
    ),
    "brackets and quotes in strings": (
        "hermes",
        '<tool_call>\n{"name": "search", "arguments": {"q": "a \\"}]\\" \\\\", '
        '"o": {"k": "</tool_call>"}}}\n</tool_call>',
        [call(0, "search", '{"q": "a \\"}]\\" \\\\", "o": {"k": "</tool_call>"}}')],
    ),
    "keys in another order": (
        "hermes",
        '<tool_call>{"id": 7, "arguments": {"city": "Oslo"}, "name": "get_weather"}'
        "</tool_call> Ok.",
        [call(0, "get_weather", '{"city": "Oslo"}'), said("Ok.")],
    ),
    "no arguments": (
        "hermes",
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}',
        [call(0, "now", "{}"), call(1, "now", "{}")],
    ),
    "arguments as a string": (
        "hermes",
        '<tool_call>{"name": "search", "arguments": "{\\"q\\": \\"x\\"}"}</tool_call>',
        [call(0, "search", '{"q": "x"}')],
    ),
    "a list in one pair of tags": (
        "hermes",
        '<tool_call>[{"name": "now", "arguments": {}}, {"name": "search", "arguments": {"q": "x"}}]'
        "</tool_call>",
        [call(0, "now", "{}"), call(1, "search", '{"q": "x"}')],
    ),
    "line breaks in a string": (
        "hermes",
        '<tool_call>\n{"name": "search", "arguments": {"q": "a\nb\tc"}}\n</tool_call>',
        [call(0, "search", '{"q": "a\\nb\\tc"}')],
    ),
    "a closing tag is missing": (
        "hermes",
        '<tool_call>\n{"name": "now", "arguments": {}}\n<tool_call>\n'
        '{"name": "search", "arguments": {"q": "x"}}\n</tool_c',
        [call(0, "now", "{}"), call(1, "search", '{"q": "x"}')],
    ),
    "cut short in its arguments": (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os',
        [call(0, "get_weather", '{"city": "Os')],
    ),
    "cut short before them": (
        "hermes",
        'Wait. <tool_call>\n{"name": "get_weather", "argu',
        [said('Wait. <tool_call>\n{"name": "get_weather", "argu')],
    ),
    "an unknown function is text": (
        "hermes",
        '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>\n',
        [said('<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>\n')],
    ),
    "no JSON is text": (
        "hermes",
        "if a <tool_call and b <tool_call> c\n<tool_call>{'name': 'now'}</tool_call>",
        [said("if a <tool_call and b <tool_call> c\n<tool_call>{'name': 'now'}</tool_call>")],
    ),
    "a call after something like one": (
        "hermes",
        '<tool_call> {"x": <tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [said('<tool_call> {"x":'), call(0, "now", "{}")],
    ),
    "brackets that do not match": (
        "hermes",
        '<tool_call>{"name": "search", "arguments": {"q": [1}}</tool_call>',
        [call(0, "search", '{"q": [1'), said("}}</tool_call>")],
    ),
    "arguments that are no object": (
        "hermes",
        '<tool_call>{"name": "search", "arguments": [1]}</tool_call>',
        [said('<tool_call>{"name": "search", "arguments": [1]}</tool_call>')],
    ),
    "only text": ("hermes", "  Hello,\n world. \n", [said("  Hello,\n world. \n")]),
    "bare JSON": (
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
        [call(0, "get_weather", '{"city": "Oslo"}')],
    ),
    "bare JSON, several": (
        "llama3",
        '{"name": "now", "parameters": {}}; {"name": "search", "parameters": {"q": ";"}}\n'
        '{"type": "function", "name": "now", "parameters": {}};',
        [call(0, "now", "{}"), call(1, "search", '{"q": ";"}'), call(2, "now", "{}")],
    ),
    "after a tag": (
        "llama3",
        'I look.<|python_tag|>{"name": "search", "parameters": {"q": "x"}}',
        [said("I look."), call(0, "search", '{"q": "x"}')],
    ),
    "code after the tag is text": (
        "llama3",
        "<|python_tag|>print(1)",
        [said("<|python_tag|>print(1)")],
    ),
    "an answer in JSON is text": (
        "llama3",
        '{"name": "Ada", "age": 36}',
        [said('{"name": "Ada", "age": 36}')],
    ),
    "JSON behind text is text": (
        "llama3",
        'Ok {"name": "now", "parameters": {}}',
        [said('Ok {"name": "now", "parameters": {}}')],
    ),
    "text behind bare JSON": (
        "llama3",
        '{"name": "now", "parameters": {}}\n\nThat was it; {',
        [call(0, "now", "{}"), said("That was it; {")],
    ),
    "a fence": (
        "generic",
        '```json\n{"name": "search", "arguments": {"q": "```"}}\n```\nDone.',
        [call(0, "search", '{"q": "```"}'), said("Done.")],
    ),
    "another fence": ("generic", "```python\n{}\n```", [said("```python\n{}\n```")]),
    "a bare list": (
        "generic",
        '\n[{"name": "now", "arguments": {}}]',
        [call(0, "now", "{}")],
    ),
    "tags, too": (
        "generic",
        'Sure. <tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [said("Sure."), call(0, "now", "{}")],
    ),
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_outputs_split_at_every_place(case: str) -> None:
    style, text, parts = RECORDED[case]
    assert same_however_cut(lambda: reader(style), text) == parts


@given(
    st.sampled_from(sorted(styles())),
    st.lists(
        st.sampled_from(
            [text for _, text, _ in RECORDED.values()]
            + ["<tool_call>", "</tool_call>", "<|python_tag|>", "```json", "{", "}", "[", ";", " "]
            + ['"name"', '"now"', ":", ",", '"arguments": {', "\n", "<", '{"name": "now"', "a"]
        ),
        max_size=8,
    ),
    st.lists(st.integers(0, 1000), max_size=12),
)
def test_random_texts_in_random_pieces(style: str, words: list[str], at: list[int]) -> None:
    text = "".join(words)
    whole = read(reader(style), [text])
    assert read(reader(style), cut(text, at)) == whole
    if not any(isinstance(part, ToolCallPart) for part in whole):
        assert "".join(part.text for part in whole if isinstance(part, TextPart)) == text


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(styles())),
    st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=3),
    st.sampled_from([None, 1]),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_what_a_style_writes_its_reader_reads(
    name: str, arguments: list[dict[str, Any]], indent: int | None, at: list[int]
) -> None:
    style = styles()[name]
    calls = [
        json.dumps({"name": "search", style.arguments: values}, indent=indent, ensure_ascii=False)
        for values in arguments
    ]
    text = style.between.join(f"{style.write.open}{one}{style.write.close}" for one in calls)
    parts = read(reader(name), cut(text, at))
    assert [part.index for part in parts if isinstance(part, ToolCallPart)] == [*range(len(calls))]
    assert [
        json.loads(part.arguments) for part in parts if isinstance(part, ToolCallPart)
    ] == arguments
    assert len(parts) == len(calls)


def test_arguments_go_out_as_they_come() -> None:
    each = reader("hermes")
    assert each.feed('<tool_call>\n{"name": "search", "arguments": ') == []
    assert [part.name for part in each.feed("{") if isinstance(part, ToolCallPart)] == [
        "search",
        None,
    ]
    assert each.feed('"q": "lo') == [ToolCallPart(0, None, None, '"q": "lo')]
    assert each.feed('ng"}}') == [ToolCallPart(0, None, None, 'ng"}')]
    assert each.feed("\n</tool_call>") == each.close() == []


def test_what_must_be_a_call_and_is_cut_short_is_no_text() -> None:
    whole = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for end in range(len(whole) + 1):
        each = ToolReader(styles()["hermes"], NAMES, only_calls=True)
        parts = read(each, [whole, "\n", whole[:end]])
        assert all(isinstance(part, ToolCallPart) for part in parts)


def test_no_more_is_held_than_may_be_a_marker() -> None:
    each = reader("hermes")
    assert each.feed("a < b") == [said("a < b")]
    assert each.feed(" <tool") == []
    assert each.feed("box") == [said(" <toolbox")]


# ── tools, styles ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "1 to 128"),
        ({"name": "a b"}, "'a b'"),
        ({"name": "x" * 129}, "1 to 128"),
        ({"parameters": {"type": "array"}}, "'array'"),
        ({"parameters": {"properties": []}}, "properties"),
        ({"parameters": {"required": "a"}}, "required"),
        ({"parameters": {"required": [1]}}, "required"),
        ({"parameters": {"description": "x" * MAX_SCHEMA_BYTES}}, str(MAX_SCHEMA_BYTES)),
    ],
)
def test_a_bad_tool_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))) as caught:
        Tool(**{"name": "f", **fields})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": (Tool("f"), Tool("f"))}, "'f' twice"),
        ({"tools": tuple(Tool(f"f{i}") for i in range(129))}, "129 entries"),
        ({"choice": "required"}, "needs tools"),
        ({"tools": (Tool("f"),), "choice": "named", "named": "g"}, "'g'"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Toolset(**fields)


def test_the_template_tells_the_style() -> None:
    def name(template: str | None) -> str:
        style = style_of(template)
        return style.name if style is not None else "none"

    assert name("… <tool_call>\\n{…}\\n</tool_call> …") == "hermes"
    assert name("… <|python_tag|> …") == "llama3"
    assert name('Respond in the format {"name": …, "parameters": dictionary of argument name') == (
        "llama3"
    )
    assert name("{{ messages }}") == name(None) == "generic"
    assert style_of("<tool_call>", "none") is None
    assert style_of("<tool_call>", "llama3") is styles()["llama3"]
    with pytest.raises(ValueError, match="nope"):
        style_of(None, "nope")


# ── grammars ────────────────────────────────────────────────────────────────────────────────────

ANYTHING = Tool("now", parameters={})
WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    strict=True,
)
GOOD = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
BAD = '<tool_call>\n{"name": "get_weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {"z": [1, {"y": null}]}}\n</tool_call>'
BEFORE: dict[Thought | None, str] = {
    None: "",
    "opened": "hmm </th <think> </think>\n\n",
    "optional": "<think>\nhmm\n</think>\n\n",
}


def accepts(grammar: str, text: str) -> bool:
    """Whether `text`, byte by byte, is a whole answer under `grammar`."""
    llguidance = pytest.importorskip("llguidance")
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
    raw = text.encode()
    return matcher.try_consume_tokens(list(raw)) == len(raw) and matcher.is_accepting()


def grammar(style: str, toolset: Toolset, thought: Thought | None = None, **rest: Any) -> str:
    return tool_grammar(styles()[style], toolset, rest.get("content"), thought, json.dumps)


@pytest.mark.parametrize("thought", BEFORE)
def test_grammar_of_calls_that_must_be(thought: Thought | None) -> None:
    before = BEFORE[thought]
    both = (WEATHER, ANYTHING)
    any_of = grammar("hermes", Toolset(both, "required"), thought)
    assert accepts(any_of, before + GOOD)
    assert accepts(any_of, before + NOW + "\n" + GOOD)
    assert not accepts(any_of, before + BAD)
    assert not accepts(any_of, before + "Hello.")
    assert accepts(any_of, before + "\n".join([GOOD] * MAX_CALLS))
    assert not accepts(any_of, before + "\n".join([GOOD] * (MAX_CALLS + 1)))
    single = grammar("hermes", Toolset(both, "required", parallel=False), thought)
    assert accepts(single, before + NOW) and not accepts(single, before + NOW + "\n" + GOOD)
    one = grammar("hermes", Toolset(both, "named", "get_weather"), thought)
    assert accepts(one, before + GOOD)
    assert not accepts(one, before + GOOD + "\n" + GOOD)
    assert not accepts(one, before + NOW)


@pytest.mark.parametrize("thought", BEFORE)
def test_grammar_of_calls_that_may_be(thought: Thought | None) -> None:
    before = BEFORE[thought]
    tools = (WEATHER, ANYTHING)
    free = grammar("hermes", Toolset(tools), thought)
    for text in ("", "Hello <tool_ca", GOOD, "I look. " + GOOD + NOW + " That is it."):
        assert accepts(free, before + text), text
    assert not accepts(free, before + "I look. " + BAD)
    single = grammar("hermes", Toolset(tools, parallel=False), thought)
    assert accepts(single, before + "I look. " + GOOD)
    assert not accepts(single, before + GOOD + GOOD)


def test_grammar_of_bare_calls() -> None:
    text = grammar("llama3", Toolset((WEATHER,)))
    good = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
    assert accepts(text, good) and accepts(text, f"{good}; {good}") and accepts(text, "It is {x}")
    assert not accepts(text, '{"name": "get_weather", "parameters": {"town": 1}}')
    assert not accepts(text, '{"a": 1}')


@pytest.mark.parametrize("thought", BEFORE)
def test_grammar_of_calls_or_content(thought: Thought | None) -> None:
    before = BEFORE[thought]
    for content, good, bad in (
        ({"json_schema": '{"type": "object", "required": ["a"]}'}, '{"a": 1}', "{}"),
        ({"json_object": True}, "{}", "[]"),
        ({"choice": ("yes", 'no "x"')}, 'no "x"', "no"),
        ({"regex": "[a/b]+"}, "a/b", "c"),
    ):
        wanted = StructuredOutput(**content)
        text = grammar("hermes", Toolset((WEATHER,)), thought, content=wanted)
        assert accepts(text, before + GOOD) and accepts(text, before + good)
        assert not accepts(text, before + bad) and not accepts(text, before + BAD)
        if thought is not None:
            alone = content_grammar(wanted, thought, json.dumps)
            assert accepts(alone, before + good) and not accepts(alone, before + bad)


def test_a_grammar_does_not_go_into_another() -> None:
    wanted = StructuredOutput(grammar='start: "a"', source="guided_grammar")
    with pytest.raises(GrammarError, match="guided_grammar"):
        content_grammar(wanted, "opened", json.dumps)


def test_white_space_in_arguments_is_bounded() -> None:
    text = grammar("hermes", Toolset((WEATHER,), "required"))
    assert accepts(text, GOOD.replace(" ", " " * 1)) and accepts(
        text, GOOD.replace(": {", ": {\n  ")
    )
    assert not accepts(text, GOOD.replace('"city": ', '"city":' + " " * 100))


def test_arguments_that_the_schema_does_not_name() -> None:
    for parameters, may in (
        (None, False),
        ({"properties": {}}, False),
        ({"properties": {}, "additionalProperties": True}, True),
        ({"type": "object"}, True),
    ):
        text = grammar("hermes", Toolset((Tool("now", parameters=parameters),), "required"))
        assert accepts(text, NOW) is may


def test_only_a_strict_schema_must_be_understood_in_full() -> None:
    pytest.importorskip("llguidance")
    schema = {"properties": {"a": {"type": "string", "format": "no-such-format"}}}
    loose = Toolset((Tool("f", parameters=schema),), "required")
    assert accepts(
        grammar("hermes", loose),
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
    )
    strict = Toolset((Tool("f", parameters=schema, strict=True),), "required")
    with pytest.raises(AssertionError, match="no-such-format"):
        accepts(grammar("hermes", strict), "")
