"""The library's front door for batches: prompts in, outputs in order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from astrai.config import EngineConfig
from astrai.front.choice import Choice
from astrai.front.intake import Intake
from astrai.front.sampling_params import SamplingParams
from astrai.front.text import token_text
from astrai.inference.engine import Message
from astrai.inference.task import FinishReason, Task, TokenLogprob, Update
from astrai.models.tokenizer import Tokenizer
from astrai.process.link import Budget
from astrai.runtime.assemble import assemble

Prompt = str | Sequence[int] | Mapping[str, Any]
ChatMessages = Sequence[Mapping[str, Any]]


class Logprob(NamedTuple):
    logprob: float
    rank: int | None  # 1 = the most probable token
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `logprobs[i]` maps token ids, the chosen one first, to Logprob."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why, when finish_reason is "error"
    pooled: list[float] | None = None  # [hidden_size], if SamplingParams.pooling asked for it


class RequestTimes(NamedTuple):
    """Seconds of the engine's clock, and what the request went through."""

    arrived: float
    admitted: float | None
    first_token: float | None
    ended: float | None
    waits: dict[str, int]  # reason → ticks spent waiting for it
    preemptions: int

    @property
    def to_first_token(self) -> float:
        """Seconds from arrival; RuntimeError if there was no token."""
        if self.first_token is None:
            raise RuntimeError(f"{self.first_token = }: the request has no first token")
        return self.first_token - self.arrived

    @property
    def after_first_token(self) -> float:
        """Seconds from the first token to the end."""
        if self.ended is None:
            raise RuntimeError(f"{self.ended = }: the request has not ended")
        return self.ended - self.arrived - self.to_first_token


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its completions. `prompt_logprobs[0]` is None: nothing predicts token 0."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    times: RequestTimes


