"""The engine of tests/server/mock_engine.py with the recorder that its configuration asks for."""

from __future__ import annotations

from astrai.config import EngineConfig
from astrai.observe.recorder import record
from astrai.process.link import Assembled, Deliver
from tests.process import mock_engine

BUILDER = "tests.observe.recorded_engine:build"


def build(config: EngineConfig, deliver: Deliver) -> Assembled:
    parts = mock_engine.build(config, deliver)
    engine = parts.engine
    recorder = record(config, engine.scheduler, {"depth": engine.runner.depth, "model": "mock"})
    return parts._replace(recorder=recorder)
