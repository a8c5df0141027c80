"""The graph's sampling: what the tasks in the slots need of it, and the memory of their edits."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from astrai.front.sampling_params import early_ends
from astrai.inference.task import Task
from astrai.kernels.gpu.sampling.edits import IN_PROMPT, LISTED, Edits, edit
from astrai.kernels.gpu.sampling.sampling import SamplingScratch, sample
from astrai.kernels.gpu.sampling.scores import score
from astrai.runtime.gpu.launch import Line
from astrai.runtime.gpu.uploads import SlotState


class Need(IntEnum):
    """What a row needs, least first; a graph that gives more gives the same token."""

    HEAT = 0  # a temperature, or none
    LIMITS = 1  # top_k, top_p, min_p
    EDITS = 2  # logit_bias, penalties, min_tokens
    SCORES = 3  # log-probabilities
    GENERAL = 4  # what no graph has: grammars, bad words, very long lists


class SlotEdits:
    """Which edits of its logits each slot asks for, on the device.

    The tables and the edited logits exist from the first task on that needs them (8 bytes per slot
    and token of the vocabulary); graphs hold their addresses. A slot is written when a task is
    seated, with the tokens known then; from there on the device counts what it draws by itself.

    Owns the tables, and the edited logits of a launch. Does not own slots or tasks.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self.needs = [Need.HEAT] * max_slots  # of the task last seated in each slot
        self.tables: Edits | None = None
        self._logits = torch.empty(0, vocab_size, device=device)
        self._written = [False] * max_slots  # the slot's rows of the tables are not blank
        self._vocab_size = vocab_size
        self._max_slots = max_slots
        self._device = device

    def seat(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            need = self.needs[task.slot] = self._need_of(task)
            edits = need is not Need.GENERAL and _edits(task)
            if edits:
                self._write(self._allocate(), task)
            elif self.tables is not None and self._written[task.slot]:
                self.tables.heads[task.slot] = self._sent(np.array([0, -1], np.int32))
            self._written[task.slot] = edits

    def edited(
        self, logits: Tensor, slots: Tensor, positions: Tensor, last: Tensor, pdl: bool
    ) -> Tensor:
        """float32 [R, vocab_size]; the next call overwrites it. See `edit`."""
        tables = self._allocate()
        edit(tables, logits, slots, positions, last, self._logits[: len(slots)], pdl)
        return self._logits[: len(slots)]

    def _allocate(self) -> Edits:
        if self.tables is None:
            rows, on = self._max_slots + 1, self._device
            heads = torch.zeros(rows, 2, dtype=torch.int32, device=on)
            heads[:, 1] = -1
            self._logits = torch.empty(self._max_slots, self._vocab_size, device=on)
            self.tables = Edits(
                torch.zeros(rows, 3, LISTED, dtype=torch.int32, device=on),
                heads,
                torch.zeros(rows, 3, dtype=torch.float64, device=on),
                torch.zeros(rows, self._vocab_size, dtype=torch.int32, device=on),
            )
        return self.tables

    def _need_of(self, task: Task) -> Need:
        params = task.params
        if params.structured is not None or task.bad_words:
            return Need.GENERAL
        if _edits(task):
            listed = _listed(task)
            # Ids that the model does not have are that row's error, which the sampler words.
            if len(listed) > LISTED or not all(0 <= t < self._vocab_size for t in listed):
                return Need.GENERAL
        if params.logprobs is not None:
            return Need.SCORES
        if _edits(task):
            return Need.EDITS
        return Need.LIMITS if params.truncated else Need.HEAT

    def _write(self, tables: Edits, task: Task) -> None:
        params, slot = task.params, task.slot
        listed = _listed(task)
        entries = np.zeros((3, LISTED), np.int32)
        entries[0, : len(listed)] = list(listed)
        bias = np.array([value for value, _ in listed.values()], np.float32)
        entries[1, : len(listed)] = bias.view(np.int32)
        entries[2, : len(listed)] = [until for _, until in listed.values()]
        tables.listed[slot] = self._sent(entries)
        counted = len(task.tokens) if params.penalised else -1
        tables.heads[slot] = self._sent(np.array([len(listed), counted], np.int32))
        if not params.penalised:
            return
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        tables.penalties[slot] = self._sent(np.array(penalties, np.float64))
        prompt = np.unique(np.array(task.prompt, np.int64))
        output = np.array(task.tokens[task.n_prompt :], np.int64)
        marks = np.ones(len(prompt) + len(output), np.int32)
        marks[: len(prompt)] = IN_PROMPT
        tables.seen[slot].zero_()
        at = self._sent(np.concatenate([prompt, output]))
        tables.seen[slot].index_add_(0, at, self._sent(marks))

    def _sent(self, array: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        x = torch.from_numpy(array)
        return (
            x if self._device.type == "cpu" else x.pin_memory().to(self._device, non_blocking=True)
        )


def draw(
    scratch: SamplingScratch, edits: SlotEdits, state: SlotState, logits: Tensor, slots: Tensor,
    positions: Tensor, out: Line, need: Need, pdl: bool,
) -> None:  # fmt: skip
    """A token for each row of `logits` [R, vocab_size] into `out`; no row needs more than `need`.

    slots, positions: int32 [R]; see `sample`, by which positions move on.
    """
    edited = logits
    if need >= Need.EDITS:
        edited = edits.edited(logits, slots, positions, state.last, pdl)
    sample(
        scratch, edited, state.temperatures, state.seeds, slots, positions, state.last,
        out.tokens, out.tops, None if need is Need.HEAT else state.limits, pdl,
    )  # fmt: skip
    if need is Need.SCORES:
        score(scratch, logits, out.tokens, slots, state.asked_tops, out.scores, pdl)


def _edits(task: Task) -> bool:
    params = task.params
    return params.penalised or bool(params.logit_bias) or params.min_tokens > 0


def _listed(task: Task) -> dict[int, tuple[float, int]]:
    """Token → its bias, and the position before which it is banned."""
    params = task.params
    listed = {token: (value, 0) for token, value in (params.logit_bias or {}).items()}
    until = task.n_prompt + params.min_tokens
    for token in early_ends(params, 0, task.stop_ids):
        listed[token] = (listed.get(token, (0.0, 0))[0], until)
    return listed


def edit_bytes(vocab_size: int, max_slots: int) -> int:
    """Device memory of `SlotEdits` once a task needs it, lists apart."""
    return 4 * (2 * max_slots + 1) * vocab_size
