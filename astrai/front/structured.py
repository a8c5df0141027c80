"""Structured output: what a request's text must match, as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
# Bytes of UTF-8 that each kind may have.
MAX_BYTES = {"json_schema": 131_072, "regex": 16_384, "choice": 131_072, "grammar": 131_072}
# White space in a row that JSON may have where it may have any: enough for indented text, and a
# small model cannot fill max_tokens with it. A schema's own "x-guidance" may say otherwise.
MAX_WHITESPACE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What the output must be: exactly one of the five. Plain data, checked here, compiled later.

    `grammar` is Lark as llguidance takes it (it has a rule `start`), or EBNF in GBNF's form
    (`root ::= "yes" | "no"`). In Lark a rule may embed a JSON schema:

        start: "<tool_call>" call "</tool_call>"
        call: %json {"type": "object", "properties": {"city": {"type": "string"}}}

    What is quoted is text. A special token of the model (`Tokenizer.special_ids`) is written
    without quotes, `<|python_tag|>`, or by its id, `<[128010]>`; a name that the model does not
    have is refused.

    Raises ValueError, naming `source` and numbers, for what is malformed or too large. What only
    the compiler can see (an unsupported keyword, an undefined rule) ends the request with a
    message that begins with `source`.
    """

    json_schema: str | None = None  # a JSON schema as JSON text
    json_object: bool = False  # any JSON object
    # Of the whole output, in Rust's syntax: no look-around; \d is [0-9].
    regex: str | None = None
    choice: tuple[str, ...] | None = None  # one of these texts
    grammar: str | None = None
    source: str = field(default="structured", compare=False)  # the request field to blame

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise ValueError(f"{self.source}: {self.json_object = }, expected true or false")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"{self.source} has {' and '.join(given) or 'nothing'}, expected exactly one of "
                f"{', '.join(_KINDS)}"
            )
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.source, self.choice))
        for name in ("json_schema", "regex", "grammar"):
            if (text := getattr(self, name)) is not None:
                _check_text(self.source, name, text)
        if self.json_schema is not None:
            _check_schema(self.source, self.json_schema)

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


class GrammarError(ValueError):
    """What was asked cannot be compiled, or the output cannot go on under it: `source: why`."""

    def __init__(self, source: str, why: str) -> None:
        super().__init__(f"{source}: {why}")
        self.source = source


def _check_text(source: str, name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{source}: {name} = {text!r}, expected text")
    size = _size(source, name, text)
    if size > MAX_BYTES[name]:
        raise ValueError(f"{source}: {name} has {size} bytes, expected at most {MAX_BYTES[name]}")


def _check_schema(source: str, text: str) -> None:
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: json_schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(
            f"{source}: json_schema is a JSON {type(schema).__name__}, expected an object"
        )


def _checked_choice(source: str, choice: object) -> tuple[str, ...]:
    if not isinstance(choice, (list, tuple)) or not choice:
        raise ValueError(f"{source}: choice = {choice!r}, expected a list of strings")
    for i, text in enumerate(choice):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{source}: choice[{i}] = {text!r}, expected a string with text")
    size = sum(_size(source, "choice", text) for text in choice)
    if size > MAX_BYTES["choice"]:
        raise ValueError(
            f"{source}: choice has {size} bytes, expected at most {MAX_BYTES['choice']}"
        )
    return tuple(choice)


def _size(source: str, name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{source}: {name} holds a lone surrogate") from None
