"""What a launch on a GPU leaves behind: results on their way to the host, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from astrai.inference.runner import outcome_of, pooled
from astrai.inference.sampler import Draws
from astrai.inference.task import NOTHING, Entry, Outcome, Task, TokenLogprob


class Drawn(NamedTuple):
    """What steps, or the ends of prompts, gave: pinned memory, valid once the event has passed."""

    tokens: np.ndarray  # int32
    tops: np.ndarray  # float32, the largest logit of each row


class Slow(NamedTuple):
    """Rows that the general sampler drew."""

    places: list[int]  # entry indices, in the order of the draws
    draws: Draws


class GpuLaunch:
    """A plan on its way. Owns what its results need until they are read once."""

    def __init__(self, entries: Sequence[Entry], event: torch.cuda.Event | None) -> None:
        self.entries = entries
        self.places: list[int] = []  # entry index of each result row
        self.drawn: list[Drawn] = []
        self.slow: list[Slow] = []
        self.scored: dict[int, list[TokenLogprob]] = {}
        self.hidden: dict[int, Tensor] = {}  # states of the rows of entries that pool
        self._event = event
        self._outcomes: list[Outcome] | None = None

    def point(self, results: Tensor, steps: list[int], ends: list[int]) -> None:
        """Where in `results` (see `GpuRunner`) the rows of these entries will be found."""
        lines = results.numpy()
        for line, places in ((0, steps), (2, ends)):
            if places:
                n = len(places)
                self.places += places
                self.drawn.append(Drawn(lines[line, :n], lines[line + 1, :n].view(np.float32)))

    def wait(self) -> list[Outcome]:
        if self._outcomes is None:
            if self._event is not None:
                self._event.synchronize()
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
        self._read_fast(outcomes)
        for slow in self.slow:
            for place, drawn in zip(slow.places, slow.draws.read()):
                outcomes[place] = outcome_of(drawn)
        for place, scored in self.scored.items():
            outcomes[place] = outcomes[place]._replace(prompt_logprobs=scored)
        for place, hidden in self.hidden.items():
            outcomes[place] = pooled(hidden, self.entries[place])
        return outcomes

    def _read_fast(self, outcomes: list[Outcome]) -> None:
        if not self.places:
            return
        tokens = np.concatenate([tokens for tokens, _ in self.drawn]).tolist()
        tops = np.concatenate([tops for _, tops in self.drawn])
        if np.isfinite(tops).all():
            for place, token in zip(self.places, tokens):
                outcomes[place] = Outcome(token)
        else:
            for place, token, top in zip(self.places, tokens, tops.tolist()):
                why = f"no token can be drawn: the largest logit is {top}"
                fine = math.isfinite(top)
                outcomes[place] = Outcome(token) if fine else Outcome(error=why)


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
