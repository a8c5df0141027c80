"""What a model's text consists of: what it says, what it thinks, and the calls it makes.

Every chat route reads the engine's text into these parts and writes them in its own shape. A
reader keeps its own state, so how the text is cut into pieces changes only where parts are cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class TextPart:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """The start of call `index` of this choice, with id and name, or more of its arguments."""

    index: int
    id: str | None  # only on the first part of a call
    name: str | None  # likewise
    arguments: str  # JSON text, to be joined over the parts of the call


Part: TypeAlias = TextPart | ReasoningPart | ToolCallPart


class Reader(Protocol):
    """Reads one choice's text into parts, holding back only what may still become a marker."""

    @property
    def in_call(self) -> bool:
        """A call has begun and not ended: its arguments are not yet JSON."""
        ...

    def feed(self, text: str) -> list[Part]: ...

    def close(self) -> list[Part]:
        """The end of the text: what was held back is what it is."""
        ...


def overlap(text: str, marker: str) -> int:
    """How much of `marker`, not all, `text` ends with."""
    for n in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts with neighbours of one kind, or of one call, made one."""
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        match part, last:
            case (TextPart(text), TextPart(before)):
                whole[-1] = TextPart(before + text)
            case (ReasoningPart(text), ReasoningPart(before)):
                whole[-1] = ReasoningPart(before + text)
            case (ToolCallPart(index, None, None, more), ToolCallPart(its, id, name, before)) if (
                index == its
            ):
                whole[-1] = ToolCallPart(index, id, name, before + more)
            case _:
                whole.append(part)
    return whole
