"""`astrai generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from astrai.cli.options import engine_config, flags, params_of, sampling_fields
from astrai.config import EngineConfig


@flags(config=engine_config, sampling=sampling_fields)
def generate(
    config: EngineConfig,
    sampling: dict[str, Any],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="JSONL; -: standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="JSONL; -: standard output.")] = "-",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Answer a bad line with an error object.")
    ] = False,
) -> None:
    """Answer a JSONL of prompts with a JSONL of results, in order.

    A line has "prompt", "messages" or "prompt_token_ids", and may have "id" and any sampling
    field, which then stands above the flags.
    """
    from astrai.cli import batch

    params_of(sampling)
    code = batch.generate(config, sampling, source, output, skip_bad)
    if code:
        raise typer.Exit(code)
