"""Where the time of a request went, in plain words and as data, from what the scheduler wrote."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from astrai.observe.ticks import Batch

# Bounds of what is kept: of each list of a task the newest, of a set of holders the largest.
_HOLDERS = 8
_CHUNKS = 64
_PREEMPTIONS = 16
_BLOCKS = 4096
_BLOCKS_PER_WAIT = 32

_FOR = {
    "slots": "for a slot",
    "pages": "for pages",
    "prefill": "for the prefill budget",
    "results": "for its last result",
    "grammar": "for its grammar",
}
_ENDS = {
    "stop": "stopped",
    "length": "reached its length",
    "abort": "was aborted",
    "error": "failed",
}


class Why(NamedTuple):
    """What became of one request."""

    text: str
    data: dict[str, Any]


def told(stories: Sequence[Why]) -> dict[str, Any]:
    """The stories of a request's prompts, one or several, as the body of an answer."""
    texts = [story.text for story in stories]
    if len(texts) > 1:
        texts = [f"prompt {i}: {text}" for i, text in enumerate(texts)]
    return {"text": "\n".join(texts), "prompts": [story.data for story in stories]}


class _Preemption(NamedTuple):
    tick: int
    by: int


class _Chunk(NamedTuple):
    tick: int
    start: int
    n: int


class _Prefix(NamedTuple):
    n_hit: int
    n_full: int  # positions in full pages, which is as far as a hit could go
    evicted: int  # tick that took the page at n_hit, or -1


class _Block(NamedTuple):
    """From `tick` on the queue waits for `reason` (None: not at all)."""

    tick: int
    reason: str | None
    holders: tuple[int, ...]  # who had what the head waits for, the largest first


@dataclass(slots=True, eq=False)
class _Story:
    """One task as the events tell it. Ticks are -1 and seconds None until they come."""

    task: int
    request: str
    index: int
    n_prompt: int
    max_tokens: int
    priority: int
    arrived: float
    arrived_tick: int
    queued_since: int = -1  # the tick it joined the queue; -1 outside of it
    joined_holders: tuple[str, tuple[int, ...]] | None = None  # of a block older than its wait
    waits: dict[str, int] = field(default_factory=dict)
    holders: dict[str, list[int]] = field(default_factory=dict)  # reason → tasks
    slot: int = -1
    admitted: float | None = None
    admitted_tick: int = -1
    n_admitted: int = 0
    n_cached: int = 0
    prefix: _Prefix | None = None
    n_preempted: int = 0
    preemptions: deque[_Preemption] = field(default_factory=lambda: deque(maxlen=_PREEMPTIONS))
    n_chunks: int = 0
    n_prefilled: int = 0
    chunks: deque[_Chunk] = field(default_factory=lambda: deque(maxlen=_CHUNKS))
    first_token: float | None = None
    first_token_tick: int = -1
    ended: float | None = None
    ended_tick: int = -1
    reason: str | None = None
    n_output: int = 0
    lost: bool = False  # its engine ended without a word about it


