"""Compiled functions that outlive the process, where there is a place for them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc


@functools.cache
def sources() -> int:
    """A number of 56 bits that another content of any file of this directory changes.

    Numba finds what it kept by the content of the file of the function, and by the values that the
    function closes over. But parts of other files are compiled into it too: so whatever is `kept`
    closes over this number.
    """
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content.update(path.read_bytes())
    return int.from_bytes(content.digest()[:7], "big")


def kept(signature: Any, function: Callable[..., None]) -> Any:
    """`function`, compiled; kept beside its file or else in the user's cache."""
    try:
        return cfunc(signature, error_model="numpy", cache=True)(function)
    except Exception:
        # Nowhere to write, no room, or a damaged file (its error can be any): compiled at every
        # start, some seconds, but it starts. What the function itself is at fault for comes again.
        return cfunc(signature, error_model="numpy")(function)
