"""`astrai trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from astrai.cli.options import RecordingPath


def trace(
    recording: RecordingPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace, as JSON.")] = Path(
        "trace.json"
    ),
    ticks: Annotated[str, typer.Option(help="FIRST:LAST, of a long recording.")] = "",
) -> None:
    """Turn a recording into a trace for Perfetto or Chrome: phases, launches, slots, requests."""
    from astrai.cli import recordings as commands

    commands.trace(recording, output, ticks)
