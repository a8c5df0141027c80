"""One completion at the edge: the engine's updates into text."""

from __future__ import annotations

from typing import NamedTuple

from astrai.front.text import TextStream
from astrai.inference.task import FinishReason, Task, TokenLogprob, Update
from astrai.models.tokenizer import Tokenizer


class ChoiceDelta(NamedTuple):
    """What one update added to a completion."""

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None  # one per token, None if not asked for
    prompt_logprobs: list[TokenLogprob] | None  # with the first token of choice 0, if asked for
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    pooled: list[float] | None  # at the end of a task that pools


class Choice:
    """Turns a task's updates into deltas of text.

    The loop and this edge run the same stop matcher over the same tokens, so they agree on where
    a stop string ends the text; here the text is cut exactly.

    Owns the text state. Does not own the task, of which it reads what no longer changes.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        self.task = task
        self._stream = TextStream(tokenizer, task.params)
        self.n_tokens = 0  # read so far; the task itself may be ahead

    def read(self, update: Update) -> ChoiceDelta:
        """The delta of `update`. A text that cannot be decoded ends this completion only."""
        task, reason = update.task, update.finish_reason
        stop_reason = task.stop_reason if reason is not None else None
        error = task.error if reason is not None else None
        tokens = update.token_ids
        # The id that ended the task is a token of the output, but not part of its text.
        stop_id = stop_reason if isinstance(stop_reason, int) else None
        try:
            text = self._stream.push(tokens[:-1] if stop_id is not None else tokens)
            if reason is not None:
                text += self._stream.finish(stop_id)
        except Exception as failure:
            text, reason = "", "error"
            error = f"text of {tokens = }: {type(failure).__name__}: {failure}"
        computed = bool(tokens) or (task.samples_nothing and reason == "length")
        first = self.n_tokens == 0 and computed
        self.n_tokens += len(tokens)
        params = task.params
        scored = first and task.index == 0 and params.prompt_logprobs is not None
        return ChoiceDelta(
            token_ids=tokens,
            text=text,
            logprobs=None if params.logprobs is None else update.logprobs,
            prompt_logprobs=task.prompt_logprobs if scored else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            pooled=_pooled(task) if params.pooling is not None and reason == "length" else None,
        )


def _pooled(task: Task) -> list[float]:
    """The chunks' parts as one vector [hidden_size]."""
    total = [sum(column) for column in zip(*task.pooled, strict=True)]
    return [value / task.n_prompt for value in total] if task.params.pooling == "mean" else total