class WhyReader:
    """Keeps the story of every live request and of the last `n_ended` that ended.

    Pages are counted from "take", "share" and "return", reasons and ticks of waiting are the
    scheduler's own. Who held what is noted when a reason begins, when somebody is admitted and
    others wait on, and when a task joins a queue that waits already.

    Owns the stories, and the lock between the thread of `apply` and that of `why`.
    """

    def __init__(self, n_ended: int = 1024, max_live: int = 1 << 16) -> None:
        self._lock = threading.Lock()
        self._n_ended = n_ended
        self._max_live = max_live
        self._tick = 0
        self._counted = True  # whether the wait of this tick is counted
        self._admitted = False  # whether this tick admitted anybody
        self._requests: dict[str, list[_Story]] = {}  # request id → its choices
        self._ended: deque[tuple[str, list[_Story]]] = deque()
        self._live: dict[int, _Story] = {}  # task id → story
        self._names: dict[int, str] = {}  # task id → request id, as long as the request is known
        self._refused: dict[str, str] = {}
        self._held: dict[int, int] = {}  # running task → pages
        self._chunked: dict[int, None] = {}  # tasks with a prefill chunk in the last tick
        self._queued: dict[int, None] = {}  # in order of joining
        self._gated: dict[int, None] = {}  # beside the queue: each waits for its grammar
        self._joined: list[_Story] = []  # since the last tick
        self._blocked: str | None = None
        self._blocks: deque[_Block] = deque(maxlen=_BLOCKS)
        self._waited: dict[str, int] = {}  # reason → ticks the queue waited, to tell live tasks
        self._marks: dict[int, dict[str, int]] = {}  # queued task → _waited when it joined
        self._handlers: dict[str, Callable[..., None]] = {
            "arrive": self._arrive,
            "refuse": self._refuse,
            "wait": self._wait,
            "grammar": self._grammar,
            "admit": self._admit,
            "prefix": self._prefix,
            "take": self._take,
            "share": self._take,
            "return": self._return,
            "prefill": self._prefill,
            "preempt": self._preempt,
            "first_token": self._first_token,
            "end": self._end,
            "snapshot": self._snapshot,
        }

    # ── what is asked ───────────────────────────────────────────────────────────────────────────

    def why(self, request_id: str) -> Why | None:
        """The story of a request so far; None if it is not known, or no longer. Any thread."""
        with self._lock:
            return self._why(request_id)

    def _why(self, request_id: str) -> Why | None:
        if (message := self._refused.get(request_id)) is not None:
            return Why(f"refused: {message}", {"request_id": request_id, "refused": message})
        stories = self._requests.get(request_id)
        if stories is None:
            return None
        if len(stories) == 1:
            text = self._tell(stories[0])
        else:
            text = "\n".join(f"choice {s.index}: {self._tell(s)}" for s in stories)
        return Why(text, {"request_id": request_id, "choices": [self._data(s) for s in stories]})

    # ── what is heard ───────────────────────────────────────────────────────────────────────────

    def apply(self, tick: int, batch: Batch) -> None:
        """All events of one tick."""
        with self._lock:
            self._apply(tick, batch)

    def _apply(self, tick: int, batch: Batch) -> None:
        if tick < self._tick:
            self._restarted()
        self._tick = tick
        self._counted = self._admitted = False
        handlers = self._handlers
        chunked: dict[int, None] = {}
        for kind, values in batch:
            if (handle := handlers.get(kind)) is not None:
                handle(*values)
            if kind == "prefill":
                chunked[values[0]] = None
        self._chunked = chunked
        self._close_tick()

    def _close_tick(self) -> None:
        self._count_wait()
        if self._blocked is not None and self._admitted and self._blocks[-1].tick != self._tick:
            # The same reason, but others hold now what the queue waits for.
            self._blocks.append(_Block(self._tick, self._blocked, self._holders(self._blocked)))
        if self._blocked is not None and self._joined:
            began = self._blocks[-1].tick
            late = [s for s in self._joined if s.task in self._queued and s.queued_since > began]
            holders = self._holders(self._blocked) if late else ()
            for story in late:
                story.joined_holders = (self._blocked, holders)
        self._joined.clear()

    def _count_wait(self) -> None:
        """After the tick's Refill: the queue is empty, or waits for what blocks its head."""
        if self._counted:
            return
        self._counted = True
        if self._gated:
            self._waited["grammar"] = self._waited.get("grammar", 0) + 1
        if not self._queued and self._blocked is not None:
            self._blocked = None
            self._blocks.append(_Block(self._tick, None, ()))
        elif self._blocked is not None:
            self._waited[self._blocked] = self._waited.get(self._blocked, 0) + 1

    def _restarted(self) -> None:
        """Ticks begin anew: what lived in the old engine is gone, and nobody said how it ended."""
        for story in list(self._live.values()):
            story.lost = True
            self._finish(story, "error")
        self._held.clear()
        self._queued.clear()
        self._gated.clear()
        self._joined.clear()
        self._marks.clear()
        self._blocks.clear()
        self._blocked = None

    def _snapshot(self, time: float, config: Any, tasks: list[dict[str, Any]], *rest: Any) -> None:
        """Every task that lives: another engine's tasks ended unheard."""
        known = {task["task"] for task in tasks}
        for story in [s for s in self._live.values() if s.task not in known]:
            self._held.pop(story.task, None)
            story.lost = True
            self._finish(story, "error")

    def _arrive(
        self,
        task: int,
        request: str,
        n_prompt: int,
        max_tokens: int,
        priority: int,
        time: float,
        choices: list[int],
        *rest: Any,
    ) -> None:
        if len(self._live) >= self._max_live:
            self._finish(next(iter(self._live.values())), None)
        self._refused.pop(request, None)
        stories = [
            _Story(id, request, index, n_prompt, max_tokens, priority, time, self._tick)
            for index, id in enumerate((task, *choices))
        ]
        self._requests[request] = stories
        for story in stories:
            self._live[story.task] = story
            self._names[story.task] = request
        self._join(stories[0], self._tick)

    def _refuse(self, request: str, message: str, *rest: Any) -> None:
        self._refused[request] = message
        if len(self._refused) > self._n_ended:
            del self._refused[next(iter(self._refused))]

    def _join(self, story: _Story, since: int) -> None:
        """It waits from tick `since` on."""
        story.queued_since = since
        self._queued[story.task] = None
        self._marks[story.task] = dict(self._waited)
        self._joined.append(story)

    def _wait(self, reason: str, head: int, *rest: Any) -> None:
        if reason == "grammar":
            self._queued.pop(head, None)
            self._gated[head] = None
            return
        self._blocked = reason
        self._blocks.append(_Block(self._tick, reason, self._holders(reason)))

    def _grammar(self, task: int, error: str | None, *rest: Any) -> None:
        if (story := self._live.get(task)) is None or error is not None:
            return  # refused: its choices end
        story.waits = self._waits_now(story)
        self._gated.pop(task, None)
        self._join(story, self._tick)

    def _admit(
        self, task: int, slot: int, n_cached: int, waits: dict[str, int], time: float, *rest: Any
    ) -> None:
        if (story := self._live.get(task)) is None:
            return
        self._leave_queue(story, waits)
        self._admitted = True
        self._held.setdefault(task, 0)
        story.slot = slot
        story.n_admitted += 1
        if story.n_admitted == 1:
            story.admitted, story.admitted_tick = time, self._tick
            story.n_cached = min(n_cached, story.n_prompt)

    def _leave_queue(self, story: _Story, waits: dict[str, int]) -> None:
        story.waits = waits
        if self._gated.pop(story.task, 0) is None:
            del self._marks[story.task]
        if story.task not in self._queued:
            return
        for reason, holders in self._seen_waiting(story):
            known = story.holders.setdefault(reason, [])
            known += [task for task in holders if task not in known and task != story.task]
            del known[:-_HOLDERS]
        story.queued_since = -1
        story.joined_holders = None
        del self._queued[story.task]
        del self._marks[story.task]

    def _seen_waiting(self, story: _Story) -> Iterable[tuple[str, tuple[int, ...]]]:
        """(reason, holders) of the newest blocks that it waited through, oldest first."""
        seen: list[tuple[str, tuple[int, ...]]] = []
        for block in reversed(self._blocks):
            if block.tick < story.queued_since or len(seen) == _BLOCKS_PER_WAIT:
                break
            if block.reason is not None:
                seen.append((block.reason, block.holders))
        if story.joined_holders is not None:
            seen.append(story.joined_holders)
        return reversed(seen)

    def _holders(self, reason: str) -> tuple[int, ...]:
        """Who has now what the head of the queue waits for."""
        if reason == "pages":
            largest = sorted(self._held.items(), key=itemgetter(1), reverse=True)
            return tuple(task for task, pages in largest[:_HOLDERS] if pages)
        if reason == "slots":
            return tuple(self._held)[:_HOLDERS]
        if reason == "prefill":
            return tuple(self._chunked)[:_HOLDERS]
        return ()

    def _prefix(self, task: int, n_hit: int, n_full: int, evicted: int, *rest: Any) -> None:
        if (story := self._live.get(task)) is not None and story.prefix is None:
            story.prefix = _Prefix(n_hit, n_full, evicted)

    def _take(self, task: int, frames: list[int], *rest: Any) -> None:
        self._held[task] = self._held.get(task, 0) + len(frames)

    def _return(self, task: int, *rest: Any) -> None:
        self._held.pop(task, None)

    def _prefill(self, task: int, start: int, count: int, *rest: Any) -> None:
        if (story := self._live.get(task)) is not None:
            story.n_chunks += 1
            story.n_prefilled += count
            story.chunks.append(_Chunk(self._tick, start, count))

    def _preempt(self, task: int, by: int, *rest: Any) -> None:
        self._held.pop(task, None)
        self._count_wait()  # this tick's Refill is over: the victim waits from the next one on
        if (story := self._live.get(task)) is not None:
            story.n_preempted += 1
            story.preemptions.append(_Preemption(self._tick, by))
            story.slot = -1
            self._join(story, self._tick + 1)

    def _first_token(self, task: int, time: float, *rest: Any) -> None:
        if (story := self._live.get(task)) is not None:
            story.first_token, story.first_token_tick = time, self._tick
            self._release_choices(story)

    def _release_choices(self, story: _Story) -> None:
        """The other choices of a request queue once the first has its prompt computed, or never."""
        if story.index == 0:
            for other in self._requests.get(story.request, ())[1:]:
                if other.reason is None and not other.n_admitted and other.queued_since < 0:
                    self._join(other, self._tick)

    def _end(
        self, task: int, reason: str, n_output: int, time: float, waits: dict[str, int], *rest: Any
    ) -> None:
        self._held.pop(task, None)
        if (story := self._live.get(task)) is None:
            return
        self._leave_queue(story, waits)
        story.n_output, story.ended = n_output, time
        self._release_choices(story)
        self._finish(story, reason)

    def _finish(self, story: _Story, reason: str | None) -> None:
        """No more is heard of it. Its request joins the ended ones with its last choice."""
        story.reason, story.ended_tick, story.slot = reason, self._tick, -1
        self._live.pop(story.task, None)
        self._queued.pop(story.task, None)
        self._gated.pop(story.task, None)
        self._marks.pop(story.task, None)
        stories = self._requests.get(story.request, [])
        if any(other.task in self._live for other in stories):
            return
        self._ended.append((story.request, stories))
        while len(self._ended) > self._n_ended:
            request, gone = self._ended.popleft()
            if self._requests.get(request) is gone:
                del self._requests[request]
            for old in gone:
                self._names.pop(old.task, None)

    # ── as data ─────────────────────────────────────────────────────────────────────────────────

    def _data(self, story: _Story) -> dict[str, Any]:
        waits = self._waits_now(story)
        holders = self._holders_now(story)
        return {
            "task": story.task,
            "choice": story.index,
            "state": self._state(story),
            "n_prompt": story.n_prompt,
            "max_tokens": story.max_tokens,
            "priority": story.priority,
            "n_output": None if story.lost else story.n_output,
            "lost_with_its_engine": story.lost,
            "finish_reason": story.reason,
            "waits": [
                {
                    "reason": reason,
                    "ticks": ticks,
                    "held_by": [self._who(task) for task in holders.get(reason, ())],
                }
                for reason, ticks in waits.items()
            ],
            "preempted": story.n_preempted,
            "preemptions": [{"tick": tick, "by": self._who(by)} for tick, by in story.preemptions],
            "prefix": None
            if story.prefix is None
            else {
                "hit_tokens": story.prefix.n_hit,
                "full_page_tokens": story.prefix.n_full,
                "missed_at": story.prefix.n_hit
                if story.prefix.n_hit < story.prefix.n_full
                else None,
                "evicted_at_tick": story.prefix.evicted if story.prefix.evicted >= 0 else None,
            },
            "prefill": {
                "tokens": story.n_prefilled,
                "chunks": story.n_chunks,
                "last_chunks": [chunk._asdict() for chunk in story.chunks],
            },
            "ticks": {
                "arrived": story.arrived_tick,
                "admitted": _known(story.admitted_tick),
                "first_token": _known(story.first_token_tick),
                "ended": _known(story.ended_tick),
                "now": self._tick,
            },
            "seconds": _seconds(story),
        }

    def _who(self, task: int) -> dict[str, Any]:
        return {"task": task, "request_id": self._names.get(task)}

    @staticmethod
    def _state(story: _Story) -> str:
        if story.ended_tick >= 0:
            return "ended"
        if story.queued_since >= 0:
            return "preempted" if story.n_admitted else "waiting"
        if story.slot < 0:
            return "held back"  # until the first choice has computed the prompt
        return "prefill" if story.first_token is None else "decode"

    def _waits_now(self, story: _Story) -> dict[str, int]:
        """Its ticks by reason; of a task in the queue up to this tick."""
        waits = dict(story.waits)
        if (mark := self._marks.get(story.task)) is not None:
            gated = story.task in self._gated
            for reason, ticks in self._waited.items():
                if (reason == "grammar") == gated and ticks > mark.get(reason, 0):
                    waits[reason] = waits.get(reason, 0) + ticks - mark.get(reason, 0)
        return waits

    def _holders_now(self, story: _Story) -> dict[str, list[int]]:
        holders = {reason: list(tasks) for reason, tasks in story.holders.items()}
        if story.task in self._queued:
            for reason, tasks in self._seen_waiting(story):
                known = holders.setdefault(reason, [])
                known += [task for task in tasks if task not in known and task != story.task]
                del known[:-_HOLDERS]
        return holders

    # ── in words ────────────────────────────────────────────────────────────────────────────────

    def _tell(self, story: _Story) -> str:
        parts = [self._tell_waits(story)]
        if story.n_preempted:
            parts.append(_tell_preemptions(story))
        if story.prefix is not None and (told := _tell_prefix(story.prefix)):
            parts.append(told)
        if story.n_chunks:
            parts.append(
                f"prefilled {_count(story.n_prefilled, 'token')} in "
                f"{_count(story.n_chunks, 'chunk')}"
            )
        if (spent := _tell_seconds(story)) is not None:
            parts.append(spent)
        if story.lost:
            parts.append(f"lost with its engine at tick {story.ended_tick}")
        elif story.reason is not None:
            parts.append(
                f"{_ENDS.get(story.reason, story.reason)} at tick {story.ended_tick} after "
                f"{_count(story.n_output, 'token')}"
            )
        return "; ".join(parts)

    def _tell_waits(self, story: _Story) -> str:
        waits = self._waits_now(story)
        if not waits:
            state = self._state(story)
            return state if state in ("waiting", "held back") else "did not wait"
        holders = self._holders_now(story)
        told = []
        for reason, ticks in sorted(waits.items(), key=itemgetter(1), reverse=True):
            by = ""
            if named := holders.get(reason):
                more = f" and {len(named) - 4} more" if len(named) > 4 else ""
                by = f" (held by {', '.join(map(str, named[:4]))}{more})"
            told.append(f"{ticks} {_FOR.get(reason, f'for {reason}')}{by}")
        verb = "has waited" if story.queued_since >= 0 else "waited"
        return f"{verb} {_count(sum(waits.values()), 'tick')}: {', '.join(told)}"


