"""The engine for asyncio: one loop, wherever it runs, and one stream of deltas per request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from astrai.config import EngineConfig
from astrai.front.admission import Admission, DeadlineExceeded, ShuttingDown, SlowReader
from astrai.front.choice import Choice
from astrai.front.intake import Intake
from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import GrammarError
from astrai.inference.engine import Health, Message
from astrai.inference.events import EventLog
from astrai.inference.task import FinishReason, Task, Timings, TokenLogprob, Update
from astrai.models.tokenizer import Tokenizer
from astrai.process.link import Budget, Link, ThreadLink

# Tokens, counted with the alternatives listed for them, that wait for a reader: a few MiB.
MAX_UNREAD = 1 << 16


class Usage(NamedTuple):
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What was added to choice `index` since its last delta."""

    index: int
    token_ids: list[int]
    text: str  # stop strings held back as far as they could still match, and cut
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob] | None  # with the first token of choice 0, if asked for
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    pooled: list[float] | None  # [hidden_size], on the last delta of a request that pools
    usage: Usage | None  # on the last delta of each choice


@dataclass(slots=True, eq=False)
class _Mailbox:
    """What the loop said of one request and its stream did not read yet, one update per task.

    A slow reader so gets larger deltas, not more of them.
    """

    loop: asyncio.AbstractEventLoop
    max_unread: int
    updates: dict[int, Update] = field(default_factory=dict)
    n_unread: int = 0
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None  # ends the stream before anything else is read

    def put(self, update: Update) -> None:
        if before := self.updates.get(update.task.id):
            before.token_ids.extend(update.token_ids)
            before.logprobs.extend(update.logprobs)
            update = before._replace(finish_reason=update.finish_reason)
        self.updates[update.task.id] = update
        self.filled.set()

    def count(self, update: Update) -> bool:
        """Whether what is unread is still within bounds with this update."""
        self.n_unread += len(update.token_ids) + sum(len(one.top) for one in update.logprobs)
        return self.n_unread <= self.max_unread

    def take(self) -> list[Update]:
        self.filled.clear()
        taken, self.updates, self.n_unread = list(self.updates.values()), {}, 0
        return taken

    def fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self.filled.set()


