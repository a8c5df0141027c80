"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.server import openai
from astrai.server.edge import Call, Edge
from astrai.server.fields import schema_of
from astrai.server.prompts import chat_prompt, echoed, encoded
from astrai.server.replies import ChatReply, CompletionReply


def mount(app: FastAPI, edge: Edge) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_card(edge, name) for name in edge.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_card(edge, edge.check_model(name)))

    @app.post("/v1/chat/completions", openapi_extra=schema_of(openai.ChatRequest))
    async def chat(request: Request) -> Response:
        asked = openai.parse_chat(await edge.json(request))
        call = openai.chat_call(asked)
        args = _reply_args(edge, "chatcmpl", call)
        talk = openai.chat_conversation(asked)
        prompt = await chat_prompt(edge.chat_format, talk, call.params.structured)
        call = call._replace(params=prompt.applied(call.params))
        reply = ChatReply(*args, prompt.reader)
        return await edge.answer(request, reply, call, [prompt.ids], "messages")

    @app.post("/v1/completions", openapi_extra=schema_of(openai.CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = openai.parse_completion(await edge.json(request))
        call = openai.completion_call(asked)
        args = _reply_args(edge, "cmpl", call)
        prompts = await encoded(edge.engine.tokenizer, asked.prompt, asked.add_special_tokens)
        echo = echoed(edge.engine.tokenizer, asked, prompts) if asked.echo else None
        reply = CompletionReply(*args, echo)
        return await edge.answer(request, reply, call, prompts, "prompt")


def _card(edge: Edge, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "astrai",
        "max_model_len": edge.engine.max_model_len,
    }


def _reply_args(edge: Edge, prefix: str, call: Call) -> tuple[str, str, Any, int | None, bool]:
    name = edge.check_model(call.model)
    id = edge.new_id(prefix)
    return id, name, edge.engine.tokenizer, call.params.logprobs, call.include_usage
