"""The KV storage: the tensors behind the page frames, and a batch's view of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PagedCache:
    """Keys and values of every page frame.

    k_cache, v_cache: [n_layers, n_pages, page_size, n_kv_heads, head_dim], views of one tensor

        pages [n_layers, n_pages, 2 * n_kv_heads, page_size, head_dim]

    in which a frame's keys (the first n_kv_heads) and values lie side by side, and one head's
    page is one contiguous piece [page_size, head_dim], so that gathering pages is a plain copy.

    Owns the tensor. Does not own the books (which frame belongs to whom).
    """

    def __init__(
        self,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ) -> None:
        if min(n_layers, n_pages, page_size, n_kv_heads, head_dim) < 1:
            raise ValueError(
                f"{n_layers = }, {n_pages = }, {page_size = }, {n_kv_heads = }, {head_dim = }, "
                "expected all at least 1"
            )
        self.n_layers = n_layers
        self.n_pages = n_pages
        self.page_size = page_size
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        shape = (n_layers, n_pages, 2 * n_kv_heads, page_size, head_dim)
        # Zeros, not garbage: a masked position has probability 0, and 0 * NaN would be NaN.
        self.pages = _zeros(shape, dtype, self.device)
        self.k_cache = self.pages[:, :, :n_kv_heads].transpose(2, 3)
        self.v_cache = self.pages[:, :, n_kv_heads:].transpose(2, 3)

    @property
    def bytes_per_page(self) -> int:
        per_layer = self.page_size * self.n_kv_heads * self.head_dim
        return 2 * self.n_layers * per_layer * self.dtype.itemsize

    def head_pages(self, layer: int) -> Tensor:
        """One layer as [n_pages * 2 * n_kv_heads, page_size, head_dim].

        The keys of head h in frame f are row f * 2 * n_kv_heads + h, its values the row
        n_kv_heads further on.
        """
        return self.pages[layer].flatten(0, 1)

    def copy_page(self, source: int, target: int) -> None:
        """Copy the content of frame `source` to frame `target` in all layers (copy on write)."""
        self.pages[:, target].copy_(self.pages[:, source])

    def clear_pages(self, frames: list[int]) -> None:
        """Zero whole frames in all layers: what a former holder left there (a NaN, say) is gone."""
        for frame in frames:
            self.pages[:, frame].zero_()


class Gathered(NamedTuple):
    """One task's keys and values in the order of their positions."""

    k: Tensor  # [length, n_kv_heads, head_dim]
    v: Tensor  # [length, n_kv_heads, head_dim]


class CacheView:
    """Cache + page tables + lengths of one batch: what attention sees.

        position p of a task  ->  frame page_table[p // page_size], row p % page_size

    Owns nothing; page_tables and lengths are the caller's and are read at each call.
    """

    def __init__(self, kv: PagedCache, page_tables: list[list[int]], lengths: list[int]) -> None:
        if len(page_tables) != len(lengths):
            raise ValueError(f"{len(page_tables) = }, expected {len(lengths) = }")
        for i, (table, length) in enumerate(zip(page_tables, lengths)):
            room = len(table) * kv.page_size
            if not 0 <= length <= room:
                raise ValueError(f"{length = } of task {i}, expected 0 <= length <= {room}")
            if any(not 0 <= frame < kv.n_pages for frame in table):
                raise ValueError(f"{table = } of task {i}, expected frames in [0, {kv.n_pages})")
        self.kv = kv
        self.page_tables = page_tables
        self.lengths = lengths

    def write(self, layer: int, positions: list[list[int]], k: Tensor, v: Tensor) -> None:
        """Write k, v [T, n_kv_heads, head_dim]: task 0's rows at positions[0], then task 1's, ...

        Positions may cross page borders; one outside its task's page table is a ValueError.
        """
        size = self.kv.page_size
        frames: list[int] = []
        for i, (table, wanted) in enumerate(zip(self.page_tables, positions, strict=True)):
            for position in wanted:
                if not 0 <= position < len(table) * size:
                    raise ValueError(
                        f"{position = } of task {i}, expected 0 <= position < {len(table) * size}"
                    )
                frames.append(table[position // size])
        rows = [position % size for wanted in positions for position in wanted]
        expected = (len(rows), self.kv.n_kv_heads, self.kv.head_dim)
        if k.shape != expected or v.shape != expected:
            raise ValueError(f"{k.shape = }, {v.shape = }, {expected = }")
        at = (
            torch.tensor(frames, dtype=torch.int64, device=self.kv.device),
            torch.tensor(rows, dtype=torch.int64, device=self.kv.device),
        )
        self.kv.k_cache[layer].index_put_(at, k)
        self.kv.v_cache[layer].index_put_(at, v)

    def gather(self, layer: int) -> list[Gathered]:
        """Every task's first `length` keys and values, copied out of the pages."""
        out = []
        for table, length in zip(self.page_tables, self.lengths):
            frames = torch.tensor(table, dtype=torch.int64, device=self.kv.device)
            k = self.kv.k_cache[layer].index_select(0, frames).flatten(0, 1)[:length]
            v = self.kv.v_cache[layer].index_select(0, frames).flatten(0, 1)[:length]
            out.append(Gathered(k, v))
        return out


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only where they are written.

    numpy asks the system for zeroed memory, which maps it page by page on first use; torch fills
    what it gets, and so would make a whole pool resident at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    buffer = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(buffer).view(dtype).view(shape)