def _tell_preemptions(story: _Story) -> str:
    times = {1: "once", 2: "twice"}.get(story.n_preempted, f"{story.n_preempted} times")
    by = dict.fromkeys(p.by if p.by != story.task else -1 for p in story.preemptions)
    names = ", ".join("itself (it was the youngest)" if task < 0 else str(task) for task in by)
    return f"preempted {times} by {names}"


def _tell_prefix(prefix: _Prefix) -> str:
    if not prefix.n_full:
        return ""
    told = f"prefix hit {_count(prefix.n_hit, 'token')}" if prefix.n_hit else ""
    if prefix.n_hit < prefix.n_full:
        cause = f"evicted at tick {prefix.evicted}" if prefix.evicted >= 0 else "not in the cache"
        missed = f"missed at token {prefix.n_hit}: {cause}"
        told = f"{told}, {missed}" if told else f"prefix {missed}"
    return told


def _tell_seconds(story: _Story) -> str | None:
    known = {name: value for name, value in _seconds(story).items() if value is not None}
    return ", ".join(f"{name} {value:.3f} s" for name, value in known.items()) or None


def _seconds(story: _Story) -> dict[str, float | None]:
    marks = (story.arrived, story.admitted, story.first_token, story.ended)
    names = ("queued", "prefill", "decode")
    return {
        name: None if a is None or b is None else b - a
        for name, a, b in zip(names, marks, marks[1:])
    }


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _known(tick: int) -> int | None:
    return tick if tick >= 0 else None
