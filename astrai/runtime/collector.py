"""Python's garbage collector, kept out of the way of ticks and streams."""

from __future__ import annotations

import gc

# New containers before the young ones are walked; such walks before those of middle age are too;
# and so on to a walk of everything. Nothing that a tick makes is in a cycle, so counting references
# frees it, and a walk only finds what a library left: some MiB of that may wait.
_THRESHOLDS = (50_000, 20, 100)


def settle() -> None:
    """What is loaded by now stays, and is not walked again; what comes is walked rarely.

    For the whole process. With Python's own thresholds a batch of 256 requests was walked 700
    times, up to 14 ms at once: longer than a tick of the device, which then waits.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
