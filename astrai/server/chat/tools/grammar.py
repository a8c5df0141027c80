"""What an answer may be, as Lark text: a thought, then calls, or text with calls, or content.

Calls are written as the style writes them, arguments by their own schemas. A lazy rule ends where
it first can, so text up to a marker is text without that marker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from astrai.front.structured import MAX_WHITESPACE, GrammarError, StructuredOutput
from astrai.server.chat import reasoning
from astrai.server.chat.tools import Style, Tool, Toolset

# "opened": the prompt ends inside a thought; "optional": the answer may begin with one.
Thought = Literal["opened", "optional"]

# In a row: a small model that must call does not find the end by itself.
MAX_CALLS = 16

_ANYTHING = r"/(.|\n)*/"


def tool_grammar(
    style: Style,
    toolset: Toolset,
    content: StructuredOutput | None,
    thought: Thought | None,
    literal: Callable[[str], str],
) -> str:
    """Lark text of an answer that calls tools of `toolset` as its choice says.

    An answer that is no call must be `content`, or any text if that is None. `literal` writes a
    marker as Lark: a quoted string, or the notation of a special token. Raises GrammarError for
    content that cannot be part of a larger grammar.
    """
    rules = _calls(style, toolset.callable, literal)
    several = toolset.parallel and toolset.choice != "named"
    more = f" ({_quoted(style.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    rules.append(f"calls: call{more}")
    if toolset.must_call:
        answer = "calls"
    elif content is not None:
        answer = "(calls | content)"
        rules.append(_content(content))
    elif style.write.open:
        answer = "inline* text" if toolset.parallel else "(inline | text)"
        rules += [f"text: {_ANYTHING}", *_inline(style, literal)]
    else:  # without a marker only the first character tells calls from text
        answer = "(calls | text)?"
        rules.append(r"text: /[^\s\[{](.|\n)*/")
    return _grammar(thought, answer, rules, literal)


def content_grammar(
    content: StructuredOutput, thought: Thought, literal: Callable[[str], str]
) -> str:
    """Lark text of an answer that is `content` after a thought; errors are as above."""
    return _grammar(thought, "content", [_content(content)], literal)


def _grammar(
    thought: Thought | None, answer: str, rules: Sequence[str], literal: Callable[[str], str]
) -> str:
    before = {"opened": "thought ", "optional": "thought? ", None: ""}[thought]
    lines = [f"start: {before}{answer}", *rules]
    if thought is not None:
        begins = f"{literal(reasoning.OPEN)} " if thought == "optional" else ""
        lines += [
            f"thought: {begins}inside /\\n{{0,2}}/",
            *_until("inside", reasoning.CLOSE, literal),
        ]
    return "\n".join(lines)


def _calls(style: Style, tools: Sequence[Tool], literal: Callable[[str], str]) -> list[str]:
    """The rules `call`, and `one` without its opening marker."""
    end = f" {_quoted(style.write.close)}" if style.write.close else ""
    marker, after = _opening(style)
    rules = [
        f"call: {f'{literal(marker)} ' if marker else ''}{after}",
        f"one: ({' | '.join(f'one_{i}' for i in range(len(tools)))}){end}",
    ]
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name)}, "{style.arguments}": '
        rules += [
            f'one_{i}: {_quoted(head)} args_{i} "}}"',
            f"args_{i}: {_json(_closed(tool.schema), exact=tool.strict)}",
        ]
    return rules


def _opening(style: Style) -> tuple[str, str]:
    """The marker before a call, "" without one, and the rules from there to the call's end."""
    marker = style.write.open.rstrip()
    space = style.write.open[len(marker) :]
    return marker, f"{_quoted(space)} one" if space else "one"


def _inline(style: Style, literal: Callable[[str], str]) -> list[str]:
    """The rule `inline`: text, then a call."""
    marker, after = _opening(style)
    return [f"inline: before {after}", *_until("before", marker, literal)]


def _until(rule: str, marker: str, literal: Callable[[str], str]) -> list[str]:
    """Anything up to the first `marker`, and the marker."""
    written = literal(marker)
    if written.startswith('"'):
        return [f"{rule}[lazy]: {_ANYTHING} {written}"]
    return [f"{rule}: {_ANYTHING} {written}"]  # text has no special token in it


def _content(content: StructuredOutput) -> str:
    match content.kind:
        case "json_schema":
            return f"content: {_json(json.loads(content.json_schema or ''), exact=True)}"
        case "json_object":
            return f"content: {_json({'type': 'object'}, exact=True)}"
        case "choice":
            return "content: " + " | ".join(_quoted(text) for text in content.choice or ())
        case "regex":
            return "content: /" + (content.regex or "").replace("/", r"\/") + "/"
        case _:
            raise GrammarError(
                content.source,
                "a grammar cannot be combined with tools or reasoning; a JSON schema, a regex or "
                "a choice can",
            )


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema; arguments that it does not name are not written unless it says they may."""
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {"type": "object", **closed, **schema}


def _json(schema: dict[str, Any] | bool, *, exact: bool) -> str:
    """JSON of a schema. If not `exact`, what the compiler does not know in it is passed over."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options = {
        "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}",
        "lenient": not exact,
        "coerce_one_of": not exact,
    }
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
