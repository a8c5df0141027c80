"""`astrai chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from astrai.cli.options import engine_config, flags, params_of, sampling_fields
from astrai.config import EngineConfig


@flags(config=engine_config, sampling=sampling_fields)
def chat(
    config: EngineConfig,
    sampling: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
) -> None:
    """Talk to the model in the terminal: /reset forgets, /exit leaves, Ctrl-C stops an answer."""
    from astrai import AsyncEngine
    from astrai.cli.terminal import Chat

    params = params_of(sampling)
    Chat(AsyncEngine(config), params, system).loop()
