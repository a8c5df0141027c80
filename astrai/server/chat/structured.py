"""What a request wants its output to match, in the forms in which clients say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from astrai.front.structured import StructuredOutput
from astrai.server.http.errors import ApiError
from astrai.server.http.fields import only

# Whitespace and back ends of other servers' options: known, and refused by name unless null.
_REFUSED_OPTIONS = frozenset(
    {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern",
     "disable_fallback", "structural_tag"}
)  # fmt: skip
_KIND_OF = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


class StructuredFields(BaseModel):
    """The fields of a request that say it; at most one of them may."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def structured_of(fields: StructuredFields) -> StructuredOutput | None:
    """ApiError 400 names the field that is malformed, or the two that speak at once."""
    asked = {
        name: value
        for name in StructuredFields.model_fields
        if (value := getattr(fields, name)) is not None
    }
    if asked.get("response_format", {}).get("type") == "text":
        only(asked.pop("response_format"), {"type"}, "response_format")
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise ApiError(f"{first} and {second} cannot both be given", param=second)
    for name, value in asked.items():
        if name == "response_format":
            return from_format(value)
        if name == "structured_outputs":
            return _from_options(value)
        return _output(name, _KIND_OF[name.removeprefix("guided_")], value)
    return None


def from_format(given: Mapping[str, Any], at: str = "response_format") -> StructuredOutput | None:
    """Of {"type": "text" | "json_object"} or {"type": "json_schema", "json_schema": {...}}."""
    kind = given.get("type")
    if kind == "json_schema":
        only(given, {"type", "json_schema"}, at)
        return from_schema(given.get("json_schema"), f"{at}.json_schema")
    if kind not in ("text", "json_object"):
        raise ApiError(
            f"{at}.type is {kind!r}, expected 'text', 'json_object' or 'json_schema'",
            param=f"{at}.type",
        )
    only(given, {"type"}, at)
    return _output(at, "json_object", True) if kind == "json_object" else None


def from_schema(given: Any, at: str) -> StructuredOutput:
    """Of {"name", "schema", "strict", "description"}. It is enforced whatever `strict` says."""
    if not isinstance(given, Mapping):
        raise ApiError(f"{at} is {given!r}, expected an object with a schema", param=at)
    only(given, {"name", "schema", "strict", "description"}, at)
    for name, kinds in (("name", str), ("description", str), ("strict", bool)):
        value = given.get(name)
        if value is not None and not isinstance(value, kinds):
            raise ApiError(f"{at}.{name} is {value!r}, expected {kinds.__name__}", param=at)
    if not isinstance(given.get("schema"), Mapping):
        raise ApiError(f"{at}.schema is required, as an object", param=f"{at}.schema")
    return _output(at.split(".")[0], "json_schema", given["schema"])


def _from_options(given: Mapping[str, Any]) -> StructuredOutput:
    at = "structured_outputs"
    for name in _REFUSED_OPTIONS & given.keys():
        if given[name] not in (None, False):
            raise ApiError(
                f"{at}.{name} is not implemented", param=f"{at}.{name}", code="not_implemented"
            )
    only(given, _KIND_OF.keys() | _REFUSED_OPTIONS, at)
    asked = {name: given[name] for name in _KIND_OF if given.get(name) not in (None, False)}
    if len(asked) != 1:
        raise ApiError(
            f"{at} has {' and '.join(asked) or 'nothing'}, expected exactly one of "
            f"{', '.join(_KIND_OF)}",
            param=at,
        )
    name, value = asked.popitem()
    return _output(at, _KIND_OF[name], value)


def _output(source: str, kind: str, value: Any) -> StructuredOutput:
    try:
        if kind == "json_schema" and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False)
        return StructuredOutput(source=source, **{kind: value})
    except (ValueError, RecursionError) as error:
        raise ApiError(str(error), param=source) from None
