"""`/v1/embeddings`: what a request may say, and the vectors as OpenAI's clients read them."""

from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any, Literal

from astrai.front.sampling_params import SamplingParams
from astrai.server.dialects.usage import UsageSum
from astrai.server.edge import Call
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import EngineFields, Lists, parse

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta

LISTS = Lists(
    harmless=frozenset({"user"}),
    refused={
        # A vector cut short means nothing unless the model was trained for it.
        "dimensions": (),
        "truncate_prompt_tokens": (),
        "input_type": (),
        "modality": ("text",),
    },
)


class EmbeddingRequest(EngineFields):
    """`pooling` and `normalize` are this server's own; unit vectors are what OpenAI gives."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None


def parse_embedding(body: dict[str, Any]) -> EmbeddingRequest:
    request = parse(body, EmbeddingRequest, LISTS)
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not texts or any(text in ("", []) for text in texts):
        raise ApiError("input is empty", param="input", code="empty_input")
    return request


def embedding_call(request: EmbeddingRequest) -> Call:
    return Call(
        params=SamplingParams(max_tokens=0, pooling=request.pooling or "mean"),
        priority=request.priority or 0,
        stream=False,
        cache_salt=request.cache_salt,
        request_id=request.request_id,
        timeout=request.timeout,
    )


class EmbeddingReply:
    """One vector for each input. Owns vectors and usage; does not own the stream that feeds it."""

    def __init__(self, id: str, model: str, request: EmbeddingRequest) -> None:
        self.id = id
        self.model = model
        self._base64 = request.encoding_format == "base64"
        self._normalize = request.normalize is not False
        self._vectors: dict[int, list[float]] = {}
        self._usage = UsageSum()

    def add(self, index: int, delta: StreamDelta) -> None:
        if delta.usage is None:
            return
        if delta.pooled is None:
            raise RuntimeError(f"the engine gave no hidden state for input {index}")
        self._vectors[index] = _unit(delta.pooled) if self._normalize else delta.pooled
        self._usage.add(delta)

    def whole(self) -> dict[str, Any]:
        usage = self._usage.body()
        del usage["completion_tokens"]
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._written(vector)}
                for index, vector in sorted(self._vectors.items())
            ],
            "model": self.model,
            "usage": usage,
            "timings": self._usage.timings(),
        }

    def _written(self, vector: list[float]) -> list[float] | str:
        if not self._base64:
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _unit(vector: list[float]) -> list[float]:
    norm = math.hypot(*vector)
    return [value / norm for value in vector] if norm > 0.0 else vector
