"""Bodies made up from the OpenAPI document, right ones and wrong ones: nothing is a 500."""

from __future__ import annotations

import json

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from astrai.server.app import create_app
from tests.server.fake_engine import FakeEngine


class Brief(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.says = "ok"


schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(Brief()))  # type: ignore[arg-type]


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_500(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error])


@schema.include(path_regex="chat|messages|tokenize|responses").parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_about_something_is_a_500(case: schemathesis.Case) -> None:
    """With a model and messages that are there, so that the other fields are looked at."""
    if isinstance(case.body, dict):
        right = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
        case.body |= {name: right[name] for name in right.keys() & case.body.keys()}
    case.call_and_validate(checks=[not_a_server_error])


def test_every_route_with_a_body_describes_it() -> None:
    document = create_app(FakeEngine()).openapi()  # type: ignore[arg-type]
    posts = [route["post"] for route in document["paths"].values() if "post" in route]
    assert len(posts) >= 8
    for post in posts:
        body = post["requestBody"]["content"]["application/json"]["schema"]
        assert len(body["properties"]) >= 2
    assert "$ref" not in json.dumps(posts)
