"""Any other model: what such models were most often taught, and what they do when only told.

Calls between <tool_call> and </tool_call>, or an answer that begins with one as bare JSON or in a
```json fence.
"""

from __future__ import annotations

from dataclasses import replace

from astrai.server.chat.tools import Marker, hermes

STYLE = replace(
    hermes.STYLE, name="generic", signs=(), at_start=(Marker("```json", "```"), Marker("", ""))
)
