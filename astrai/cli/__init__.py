"""The command line: one file a command, and the flags that several share."""

from __future__ import annotations

from astrai.cli.app import main, run

__all__ = ["main", "run"]
