"""Plans into kernels: the model, the pages and the sampler of one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from astrai.inference.cache.storage import KVCache
from astrai.inference.sampler import Sampled, Sampler, SampleRow
from astrai.inference.sampling_params import banned_tokens
from astrai.inference.task import NOTHING, Entry, Outcome, Plan, Task, TokenLogprob
from astrai.kernels.attention import AttentionBackend, AttentionBatch
from astrai.models.decoder import Decoder

# Prompt positions whose logits exist at once: bounds the memory of prompt_logprobs.
_LOGPROB_ROWS = 64


class Done(NamedTuple):
    """A launch whose outcomes are known already."""

    outcomes: list[Outcome]

    def wait(self) -> list[Outcome]:
        return self.outcomes


class Runner:
    """Runs one plan at a time: clears and copies pages, one ragged forward pass, one draw per row.

    Prefill chunks and decode steps share the pass, so the weights are read once per tick.

    Owns the decoder, the KV tensors and the sampler. Does not own tasks or the books: it reads
    page tables and tokens of the tasks in the plan, in the owner thread.
    """

    depth = 0

    def __init__(
        self, decoder: Decoder, kv: KVCache, attention: AttentionBackend, sampler: Sampler
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.attention = attention
        self.sampler = sampler

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Done:
        self.kv.clear_pages(plan.clears)
        for source, target in plan.copies:
            self.kv.copy_page(source, target)
        entries = list(plan.entries.values())
        hidden = self._forward(entries, plan.groups)
        ends = _row_ends(entries)
        drawn = self._draw(hidden, entries, ends)
        outcomes = []
        for entry, end in zip(entries, ends):
            sampled = next(drawn) if entry.samples else None
            scored = self._score_prompt(hidden[end - entry.n : end], entry)
            outcomes.append(_outcome(sampled, scored))
        return Done(outcomes)

    def _forward(self, entries: list[Entry], groups: list[list[Task]]) -> Tensor:
        """Hidden states of all rows of the plan, entry by entry: [sum of counts, hidden_size]."""
        ids: list[int] = []
        positions: list[int] = []
        for task, start, n, _, _ in entries:
            ids += task.tokens[start : start + n]
            positions += range(start, start + n)
        row_of = {entry.task: i for i, entry in enumerate(entries)}
        self.attention.plan(
            AttentionBatch(
                starts=[entry.start for entry in entries],
                counts=[entry.n for entry in entries],
                page_tables=[entry.task.page_table for entry in entries],
                groups=[[row_of[task] for task in group] for group in groups],
            )
        )
        device = self.kv.device
        return self.decoder.forward(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            self.attention.run,
        )

    def _draw(self, hidden: Tensor, entries: list[Entry], ends: list[int]) -> Iterator[Sampled]:
        """One token for each sampling entry, from the logits of its last row."""
        rows = [end - 1 for entry, end in zip(entries, ends) if entry.samples]
        if not rows:
            return iter(())
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        wanted = [_sample_row(entry) for entry in entries if entry.samples]
        return iter(self.sampler.sample(self.decoder.logits(hidden), wanted))

    def _score_prompt(self, hidden: Tensor, entry: Entry) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens that follow the positions of a prefill chunk."""
        task, start, n = entry.task, entry.start, entry.n
        top = task.params.prompt_logprobs
        if top is None or not task.wants_prompt_logprobs:
            return []
        targets = task.prompt[start + 1 : start + n + 1]
        scored: list[TokenLogprob] = []
        for i in range(0, len(targets), _LOGPROB_ROWS):
            part = targets[i : i + _LOGPROB_ROWS]
            logits = self.decoder.logits(hidden[i : i + len(part)])
            scores = self.sampler.prompt_logprobs(logits, part, top)
            scored += [TokenLogprob(token, *score) for token, score in zip(part, scores)]
        return scored


def _row_ends(entries: list[Entry]) -> list[int]:
    ends, end = [], 0
    for entry in entries:
        end += entry.n
        ends.append(end)
    return ends


def _sample_row(entry: Entry) -> SampleRow:
    task = entry.task
    params = task.params
    looks_back = params.penalised or params.min_tokens > task.n_output or bool(task.bad_words)
    output_ids = task.tokens[task.n_prompt :] if looks_back else []
    return SampleRow(
        params=params,
        seed=task.seed,
        position=entry.start + entry.n,
        slot=task.slot,
        prompt_ids=task.prompt,
        output_ids=output_ids,
        banned=banned_tokens(params, output_ids, tuple(task.stop_ids), task.bad_words)
        if looks_back
        else (),
    )


def _outcome(sampled: Sampled | None, scored: list[TokenLogprob]) -> Outcome:
    if sampled is None:
        return Outcome(prompt_logprobs=scored) if scored else NOTHING
    if sampled.error is not None:
        return Outcome(error=sampled.error)
    logprob = None
    if sampled.logprob is not None:
        logprob = TokenLogprob(sampled.token, sampled.logprob, sampled.rank or 0, sampled.top or ())
    return Outcome(sampled.token, logprob, scored)
