"""Reading a text in pieces: however it is cut, what comes out must be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

from astrai.server.chat.parts import Part, Reader, ToolCallPart, joined


def read(reader: Reader, pieces: Iterable[str]) -> list[Part]:
    """The joined parts, with every id the same."""
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.feed(piece)
    parts += reader.close()
    begun = [part for part in parts if isinstance(part, ToolCallPart) and part.id is not None]
    assert len({part.id for part in begun}) == len(begun), "two calls have one id"
    assert all(str(part.id).startswith("call_") and len(str(part.id)) == 29 for part in begun)
    return joined(
        replace(part, id="id") if isinstance(part, ToolCallPart) and part.id else part
        for part in parts
    )


def cut(text: str, at: Iterable[int]) -> list[str]:
    borders = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


def same_however_cut(new: Callable[[], Reader], text: str) -> list[Part]:
    """Read whole, in single characters, and cut in two at every place."""
    whole = read(new(), [text])
    assert read(new(), text) == whole
    for i in range(len(text) + 1):
        assert read(new(), [text[:i], text[i:]]) == whole, (text[:i], text[i:])
    return whole
