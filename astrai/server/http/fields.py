"""Request bodies: JSON into checked fields. What is wrong is a 400 that names its field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Set
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import GrammarError
from astrai.server.http.errors import ApiError

M = TypeVar("M", bound=BaseModel)

# Fields that the engine's own refusals may name.
_BLAMED = {field.name for field in dataclasses.fields(SamplingParams)} | {"prompt", "priority"}


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class EngineFields(Body):
    """What a request may say on every route that asks something of the engine."""

    priority: int | None = None
    timeout: float | None = None  # seconds
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: str | None = None


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body as an object of valid Unicode; ApiError 400 otherwise."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        # Escaped lone surrogates parse, but no tokenizer and no UTF-8 response can carry them.
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not valid UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
            code="invalid_json",
        ) from None
    except UnicodeEncodeError:
        raise ApiError("the body holds a lone surrogate", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(
            f"the body is a JSON {type(body).__name__}, expected an object", code="invalid_json"
        )
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def blame(error: ValueError) -> ApiError:
    """A 400 from a ValueError, `param` being the first field of a request that it names."""
    message = str(error)
    if isinstance(error, GrammarError):
        return ApiError(message, param=error.source, code="grammar_refused")
    named = (word for word in re.findall(r"\w+", message) if word in _BLAMED)
    return ApiError(message, param=next(named, None))


class Lists(NamedTuple):
    """What a route does with fields that it does not implement; any other is unknown: a 400.

    harmless: accepted without effect; they describe the caller or his bookkeeping, not the answer.
    refused: 400, unless null or one of the values that ask for nothing.
    """

    harmless: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]


def parse(body: dict[str, Any], model: type[M], lists: Lists) -> M:
    """The implemented fields of a body, checked."""
    return validate(model, screen(body, model, lists.harmless, lists.refused))


def screen(
    fields: Mapping[str, Any],
    model: type[BaseModel],
    harmless: frozenset[str],
    refused: Mapping[str, tuple[Any, ...]],
    at: str = "",
) -> dict[str, Any]:
    """The implemented fields of `fields`; ApiError names the first that is refused or unknown."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in model.model_fields:
            kept[name] = value
        elif name in harmless:
            continue
        elif name in refused:
            if value is not None and value not in refused[name]:
                raise ApiError(
                    f"{at}{name} is not implemented", param=f"{at}{name}", code="not_implemented"
                )
        else:
            close = difflib.get_close_matches(name[:64], model.model_fields, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ApiError(
                f"unknown field {at}{name}{hint}", param=f"{at}{name}", code="unknown_field"
            )
    return kept


# A union's errors speak of its branches, one by one; these speak of the field.
_UNIONS = {
    "prompt": "expected a string, a list of strings, a list of token ids, or lists of token ids",
    "input": "expected a string, a list of strings, a list of token ids, or lists of token ids",
    "stop": "expected a string or a list of strings",
}


def validate(model: type[M], fields: dict[str, Any]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = _where(first["loc"])
        if first["type"] == "missing":
            raise ApiError(f"{where} is required", param=where) from None
        if where in _UNIONS:
            message = f"{_UNIONS[where]}, got {short(fields[where])}"
        else:
            message = f"{first['msg']}, got {short(first['input'])}"
        raise ApiError(f"{where}: {message}", param=where) from None


def _where(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` of a location; only these fields have parts with names."""
    path = str(loc[0])
    if path not in ("messages", "stream_options", "tools"):
        return path
    for step in loc[1:]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path


# ── parts of a body that no model describes ─────────────────────────────────────────────────────


def refuse(at: str, what: Any) -> ApiError:
    return ApiError(f"{at}: {what!r} is not implemented", param=at, code="not_implemented")


def text_of(content: Any, at: str, kinds: tuple[str, ...], extra: frozenset[str]) -> str:
    """The text of a string or of a list of text parts; a part may have the fields in `extra`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{at}: expected a string or a list of parts", param=at)
    return "".join(_part(part, f"{at}[{i}]", kinds, extra) for i, part in enumerate(content))


def _part(part: Any, at: str, kinds: tuple[str, ...], extra: frozenset[str]) -> str:
    fields = typed(part, at)
    if fields["type"] not in kinds:
        raise refuse(f"{at}.type", fields["type"])
    name = "refusal" if fields["type"] == "refusal" else "text"
    only(fields, extra | {"type", name}, at)
    return string(fields, name, at)


def typed(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ApiError(f"{at}: expected an object with a type", param=at)
    return value


def string(fields: Mapping[str, Any], name: str, at: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ApiError(f"{at}.{name}: expected a string", param=f"{at}.{name}")
    return value


def only(fields: Mapping[str, Any], known: Set[str], at: str) -> None:
    for name, value in fields.items():
        if name not in known and value is not None:
            raise ApiError(f"unknown field {at}.{name}", param=f"{at}.{name}", code="unknown_field")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that reads it itself, for the OpenAPI document."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inlined(model.model_json_schema())}},
        }
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references: theirs would be to the root of the OpenAPI document.

    Ends because no body contains itself.
    """
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        if name := value.get("$ref"):
            return inline(definitions[name.rsplit("/", 1)[1]])
        return {key: inline(item) for key, item in value.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined
