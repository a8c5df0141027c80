"""Hermes and Qwen: each call is a JSON object between <tool_call> and </tool_call>."""

from __future__ import annotations

from astrai.server.chat.tools import Marker, Style

STYLE = Style(
    name="hermes",
    signs=("<tool_call>",),
    anywhere=(Marker("<tool_call>", "</tool_call>"),),
    at_start=(),
    write=Marker("<tool_call>\n", "\n</tool_call>"),
    between="\n",
    arguments="arguments",
    form=(
        "To call one, write a JSON object with its name and arguments, each call between its own "
        "tags:\n<tool_call>\n"
        '{"name": <function name>, "arguments": <object of arguments>}\n</tool_call>'
    ),
)
