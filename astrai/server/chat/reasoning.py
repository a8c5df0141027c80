"""What a model thinks before it answers: the text between <think> and </think> at its start."""

from __future__ import annotations

from typing import Literal

from astrai.server.chat.parts import Part, Reader, ReasoningPart, TextPart, overlap

OPEN = "<think>"
CLOSE = "</think>"

_SPACE = " \t\r\n"


class ThinkReader:
    """Splits one choice's text into reasoning and the rest, which `inner` reads if there is one.

    `opened`: the prompt ended inside the thought. Line breaks at the borders belong to the
    markers. Owns: what is held back. Does not own: `inner`'s state.
    """

    def __init__(self, opened: bool, inner: Reader | None = None) -> None:
        self._inner = inner
        self._mode: Literal["start", "inside", "behind", "after"] = "inside" if opened else "start"
        self._held = ""
        self._thought = False  # some of it was given out

    @property
    def in_call(self) -> bool:
        return self._inner is not None and self._inner.in_call

    def feed(self, text: str) -> list[Part]:
        if self._mode == "after":
            return self._rest(text)
        parts: list[Part] = []
        text = self._held + text
        self._held = ""
        if self._mode == "start":
            text = self._begin(text)
        if self._mode == "inside":
            text = self._think(text, parts)
        if self._mode == "behind" and (text := text.lstrip("\n")):
            self._mode = "after"
        if self._mode == "after":
            parts += self._rest(text)
        return parts

    def close(self) -> list[Part]:
        parts: list[Part] = []
        if self._mode == "inside":
            self._reason(self._held.rstrip("\n"), parts)
        else:
            parts += self._rest(self._held)
        self._held = ""
        return parts + (self._inner.close() if self._inner is not None else [])

    def _begin(self, text: str) -> str:
        """Past the opening marker, if the text begins with it."""
        seen = text.lstrip(_SPACE)
        if seen.startswith(OPEN):
            self._mode = "inside"
            return seen[len(OPEN) :]
        if OPEN.startswith(seen):
            self._held = text
            return ""
        self._mode = "after"
        return text

    def _think(self, text: str, parts: list[Part]) -> str:
        at = text.find(CLOSE)
        if at >= 0:
            self._mode = "behind"
            self._reason(text[:at].rstrip("\n"), parts)
            return text[at + len(CLOSE) :]
        # Held: what may be the marker, and the line breaks that are dropped before it.
        certain = text[: len(text) - overlap(text, CLOSE)].rstrip("\n")
        self._held = text[len(certain) :]
        self._reason(certain, parts)
        return ""

    def _reason(self, text: str, parts: list[Part]) -> None:
        if not self._thought:
            text = text.lstrip("\n")
        if text:
            self._thought = True
            parts.append(ReasoningPart(text))

    def _rest(self, text: str) -> list[Part]:
        if self._inner is not None:
            return self._inner.feed(text)
        return [TextPart(text)] if text else []


def thinks(template: str | None, name: str = "auto") -> bool:
    """Whether answers may begin with a thought: if the template knows the marker, by default."""
    if name not in ("auto", "none", "think"):
        raise ValueError(f"reasoning parser {name!r}, expected auto, none, think")
    return name == "think" or (name == "auto" and CLOSE in (template or ""))