class LLM:
    """Generates for whole batches, in the calling thread.

    `LLM(model, dtype=..., max_slots=..., ...)`: every field of EngineConfig is a keyword.

    Owns an engine. Not for use from several threads at once: AsyncEngine is.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"LLM has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
        parts = assemble(EngineConfig(model=model, **options), self._read)
        front = parts.front
        self.config = front.config
        self.engine = parts.engine
        self.tokenizer: Tokenizer = front.tokenizer
        self.events = parts.engine.scheduler.events
        self.budget: Budget = front.budget
        self.model_name: str = front.model_name
        self.intake = Intake(front.limits, front.tokenizer, front.config.seed)
        self._requests = itertools.count()
        self._open: dict[int, tuple[Choice, CompletionOutput]] = {}
        self._progress: Any = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Outputs in the order of `prompts`.

        A prompt is text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}. Raises
        ValueError, naming the prompt, before anything runs if one cannot be served.
        """
        many = _as_list(prompts)
        params = _per_prompt(sampling_params, len(many))
        requests = []
        for i, (prompt, chosen) in enumerate(zip(many, params)):
            text, ids = self._encoded(prompt, i)
            try:
                tasks = self.intake.tasks(ids, chosen, request_id=str(next(self._requests)))
                if chosen.structured is not None and self.engine.grammars is not None:
                    self.engine.grammars.wait(chosen.structured)
            except ValueError as error:
                if len(many) == 1:
                    raise
                raise ValueError(f"prompt {i} of {len(many)}: {error}") from error
            requests.append((text, tasks))
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: ChatMessages | Sequence[ChatMessages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or several, through the model's chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [
            self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt, **(chat_template_kwargs or {})
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def _encoded(self, prompt: Prompt, i: int) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, Mapping):
            return None, list(prompt)
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), list(prompt["prompt_token_ids"])
        if isinstance(text := prompt.get("prompt"), str):
            return text, self.tokenizer.encode(text)
        raise ValueError(
            f"prompt {i} has the keys {sorted(prompt)}, expected 'prompt' or 'prompt_token_ids'"
        )

    def _run(
        self, requests: Sequence[tuple[str | None, list[Task]]], use_tqdm: bool
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for text, tasks in requests:
            completions = [self._opened(task) for task in tasks]
            outputs.append(_request_output(text, tasks[0], completions))
        if use_tqdm:
            from tqdm import tqdm

            total = sum(task.max_tokens for _, tasks in requests for task in tasks)
            self._progress = tqdm(total=total, unit="tok", desc="generate", dynamic_ncols=True)
        try:
            self.engine.post(Message(add=[tasks[0] for _, tasks in requests]))
            while not self.engine.idle:
                self.engine.step()
            self.engine.scheduler.check()
        finally:
            self._close()
        for output, (_, tasks) in zip(outputs, requests):
            self._complete(output, tasks)
        return outputs

    def _opened(self, task: Task) -> CompletionOutput:
        scored = task.params.logprobs is not None
        output = CompletionOutput(
            task.index, "", [], 0.0 if scored else None, [] if scored else None
        )
        self._open[task.id] = (Choice(self.tokenizer, task), output)
        return output

    def _close(self) -> None:
        """Abort what an interruption left: the engine is clean for the next call."""
        if self._open:
            self.engine.post(Message(abort=list(self._open)))
            while not self.engine.idle:
                self.engine.step()
            self._open.clear()
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _read(self, updates: list[Update]) -> None:
        for update in updates:
            if update.task.id not in self._open:
                continue
            choice, output = self._open[update.task.id]
            delta = choice.read(update)
            output.text += delta.text
            output.token_ids += delta.token_ids
            if output.logprobs is not None and output.cumulative_logprob is not None:
                output.logprobs += [self._ranked(scored) for scored in delta.logprobs or ()]
                output.cumulative_logprob += sum(s.logprob for s in delta.logprobs or ())
            if self._progress is not None:
                self._progress.update(len(delta.token_ids))
            if delta.finish_reason is not None:
                self._finish(update, delta.finish_reason, output)
                output.stop_reason, output.error = delta.stop_reason, delta.error
                output.pooled = delta.pooled

    def _finish(self, update: Update, reason: FinishReason, output: CompletionOutput) -> None:
        output.finish_reason = reason
        del self._open[update.task.id]
        if update.finish_reason is None:  # the text failed at the edge; the loop goes on
            self.engine.post(Message(abort=[update.task.id]))
        if self._progress is not None:  # tokens it did not need
            self._progress.total -= update.task.max_tokens - len(output.token_ids)

    def _complete(self, output: RequestOutput, tasks: list[Task]) -> None:
        leader = tasks[0]
        output.finished = True
        output.num_cached_tokens = leader.n_cached
        output.times = _times(leader)
        if leader.params.prompt_logprobs is not None:
            ranked = [self._ranked(scored) for scored in leader.prompt_logprobs]
            output.prompt_logprobs = [None, *ranked]

    def _ranked(self, scored: TokenLogprob) -> dict[int, Logprob]:
        text = token_text(self.tokenizer, scored.token)
        ranked = {scored.token: Logprob(scored.logprob, scored.rank, text)}
        for rank, (token, logprob) in enumerate(scored.top, 1):
            ranked.setdefault(token, Logprob(logprob, rank, token_text(self.tokenizer, token)))
        return ranked


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, n: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * n
    if isinstance(params, SamplingParams):
        return [params] * n
    if len(params) != n:
        raise ValueError(f"{len(params)} sampling params for {n} prompts, expected one or {n}")
    return list(params)


def _request_output(
    text: str | None, leader: Task, completions: list[CompletionOutput]
) -> RequestOutput:
    return RequestOutput(
        request_id=leader.request_id,
        prompt=text,
        prompt_token_ids=leader.prompt,
        prompt_logprobs=None,
        outputs=completions,
        finished=False,
        num_cached_tokens=0,
        times=_times(leader),
    )


def _times(task: Task) -> RequestTimes:
    return RequestTimes(
        task.arrived_at,
        task.admitted_at,
        task.first_token_at,
        task.ended_at,
        task.waits,
        task.n_preempted,
    )
