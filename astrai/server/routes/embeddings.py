"""`/v1/embeddings`."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from astrai.server.chat.prompts import encoded
from astrai.server.dialects import embeddings
from astrai.server.edge import Edge
from astrai.server.http.fields import schema_of


def mount(app: FastAPI, edge: Edge) -> None:
    @app.post("/v1/embeddings", openapi_extra=schema_of(embeddings.EmbeddingRequest))
    async def embed(request: Request) -> Response:
        parsed = embeddings.parse_embedding(await edge.json(request))
        name = edge.check_model(parsed.model)
        call = embeddings.embedding_call(parsed)
        prompts = await encoded(edge.engine.tokenizer, parsed.input, parsed.add_special_tokens)
        reply = embeddings.EmbeddingReply(edge.new_id("embd"), name, parsed)
        return await edge.answer_whole(request, reply, call, prompts, "input")
