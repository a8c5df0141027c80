"""`astrai replay`: a recording through the scheduler again, otherwise, or in the live page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from astrai.cli.options import CliError, PolicyFlag, RecordingPath


def replay(
    recording: RecordingPath,
    pages: Annotated[int | None, typer.Option(help="What if: page frames.", min=1)] = None,
    page_size: Annotated[int | None, typer.Option(help="What if: tokens in a page.")] = None,
    slots: Annotated[int | None, typer.Option(help="What if: slots.", min=1)] = None,
    prefill_budget: Annotated[
        int | None, typer.Option(help="What if: prompt tokens a tick.", min=1)
    ] = None,
    ageing_ticks: Annotated[int | None, typer.Option(help="What if: ageing.", min=1)] = None,
    policy: Annotated[PolicyFlag | None, typer.Option(help="What if: batching.")] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="What if: pages of equal prompt starts shared or not.")
    ] = None,
    ignore_priority: Annotated[
        bool, typer.Option("--ignore-priority", help="What if: first come, first served.")
    ] = False,
    view: Annotated[bool, typer.Option("--view", help="Open it in the live page.")] = False,
    port: Annotated[int, typer.Option(help="Of the live page; 0: any.", min=0, max=65535)] = 0,
) -> None:
    """Run a recording through the scheduler again and compare every decision.

    With a what-if option: simulate the recorded load under another configuration.
    """
    from astrai.cli import recordings as commands
    from astrai.observe.whatif import Change

    change = Change(
        pages,
        page_size,
        slots,
        prefill_budget,
        ageing_ticks,
        policy.value if policy else None,
        prefix_cache,
        ignore_priority,
    )
    if view:
        _view(recording, port)
    elif change != Change():
        commands.what_if(recording, change)
    elif code := commands.replay(recording):
        raise typer.Exit(code)


def _view(recording: Path, port: int) -> None:
    """Serve the recording in the live page to this machine, until Ctrl-C."""
    import socket

    from astrai.observe.recording import Recording

    try:
        import uvicorn

        from astrai.server.playback import create_playback_app
    except ImportError as error:
        raise CliError(f"{error}: install it with pip install 'astrai[serve]'") from None
    found = Recording(recording)
    found.require_whole("the live page")
    app = create_playback_app(found.events(), recording.name)
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/live", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        server.run(sockets=[listener])
