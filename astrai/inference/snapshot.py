"""What a reader of events needs that saw nothing until now: the values of a "snapshot" event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from astrai.inference.task import Task

if TYPE_CHECKING:
    from astrai.inference.scheduler import Scheduler


def snapshot_of(scheduler: Scheduler) -> tuple[Any, ...]:
    """The state between two ticks, as KINDS names it. O(tasks + pages they hold or cache)."""
    books, planning = scheduler.books, scheduler.config
    config = {
        "n_pages": books.pool.n_pages,
        "page_size": books.page_size,
        "max_slots": planning.max_slots,
        "prefill_budget": planning.prefill_budget,
        "group_decode": planning.group_decode,
        "batching": planning.batching,
    }
    tasks = [_task(task) for task in scheduler.tasks.values()]
    indexed = books.prefix.frames() if books.prefix_cache else []
    return scheduler.clock(), config, tasks, indexed, scheduler.blocked


def _task(task: Task) -> dict[str, Any]:
    return {
        "task": task.id,
        "request": task.request_id,
        "n_prompt": task.n_prompt,
        "max_tokens": task.max_tokens,
        "priority": task.priority,
        "slot": task.slot,
        "computed": task.computed,
        "n_output": task.n_output,
        "n_cached": task.n_cached,
        "n_preempted": task.n_preempted,
        "arrived": task.arrived_at,
        "admitted": task.admitted_at,
        "first_token": task.first_token_at,
        "frames": list(task.page_table),
    }
