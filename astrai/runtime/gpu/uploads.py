"""What a GPU remembers of every slot between ticks, and how a tick's changes reach it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from astrai.inference.task import Task
from astrai.kernels.gpu.sampling.truncation import Limits
from astrai.runtime.sampling.sampler import MAX_TEMPERATURE, share_of

_ALIGN = 64  # int32 words: views start where 16-byte loads may
_INT32 = (1 << 31) - 1


class SlotState:
    """Page table, last tokens and what the sampler is asked, of every slot and one for padding.

        arena int32   | tables [slots + 1, width] | last [.., 2] | seeds [.., 2] | temperatures |
                      | top_k | shares of top_p [.., 2] | min_p | alternatives asked + 1 |

    The token sampled for position p is at last[slot, p % 2]: computing a position a second time
    finds the token it was given the first time.

    Owns the arena and the list of changes since the last upload. Does not own tasks or pages.
    """

    def __init__(self, max_slots: int, max_pages: int, device: torch.device) -> None:
        rows = max_slots + 1
        self.max_slots = max_slots
        self.padding_slot = max_slots
        self.width = _aligned(max_pages)
        sizes = [rows * self.width, 2 * rows, 2 * rows, rows, rows, 2 * rows, rows, rows]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + _aligned(size))
        self._seeds_at, self._heat_at, self._k_at, self._p_at, self._min_at, self._tops_at = starts[
            2:8
        ]
        self.arena = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        parts = [self.arena[start:][:size] for start, size in zip(starts, sizes)]
        self.tables = parts[0].view(rows, self.width)
        self.last = parts[1].view(rows, 2)
        self.seeds = parts[2].view(rows, 2)
        self.temperatures = parts[3].view(torch.float32)
        self.limits = Limits(parts[4], parts[5].view(rows, 2), parts[6].view(torch.float32))
        self.asked_tops = parts[7]  # 0: no log-probabilities
        self._task: list[Task | None] = [None] * max_slots
        self._epoch = [-1] * max_slots
        self._n_pages = [0] * max_slots
        self._seated: list[Task] = []
        self._changes: list[int] = []  # place, value, place, value, ...

    def follow(self, task: Task, epoch: int) -> None:
        """Note what the device does not know yet of the task in its slot."""
        slot, table = task.slot, task.page_table
        known = self._n_pages[slot]
        if self._task[slot] is not task or self._epoch[slot] != epoch:
            self._seat(task, epoch)
            known = 0
        if len(table) == known:
            return
        if len(table) > self.width:
            raise ValueError(f"{len(table) = } pages of task {task.id}, expected <= {self.width}")
        base = slot * self.width
        for page in range(known, len(table)):
            self._changes += (base + page, table[page])
        self._n_pages[slot] = len(table)

    def take_changes(self) -> np.ndarray:
        """int32 [n, 2]: (place in the arena, value) since the last call."""
        changes = np.array(self._changes, dtype=np.int64).astype(np.int32).reshape(-1, 2)
        self._changes.clear()
        return changes

    def take_seated(self) -> list[Task]:
        """The tasks that got a slot, or got it again, since the last call."""
        seated, self._seated = self._seated, []
        return seated

    def forget(self) -> None:
        """A launch failed before its upload: send everything again."""
        self._task = [None] * self.max_slots
        self._changes.clear()
        self._seated.clear()

    def _seat(self, task: Task, epoch: int) -> None:
        slot = task.slot
        self._task[slot], self._epoch[slot], self._n_pages[slot] = task, epoch, 0
        self._seated.append(task)
        params = task.params
        words = (
            (self._seeds_at + 2 * slot, task.seed),
            (self._p_at + 2 * slot, share_of(params)),
        )
        for place, value in words:
            self._changes += (place, _signed(value), place + 1, _signed(value >> 32))
        self._changes += (
            self._heat_at + slot, _float_bits(min(params.temperature, MAX_TEMPERATURE)),
            self._k_at + slot, min(params.top_k, _INT32),
            self._min_at + slot, _float_bits(params.min_p),
            self._tops_at + slot, 0 if params.logprobs is None else params.logprobs + 1,
        )  # fmt: skip


class Staging:
    """int32 arrays filled on the host and copied to fixed places on the device in one piece.

    Owns the device memory and a ring of pinned buffers: a buffer is written again only after as
    many launches as the ring has places, by which time its copy is long done.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device, ring: int = 4) -> None:
        self._starts: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._starts[name] = end
            end += _aligned(size)
        self.device = torch.zeros(end, dtype=torch.int32, device=device)
        self.views = {
            name: self.device[self._starts[name] :][:size] for name, size in sizes.items()
        }
        pin = device.type == "cuda"
        self._pinned = [torch.zeros(end, dtype=torch.int32, pin_memory=pin) for _ in range(ring)]
        self._arrays = [pinned.numpy() for pinned in self._pinned]
        self._turn = 0
        self._end = 0

    def begin(self) -> None:
        self._turn = (self._turn + 1) % len(self._pinned)
        self._end = 0

    def put(
        self, name: str, values: Sequence[int] | np.ndarray, room: int = 0, fill: int = 0
    ) -> None:
        """`values` from the start of `name`, then `fill` up to `room` values in all."""
        start, n = self._starts[name], len(values)
        array = self._arrays[self._turn]
        array[start : start + n] = values
        if room > n:
            array[start + n : start + room] = fill
        self._end = max(self._end, start + max(n, room))

    def copy(self) -> None:
        """Everything up to the last value put, asynchronously."""
        part = self._pinned[self._turn][: self._end]
        self.device[: self._end].copy_(part, non_blocking=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _signed(number: int) -> int:
    """The low 32 bits, as an int32."""
    word = number & 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _float_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
