"""Plans into kernels: the model, the pages and the sampler of one device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor

from astrai.front.sampling_params import bad_word_ends, early_ends
from astrai.front.structured import GrammarError
from astrai.inference.cache.storage import PagedCache
from astrai.inference.task import NOTHING, Done, Entry, Outcome, Plan, Task, TokenLogprob
from astrai.kernels.attention import AttentionBackend, AttentionBatch
from astrai.models.decoder import Decoder
from astrai.runtime.sampling.sampler import Sampled, Sampler, SampleRow

# Prompt positions whose logits exist at once: bounds the memory of prompt_logprobs.
_LOGPROB_ROWS = 64


class Runner:
    """Runs one plan at a time: clears and copies pages, one ragged forward pass, one draw per row.

    Prefill chunks and decode steps share the pass, so the weights are read once per tick.

    Owns the decoder, the KV tensors and the sampler. Does not own tasks or the books: it reads
    page tables and tokens of the tasks in the plan, in the owner thread.
    """

    depth = 0

    def __init__(
        self, decoder: Decoder, kv: PagedCache, attention: AttentionBackend, sampler: Sampler
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
            outcome = outcome_of(next(drawn)) if entry.samples else NOTHING
            if entry.task.wants_prompt_logprobs:
                scored = self._score_prompt(hidden[end - entry.n : end], entry)
                outcome = outcome._replace(prompt_logprobs=scored)
            if entry.task.params.pooling is not None:
                outcome = pooled(hidden[end - entry.n : end], entry)
            outcomes.append(outcome)
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
        wanted = [
            sample_row(e, e.task.tokens[e.task.n_prompt :] if looks_back(e.task) else [])
            for e in entries
            if e.samples
        ]
        return iter(self.sampler.sample(self.decoder.logits(hidden), wanted))

    def _score_prompt(self, hidden: Tensor, entry: Entry) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens that follow the positions of a prefill chunk."""
        task, start, n = entry.task, entry.start, entry.n
        top = task.params.prompt_logprobs or 0
        targets = task.prompt[start + 1 : start + n + 1]
        scored: list[TokenLogprob] = []
        for i in range(0, len(targets), _LOGPROB_ROWS):
            part = targets[i : i + _LOGPROB_ROWS]
            logits = self.decoder.logits(hidden[i : i + len(part)])
            scores = self.sampler.prompt_logprobs(logits, part, top)
            scored += [TokenLogprob(token, *score) for token, score in zip(part, scores)]
        return scored


def pooled(hidden: Tensor, entry: Entry) -> Outcome:
    """What the positions of a prefill chunk, [n, hidden_size], add to the task's pooled state.

    The sum of all for "mean" (in float64, so that it hardly matters where chunks meet), the last
    prompt position for "last".
    """
    task, start, n = entry.task, entry.start, entry.n
    values: list[float] = []
    if task.params.pooling == "mean":
        values = hidden.double().sum(0).tolist()
    elif start + n == task.n_prompt:
        values = hidden[-1].tolist()
    if not math.isfinite(sum(values)):
        return Outcome(error=f"the hidden states of positions {start} to {start + n} have no sum")
    return Outcome(pooled=values)


def _row_ends(entries: list[Entry]) -> list[int]:
    ends, end = [], 0
    for entry in entries:
        end += entry.n
        ends.append(end)
    return ends


def looks_back(task: Task) -> bool:
    """What the task may draw next depends on what it drew before."""
    params = task.params
    return params.penalised or params.min_tokens > 0 or bool(task.bad_words)


def sample_row(entry: Entry, output_ids: list[int]) -> SampleRow:
    """What the sampler must know of an entry; `output_ids` matter if the task looks back."""
    task = entry.task
    banned: Collection[int] = ()
    ends: Collection[int] = ()
    if looks_back(task):
        banned = bad_word_ends(output_ids, task.bad_words)
        ends = early_ends(task.params, len(output_ids), task.stop_ids)
    mask: np.ndarray | None = None
    refused = None
    if task.matcher is None:
        banned = sorted({*banned, *ends})
    else:
        # What would end the output is held off only as long as the grammar lets it go on.
        held_off = {*ends, *task.matcher.eos_ids} if task.params.ignore_eos else ends
        try:
            mask = task.matcher.mask(held_off)
        except GrammarError as error:
            refused = str(error)
    return SampleRow(
        params=task.params,
        seed=task.seed,
        position=entry.start + entry.n,
        slot=task.slot,
        prompt_ids=task.prompt,
        output_ids=output_ids,
        banned=tuple(banned),
        mask=mask,
        refused=refused,
    )


def outcome_of(sampled: Sampled) -> Outcome:
    if sampled.error is not None:
        return Outcome(error=sampled.error)
    logprob = None
    if sampled.logprob is not None:
        rank, top = sampled.rank or 0, sampled.top or ()
        logprob = TokenLogprob(sampled.token, sampled.logprob, rank, top)
    return Outcome(sampled.token, logprob)
