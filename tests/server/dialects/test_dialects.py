"""Whatever the parts of an answer are: the events of both dialects add up to their whole bodies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.server.chat.parts import Part, ReasoningPart, TextPart, ToolCallPart
from astrai.server.dialects.anthropic import MessageReply
from astrai.server.dialects.responses import ResponseReply, ResponseRequest
from tests.server.fake_engine import ByteTokenizer, Delta, _usage

Json = dict[str, Any]


class Script:
    """A reader that gives scripted parts: those of the next step for each text it is fed."""

    in_call = False

    def __init__(self, steps: list[list[Part]]) -> None:
        self.steps = list(steps)

    def feed(self, text: str) -> list[Part]:
        return self.steps.pop(0)

    def close(self) -> list[Part]:
        return []


@st.composite
def scripts(draw: st.DrawFn) -> list[list[Part]]:
    """Parts as a reader gives them, call by call, cut into steps anywhere."""
    parts: list[Part] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thought", "call"]), max_size=6)):
        pieces = draw(st.lists(st.text("ab \n", min_size=1, max_size=3), min_size=1, max_size=3))
        if kind == "call":
            parts.append(
                ToolCallPart(calls, f"call_{calls}", "f", draw(st.sampled_from(["", "{"])))
            )
            head = "" if parts[-1].arguments else "{"
            body = [head, '"a": ', "1", "}"][: draw(st.integers(1, 4))]
            parts += [ToolCallPart(calls, None, None, more) for more in body if more]
            calls += 1
        else:
            part = TextPart if kind == "text" else ReasoningPart
            parts += [part(piece) for piece in pieces]
    steps: list[list[Part]] = [[]]
    for part in parts:
        if draw(st.booleans()):
            steps.append([])
        steps[-1].append(part)
    return steps


def deltas(steps: list[list[Part]], reason: str) -> list[Delta]:
    last = len(steps) - 1
    return [
        Delta(
            0,
            [i],
            "x",
            finish_reason=reason if i == last else None,
            usage=_usage([1, 2, 3], len(steps)) if i == last else None,
        )
        for i in range(len(steps))
    ]


def streamed(reply: Any, steps: list[list[Part]], reason: str) -> list[Json]:
    raw = b"".join(b for delta in deltas(steps, reason) for b in reply.events(0, delta))
    raw += b"".join(reply.end())
    events = []
    for block in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def whole(reply: Any, steps: list[list[Part]], reason: str) -> Json:
    for delta in deltas(steps, reason):
        reply.add(0, delta)
    body: Json = reply.whole()
    return body


@settings(max_examples=150, deadline=None)
@given(steps=scripts(), reason=st.sampled_from(["stop", "length"]))
def test_responses(steps: list[list[Part]], reason: str) -> None:
    def reply() -> ResponseReply:
        request = ResponseRequest(input="x")
        tokenizer: Any = ByteTokenizer()
        return ResponseReply("r", "m", tokenizer, request, None, None, lambda: Script(steps))

    events = streamed(reply(), steps, reason)
    body = whole(reply(), steps, reason)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == ("completed" if reason == "stop" else "incomplete") == body["status"]
    done: list[Json] = []
    text, opened = "", -1
    for kind, event in zip(kinds[2:-1], events[2:-1]):
        assert event["output_index"] == len(done), "one item is open at a time"
        if kind == "output_item.added":
            text, opened = "", opened + 1
            id = event["item"]["id"]
        elif kind.endswith(".delta"):
            text += event["delta"]
        elif kind.endswith(("text.done", "arguments.done")):
            assert text == event.get("text", event.get("arguments"))
        elif kind == "output_item.done":
            assert event["item"]["id"] == id
            done.append(event["item"])
        assert opened == len(done) - (kind == "output_item.done")
    assert done == events[-1]["response"]["output"]
    for item, other in zip(done, body["output"], strict=True):
        assert {**item, "id": ""} == {**other, "id": ""}


@settings(max_examples=150, deadline=None)
@given(steps=scripts(), reason=st.sampled_from(["stop", "length"]))
def test_messages(steps: list[list[Part]], reason: str) -> None:
    def reply() -> MessageReply:
        return MessageReply("m", "m", 3, lambda: Script(steps))

    events = streamed(reply(), steps, reason)
    body = whole(reply(), steps, reason)
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    blocks: list[Json] = []
    is_open = False
    fields = {
        "text_delta": "text",
        "thinking_delta": "thinking",
        "input_json_delta": "partial_json",
    }
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"partial_json": ""})
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            field = fields[event["delta"]["type"]]
            blocks[-1][field] += event["delta"][field]
        else:
            assert is_open and event["index"] == len(blocks) - 1
            is_open = False
    assert not is_open
    for block in blocks:
        text = block.pop("partial_json")
        if block["type"] == "tool_use" and text.endswith("}"):
            block["input"] = json.loads(text)
        elif block["type"] == "tool_use":
            block["input"] = {"partial_json": text}
    assert blocks == body["content"]
    assert events[-2]["delta"]["stop_reason"] == body["stop_reason"]
    assert events[-2]["usage"] == body["usage"]
