"""An engine of bytes: what it says is known beforehand, and it counts the streams it has open."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from astrai.config import EngineConfig
from astrai.inference.async_engine import Usage
from astrai.inference.intake import PromptTooLong, QueueFull
from astrai.inference.sampling_params import SamplingParams
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
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ValueError("the conversation starts with the assistant")
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        text += "".join(f"[{key}={value}]" for key, value in kwargs.items())
        return self.encode(text + ("<assistant>" if add_generation_prompt else ""))


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
        self.tokenizer = ByteTokenizer()
        self.open: set[str] = set()
        self.prompts: dict[str, list[int]] = {}
        self.params: SamplingParams | None = None
        self.priority = 0
        self.health = Health(True, "nothing to do", {"pages_free": 8})
        self.events: list[str] = []

    def start(self) -> None:
        self.events.append("start")

    async def shutdown(self) -> None:
        self.events.append("shutdown")

    def healthy(self) -> Health:
        return self.health

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        namespace: str = "",
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        for i, token in enumerate(prompt_ids):
            if not 0 <= token < self.tokenizer.vocab_size:
                raise ValueError(f"prompt[{i}] = {token}, expected < {self.tokenizer.vocab_size}")
        if len(prompt_ids) >= self.max_model_len:
            raise PromptTooLong(len(prompt_ids), None, self.max_model_len)
        if len(self.open) >= self.max_waiting:
            raise QueueFull(f"{len(self.open)} requests wait, at most {self.max_waiting} may")
        self.params, self.priority = params, priority
        self.prompts[request_id] = prompt_ids
        self.open.add(request_id)
        try:
            text = bytes(token for token in prompt_ids if token < 256).decode(errors="replace")
            if "hang-first" in text:
                await asyncio.Event().wait()
            streams = [self._choice(i, text, prompt_ids, params) for i in range(params.n)]
            while streams:
                for stream in list(streams):
                    delta = await anext(stream)
                    yield delta
                    if delta.finish_reason is not None:
                        streams.remove(stream)
                await asyncio.sleep(0)
        finally:
            self.open.discard(request_id)

    async def _choice(
        self, index: int, prompt: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[Delta, None]:
        says = SAYS.encode()
        room = self.max_model_len - len(prompt_ids)
        limit = min(params.max_tokens or room, room)
        usage = _usage(prompt_ids, 0)
        if "fail-first" in prompt:
            yield Delta(index, [], "", finish_reason="error", error="NaN in 1 row", usage=usage)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i, token in enumerate(says[:limit]):
            if i == 3:
                await self._misbehave(prompt)
                if "fail-later" in prompt:
                    yield Delta(index, [], "", finish_reason="error", error="NaN in 1 row")
            last = i + 1 == min(limit, len(says))
            yield Delta(
                index,
                [token],
                decoder.decode(bytes([token]), final=last),
                logprobs=self._logprobs([token], params.logprobs),
                prompt_logprobs=self._logprobs(prompt_ids[1:], params.prompt_logprobs)
                if i == 0
                else None,
                finish_reason=None if not last else "length" if limit <= len(says) else "stop",
                usage=_usage(prompt_ids, i + 1) if last else None,
            )

    @staticmethod
    async def _misbehave(prompt: str) -> None:
        if "raise-later" in prompt:
            raise RuntimeError("the loop ended")
        if "hang" in prompt:
            await asyncio.Event().wait()

    @staticmethod
    def _logprobs(tokens: list[int], top: int | None) -> list[TokenLogprob] | None:
        if top is None:
            return None
        return [
            TokenLogprob(t, -0.5, 1, tuple((t + k, -0.5 - k) for k in range(top))) for t in tokens
        ]