class AsyncEngine:
    """Serves requests of many coroutines from one engine loop.

    Owns the link to the loop between `start` and `shutdown`, the mailboxes of open streams and
    the bounds of the queue.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        link: Link | None = None,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        """Load the model of `config` in this process, or use the loop behind `link`."""
        self._link: Link = link or ThreadLink(config or EngineConfig())
        front = self._link.connect(self._deliver)
        self.config = front.config
        self.tokenizer: Tokenizer = front.tokenizer
        self.model_name: str = front.model_name
        self.budget: Budget = front.budget
        # Ended requests by how they ended: a finish_reason, or the name of what ended them.
        self.counts: Counter[str] = Counter()
        self._limits = front.limits
        self._intake = Intake(front.limits, front.tokenizer, front.config.seed)
        self._admission = Admission(
            front.config.max_waiting, front.config.max_waiting_tokens, front.config.max_slots or 1
        )
        self._max_unread = max_unread
        self._mailboxes: dict[int, _Mailbox] = {}  # task id → its request's mailbox
        self._requests: dict[str, list[int]] = {}  # request id → task ids, while its stream is open
        self._draining = False

    @property
    def events(self) -> EventLog:
        return self._link.events

    @property
    def max_model_len(self) -> int:
        return self._limits.max_model_len

    @property
    def ended(self) -> str | None:
        """Why the loop ended for good, if it did."""
        return self._link.ended

    @property
    def n_open(self) -> int:
        """Requests whose streams are open."""
        return len(self._requests)

    def start(self) -> None:
        self._link.start()

    @property
    def draining(self) -> bool:
        """New requests are refused: the server is about to end."""
        return self._draining

    def stop_admitting(self) -> None:
        """Refuse new requests from now on; open ones go on."""
        self._draining = True

    async def end_all(self, why: str, seconds: float = 1.0) -> None:
        """Tell every open stream why it ends, and give the loop `seconds` to let go of them."""
        for box in set(self._mailboxes.values()):
            box.fail(ShuttingDown(why))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while loop.time() < deadline and (self.n_open or self.stats().get("running")):
            await asyncio.sleep(0.02)

    async def shutdown(self) -> None:
        """Stop the loop after its present tick; open streams end with an error."""
        self.stop_admitting()
        await asyncio.to_thread(self._link.stop)

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        namespace: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[StreamDelta, None]:
        """Deltas of all `params.n` choices as they come, until each has a finish_reason.

        Closing the generator aborts what still runs: its pages are free within a tick. Raises
        ValueError (PromptTooLong), QueueFull or ShuttingDown before the first delta, and at any
        time DeadlineExceeded after `timeout` seconds, SlowReader, or ShuttingDown.
        """
        if self._draining:
            raise ShuttingDown("the server is shutting down", retry_after=5)
        tasks = self._intake.tasks(prompt_ids, params, request_id, namespace, priority)
        self._admission.enter(tasks[0])
        box = _Mailbox(asyncio.get_running_loop(), self._max_unread)
        open_choices = {task.id: Choice(self.tokenizer, task) for task in tasks}
        self._mailboxes.update(dict.fromkeys(open_choices, box))
        self._requests[request_id] = list(open_choices)
        timer = None
        if timeout is not None:
            late = DeadlineExceeded(f"the request took longer than its timeout of {timeout:g} s")
            timer = box.loop.call_later(timeout, box.fail, late)
        outcome = "abort"
        try:
            self._link.post(Message(add=[tasks[0]]))
            while open_choices:
                await box.filled.wait()
                if box.failure is not None:
                    raise box.failure
                for update in box.take():
                    if delta := self._read(open_choices, update):
                        outcome = delta.finish_reason or outcome
                        _raise_if_refused(params, delta)
                        yield delta
        finally:
            if timer is not None:
                timer.cancel()
            if open_choices:
                outcome = "abort" if box.failure is None else type(box.failure).__name__
            self.counts[outcome] += 1
            self._close(request_id, tasks, open_choices)

    def abort(self, request_id: str) -> bool:
        """End a request from outside its stream, which sees finish_reason "abort"."""
        found = self._requests.get(request_id)
        if found is not None:
            self._link.post(Message(abort=found))
        return found is not None

    def healthy(self) -> Health:
        return self._link.health()

    def ready(self) -> Health:
        """Whether a request sent now would be taken."""
        health = self._link.health()
        if self._draining:
            return Health(False, "shutting down", health.numbers)
        return health

    def stats(self) -> dict[str, Any]:
        """Counts of now: slots, pages, queue, tick."""
        return {"slots_total": self.config.max_slots, **self._link.health().numbers}

    def _read(self, open_choices: dict[int, Choice], update: Update) -> StreamDelta | None:
        """The delta of an update; None if it says nothing to the stream."""
        task = update.task
        choice = open_choices.get(task.id)
        if choice is None or not (update.token_ids or update.finish_reason):
            return None
        delta = choice.read(update)
        usage = None
        if delta.finish_reason is not None:
            usage = Usage(task.n_prompt, task.n_cached, choice.n_tokens, task.timings())
            del open_choices[task.id]
            if update.finish_reason is None:  # its text failed here; the loop goes on
                self._link.post(Message(abort=[task.id]))
        return StreamDelta(task.index, *delta, usage)

    def _close(self, request_id: str, tasks: list[Task], still_open: dict[int, Choice]) -> None:
        self._admission.leave(tasks[0].id)
        self._requests.pop(request_id, None)
        for task in tasks:
            self._mailboxes.pop(task.id, None)
        if still_open:
            self._link.post(Message(abort=list(still_open)))

    def _deliver(self, updates: list[Update]) -> None:
        """Link's thread: one call into each event loop per tick, however many tasks moved."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Update]]] = {}
        for update in updates:
            if not update.token_ids and update.finish_reason is None:
                self._admission.admit(update.task.id)
            if box := self._mailboxes.get(update.task.id):
                by_loop.setdefault(box.loop, []).append((box, update))
        for loop, mail in by_loop.items():
            with contextlib.suppress(RuntimeError):  # closed, and its streams with it
                loop.call_soon_threadsafe(self._drop, mail)

    def _drop(self, mail: list[tuple[_Mailbox, Update]]) -> None:
        for box, update in mail:
            box.put(update)
            if not box.count(update) and box.failure is None:
                text = f"{box.n_unread} tokens wait for a reader, at most {box.max_unread} may"
                box.fail(SlowReader(text))
                # Its stream may not wake for long: what it holds is given back now.
                task_ids = [i for i, other in self._mailboxes.items() if other is box]
                for task_id in task_ids:
                    self._mailboxes.pop(task_id)
                self._link.post(Message(abort=task_ids))
                box.updates.clear()


def _raise_if_refused(params: SamplingParams, delta: StreamDelta) -> None:
    """What its grammar refused before the first token is a fault of the request."""
    asked, usage = params.structured, delta.usage
    if asked is None or delta.error is None or usage is None or usage.completion_tokens:
        return
    source, _, why = delta.error.partition(": ")
    if source == asked.source:
        raise GrammarError(source, why)
