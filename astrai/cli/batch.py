"""`astrai generate`: a JSONL of prompts in, a JSONL of results out, in order.

Input, one object a line: one of "prompt" (text), "messages" or "prompt_token_ids"; "id" (any
string or number, default: the line's number) and any field of SamplingParams.
Output: {"id", "line", "outputs": [{"index", "text", "token_ids", "finish_reason", "stop_reason",
"logprobs"}], "usage"}, or {"id", "line", "error": {"message", "field"}} for a line skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

from astrai.config import EngineConfig
from astrai.front.sampling_params import SamplingParams

if TYPE_CHECKING:
    from astrai.front.async_engine import AsyncEngine, StreamDelta

_SOURCES = ("prompt", "messages", "prompt_token_ids")
_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
# Enough to keep every slot busy behind one long answer, few enough to hold in memory.
_IN_FLIGHT = 1024
_FULL_SECONDS = 0.5  # until a request that found the queue full asks again


class BadLine(Exception):
    """A line that cannot be answered."""

    def __init__(
        self, line: int, message: str, field: str | None = None, id: str | int | None = None
    ) -> None:
        where = f"line {line}" if field is None else f"line {line}, field {field!r}"
        super().__init__(f"{where}: {message}")
        self.line = line
        self.message = message
        self.field = field
        self.id = line if id is None else id

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "field": self.field}
        return {"id": self.id, "line": self.line, "error": error}


class Request(NamedTuple):
    line: int
    id: str | int
    source: str  # which of _SOURCES
    value: Any
    params: SamplingParams


class Outcome(NamedTuple):
    body: dict[str, Any]
    failed: bool  # the engine ended a choice with an error
    tokens: int


def generate(
    config: EngineConfig, sampling: Mapping[str, Any], source: str, output: str, skip_bad: bool
) -> int:
    """Exit code: 0, 1 if the engine failed a request, 2 for a bad line (the first is named)."""
    from astrai.front.async_engine import AsyncEngine

    try:
        with _opened(source, "r", sys.stdin) as file:
            requests = read(file, sampling, skip_bad)
        # A model takes seconds to load: not for nothing.
        some = any(isinstance(request, Request) for request in requests)
        engine = AsyncEngine(config) if some else None
        with _opened(output, "w", sys.stdout) as file:
            if engine is None:
                file.writelines(_line(bad.body()) for bad in requests if isinstance(bad, BadLine))
                return 0
            failed = asyncio.run(answer_all(engine, requests, file, skip_bad))
    except BadLine as error:
        print(f"astrai: error: {source}: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"astrai: error: {failed} of {len(requests)} requests failed", file=sys.stderr)
    return 1 if failed else 0


def read(
    lines: Iterable[str], sampling: Mapping[str, Any], skip_bad: bool = False
) -> list[Request | BadLine]:
    """One item per line that is not blank; raises the first BadLine unless they are to be kept."""
    items: list[Request | BadLine] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            items.append(parse(number, text, sampling))
        except BadLine as error:
            if not skip_bad:
                raise
            items.append(error)
    return items


def parse(number: int, text: str, sampling: Mapping[str, Any]) -> Request:
    """The request of a line; `sampling` holds the fields it does not bring."""
    try:
        fields = json.loads(text)
        # Escaped lone surrogates parse, but no tokenizer takes them.
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine(number, "holds a lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(number, f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadLine(number, f"a JSON {type(fields).__name__}, expected an object")
    id = fields.pop("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise BadLine(number, f"{id!r}, expected a string or an integer", "id")
    given = [name for name in _SOURCES if fields.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise BadLine(number, f"{found} of {', '.join(_SOURCES)}, expected exactly one", id=id)
    source = given[0]
    value = fields[source]
    if complaint := _complaint(source, value):
        raise BadLine(number, complaint, source, id)
    own = {name: v for name, v in fields.items() if name not in _SOURCES and v is not None}
    for name in own:
        if name not in _SAMPLING:
            raise BadLine(number, "unknown field", name, id)
    if isinstance(own.get("logit_bias"), dict):
        # JSON has no integer keys; one that is none is left to be refused.
        bias = own["logit_bias"].items()
        own["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias}
    try:
        params = SamplingParams(**{**sampling, **own})
    except ValueError as error:
        field = next((name for name in own if name in str(error)), None)
        raise BadLine(number, str(error), field, id) from None
    return Request(number, id, source, value, params)


def _complaint(source: str, value: Any) -> str | None:
    if source == "prompt":
        return None if isinstance(value, str) and value else "expected a text that is not empty"
    if not isinstance(value, list) or not value:
        return "expected a list that is not empty"
    if source == "prompt_token_ids":
        ok = all(isinstance(token, int) and not isinstance(token, bool) for token in value)
        return None if ok else "expected integers"
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            return f"message {i}: expected an object with role and content, both text"
    return None


async def answer_all(
    engine: AsyncEngine, requests: Sequence[Request | BadLine], file: TextIO, skip_bad: bool
) -> int:
    """Write one line per request, in order, as soon as those before it are done.

    Returns how many requests the engine failed; raises the first BadLine, after the results
    before it, unless they are to be written.
    """
    failed = 0

    def write(outcome: Outcome) -> None:
        nonlocal failed
        failed += outcome.failed
        file.write(_line(outcome.body))
        file.flush()

    engine.start()
    try:
        with _progress(len(requests)) as advance:
            await _in_order(engine, requests, write, advance, skip_bad)
    finally:
        await engine.shutdown()
    return failed


async def _in_order(
    engine: AsyncEngine,
    requests: Sequence[Request | BadLine],
    write: Callable[[Outcome], None],
    advance: Callable[[Outcome], None],
    skip_bad: bool,
) -> None:
    pending: deque[asyncio.Task[Outcome]] = deque()

    async def finish_oldest() -> None:
        outcome = await pending[0]
        pending.popleft()
        write(outcome)
        advance(outcome)

    limit = min(_IN_FLIGHT, engine.config.max_waiting)
    try:
        for request in requests:
            if len(pending) >= limit:
                await finish_oldest()
            pending.append(asyncio.create_task(_outcome(engine, request, skip_bad)))
        while pending:
            await finish_oldest()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _outcome(engine: AsyncEngine, request: Request | BadLine, skip_bad: bool) -> Outcome:
    try:
        if isinstance(request, BadLine):
            raise request
        return await _answer(engine, request)
    except BadLine as error:
        if not skip_bad:
            raise
        return Outcome(error.body(), False, 0)


async def _answer(engine: AsyncEngine, request: Request) -> Outcome:
    try:
        ids = _encode(engine, request)
        choices = await _choices(engine, request, ids)
    except ValueError as error:
        raise BadLine(request.line, str(error), request.source, request.id) from None
    outputs = [_output(index, deltas) for index, deltas in sorted(choices.items())]
    last = [deltas[-1].usage for _, deltas in sorted(choices.items())]
    completion = sum(usage.completion_tokens for usage in last if usage is not None)
    usage = {
        "prompt_tokens": len(ids),
        "cached_tokens": last[0].cached_tokens if last[0] is not None else 0,
        "completion_tokens": completion,
    }
    body = {"id": request.id, "line": request.line, "outputs": outputs, "usage": usage}
    failed = any(output["finish_reason"] in ("error", "abort") for output in outputs)
    return Outcome(body, failed, completion)


async def _choices(
    engine: AsyncEngine, request: Request, ids: list[int]
) -> dict[int, list[StreamDelta]]:
    """All deltas of each choice. A queue full of tokens only makes the request wait."""
    from astrai.front.admission import QueueFull

    choices: dict[int, list[StreamDelta]] = {}
    while not choices:
        try:
            stream = engine.stream(ids, request.params, request_id=str(request.id))
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    choices.setdefault(delta.index, []).append(delta)
        except QueueFull:
            await asyncio.sleep(_FULL_SECONDS)
    return choices


def _encode(engine: AsyncEngine, request: Request) -> list[int]:
    if request.source == "prompt":
        return engine.tokenizer.encode(request.value)
    if request.source == "messages":
        return engine.tokenizer.apply_chat_template(request.value)
    return list(request.value)


def _output(index: int, deltas: Sequence[StreamDelta]) -> dict[str, Any]:
    last = deltas[-1]
    output: dict[str, Any] = {
        "index": index,
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "finish_reason": last.finish_reason,
        "stop_reason": last.stop_reason,
    }
    if last.error is not None:
        output["error"] = last.error
    logprobs = [token for delta in deltas for token in delta.logprobs or ()]
    if logprobs:
        output["logprobs"] = [token._asdict() for token in logprobs]
    return output


def _line(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _opened(path: str, mode: str, standard: TextIO) -> Iterator[TextIO]:
    if path == "-":
        yield standard
        return
    with open(path, mode, encoding="utf-8") as file:
        yield cast(TextIO, file)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """Shows requests done and tokens per second on stderr, if that is a terminal."""
    from tqdm import tqdm

    tokens = 0
    with tqdm(total=total, unit="request", file=sys.stderr, disable=None) as bar:

        def advance(outcome: Outcome) -> None:
            nonlocal tokens
            tokens += outcome.tokens
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.update()

        yield advance
