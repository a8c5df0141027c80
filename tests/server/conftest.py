from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import serving


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def http(engine: FakeEngine) -> Iterator[httpx.Client]:
    options = {"served_names": ("fake", "alias/of-fake"), "max_body_bytes": 1 << 16}
    with serving(engine, **options) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client
