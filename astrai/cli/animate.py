"""`astrai animate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from astrai.cli.options import DEFAULT


class ScenePart(StrEnum):
    all = "all"
    batching = "batching"
    cache = "cache"


class FilmQuality(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"
    uhd = "4k"


def animate(
    recording: Annotated[
        Path | None, typer.Argument(help="From --record; without it a small run is made.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The film.")] = Path("astrai.mp4"),
    scene: Annotated[ScenePart, typer.Option(help="Which of the two scenes.")] = ScenePart.all,
    quality: Annotated[FilmQuality, typer.Option(help="480p to 2160p.")] = FilmQuality.medium,
    gif: Annotated[bool, typer.Option("--gif", help="A GIF instead of an MP4.")] = False,
    batching: Annotated[
        Path | None,
        typer.Option(help="Output of astrai bench batching --json: the ratio of the closing bars."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="What the small run runs.")
    ] = DEFAULT.model,
) -> None:
    """Draw a recording as a short film: continuous batching, and the paged KV cache."""
    from astrai.observe.animate import render

    render.animate(
        recording,
        output,
        scene=scene.value,
        quality=quality.value,
        gif=gif,
        batching=batching,
        model=model,
    )
    print(output)
