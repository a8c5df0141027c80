"""The page as one self-contained document: its parts are put in line, and nothing else may load."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from typing import NamedTuple

_SCRIPTS = ("state", "loop", "pool", "panels", "timeline", "talk", "main")


class Page(NamedTuple):
    html: bytes
    headers: dict[str, str]  # among them the policy that allows exactly what is in `html`


@functools.cache
def page() -> Page:
    """The document and the headers to send it with."""
    folder = resources.files(__package__) / "page"

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    css = text("live.css")
    js = "\n".join(text(f"{name}.js") for name in _SCRIPTS)
    html = text("index.html").replace("/*{css}*/", css).replace("/*{js}*/", js)
    policy = (
        f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
    }
    return Page(html.encode(), headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
