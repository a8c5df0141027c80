from __future__ import annotations

from pathlib import Path

import pytest

from astrai.models.pull import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve("smollm2")
