"""`/v1/responses`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from astrai.server.dialects import responses
from astrai.server.dialects.responses import ResponseReply, ResponseRequest
from astrai.server.dialects.shared import asked_of
from astrai.server.edge import Edge
from astrai.server.http.fields import schema_of


def mount(app: FastAPI, edge: Edge) -> None:
    @app.post("/v1/responses", openapi_extra=schema_of(ResponseRequest))
    async def respond(request: Request) -> Response:
        body = await edge.json(request)
        parsed = responses.parse_response(body)
        name = edge.check_model(parsed.model)
        chat = responses.chat_body(parsed)
        asked = await asked_of(edge.chat_format, chat, responses.NAMES)
        reply = ResponseReply(
            edge.new_id("resp"),
            name,
            edge.engine.tokenizer,
            parsed,
            body.get("metadata"),
            asked.call.params.logprobs,
            asked.reader,
        )
        return await edge.answer(request, reply, asked.call, [asked.ids], "input")
