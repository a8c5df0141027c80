"""Calls out of a model's text, character by character: what was read is never read again.

A call is told from text by its JSON up to the place where its arguments begin: until then all of
it is held back, and becomes text if it is not a call of a declared tool. From there on arguments
go out as they come, so what is wrong after that shows in the arguments.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Generator
from typing import Literal, TypeAlias

from astrai.server.chat.parts import Part, TextPart, ToolCallPart, overlap
from astrai.server.chat.tools import Marker, Style

_SPACE = " \t\r\n"
_SCALAR = frozenset("+-.0123456789eEaflnrstu")  # numbers, true, false, null
# Gets one character per send; ends after the last character that it needs.
_Steps: TypeAlias = Generator[None, str, None]
# The same, and returns the first character after white space behind what it read.
_StepsTo: TypeAlias = Generator[None, str, str]


class _NotACall(Exception):
    """The character just sent cannot stand here."""


class CallScanner:
    """One JSON object, or an array of objects, each {"name": …, "arguments": {…}} in any order.

    Owns: the place in the JSON, and the parts of calls that are certain. `open`: a call has begun
    and not ended, so that nothing of it can be text any more.
    """

    def __init__(self, names: Collection[str], first_index: int) -> None:
        self.open = False
        self.n_calls = first_index
        self._names = names
        self._parts: list[Part] = []
        self._arguments: list[str] = []  # of the open call, not yet in a part
        self._steps = self._calls()
        next(self._steps)

    def push(self, char: str) -> Literal["more", "done", "not a call"]:
        """Read one character; one that makes this not a call is not taken."""
        try:
            self._steps.send(char)
        except StopIteration:
            return "done"
        except _NotACall:
            self.open = False
            return "not a call"
        return "more"

    def take(self) -> list[Part]:
        """What is certain since the last take."""
        self._cut()
        parts, self._parts = self._parts, []
        return parts

    def _cut(self) -> None:
        if self._arguments:
            more = "".join(self._arguments)
            self._arguments.clear()
            self._parts.append(ToolCallPart(self.n_calls - 1, None, None, more))

    def _begin(self, name: str) -> None:
        self._cut()
        id = f"call_{uuid.uuid4().hex[:24]}"
        self._parts.append(ToolCallPart(self.n_calls, id, name, ""))
        self.n_calls += 1
        self.open = True

    def _calls(self) -> _Steps:
        char = yield from _after_space()
        if char == "{":
            yield from self._call()
            return
        _expect(char, "[")
        while True:
            _expect((yield from _after_space()), "{")
            yield from self._call()
            char = yield from _after_space()
            if char == "]":
                return
            _expect(char, ",")

    def _call(self) -> _Steps:
        """An object, from behind its opening brace to its closing one."""
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        char = yield from _after_space()
        while True:
            key = yield from _string(char)
            _expect((yield from _after_space()), ":")
            char = yield from _after_space()
            if key == "name" and name is None:
                name = yield from _string(char)
                if name not in self._names:
                    raise _NotACall
                char = yield from _after_space()
            elif key in ("arguments", "parameters") and early is None and not self.open:
                if char == "{" and name is not None:
                    self._begin(name)
                    char = yield from _value(char, self._arguments.append)
                else:
                    read: list[str] = []
                    char = yield from _value(char, read.append)
                    early = _object_text("".join(read))
            else:
                char = yield from _value(char, _ignore)
            if char == "}":
                break
            _expect(char, ",")
            char = yield from _after_space()
        if name is None:
            raise _NotACall
        if not self.open:
            self._begin(name)
            self._arguments.append("{}" if early is None else early)
        self._cut()
        self.open = False


def _after_space() -> _StepsTo:
    while (char := (yield)) in _SPACE:
        pass
    return char


def _expect(char: str, wanted: str) -> None:
    if char != wanted:
        raise _NotACall


def _ignore(_: str) -> None: ...


def _string(char: str) -> Generator[None, str, str]:
    """The text of a string whose opening quote is `char`."""
    _expect(char, '"')
    read = ['"']
    yield from _quoted(read.append)
    try:
        text: str = json.loads("".join(read))
    except ValueError:
        raise _NotACall from None
    return text


def _quoted(sink: Callable[[str], object]) -> _Steps:
    """The rest of a string, closing quote included. A bare line break in it is put right."""
    escaped = False
    while True:
        char = yield
        sink(char if char >= " " else json.dumps(char)[1:-1])
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"':
            return


def _value(char: str, sink: Callable[[str], object]) -> _StepsTo:
    """A value that begins with `char`; of its syntax brackets and letters are checked."""
    if char not in '"{[':
        while char not in _SPACE + ",]}":
            if char not in _SCALAR:
                raise _NotACall
            sink(char)
            char = yield
        return char if char not in _SPACE else (yield from _after_space())
    closers: list[str] = []
    while True:
        if char in "}]" and closers.pop() != char:
            raise _NotACall
        sink(char)
        if char == '"':
            yield from _quoted(sink)
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        if not closers:
            return (yield from _after_space())
        char = yield


def _object_text(text: str) -> str:
    """Arguments as the JSON text of an object: written as one, as a string of one, or null."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            text, value = value, json.loads(value)
    except (ValueError, RecursionError):
        raise _NotACall from None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise _NotACall
    return text


