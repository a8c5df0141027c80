"""AstrAI: continuous batching over a paged, prefix-shared KV cache that you can watch and record.

The names below are the library's front door. They load on first use: `import astrai` is free.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Two threads that meet after every small operation spin while they wait, by default far longer
# than a tick when another process holds a core: a step of 15 ms was seen to take 2 s. Bounded
# spinning costs nothing measurable on a quiet machine. Read when torch loads its threads library.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from astrai.config import EngineConfig
    from astrai.front.async_engine import AsyncEngine
    from astrai.front.llm import LLM, CompletionOutput, RequestOutput
    from astrai.front.sampling_params import SamplingParams
    from astrai.front.structured import StructuredOutput

_HOMES = {
    "LLM": "astrai.front.llm",
    "RequestOutput": "astrai.front.llm",
    "CompletionOutput": "astrai.front.llm",
    "AsyncEngine": "astrai.front.async_engine",
    "SamplingParams": "astrai.front.sampling_params",
    "StructuredOutput": "astrai.front.structured",
    "EngineConfig": "astrai.config",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'astrai' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
