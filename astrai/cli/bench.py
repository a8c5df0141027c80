"""`astrai bench`: what there is to measure."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated

import typer

import astrai.bench
from astrai.cli.options import CliError

SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, what there is.")] = None,
) -> None:
    """Measure: astrai bench NAME [--json] ...; the last line is one JSON object."""
    modules = pkgutil.iter_modules(astrai.bench.__path__)
    known = sorted(module.name for module in modules if module.name[0] != "_")
    if name in (None, "--help", "-h"):
        print("astrai bench NAME [--json], NAME one of: " + ", ".join(known))
        return
    if name not in known:
        raise CliError(f"no benchmark {name!r}; there are: {', '.join(known)}", 2)
    code = importlib.import_module(f"astrai.bench.{name}").main(context.args)
    if isinstance(code, int) and code:
        raise typer.Exit(code)
