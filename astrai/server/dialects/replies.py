"""The engine's deltas in OpenAI's response shapes, whole or in chunks."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from astrai.server.chat.parts import Part, Reader, ReasoningPart, TextPart, ToolCallPart, joined
from astrai.server.dialects.usage import UsageSum
from astrai.server.http.errors import ApiError
from astrai.server.http.streaming import DONE, event

if TYPE_CHECKING:
    from astrai.front.async_engine import StreamDelta
    from astrai.inference.task import TokenLogprob
    from astrai.models.tokenizer import Tokenizer

Json = dict[str, Any]

# JSON has no infinity; this is what stands for a token that could not be drawn.
_MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class _Choice:
    """What a choice has said so far; `offset` counts its characters for `text_offset`."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[Json | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reader: Reader | None = None
    calls: bool = False
    in_call: bool = False
    offset: int = 0
    echo: int | None = None  # the prompt whose scores are still to be listed
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )


class OpenAIReply:
    """One response of one choice or several.

    Owns its choices and usage; does not own the stream that feeds it.
    """

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
                **self._content(choice, "".join(choice.texts)),
                "logprobs": self._logprobs(choice, choice.logprobs),
            }
            choices.append(self._ended(body, choice))
        return self._envelope(self.whole_object, choices) | {
            "usage": self.usage.body(),
            "timings": self.usage.timings(),
        }

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
        return self._envelope(self.chunk_object, []) | {
            "usage": self.usage.body(),
            "timings": self.usage.timings(),
        }

    def _content(self, choice: _Choice, text: str) -> Json:
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
        if self._include_usage:
            body["usage"] = None
        elif choice["finish_reason"] is not None:
            body["timings"] = self.usage.timings()  # of the choices that ended so far
        return body

    def _envelope(self, object: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _token(self, token: TokenLogprob) -> Json:
        return ranked(self._tokenizer, token)


def ranked(tokenizer: Tokenizer, token: TokenLogprob) -> Json:
    """A token's score as chats have it, with its alternatives."""
    top = [_score(tokenizer, id, logprob) for id, logprob in token.top]
    return {**_score(tokenizer, token.token, token.logprob), "top_logprobs": top}


def _score(tokenizer: Tokenizer, id: int, logprob: float) -> Json:
    raw = tokenizer.token_bytes(id)
    return {
        "token": raw.decode("utf-8", errors="replace"),
        "logprob": max(logprob, _MIN_LOGPROB),
        "bytes": list(raw),
    }


class ChatReply(OpenAIReply):
    """`reader` makes what reads a choice's text into parts; without one, all of it is content."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        id: str,
        model: str,
        tokenizer: Tokenizer,
        logprobs: int | None,
        include_usage: bool,
        reader: Callable[[], Reader] | None = None,
    ) -> None:
        super().__init__(id, model, tokenizer, logprobs, include_usage)
        self._new_reader = reader

    def chunks(self, index: int, delta: StreamDelta) -> Iterator[Json]:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
            choice.reader = self._new_reader() if self._new_reader is not None else None
            self._note(choice, delta)
            first = self._piece(index, {"role": "assistant", "content": ""}, None)
            if choice.prompt_logprobs is not None:
                first["prompt_logprobs"] = choice.prompt_logprobs
            yield self._chunk(first)
        else:
            self._note(choice, delta)
        logprobs = self._logprobs(choice, delta.logprobs or ())
        for piece in self._pieces(choice, delta):
            yield self._chunk(self._piece(index, piece, logprobs))
            logprobs = self._logprobs(choice, ())
        if delta.finish_reason is not None:
            last = self._piece(index, {}, None)
            last |= {"finish_reason": self._reason(choice), "stop_reason": choice.stop_reason}
            yield self._chunk(last)

    def _pieces(self, choice: _Choice, delta: StreamDelta) -> list[Json]:
        """What `delta` adds to the message; tokens whose text is held back add an empty piece."""
        if choice.reader is None:
            return [{"content": delta.text}] if delta.text or delta.logprobs else []
        parts = choice.reader.feed(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            parts += choice.reader.close()
        choice.calls |= any(isinstance(part, ToolCallPart) for part in parts)
        choice.in_call = choice.reader.in_call
        return [_delta(part) for part in joined(parts)] or ([{}] if delta.logprobs else [])

    @staticmethod
    def _piece(index: int, delta: Json, logprobs: Json | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    @staticmethod
    def _reason(choice: _Choice) -> str | None:
        """A model that stops behind a call waits for its result; one that stops in it does not."""
        called = choice.calls and not choice.in_call and choice.finish_reason == "stop"
        return "tool_calls" if called else choice.finish_reason

    def _ended(self, body: Json, choice: _Choice) -> Json:
        return super()._ended(body, choice) | {"finish_reason": self._reason(choice)}

    def _content(self, choice: _Choice, text: str) -> Json:
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if self._new_reader is None:
            return {"message": message}
        reader = self._new_reader()
        parts = joined(reader.feed(text) + reader.close())
        said = "".join(part.text for part in parts if isinstance(part, TextPart))
        thought = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
        calls = [_called(part) for part in parts if isinstance(part, ToolCallPart)]
        choice.calls, choice.in_call = bool(calls), reader.in_call
        message["content"] = said if said or not (thought or calls) else None
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprob]) -> Json | None:
        if self._top is None:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}


def _called(call: ToolCallPart) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _delta(part: Part) -> Json:
    match part:
        case TextPart(text):
            return {"content": text}
        case ReasoningPart(text):
            return {"reasoning_content": text}
        case ToolCallPart(index, None, _, arguments):
            return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
        case _:
            return {"tool_calls": [{"index": part.index, **_called(part)}]}


class Echo(NamedTuple):
    """Puts prompts in front of their completions, and the scores of their tokens."""

    prompts: Sequence[tuple[str, list[int]]]
    n: int  # choices of each prompt
    prompt_logprobs: int | None  # what the request asked for by that name


class CompletionReply(OpenAIReply):
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        id: str,
        model: str,
        tokenizer: Tokenizer,
        logprobs: int | None,
        include_usage: bool,
        echo: Echo | None = None,
    ) -> None:
        super().__init__(id, model, tokenizer, logprobs, include_usage)
        self._echo = echo
        self._scored: dict[int, list[TokenLogprob]] = {}  # by prompt: its first choice brings them

    def add(self, index: int, delta: StreamDelta) -> None:
        self._begin(index, delta)
        super().add(index, delta)

    def chunks(self, index: int, delta: StreamDelta) -> Iterator[Json]:
        self._begin(index, delta)
        choice = self._choices[index]
        self._note(choice, delta)
        text = "".join(choice.texts) + delta.text  # texts: the echo, until it is sent
        choice.texts.clear()
        seen = text or delta.logprobs or choice.prompt_logprobs
        if not seen and delta.finish_reason is None:
            return
        body = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(choice, delta.logprobs or ()),
        }
        yield self._chunk(self._ended(body, choice))
        choice.prompt_logprobs = None

    def _begin(self, index: int, delta: StreamDelta) -> None:
        """A choice's first delta brings its echo."""
        if index in self._choices:
            return
        choice = self._choices[index] = _Choice()
        if self._echo is not None:
            at = index // self._echo.n
            choice.echo = at
            choice.texts.append(self._echo.prompts[at][0])
            if delta.prompt_logprobs is not None:
                self._scored[at] = delta.prompt_logprobs

    def _note(self, choice: _Choice, delta: StreamDelta) -> None:
        super()._note(choice, delta)
        if self._echo is not None and delta.prompt_logprobs is not None:
            top = self._echo.prompt_logprobs
            if top is None:
                choice.prompt_logprobs = None
            for entry in choice.prompt_logprobs or ():
                if entry is not None:
                    del entry["top_logprobs"][top:]

    def _content(self, choice: _Choice, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprob]) -> Json | None:
        if self._top is None:
            return None
        body: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        if self._echo is not None and choice.echo is not None:
            self._list_prompt(body, *self._echo.prompts[choice.echo], self._scored[choice.echo])
            choice.offset = len(self._echo.prompts[choice.echo][0])
            choice.echo = None
        for token in tokens:
            self._list(body, choice.offset, token.token, token)
            raw = self._tokenizer.token_bytes(token.token)
            choice.offset += len(choice.decoder.decode(raw))
        return body

    def _list_prompt(
        self, body: Json, text: str, ids: list[int], scores: list[TokenLogprob]
    ) -> None:
        """The first token has no score; special tokens may stand outside of the text."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset = 0
        for i, id in enumerate(ids):
            self._list(body, min(offset, len(text)), id, scores[i - 1] if i else None)
            if id not in self._tokenizer.special_ids:
                offset += len(decoder.decode(self._tokenizer.token_bytes(id)))

    def _list(self, body: Json, offset: int, id: int, score: TokenLogprob | None) -> None:
        text = self._name(id)
        logprob = None if score is None else max(score.logprob, _MIN_LOGPROB)
        body["text_offset"].append(offset)
        body["tokens"].append(text)
        body["token_logprobs"].append(logprob)
        top = () if score is None else score.top[: self._top]
        listed = {self._name(id): max(value, _MIN_LOGPROB) for id, value in top}
        body["top_logprobs"].append(None if score is None else {**listed, text: logprob})

    def _name(self, id: int) -> str:
        """A token's text; parts of a character are told apart by their bytes."""
        raw = self._tokenizer.token_bytes(id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
