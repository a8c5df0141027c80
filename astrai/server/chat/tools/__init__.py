"""Tools: what a request may offer, and the styles in which models write a call of one.

A style is data: how a call begins and ends, and how the model is told so. A model's style is
found in its chat template, or named by flag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 65_536
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_EMPTY: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask to be called; ValueError if it is malformed or too large.

    How deep its schema may nest is bounded with the body that it came in.
    `strict`: its arguments always match `parameters`, also where the call itself is optional.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # JSON schema of an object; None: nothing to say
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name = {self.name[:140]!r}, expected 1 to 128 of letters, digits, '_', '-', "
                "'.' and ':'"
            )
        schema = self.parameters
        if schema is None:
            return
        if schema.get("type", "object") != "object":
            raise ValueError(f"parameters.type = {schema['type']!r}, expected 'object'")
        if not isinstance(schema.get("properties", {}), dict):
            raise ValueError("parameters.properties is not an object")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
            raise ValueError("parameters.required is not a list of strings")
        if (size := len(json.dumps(schema))) > MAX_SCHEMA_BYTES:
            raise ValueError(f"parameters have {size} bytes, expected at most {MAX_SCHEMA_BYTES}")

    @property
    def schema(self) -> Mapping[str, Any]:
        return _EMPTY if self.parameters is None else self.parameters

    def described(self) -> dict[str, Any]:
        """As chat templates expect a tool."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.schema)}}


@dataclass(frozen=True, slots=True)
class Toolset:
    """The tools of one request and how they may be used; ValueError if that makes no sense."""

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    named: str | None = None  # the one tool that must be called
    parallel: bool = True  # False: at most one call

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(names) > MAX_TOOLS:
            raise ValueError(f"tools has {len(names)} entries, expected at most {MAX_TOOLS}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tools names {name!r} twice")
        if self.choice in ("required", "named") and not names:
            raise ValueError(f"tool_choice = {self.choice!r} needs tools")
        if self.choice == "named" and self.named not in names:
            raise ValueError(
                f"tool_choice names {self.named!r}, which is not one of the tools: "
                f"{', '.join(names)}"
            )

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that an answer may call."""
        if self.choice == "none":
            return ()
        if self.choice == "named":
            return tuple(tool for tool in self.tools if tool.name == self.named)
        return self.tools

    @property
    def must_call(self) -> bool:
        return self.choice in ("required", "named")


class Marker(NamedTuple):
    """What stands before calls and what after; an empty `close` is nothing."""

    open: str
    close: str


@dataclass(frozen=True, slots=True)
class Style:
    """How a model writes calls: as JSON objects with a name and arguments, between markers."""

    name: str
    signs: tuple[str, ...]  # a chat template that holds one of these is of this style
    anywhere: tuple[Marker, ...]  # calls between these, wherever they stand in the text
    at_start: tuple[Marker, ...]  # calls that are the first of the text; ("", "") is bare JSON
    write: Marker  # around a call that a grammar makes the model write
    between: str  # between two of those
    arguments: str  # the key under which it writes a call's arguments
    form: str  # told to models whose template does not know tools
    one_by_one: bool = False  # its template takes one call in a message


def styles() -> Mapping[str, Style]:
    from astrai.server.chat.tools import generic, hermes, llama3

    return {style.name: style for style in (hermes.STYLE, llama3.STYLE, generic.STYLE)}


def style_of(template: str | None, name: str = "auto") -> Style | None:
    """The style called `name`: of the template if "auto", none at all if "none"."""
    known = styles()
    if name == "none":
        return None
    if name != "auto":
        if name not in known:
            raise ValueError(f"tool parser {name!r}, expected auto, none, {', '.join(known)}")
        return known[name]
    for style in known.values():
        if any(sign in (template or "") for sign in style.signs):
            return style
    return known["generic"]


def instructions(tools: Sequence[Tool], style: Style) -> str:
    """The system message that tells a model of its tools if its template cannot."""
    listed = "\n".join(json.dumps(tool.described(), ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. These are their signatures as JSON schemas:\n"
        f"<tools>\n{listed}\n</tools>\n{style.form}\n"
        "Call a function only if it helps; otherwise answer in plain text."
    )
