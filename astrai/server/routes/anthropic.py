"""`/v1/messages`, `/v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.server.dialects import anthropic
from astrai.server.dialects.anthropic import CountRequest, MessageReply, MessagesRequest
from astrai.server.dialects.shared import asked_of
from astrai.server.edge import Edge
from astrai.server.http.fields import schema_of


def mount(app: FastAPI, edge: Edge) -> None:
    @app.post("/v1/messages", openapi_extra=schema_of(MessagesRequest))
    async def messages(request: Request) -> Response:
        parsed = anthropic.parse_messages(await edge.json(request))
        name = edge.check_model(parsed.model)
        body = anthropic.chat_body(parsed, edge.chat_format)
        asked = await asked_of(edge.chat_format, body, anthropic.NAMES)
        reply = MessageReply(edge.new_id("msg"), name, len(asked.ids), asked.reader)
        return await edge.answer(request, reply, asked.call, [asked.ids], "messages")

    @app.post("/v1/messages/count_tokens", openapi_extra=schema_of(CountRequest))
    async def count(request: Request) -> Response:
        parsed = anthropic.parse_count(await edge.json(request))
        edge.check_model(parsed.model)
        body = anthropic.chat_body(parsed, edge.chat_format)
        asked = await asked_of(edge.chat_format, body, anthropic.NAMES)
        return JSONResponse({"input_tokens": len(asked.ids)})
