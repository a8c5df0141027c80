"""`astrai simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from astrai.cli.options import PolicyFlag


def simulate(
    step_time: Annotated[
        str,
        typer.Option(
            help="A recording to fit it to, or four numbers of seconds: base, a prompt token, a "
            "decoding row, a page read.",
        ),
    ],
    workload: Annotated[
        Path | None, typer.Argument(metavar="WORKLOAD.JSONL", help="Without it: generated.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = 64,
    pages: Annotated[int, typer.Option(help="Page frames.", min=1)] = 4096,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.", min=1)] = 64,
    prefill_budget: Annotated[int, typer.Option(help="Prompt tokens a tick.", min=1)] = 2048,
    policy: Annotated[PolicyFlag, typer.Option(help="Batching.")] = PolicyFlag.continuous,
    prefix_cache: Annotated[bool, typer.Option(help="Share equal prompt starts.")] = True,
    overlap: Annotated[
        bool, typer.Option(help="Plan a step while the one before runs, as on a GPU.")
    ] = False,
    requests: Annotated[int, typer.Option(help="Generated: how many.", min=1)] = 10_000,
    rate: Annotated[float, typer.Option(help="Generated: a second; 0: all at once.", min=0)] = 10.0,
    prompt: Annotated[int, typer.Option(help="Generated: median prompt tokens.", min=1)] = 200,
    output: Annotated[int, typer.Option(help="Generated: median output tokens.", min=1)] = 100,
    sigma: Annotated[float, typer.Option(help="Generated: spread of lengths.", min=0)] = 1.0,
    shared: Annotated[
        float, typer.Option(help="Generated: share with a shared beginning.", min=0, max=1)
    ] = 0.0,
    prefixes: Annotated[int, typer.Option(help="Generated: shared beginnings.", min=1)] = 10,
    prefix_tokens: Annotated[int, typer.Option(help="Generated: tokens of one.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Generated: of the random lengths.")] = 0,
    pools: Annotated[bool, typer.Option(help="Show what the books cost in larger pools.")] = True,
) -> None:
    """Plan capacity: the real scheduler under a virtual clock. The last line is JSON.

    A line of the workload: {"at": seconds, "prompt": tokens, "output": tokens}, and where wanted
    "prefix", "prefix_tokens", "priority", "n".
    """
    from astrai.cli import recordings as commands
    from astrai.observe.simulate import Shape

    shape = Shape(prompt, output, sigma, prefixes, prefix_tokens, shared)
    load = commands.Load(workload, requests, rate, shape, seed)
    static = policy is PolicyFlag.static
    setting = commands.setting_of(
        slots, pages, page_size, prefill_budget, static, prefix_cache, overlap
    )
    commands.simulate(load, setting, commands.step_time_of(step_time), pools=pools)
