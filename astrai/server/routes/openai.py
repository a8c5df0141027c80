"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.server.chat.prompts import chat_asked, echoed, encoded
from astrai.server.dialects import openai
from astrai.server.dialects.replies import ChatReply, CompletionReply
from astrai.server.edge import Edge
from astrai.server.http.fields import schema_of


def mount(app: FastAPI, edge: Edge) -> None:
    tokenizer = edge.engine.tokenizer

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_card(edge, name) for name in edge.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_card(edge, edge.check_model(name)))

    @app.post("/v1/chat/completions", openapi_extra=schema_of(openai.ChatRequest))
    async def chat(request: Request) -> Response:
        parsed = openai.parse_chat(await edge.json(request))
        name = edge.check_model(parsed.model)
        asked = await chat_asked(edge.chat_format, parsed)
        reply = ChatReply(
            edge.new_id("chatcmpl"),
            name,
            tokenizer,
            asked.call.params.logprobs,
            asked.call.include_usage,
            asked.reader,
        )
        return await edge.answer(request, reply, asked.call, [asked.ids], "messages")

    @app.post("/v1/completions", openapi_extra=schema_of(openai.CompletionRequest))
    async def completions(request: Request) -> Response:
        parsed = openai.parse_completion(await edge.json(request))
        name = edge.check_model(parsed.model)
        call = openai.completion_call(parsed)
        prompts = await encoded(tokenizer, parsed.prompt, parsed.add_special_tokens)
        reply = CompletionReply(
            edge.new_id("cmpl"),
            name,
            tokenizer,
            call.params.logprobs,
            call.include_usage,
            echoed(tokenizer, parsed, prompts) if parsed.echo else None,
        )
        return await edge.answer(request, reply, call, prompts, "prompt")


def _card(edge: Edge, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "astrai",
        "max_model_len": edge.engine.max_model_len,
    }
