"""The engine's deltas in OpenAI's response shapes, whole or in chunks."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from astrai.server.errors import ApiError
from astrai.server.streaming import DONE, event

if TYPE_CHECKING:
    from astrai.inference.async_engine import StreamDelta
    from astrai.inference.task import TokenLogprob
    from astrai.models.tokenizer import Tokenizer

Json = dict[str, Any]

# JSON has no infinity; this is what stands for a token that could not be drawn.
_MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class UsageSum:
    """Tokens of all choices of all prompts; a prompt counts once, however many choices it has."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, delta: StreamDelta) -> None:
        if delta.usage is None:
            return
        self.completion += delta.usage.completion_tokens
        if delta.index == 0:
            self.prompt += delta.usage.prompt_tokens
            self.cached += delta.usage.cached_tokens

    def body(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class _Choice:
    """What a choice has said so far; `offset` counts its characters for `text_offset`."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[Json | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )


class Reply:
    """One response. Owns its choices and usage; does not own the stream that feeds it."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, id: str, model: str, tokenizer: Tokenizer, logprobs: int | None, include_usage: bool
    ) -> None:
        self.id = id
        self.model = model
        self.created = int(time.time())
        self.usage = UsageSum()
        self._tokenizer = tokenizer
        self._top = logprobs
        self._include_usage = include_usage
        self._choices: dict[int, _Choice] = {}

    def add(self, index: int, delta: StreamDelta) -> None:
        choice = self._choices.setdefault(index, _Choice())
        self._note(choice, delta)
        choice.texts.append(delta.text)
        choice.logprobs += delta.logprobs or ()

    def whole(self) -> Json:
        choices = []
        for index, choice in sorted(self._choices.items()):
            body = {
                "index": index,
                **self._content("".join(choice.texts)),
                "logprobs": self._logprobs(choice, choice.logprobs),
            }
            choices.append(self._ended(body, choice))
        return self._envelope(self.whole_object, choices) | {"usage": self.usage.body()}

    def events(self, index: int, delta: StreamDelta) -> Iterator[bytes]:
        for chunk in self.chunks(index, delta):
            yield event(chunk)

    def end(self) -> Iterator[bytes]:
        if self._include_usage:
            yield event(self.last_chunk())
        yield DONE

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.body())

    def chunks(self, index: int, delta: StreamDelta) -> Iterator[Json]:
        """The chunks that say what `delta` brought: none if it brought nothing that shows."""
        raise NotImplementedError

    def last_chunk(self) -> Json:
        """The usage alone, for `stream_options.include_usage`."""
        return self._envelope(self.chunk_object, []) | {"usage": self.usage.body()}

    def _content(self, text: str) -> Json:
        raise NotImplementedError

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprob]) -> Json | None:
        raise NotImplementedError

    def _note(self, choice: _Choice, delta: StreamDelta) -> None:
        self.usage.add(delta)
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
        if delta.prompt_logprobs is not None:
            # The first token has nothing before it to be predicted from.
            listed: list[Json | None] = [None]
            listed += [self._token(token) for token in delta.prompt_logprobs]
            choice.prompt_logprobs = listed

    def _ended(self, body: Json, choice: _Choice) -> Json:
        body |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if choice.prompt_logprobs is not None:
            body["prompt_logprobs"] = choice.prompt_logprobs
        return body

    def _chunk(self, choice: Json) -> Json:
        body = self._envelope(self.chunk_object, [choice])
        return body | {"usage": None} if self._include_usage else body

    def _envelope(self, object: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _token(self, token: TokenLogprob) -> Json:
        top = [self._ranked(id, logprob) for id, logprob in token.top]
        return {**self._ranked(token.token, token.logprob), "top_logprobs": top}

    def _ranked(self, id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(id)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, _MIN_LOGPROB),
            "bytes": list(raw),
        }


class ChatReply(Reply):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def chunks(self, index: int, delta: StreamDelta) -> Iterator[Json]:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
            self._note(choice, delta)
            first = self._piece(index, {"role": "assistant", "content": ""}, None)
            if choice.prompt_logprobs is not None:
                first["prompt_logprobs"] = choice.prompt_logprobs
            yield self._chunk(first)
        else:
            self._note(choice, delta)
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(choice, delta.logprobs or ())
            yield self._chunk(self._piece(index, {"content": delta.text}, logprobs))
        if delta.finish_reason is not None:
            last = self._piece(index, {}, None)
            last |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            yield self._chunk(last)

    @staticmethod
    def _piece(index: int, delta: Json, logprobs: Json | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprob]) -> Json | None:
        if self._top is None:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}


class CompletionReply(Reply):
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def chunks(self, index: int, delta: StreamDelta) -> Iterator[Json]:
        choice = self._choices.setdefault(index, _Choice())
        self._note(choice, delta)
        seen = delta.text or delta.logprobs or delta.prompt_logprobs
        if not seen and delta.finish_reason is None:
            return
        body = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(choice, delta.logprobs or ()),
        }
        yield self._chunk(self._ended(body, choice))
        choice.prompt_logprobs = None

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprob]) -> Json | None:
        if self._top is None:
            return None
        body: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token in tokens:
            text = self._name(token.token)
            logprob = max(token.logprob, _MIN_LOGPROB)
            body["text_offset"].append(choice.offset)
            body["tokens"].append(text)
            body["token_logprobs"].append(logprob)
            top = {self._name(id): max(value, _MIN_LOGPROB) for id, value in token.top}
            body["top_logprobs"].append({**top, text: logprob})
            raw = self._tokenizer.token_bytes(token.token)
            choice.offset += len(choice.decoder.decode(raw))
        return body

    def _name(self, id: int) -> str:
        """A token's text; parts of a character are told apart by their bytes."""
        raw = self._tokenizer.token_bytes(id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
