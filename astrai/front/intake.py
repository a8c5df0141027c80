"""Requests into tasks: the one place where a request is checked before it enters the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from astrai.front.sampling_params import SamplingParams, resolve_seed
from astrai.front.text import StopWatcher, bad_word_ids
from astrai.inference.task import Task
from astrai.models.tokenizer import Tokenizer


class PromptTooLong(ValueError):
    """The prompt, or prompt + max_tokens, does not fit the context."""

    def __init__(self, n_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
        self.n_prompt = n_prompt
        self.max_tokens = max_tokens
        self.max_model_len = max_model_len
        asked = "" if max_tokens is None else f" + max_tokens {max_tokens}"
        room = "" if max_tokens is not None else " (and at least one token is to be generated)"
        super().__init__(
            f"prompt of {n_prompt} tokens{asked} exceeds the context of {max_model_len}{room}"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is checked against."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    n_pages: int  # of the whole pool
    page_size: int


class Intake:
    """Makes tasks of requests, in any thread.

    Owns the numbering of tasks.
    """

    def __init__(self, limits: Limits, tokenizer: Tokenizer, seed: int) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self._seed = seed
        self._ids = itertools.count()

    def tasks(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        namespace: str = "",
        priority: int = 0,
    ) -> list[Task]:
        """The `params.n` tasks of one request; the first leads, the others are its siblings.

        Raises ValueError (PromptTooLong with both numbers); nothing is queued then.
        """
        prompt = self._checked_prompt(prompt_ids)
        max_tokens = self._max_tokens(len(prompt), params)
        params.check_vocabulary(self.limits.vocab_size)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.limits.eos_token_ids)
        bad_words = bad_word_ids(self.tokenizer, params.bad_words)
        tasks = []
        for index in range(params.n):
            number = next(self._ids)
            if params.seed is None:
                seed = resolve_seed(self._seed, number + 1)
            else:
                seed = resolve_seed(params.seed, index)
            tasks.append(
                Task(
                    id=number,
                    request_id=request_id,
                    prompt=prompt,
                    params=params,
                    max_tokens=max_tokens,
                    seed=seed,
                    stop_ids=frozenset(stop_ids),
                    bad_words=bad_words,
                    stop_check=stop_check(self.tokenizer, params),
                    namespace=namespace,
                    priority=priority,
                    index=index,
                )
            )
        tasks[0].siblings = tasks[1:]
        tasks[0].check_fits(self.limits.n_pages, self.limits.page_size)
        return tasks

    def _checked_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        prompt = list(prompt_ids)
        if not prompt:
            raise ValueError("the prompt is empty: it has 0 tokens, expected at least 1")
        for i, token in enumerate(prompt):
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"prompt token {i} is {token!r}, expected an integer")
            if not 0 <= token < self.limits.vocab_size:
                raise ValueError(
                    f"prompt token {i} is {token}, expected 0 <= token < {self.limits.vocab_size}"
                )
        return prompt

    def _max_tokens(self, n_prompt: int, params: SamplingParams) -> int:
        room = self.limits.max_model_len - n_prompt
        if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
            raise PromptTooLong(n_prompt, params.max_tokens, self.limits.max_model_len)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if params.min_tokens > max_tokens:
            raise ValueError(f"min_tokens = {params.min_tokens}, expected <= {max_tokens}")
        return max_tokens


def stop_check(tokenizer: Tokenizer, params: SamplingParams) -> Callable[[int], str | None] | None:
    """What the loop asks after each token of a task that has stop strings."""
    return StopWatcher(tokenizer, params) if params.stop else None
