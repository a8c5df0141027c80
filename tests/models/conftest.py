from __future__ import annotations

from pathlib import Path

import pytest

from astrai.models.pull import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return resolve("smollm2")
    except RuntimeError as error:
        pytest.skip(f"the default model is not here and cannot be fetched: {error}")
