"""What a launch on a GPU leaves behind: results on their way to the host, read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from astrai.inference.task import NOTHING, Entry, Outcome, Task, TokenLogprob
from astrai.kernels.gpu.sampling.scores import WORDS, scores_of
from astrai.runtime.runner import outcome_of, pooled
from astrai.runtime.sampling.sampler import Draws, Sampled, checked, score_of

# Lines of results.
STEPS, ENDS = 0, 1


class Line(NamedTuple):
    """What rows sample."""

    tokens: Tensor  # int32 [n]
    tops: Tensor  # float32 [n], the largest logit of each row
    scores: Tensor  # int32 [n, WORDS]: see `scores_of`


class Results(NamedTuple):
    """What a launch samples: a line of the steps, and one of the ends of prompts."""

    drawn: Tensor  # int32 [2, 2, rows]: of each line the tokens, and the largest logits (float32)
    scores: Tensor  # int32 [2, rows, WORDS]

    def line(self, which: int, n: int) -> Line:
        """A line's first n rows."""
        tokens, tops = self.drawn[which, :, :n].unbind(0)
        return Line(tokens, tops.view(torch.float32), self.scores[which, :n])


def new_results(rows: int, device: torch.device, pinned: bool = False) -> Results:
    shapes = ((2, 2, rows), (2, rows, WORDS))
    drawn, scores = (
        torch.zeros(shape, dtype=torch.int32, device=device, pin_memory=pinned) for shape in shapes
    )
    return Results(drawn, scores)


class Drawn(NamedTuple):
    """Rows of a line, in pinned memory: valid once the launch's event has passed."""

    places: list[int]  # entry index of each row
    tokens: np.ndarray  # int32
    tops: np.ndarray  # float32, the largest logit of each row
    scores: np.ndarray | None  # int32 [rows, WORDS]; None: no row has log-probabilities


class Slow(NamedTuple):
    """Rows that the general sampler drew."""

    places: list[int]  # entry indices, in the order of the draws
    draws: Draws


class GpuLaunch:
    """A plan on its way. Owns what its results need until they are read once."""

    def __init__(self, entries: Sequence[Entry], event: torch.cuda.Event | None) -> None:
        self.entries = entries
        self.drawn: list[Drawn] = []
        self.slow: list[Slow] = []
        self.scored: dict[int, list[TokenLogprob]] = {}
        self.hidden: dict[int, Tensor] = {}  # states of the rows of entries that pool
        self.event = event
        self._outcomes: list[Outcome] | None = None

    def point(self, results: Results, line: int, places: list[int], scored: bool) -> None:
        """Where in pinned memory the rows of the entries `places` will be found."""
        if places:
            tokens, tops, scores = (x.numpy() for x in results.line(line, len(places)))
            self.drawn.append(Drawn(places, tokens, tops, scores if scored else None))

    def wait(self) -> list[Outcome]:
        if self._outcomes is None:
            if self.event is not None:
                self.event.synchronize()
            self._outcomes = self._read()
            self.slow, self.scored, self.hidden = [], {}, {}
        return self._outcomes

    def token_of(self, task: Task) -> int | None:
        """The token this launch sampled for the task; None if it sampled none."""
        for entry, outcome in zip(self.entries, self.wait()):
            if entry.task is task and entry.samples:
                return outcome.token
        return None

    def _read(self) -> list[Outcome]:
        outcomes = [NOTHING] * len(self.entries)
        for line in self.drawn:
            _read_line(line, self.entries, outcomes)
        for slow in self.slow:
            for place, drawn in zip(slow.places, slow.draws.read()):
                outcomes[place] = outcome_of(drawn)
        for place, scored in self.scored.items():
            outcomes[place] = outcomes[place]._replace(prompt_logprobs=scored)
        for place, hidden in self.hidden.items():
            outcomes[place] = pooled(hidden, self.entries[place])
        return outcomes


def _read_line(line: Drawn, entries: Sequence[Entry], outcomes: list[Outcome]) -> None:
    places, tokens, tops, words = line
    if words is None and np.isfinite(tops).all():
        for place, token in zip(places, tokens.tolist()):
            outcomes[place] = Outcome(token)
        return
    for row, (place, token, top) in enumerate(zip(places, tokens.tolist(), tops.tolist())):
        found = Sampled(token)
        if words is not None and entries[place].task.params.logprobs is not None:
            found = scored(token, words[row])
        outcomes[place] = outcome_of(checked(found, top))


def scored(token: int, words: np.ndarray) -> Sampled:
    """The token with what its words say: int32 [WORDS]."""
    score = score_of(*scores_of(words))
    return Sampled(token, score.logprob, score.top, score.rank)


def to_host(draws: Draws) -> Draws:
    """The same draws in pinned memory, to be read after the launch's event, not before."""

    def host(x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return pinned.copy_(x, non_blocking=True)

    parts = [
        part._replace(
            own=host(part.own), peak=host(part.peak), mass=host(part.mass), rank=host(part.rank),
            at=None if part.at is None else host(part.at),
            values=None if part.values is None else host(part.values),
        )
        for part in draws.scores
    ]  # fmt: skip
    return draws._replace(tokens=host(draws.tokens), peaks=host(draws.peaks), scores=parts)