class ToolReader:
    """Reads one choice's text into text and calls of the tools in `names`.

    White space beside a call is no text. `only_calls`: a grammar allows nothing else, so what is
    cut short at the end is the start of a call and no text.

    Owns: what is held back, and the scanner of what may be a call. Does not own: the parts given
    out.
    """

    def __init__(self, style: Style, names: Collection[str], only_calls: bool = False) -> None:
        self.n_calls = 0
        self._only_calls = only_calls
        self._style = style
        self._names = names
        self._mode = self._start if style.at_start else self._text
        self._marker = Marker("", "")  # of the present call
        self._scanner = CallScanner(names, 0)
        self._parts: list[Part] = []
        # What is read and not given out: white space, then what may be a marker or a call.
        self._space = ""
        self._held = ""
        self._after_call = False  # nothing but white space since the last call

    @property
    def in_call(self) -> bool:
        return self._scanner.open

    def feed(self, text: str) -> list[Part]:
        while text:
            text = self._mode(text)
        self._parts += self._scanner.take()
        return self._taken()

    def close(self) -> list[Part]:
        if self._only_calls:
            return self._taken()
        rest = self._held.strip()
        ended = self._mode == self._behind and (rest == ";" or self._marker.close.startswith(rest))
        if self._held and not ended:
            self._say(self._held)
        if self._space and not self._after_call:
            self._parts.append(TextPart(self._space))
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _say(self, text: str) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip(_SPACE)
        said = text.rstrip(_SPACE)
        self._space = text[len(said) :]
        if said:
            self._parts.append(TextPart(said))
            self._after_call = False

    # Each mode reads from the front of a text that is not empty, and returns what is left for the
    # next. They end because each either reads a character or goes on to `_text`, which reads all
    # of what it does not open a call in.

    def _start(self, text: str) -> str:
        """Before the first character that is not white space, and in a marker there."""
        for i, char in enumerate(text):
            if not self._held and char in _SPACE:
                self._space += char
                continue
            self._held += char
            for marker in self._style.at_start:
                if marker.open == self._held:
                    self._open(marker)
                    return text[i + 1 :]
                if not marker.open and self._held in ("{", "["):
                    self._held = ""
                    self._open(marker)
                    return text[i:]
            if not any(m.open.startswith(self._held) for m in self._style.at_start if m.open):
                return self._give_up(text[i + 1 :])
        return ""

    def _text(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        found = [(text.find(m.open), m) for m in self._style.anywhere]
        found = [(at, marker) for at, marker in found if at >= 0]
        if found:
            at, marker = min(found)
            self._say(text[:at])
            self._held = marker.open
            self._open(marker)
            return text[at + len(marker.open) :]
        keep = max((overlap(text, m.open) for m in self._style.anywhere), default=0)
        self._held = text[len(text) - keep :]
        self._say(text[: len(text) - keep])
        return ""

    def _call(self, text: str) -> str:
        scanner = self._scanner
        for i, char in enumerate(text):
            was_open = scanner.open
            state = scanner.push(char)
            if scanner.n_calls > self.n_calls:  # certain, so nothing held is text
                self.n_calls = scanner.n_calls
                self._held = self._space = ""
                self._after_call = True
            elif not was_open and state != "not a call":
                self._held += char
            if state != "more":
                self._parts += scanner.take()
            if state == "done":
                self._held = ""
                self._mode = self._behind
                return text[i + 1 :]
            if state == "not a call":
                self._say(self._held)
                self._held = ""
                self._mode = self._text
                return text[i:]
        return ""

    def _behind(self, text: str) -> str:
        """Behind the JSON: its closing marker, or the next call where there is none."""
        close = self._marker.close
        for i, char in enumerate(text):
            if not close and char in "{[":
                self._open(self._marker)
                return text[i:]
            self._held += char
            rest = self._held.lstrip(_SPACE)
            if close and rest == close:
                self._held = ""
                self._mode = self._text
                return text[i + 1 :]
            if not (close.startswith(rest) or (not close and rest.rstrip(_SPACE) == ";")):
                return self._give_up(text[i + 1 :])
        return ""

    def _open(self, marker: Marker) -> None:
        self._marker = marker
        self._scanner = CallScanner(self._names, self.n_calls)
        self._mode = self._call

    def _give_up(self, rest: str) -> str:
        """What is held is text, up to a marker in it."""
        text, self._held = self._held + rest, ""
        self._mode = self._text
        return text
