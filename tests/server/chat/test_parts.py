from __future__ import annotations

from astrai.server.chat.parts import ReasoningPart, TextPart, ToolCallPart, joined


def test_neighbours_of_a_kind_are_one() -> None:
    parts = [ReasoningPart("a"), ReasoningPart("b"), TextPart("c"), TextPart("d")]
    assert joined(parts) == [ReasoningPart("ab"), TextPart("cd")]


def test_a_call_gathers_its_own_arguments_only() -> None:
    parts = [
        ToolCallPart(0, "x", "f", ""),
        ToolCallPart(0, None, None, '{"a"'),
        ToolCallPart(0, None, None, ": 1}"),
        ToolCallPart(1, "y", "g", ""),
        ToolCallPart(1, None, None, "{}"),
        TextPart("t"),
    ]
    assert joined(parts) == [
        ToolCallPart(0, "x", "f", '{"a": 1}'),
        ToolCallPart(1, "y", "g", "{}"),
        TextPart("t"),
    ]


def test_kinds_of_the_same_text_are_not_equal() -> None:
    assert TextPart("a") != ReasoningPart("a")
    assert joined([TextPart("a"), ReasoningPart("a")]) == [TextPart("a"), ReasoningPart("a")]
