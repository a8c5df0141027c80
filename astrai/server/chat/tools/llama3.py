"""Llama 3: an answer that is a JSON object with name and parameters, or <|python_tag|> before it.

Several calls stand one after the other, with or without a semicolon between them.
"""

from __future__ import annotations

from astrai.server.chat.tools import Marker, Style

STYLE = Style(
    name="llama3",
    signs=("<|python_tag|>", '"parameters": dictionary of argument name'),
    anywhere=(Marker("<|python_tag|>", ""),),
    at_start=(Marker("", ""),),
    write=Marker("", ""),
    between="; ",
    arguments="parameters",
    form=(
        "To call one, answer with nothing but a JSON object with its name and parameters:\n"
        '{"name": <function name>, "parameters": <object of arguments>}'
    ),
    one_by_one=True,
)
