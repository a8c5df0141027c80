"""The command line. Every command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import astrai
from astrai.cli import animate, bench, chat, generate, pull, replay, serve, simulate, trace
from astrai.cli.options import CliError

# UsageError and ClickException, wherever the installed typer keeps them.
_USAGE_ERROR, _CLICK_ERROR = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="astrai",
    help="LLM inference: continuous batching over a paged, prefix-shared KV cache.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    serve.serve,
    chat.chat,
    generate.generate,
    pull.pull,
    animate.animate,
    replay.replay,
    trace.trace,
    simulate.simulate,
):
    app.command()(command)
app.command(context_settings=bench.SETTINGS)(bench.bench)


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """The exit code of a command line; what goes wrong is one line on stderr."""
    debug = "--debug" in args
    try:
        code = app([arg for arg in args if arg != "--debug"], "astrai", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"astrai: error: {_one_line(error)}", file=sys.stderr)
        if isinstance(error, CliError):
            return error.code
        return 2 if isinstance(error, _USAGE_ERROR) else 1


def _one_line(error: Exception) -> str:
    if isinstance(error, _CLICK_ERROR):
        message = str(error.format_message())  # type: ignore[attr-defined]
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (CliError, ValueError, RuntimeError, OSError, MemoryError)):
        message = str(error) or type(error).__name__
    elif isinstance(error, ImportError):
        message = str(error)
    else:
        message = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
    return " ".join(message.split())


def _version(asked: bool) -> None:
    if asked:
        print(f"astrai {astrai.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
