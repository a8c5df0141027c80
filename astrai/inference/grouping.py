"""Which decode steps share one dense matmul."""

from __future__ import annotations

from collections.abc import Sequence

from astrai.config import GroupDecode
from astrai.inference.task import Task

# Pages of padding that cost about as much as one more matmul per layer (measured on two CPU cores:
# 40 µs for a group, 3 µs for a page of one task).
GROUP_PADDING = 14


def groups_of(steps: Sequence[Task], kind: GroupDecode) -> list[list[Task]]:
    """Tasks that decode in this tick, by what their attention has in common.

    "position": the same position, so nothing is padded. "length": similar numbers of pages, the
    shorter tables padded, as long as that costs less than another matmul would.
    """
    if kind == "off":
        return [[task] for task in steps]
    if kind == "position":
        standing: dict[int, list[Task]] = {}
        for task in steps:
            standing.setdefault(task.computed, []).append(task)
        return list(standing.values())
    groups: list[list[Task]] = []
    width = padded = 0
    for task in sorted(steps, key=lambda task: -len(task.page_table)):
        padded += width - len(task.page_table)
        if not groups or padded > GROUP_PADDING:
            width, padded = len(task.page_table), 0
            groups.append([])
        groups[-1].append(task)
    return groups
