"""An engine of bytes: what it says is known beforehand, and it counts the streams it has open."""

from __future__ import annotations

import asyncio
import codecs
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from astrai.config import EngineConfig
from astrai.front.admission import QueueFull
from astrai.front.async_engine import Usage
from astrai.front.intake import PromptTooLong
from astrai.front.sampling_params import SamplingParams
from astrai.inference.task import Timings, TokenLogprob

SAYS = "Grüße, 世界 🙂! " * 4
EOS = 256


class Delta(NamedTuple):
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    pooled: list[float] | None = None
    usage: Usage | None = None


def _usage(prompt_ids: list[int], n_output: int) -> Usage:
    timings = Timings(0.25, 0.5, 0.125, len(prompt_ids), 2, n_output, 0, {"slots": 3})
    return Usage(len(prompt_ids), 2, n_output, timings)


class Health(NamedTuple):
    ok: bool
    reason: str
    numbers: dict[str, float]


class Budget:
    def lines(self) -> list[str]:
        return ["weights 0 MiB"]


class ByteTokenizer:
    vocab_size = 257
    special_ids = frozenset({256})
    has_chat_template = True
    chat_template = "a template that knows neither tools nor thoughts"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def render_chat(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        if messages[0]["role"] == "assistant":
            raise ValueError("the conversation starts with the assistant")
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        text += "".join(f"[{key}={value}]" for key, value in kwargs.items())
        return text + ("<assistant>" if add_generation_prompt else "")


class Events(list[str]):
    """What the app did, in order; and the readers that it attached."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Any] = []

    def attach(self, reader: Any) -> None:
        self.readers.append(reader)

    def detach(self, reader: Any) -> None:
        self.readers.remove(reader)


class FakeEngine:
    """Says `SAYS` byte by byte, then ends. A prompt that contains one of these words makes it:

    `fail-first`, `fail-later`: end with an error before any token, or after three;
    `raise-later`: raise after three tokens; `hang`: wait for ever after three tokens;
    `hang-first`: wait for ever before any.
    """

    model_name = "fake"
    max_model_len = 4096
    max_waiting = 100

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = replace(config or EngineConfig(), max_slots=8)
        self.budget = Budget()
        self.tokenizer: Any = ByteTokenizer()
        self.says = SAYS
        self.open: set[str] = set()
        self.prompts: dict[str, list[int]] = {}
        self.params: SamplingParams | None = None
        self.priority = 0
        self.namespace = ""
        self.aborted: set[str] = set()
        self.health = Health(True, "nothing to do", {"pages_free": 8})
        self.events = Events()
        self.ready_now: Health | None = None
        self.timeout: float | None = None
        self.ended: str | None = None
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        self.events.append("start")

    def stop_admitting(self) -> None:
        self.ready_now = Health(False, "shutting down", {})

    async def end_all(self, why: str, seconds: float = 1.0) -> None:
        self.events.append("end_all")

    async def shutdown(self) -> None:
        self.events.append("shutdown")

    @property
    def n_open(self) -> int:
        return len(self.open)

    def ready(self) -> Health:
        return self.ready_now or self.health

    def healthy(self) -> Health:
        return self.health

    def stats(self) -> dict[str, float]:
        return {"slots_total": 8, "pages_total": 8}

    def abort(self, request_id: str) -> bool:
        if request_id in self.open:
            self.aborted.add(request_id)
        return request_id in self.open

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        namespace: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        self.timeout = timeout
        for i, token in enumerate(prompt_ids):
            if not 0 <= token < self.tokenizer.vocab_size:
                raise ValueError(f"prompt[{i}] = {token}, expected < {self.tokenizer.vocab_size}")
        if len(prompt_ids) >= self.max_model_len:
            raise PromptTooLong(len(prompt_ids), None, self.max_model_len)
        if len(self.open) >= self.max_waiting:
            raise QueueFull(f"{len(self.open)} requests wait, at most {self.max_waiting} may")
        self.params, self.priority, self.namespace = params, priority, namespace
        self.prompts[request_id] = prompt_ids
        self.open.add(request_id)
        try:
            text = bytes(token for token in prompt_ids if token < 256).decode(errors="replace")
            if "hang-first" in text:
                await self._hang(request_id)
            streams = [
                self._choice(request_id, i, text, prompt_ids, params) for i in range(params.n)
            ]
            while streams:
                for stream in list(streams):
                    delta = await anext(stream)
                    if request_id in self.aborted:
                        delta = delta._replace(finish_reason="abort")
                    yield delta
                    if delta.finish_reason is not None:
                        streams.remove(stream)
                await asyncio.sleep(0)
        finally:
            self.open.discard(request_id)
            self.aborted.discard(request_id)

    async def _choice(
        self,
        request_id: str,
        index: int,
        prompt: str,
        prompt_ids: list[int],
        params: SamplingParams,
    ) -> AsyncGenerator[Delta, None]:
        says = self.says.encode()
        room = self.max_model_len - len(prompt_ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        usage = _usage(prompt_ids, 0)
        if "fail-first" in prompt:
            yield Delta(index, [], "", finish_reason="error", error="NaN in 1 row", usage=usage)
        if params.max_tokens == 0:
            yield Delta(
                index,
                [],
                "",
                prompt_logprobs=self._logprobs(prompt_ids[1:], params.prompt_logprobs)
                if index == 0
                else None,
                finish_reason="length",
                pooled=[3.0 * len(prompt_ids), 4.0 * len(prompt_ids)] if params.pooling else None,
                usage=usage,
            )
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i, token in enumerate(says[:limit]):
            if i == 3:
                await self._misbehave(prompt, request_id)
                if "fail-later" in prompt:
                    yield Delta(index, [], "", finish_reason="error", error="NaN in 1 row")
            last = i + 1 == min(limit, len(says))
            yield Delta(
                index,
                [token],
                decoder.decode(bytes([token]), final=last),
                logprobs=self._logprobs([token], params.logprobs),
                prompt_logprobs=self._logprobs(prompt_ids[1:], params.prompt_logprobs)
                if i == 0 and index == 0
                else None,
                finish_reason=None if not last else "length" if limit <= len(says) else "stop",
                usage=_usage(prompt_ids, i + 1) if last else None,
            )

    async def _hang(self, request_id: str) -> None:
        while request_id not in self.aborted:
            await asyncio.sleep(0.002)

    async def _misbehave(self, prompt: str, request_id: str) -> None:
        if "raise-later" in prompt:
            raise RuntimeError("the loop ended")
        if "hang" in prompt:
            await self._hang(request_id)

    @staticmethod
    def _logprobs(tokens: list[int], top: int | None) -> list[TokenLogprob] | None:
        if top is None:
            return None
        return [
            TokenLogprob(t, -0.5, 1, tuple((t + k, -0.5 - k) for k in range(top))) for t in tokens
        ]
