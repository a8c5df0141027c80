"""`/tokenize`, `/detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from astrai.server.chat.prompts import chat_prompt, encoded
from astrai.server.dialects import tokens
from astrai.server.dialects.openai import chat_conversation
from astrai.server.edge import Edge, off_loop
from astrai.server.http.fields import schema_of


def mount(app: FastAPI, edge: Edge) -> None:
    tokenizer = edge.engine.tokenizer

    @app.post("/tokenize", openapi_extra=schema_of(tokens.TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        asked, chat = tokens.parse_tokenize(await edge.json(request))
        edge.check_model(asked.model)
        if chat is not None:
            ids = (await chat_prompt(edge.chat_format, chat_conversation(chat))).ids
        else:
            (ids,) = await encoded(tokenizer, asked.prompt or "", asked.add_special_tokens)
        body: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": edge.engine.max_model_len,
        }
        if asked.return_token_strs:
            body["token_strs"] = [_text(tokenizer.token_bytes(id)) for id in ids]
        return JSONResponse(body)

    @app.post("/detokenize", openapi_extra=schema_of(tokens.DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        asked = tokens.parse_detokenize(await edge.json(request), tokenizer.vocab_size)
        edge.check_model(asked.model)
        ids = asked.tokens
        text = await off_loop(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))
        return JSONResponse({"prompt": text})


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
