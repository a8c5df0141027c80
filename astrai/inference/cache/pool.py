"""Which page frames are free, cached or held, and by how many page tables."""

from __future__ import annotations

from typing import NamedTuple

from astrai.inference.cache.bitmask import BitMask


def n_pages_for(n_tokens: int, page_size: int) -> int:
    """Pages that `n_tokens` positions need: 120 tokens → 2, 180 → 3 with pages of 64."""
    return (n_tokens + page_size - 1) // page_size


class PoolCounts(NamedTuple):
    """`free + cached + held == total`, after every tick."""

    free: int  # in the free mask
    cached: int  # refs 0, but the content is still indexed by its prefix
    held: int  # refs > 0
    total: int


class PagePool:
    """Page frames as a free mask and reference counts.

    A frame is in exactly one of three states; the arrows are the only ways between them:

            alloc                free(keep=False), refs → 0
        FREE ────► HELD ──────────────────────────────────► FREE
                    │  ▲
        free(keep=True), refs → 0
                    ▼  │ share
                   CACHED ────► FREE
                         evict

    Owns the states and the counts; does not own the content, nor who the holders are.
    """

    __slots__ = ("_cached", "free_mask", "n_pages", "refs")

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.free_mask = BitMask(n_pages)
        self.refs = [0] * n_pages
        self._cached = 0

    @property
    def counts(self) -> PoolCounts:
        free = len(self.free_mask)
        return PoolCounts(free, self._cached, self.n_pages - free - self._cached, self.n_pages)

    @property
    def n_free(self) -> int:
        return len(self.free_mask)

    @property
    def n_cached(self) -> int:
        return self._cached

    def alloc(self) -> int:
        """The lowest free frame, now held once, or -1 when none is free."""
        frame = self.free_mask.take()
        if frame >= 0:
            self.refs[frame] = 1
        return frame

    def alloc_n(self, n: int) -> list[int]:
        """`n` frames, lowest first, or an empty list and no change when fewer are free."""
        if n > len(self.free_mask):
            return []
        return [self.alloc() for _ in range(n)]

    def share(self, frame: int) -> None:
        """One more page table holds `frame`, which is held or cached."""
        if self.refs[frame] == 0:
            if frame in self.free_mask:
                raise ValueError(f"{frame = } is free and cannot be shared")
            self._cached -= 1
        self.refs[frame] += 1

    def free(self, frame: int, keep: bool = False) -> None:
        """One page table less holds `frame`; the last one leaves it cached (`keep`) or free."""
        refs = self.refs[frame]
        if refs == 0:
            raise ValueError(f"{frame = } has refs 0 and cannot be freed")
        self.refs[frame] = refs - 1
        if refs == 1:
            if keep:
                self._cached += 1
            else:
                self.free_mask.put(frame)

    def evict(self, frame: int) -> None:
        """A cached frame becomes free."""
        if self.refs[frame] != 0 or frame in self.free_mask:
            raise ValueError(f"{frame = } with refs {self.refs[frame]} is not cached")
        self._cached -= 1
        self.free_mask.put(frame)
