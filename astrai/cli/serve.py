"""`astrai serve`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from astrai.cli.options import CliError, door_config, engine_config, flags
from astrai.config import DoorConfig, EngineConfig


class ToolParserFlag(StrEnum):
    auto = "auto"
    none = "none"
    hermes = "hermes"
    llama3 = "llama3"
    generic = "generic"


class ReasoningParserFlag(StrEnum):
    auto = "auto"
    none = "none"
    think = "think"


@flags(config=engine_config, door=door_config)
def serve(
    config: EngineConfig,
    door: DoorConfig,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in requests; may be repeated.")
    ] = None,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body.", min=1)] = 8,
    drain_seconds: Annotated[
        int, typer.Option(help="Time for open answers to end at shutdown.", min=0)
    ] = 30,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds a request may take that does not say itself.", min=0.001),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run the engine in the server's own process.")
    ] = False,
    tool_parser: Annotated[
        ToolParserFlag, typer.Option(help="How the model writes tool calls; auto: by its template.")
    ] = ToolParserFlag.auto,
    reasoning_parser: Annotated[
        ReasoningParserFlag,
        typer.Option(help="Whether <think>…</think> is split off; auto: by the chat template."),
    ] = ReasoningParserFlag.auto,
) -> None:
    """Serve the model over HTTP with OpenAI's API."""
    try:
        from astrai.server import run as server
    except ImportError as error:
        raise CliError(f"{error}: install it with pip install 'astrai[serve]'") from None
    code = server.serve(
        config,
        host=host,
        port=port,
        names=served_model_name or (),
        max_body_bytes=max_body_mib << 20,
        drain_seconds=drain_seconds,
        door=door,
        tool_parser=tool_parser.value,
        reasoning_parser=reasoning_parser.value,
        request_timeout=request_timeout,
        in_process=in_process,
    )
    if code:
        raise typer.Exit(code)
