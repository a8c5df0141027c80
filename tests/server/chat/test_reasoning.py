from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai.server.chat.parts import Part, ReasoningPart, TextPart
from astrai.server.chat.reasoning import ThinkReader, thinks
from astrai.server.chat.tools import styles
from astrai.server.chat.tools.reader import ToolReader
from tests.server.chat.split import cut, read, same_however_cut


def thought(text: str) -> Part:
    return ReasoningPart(text)


def said(text: str) -> Part:
    return TextPart(text)


@pytest.mark.parametrize(
    ("opened", "text", "parts"),
    [
        (
            False,
            "<think>\nTwo and two.\n</think>\n\nFour.",
            [thought("Two and two."), said("Four.")],
        ),
        (True, "Two and two.\n</think>\n\nFour.", [thought("Two and two."), said("Four.")]),
        (True, "\n\na\n\nb <i>\n\n</think>c", [thought("a\n\nb <i>"), said("c")]),
        (False, "  \n<think>a</think> b", [thought("a"), said(" b")]),
        (False, "<think>\n\n</think>\n\nFour.", [said("Four.")]),
        (False, "Four.", [said("Four.")]),
        (False, " \n", [said(" \n")]),
        (False, "", []),
        (False, "<thin", [said("<thin")]),
        (False, "<thinker>a</think>", [said("<thinker>a</think>")]),
        (False, "a <think>b</think>", [said("a <think>b</think>")]),
        (False, "<think>a</think>b</think><think>", [thought("a"), said("b</think><think>")]),
        (True, "no end", [thought("no end")]),
        (True, "a </thi", [thought("a </thi")]),
        (True, "a\n</think>\n", [thought("a")]),
        (True, "a </</think>b", [thought("a </"), said("b")]),
    ],
)
def test_thought_and_the_rest(opened: bool, text: str, parts: list[Part]) -> None:
    assert same_however_cut(lambda: ThinkReader(opened), text) == parts


@given(
    st.booleans(),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "<", "</", "a", " ", "think>"])),
    st.lists(st.integers(0, 100)),
)
def test_random_texts_in_random_pieces(opened: bool, words: list[str], at: list[int]) -> None:
    text = "".join(words)
    assert read(ThinkReader(opened), cut(text, at)) == read(ThinkReader(opened), [text])


def test_no_more_is_held_than_may_be_a_marker() -> None:
    reader = ThinkReader(True)
    assert reader.feed("some thought\n") == [thought("some thought")]
    assert reader.feed("more </th") == [thought("\nmore ")]
    assert reader.feed("e") == [thought("</the")]


def test_what_is_behind_the_thought_may_be_a_call() -> None:
    text = 'I call f.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'

    def new() -> ThinkReader:
        return ThinkReader(True, ToolReader(styles()["hermes"], {"f"}))

    kinds = [type(part).__name__ for part in same_however_cut(new, text)]
    assert kinds == ["ReasoningPart", "ToolCallPart"]


def test_a_call_in_a_thought_is_a_thought() -> None:
    text = '<think>{"name": "f", "parameters": {}}</think>Done'
    reader = ThinkReader(False, ToolReader(styles()["llama3"], {"f"}))
    assert read(reader, [text]) == [thought('{"name": "f", "parameters": {}}'), said("Done")]


def test_which_models_think() -> None:
    assert thinks("{{ '<think>\\n' }} … </think>")
    assert not thinks("plain") and not thinks(None)
    assert thinks("plain", "think") and not thinks("</think>", "none")
    with pytest.raises(ValueError, match="nope"):
        thinks(None, "nope")
