"""`astrai pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from astrai.cli.options import DEFAULT


def pull(
    name: Annotated[str, typer.Argument(help="A known name or hub id.")] = DEFAULT.model,
) -> None:
    """Fetch a model, and print where it is."""
    from astrai.models.pull import resolve

    print(resolve(name))
