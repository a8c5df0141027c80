"""The queue: tasks that wait for their turn, in the order of their keys."""

from __future__ import annotations

import heapq

from astrai.inference.task import Task


class WaitingQueue:
    """A heap from which tasks may also be taken out of turn, because they ended.

    Such a task stays in the heap until it comes to the head, or until more than half of the heap
    is like it. So every operation is O(log n) amortised, and what clients queue and abandon while
    the head is blocked takes no more memory than what really waits.

    Owns the order. Does not own the tasks, nor say who may run.
    """

    __slots__ = ("_heap", "_tasks")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Task]] = []  # keys are unique
        self._tasks: dict[int, Task] = {}  # task id → task, of those that wait

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def head(self) -> Task | None:
        """Whose turn it is."""
        while self._heap and self._heap[0][1].id not in self._tasks:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def push(self, task: Task) -> None:
        self._tasks[task.id] = task
        heapq.heappush(self._heap, (task.key, task))

    def remove(self, task: Task) -> None:
        """Nothing if it does not wait. Only one that was the head may be pushed again."""
        if self._tasks.pop(task.id, None) is None:
            return
        if self._heap[0][1] is task:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._tasks):
            self._heap = [pair for pair in self._heap if pair[1].id in self._tasks]
            heapq.heapify(self._heap)

    def in_order(self) -> list[Task]:
        """All that wait, the head first. Any thread may ask."""
        return sorted(self._tasks.values(), key=lambda task: task.key)
