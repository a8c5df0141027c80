"""The routes: each refuses or encodes a body, then turns the engine's deltas into a reply."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import astrai
from astrai.inference.intake import PromptTooLong, QueueFull
from astrai.server import errors, openai
from astrai.server.errors import ApiError
from astrai.server.openai import Call
from astrai.server.replies import ChatReply, CompletionReply, Reply
from astrai.server.streaming import DONE, EventStream, event, merge, unless_gone

if TYPE_CHECKING:
    from astrai.inference.async_engine import AsyncEngine, StreamDelta

    Deltas: TypeAlias = AsyncGenerator[tuple[int, StreamDelta], None]

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
# Shorter texts encode in less time than a hop to another thread and back takes to matter.
_LONG_TEXT = 8192


def create_app(
    engine: AsyncEngine,
    *,
    served_names: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The app of one engine, which it starts and shuts down with itself.

    `served_names` are the names that `model` may say, the first being the one in answers; without
    any it is the engine's own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.shutdown()

    # The interactive pages load their scripts from elsewhere, so they are off.
    app = FastAPI(
        title="AstrAI",
        version=astrai.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    edge = Edge(engine, tuple(served_names) or (engine.model_name,), max_body_bytes)
    app.get("/health")(edge.health)
    app.get("/version")(edge.version)
    app.get("/v1/models")(edge.models)
    app.get("/v1/models/{name:path}")(edge.model)
    app.post("/v1/chat/completions", openapi_extra=_schema(openai.ChatRequest))(edge.chat)
    app.post("/v1/completions", openapi_extra=_schema(openai.CompletionRequest))(edge.completions)
    return app


def _schema(model: type[Any]) -> dict[str, Any]:
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": model.model_json_schema()}},
        }
    }


class Edge:
    """Owns nothing but names and limits: the engine does the work and keeps the state."""

    def __init__(self, engine: AsyncEngine, names: tuple[str, ...], max_body_bytes: int) -> None:
        self.engine = engine
        self.names = names
        self.max_body_bytes = max_body_bytes

    async def health(self) -> Response:
        ok, reason, numbers = self.engine.healthy()
        body = {"status": "ok" if ok else "unhealthy", "reason": reason, **numbers}
        return JSONResponse(body, status_code=200 if ok else 503)

    async def version(self) -> Response:
        return JSONResponse({"version": astrai.__version__})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._card(name))

    async def chat(self, request: Request) -> Response:
        asked = openai.parse_chat(openai.parse_json(await self._body(request)))
        call = openai.chat_call(asked)
        self._check_model(call.model)
        ids = await self._chat_ids(asked)
        reply = ChatReply(*self._reply_args("chatcmpl", call))
        return await self._answer(request, reply, call, [ids], "messages")

    async def completions(self, request: Request) -> Response:
        asked = openai.parse_completion(openai.parse_json(await self._body(request)))
        call = openai.completion_call(asked)
        self._check_model(call.model)
        prompts = await self._prompt_ids(asked)
        reply = CompletionReply(*self._reply_args("cmpl", call))
        return await self._answer(request, reply, call, prompts, "prompt")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "astrai",
            "max_model_len": self.engine.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ApiError(
                f"the model {name!r} is not served here; served: {', '.join(self.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _reply_args(self, prefix: str, call: Call) -> tuple[str, str, Any, int | None, bool]:
        id = f"{prefix}-{uuid.uuid4().hex}"
        name = call.model or self.names[0]
        return id, name, self.engine.tokenizer, call.params.logprobs, call.include_usage

    async def _body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large(int(declared))
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise self._too_large(len(body))
        return bytes(body)

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            f"the body has at least {size} bytes, expected at most {self.max_body_bytes}",
            code="body_too_large",
        )

    async def _chat_ids(self, asked: openai.ChatRequest) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not tokenizer.has_chat_template:
            raise ApiError("the model has no chat template: use /v1/completions", param="messages")
        messages = openai.template_messages(asked)
        generation = True if asked.add_generation_prompt is None else asked.add_generation_prompt
        kwargs = asked.chat_template_kwargs or {}

        def render() -> list[int]:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, **kwargs
            )

        try:
            return await _off_loop(sum(len(m["content"]) for m in messages), render)
        except ValueError as error:
            message = f"the chat template refuses these messages: {error}"
            raise ApiError(message, param="messages", code="chat_template_error") from None

    async def _prompt_ids(self, asked: openai.CompletionRequest) -> list[list[int]]:
        special = True if asked.add_special_tokens is None else asked.add_special_tokens
        tokenizer = self.engine.tokenizer
        prompt = asked.prompt
        one = isinstance(prompt, str) or _is_ids(prompt)
        items: Sequence[Any] = [prompt] if one else prompt

        def encode() -> list[list[int]]:
            return [
                tokenizer.encode(item, add_special_tokens=special)
                if isinstance(item, str)
                else item
                for item in items
            ]

        return await _off_loop(sum(len(i) for i in items if isinstance(i, str)), encode)

    async def _answer(
        self, request: Request, reply: Reply, call: Call, prompts: list[list[int]], param: str
    ) -> Response:
        headers = {"x-request-id": reply.id}
        try:
            source = self._open(reply.id, call, prompts)
            if call.stream:
                first = await _first(request, source)
                return EventStream(_events(reply, call, first, source), source, headers)
            async with aclosing(source):
                await unless_gone(request.receive, _collect(reply, call, source))
            return JSONResponse(reply.whole(), headers=headers)
        except (ApiError, ClientDisconnect):
            raise
        except Exception as error:
            raise _api_error(error, param) from None

    def _open(self, id: str, call: Call, prompts: list[list[int]]) -> Deltas:
        """One stream per prompt, merged."""
        names = [id] if len(prompts) == 1 else [f"{id}-{i}" for i in range(len(prompts))]
        return merge(
            [
                self.engine.stream(ids, call.params, request_id=name, priority=call.priority)
                for name, ids in zip(names, prompts)
            ]
        )


async def _first(request: Request, source: Deltas) -> tuple[int, StreamDelta]:
    """What comes first, so that an error before any token is still an HTTP status."""
    try:
        first = await unless_gone(request.receive, _next(source))
        _raise_if_failed(first[1])
    except BaseException:
        await source.aclose()
        raise
    return first


async def _next(source: Deltas) -> tuple[int, StreamDelta]:
    async for item in source:
        return item
    raise RuntimeError("the engine's stream ended before its first delta")


async def _collect(reply: Reply, call: Call, source: Deltas) -> None:
    async for i, delta in source:
        _raise_if_failed(delta)
        reply.add(i * call.params.n + delta.index, delta)


async def _events(
    reply: Reply, call: Call, first: tuple[int, StreamDelta], source: Deltas
) -> AsyncGenerator[bytes, None]:
    """The reply as events; an error after the first is an event too, and the last one."""
    try:
        i, delta = first
        for chunk in reply.chunks(i * call.params.n + delta.index, delta):
            yield event(chunk)
        async for i, delta in source:
            _raise_if_failed(delta)
            for chunk in reply.chunks(i * call.params.n + delta.index, delta):
                yield event(chunk)
        if call.include_usage:
            yield event(reply.last_chunk())
        yield DONE
    except ApiError as error:
        yield event(error.body())
    except Exception as error:
        yield event(_api_error(error, None).body())


def _raise_if_failed(delta: StreamDelta) -> None:
    if delta.finish_reason == "error":
        raise ApiError(delta.error or "the engine failed", status=500)
    if delta.finish_reason == "abort":
        raise ApiError(delta.error or "the request was aborted", status=503)


def _api_error(error: Exception, param: str | None) -> ApiError:
    """What the engine refused, or failed at, as the HTTP error that it is."""
    if isinstance(error, PromptTooLong):
        return ApiError(str(error), param=param, code="context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(str(error), status=503, code="queue_full")
    if isinstance(error, ValueError):
        return openai.blame(error)
    logger.error("the engine failed", exc_info=error)
    return ApiError(f"internal error: {type(error).__name__}: {error}", status=500)


async def _off_loop(n_characters: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if n_characters > _LONG_TEXT else work()


def _is_ids(prompt: Sequence[Any]) -> TypeGuard[list[int]]:
    return isinstance(prompt[0], int)
