"""The engine for asyncio: one loop thread, one stream of deltas per request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from astrai.config import EngineConfig
from astrai.inference.assemble import Budget, assemble
from astrai.inference.choice import Choice
from astrai.inference.engine import Health, Message
from astrai.inference.sampling_params import SamplingParams
from astrai.inference.task import FinishReason, Timings, TokenLogprob, Update
from astrai.models.tokenizer import Tokenizer


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
    """Updates of one request, handed from the loop thread to its event loop."""

    loop: asyncio.AbstractEventLoop
    updates: deque[Update] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncEngine:
    """Serves requests of many coroutines from one engine loop.

    Owns the loop thread between `start` and `shutdown`, and the mailboxes of open streams.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        parts = assemble(config or EngineConfig(), self._deliver)
        self.config = parts.config
        self._engine = parts.engine
        self._intake = parts.intake
        self._recorder = parts.recorder
        self._mailboxes: dict[int, _Mailbox] = {}  # task id → its request's mailbox
        self._requests: dict[str, list[int]] = {}  # request id → task ids, while its stream is open
        self.events = parts.events
        self.tokenizer: Tokenizer = parts.tokenizer
        self.model_name: str = parts.model_name
        self.budget: Budget = parts.budget

    @property
    def max_model_len(self) -> int:
        return self._intake.limits.max_model_len

    def start(self) -> None:
        self._engine.start()

    async def shutdown(self) -> None:
        """Stop the loop after its present tick; open streams end with an error."""
        await asyncio.to_thread(self._engine.stop)
        if self._recorder is not None:
            self._recorder.close()

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        namespace: str = "",
        priority: int = 0,
    ) -> AsyncGenerator[StreamDelta, None]:
        """Deltas of all `params.n` choices as they come, until each has a finish_reason.

        Closing the generator aborts what still runs: its pages are free within a tick. Raises
        ValueError (PromptTooLong) or QueueFull before the first delta.
        """
        tasks = self._intake.tasks(prompt_ids, params, request_id, namespace, priority)
        box = _Mailbox(asyncio.get_running_loop())
        open_choices = {task.id: Choice(self.tokenizer, task) for task in tasks}
        self._mailboxes.update(dict.fromkeys(open_choices, box))
        self._requests[request_id] = list(open_choices)
        self._engine.post(Message(add=[tasks[0]]))
        try:
            while open_choices:
                await box.filled.wait()
                box.filled.clear()
                for update in _merged(box.updates):
                    if update.task.id not in open_choices:
                        continue
                    delta = self._delta(open_choices[update.task.id], update)
                    if delta.finish_reason is not None:
                        del open_choices[update.task.id]
                        if update.finish_reason is None:  # its text failed here; the loop goes on
                            self._engine.post(Message(abort=[update.task.id]))
                    yield delta
        finally:
            self._requests.pop(request_id, None)
            for task in tasks:
                self._mailboxes.pop(task.id, None)
            if open_choices:
                self._engine.post(Message(abort=list(open_choices)))

    def abort(self, request_id: str) -> bool:
        """End a request from outside its stream, which sees finish_reason "abort"."""
        found = self._requests.get(request_id)
        if found is not None:
            self._engine.post(Message(abort=found))
        return found is not None

    def healthy(self) -> Health:
        return self._engine.health()

    def stats(self) -> dict[str, Any]:
        """Counts of now: slots, pages, queue, tick."""
        return {
            "slots_total": self.config.max_slots,
            "preemptions": self._engine.scheduler.n_preemptions,
            **self._engine.health().numbers,
        }

    def _delta(self, choice: Choice, update: Update) -> StreamDelta:
        task = choice.task
        delta = choice.read(update)
        usage = None
        if delta.finish_reason is not None:
            usage = Usage(task.n_prompt, task.n_cached, choice.n_tokens, task.timings())
        return StreamDelta(task.index, *delta, usage)

    def _deliver(self, updates: list[Update]) -> None:
        """Loop thread: one call into each event loop per tick, however many tasks moved."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Update]]] = {}
        for update in updates:
            if box := self._mailboxes.get(update.task.id):
                by_loop.setdefault(box.loop, []).append((box, update))
        for loop, mail in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_drop, mail)


def _drop(mail: list[tuple[_Mailbox, Update]]) -> None:
    for box, update in mail:
        box.updates.append(update)
        box.filled.set()


def _merged(updates: deque[Update]) -> list[Update]:
    """All waiting updates, one per task: a slow reader gets larger deltas, not more of them."""
    merged: dict[int, Update] = {}
    while updates:
        task, token_ids, logprobs, reason = updates.popleft()
        if before := merged.get(task.id):
            token_ids, logprobs = before.token_ids + token_ids, before.logprobs + logprobs
        merged[task.id] = Update(task, token_ids, logprobs, reason)
    return list(merged.values())
