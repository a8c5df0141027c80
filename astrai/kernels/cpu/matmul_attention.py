"""Attention on the CPU: dense matmuls over whole pages.

A row's result depends on nothing but its own query, keys and values, bit for bit: every sum runs
over whole pages in the order of their positions, and what is hidden has probability exactly 0, so
that neither the pages appended for a longer neighbour nor the rows beside it change anything.
The frames of a batch must hold finite numbers, hidden positions too: 0 * NaN would be NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai.kernels.attention import AttentionBatch, check_batch
from astrai.kernels.cpu.threads import together

if TYPE_CHECKING:
    from astrai.inference.cache.storage import PagedCache
    from astrai.models.config import ModelConfig

# Queries of one chunk attended at once: bounds the scores, and skips keys that a block of
# queries cannot see yet.
_QUERY_BLOCK = 128

# A matmul keeps one order of summation only while the sum is short (seen to change above 192
# terms in float32, above 1,023 in bfloat16): longer sums are added up over blocks of keys.
_KEY_BLOCK = {torch.float32: 128}
_DEFAULT_KEY_BLOCK = 512

# A float32 matmul does so only for multiples of 4 rows, and any takes another path for a product
# of fewer than 400 multiplications, which a lone row of a tiny head can be.
_ROW_MULTIPLE = 4
_TINY_HEAD_DIM = 32


# K and V elements of a layer from which on threads are worth meeting for: two cores fetch twice as
# much of what no cache holds (measured on two cores: 8 to 15 % of a decode step of 8 rows).
_ALONE_ELEMENTS = 1 << 17


class _Work(NamedTuple):
    """One dense attention: equally many queries of each task over equally many pages."""

    rows: slice | Tensor  # of the flat batch, n_tasks * n_queries of them
    n_tasks: int
    n_queries: int
    pages: Tensor  # [2 * n_tasks * n_kv_heads * n_pages] rows of PagedCache.head_pages, K then V
    bias: Tensor  # [n_tasks, 1, n_queries, 1, n_pages * page_size], 0 or -inf where hidden


class CpuAttention:
    """Owns the indices and masks of the tick. Does not own the cache."""

    def __init__(self, kv: PagedCache, config: ModelConfig) -> None:
        self.kv = kv
        self.config = config
        self._layers = [
            (kv.k_cache[i], kv.v_cache[i], kv.head_pages(i)) for i in range(kv.n_layers)
        ]
        self._share = config.n_heads // config.n_kv_heads
        self._scale = config.head_dim**-0.5
        self._key_block = _KEY_BLOCK.get(kv.dtype, _DEFAULT_KEY_BLOCK)
        pads = kv.dtype == torch.float32 or config.head_dim < _TINY_HEAD_DIM
        self._row_multiple = _ROW_MULTIPLE if pads else 1
        # Pages before a window are skipped in whole blocks of keys, so that blocks start at the
        # same positions for every query.
        self._skip = math.lcm(self._key_block, kv.page_size) // kv.page_size

    def plan(self, batch: AttentionBatch) -> None:
        size = self.kv.page_size
        check_batch(batch, size)
        frames: list[int] = []
        offsets: list[int] = []
        first = [0]
        for start, count, table in zip(batch.starts, batch.counts, batch.page_tables):
            end = start + count
            frames += [table[p // size] for p in range(start, end)]
            offsets += [p % size for p in range(start, end)]
            first.append(first[-1] + count)
        self._n_rows = first[-1]
        self._at = (torch.tensor(frames), torch.tensor(offsets))
        grouped = {i for group in batch.groups for i in group}
        groups = [*batch.groups, *([i] for i in range(len(batch.starts)) if i not in grouped)]
        works = {
            window: [w for group in groups for w in self._plan_group(batch, group, first, window)]
            for window in set(self.config.layer_windows)
        }
        self._works = [works[window] for window in self.config.layer_windows]
        per_page = self.kv.page_size * self.kv.head_dim
        self._n_gathered = per_page * max(
            sum(work.pages.numel() for work in layer) for layer in works.values()
        )

    def _plan_group(
        self, batch: AttentionBatch, group: list[int], first: list[int], window: int | None
    ) -> list[_Work]:
        """The work of entries of equal count; a long chunk in blocks of queries."""
        size, heads = self.kv.page_size, self.kv.n_kv_heads
        total = batch.counts[group[0]]
        works = []
        for done in range(0, total, _QUERY_BLOCK):
            count = min(_QUERY_BLOCK, total - done)
            at = [batch.starts[i] + done for i in group]  # first query of each task
            ends = [-(-(p + count) // size) for p in at]
            begins = [0] * len(at)
            if window is not None:
                step = self._skip
                begins = [max(0, p - window + 1) // (size * step) * step for p in at]
            n_pages = max(end - begin for begin, end in zip(begins, ends))
            tables = []
            for i, begin, end in zip(group, begins, ends):
                table = batch.page_tables[i][begin:end]
                # Padding repeats a page of the task's own: hidden, and never another's.
                tables.append(table + table[-1:] * (n_pages - len(table)))
            frames = torch.tensor(tables)[None, :, None, :]
            lanes = torch.arange(2 * heads).view(2, 1, heads, 1)
            queries = torch.tensor(at)[:, None, None] + torch.arange(count)[:, None]
            keys = torch.tensor(begins)[:, None, None] * size + torch.arange(n_pages * size)
            hidden = keys > queries
            if window is not None:  # a position sees itself and the window - 1 before it
                hidden |= keys <= queries - window
            bias = torch.zeros(hidden.shape, dtype=self.kv.dtype)
            works.append(
                _Work(
                    rows=_rows([first[i] + done for i in group], count),
                    n_tasks=len(group),
                    n_queries=count,
                    pages=(frames * (2 * heads) + lanes).flatten(),
                    bias=bias.masked_fill_(hidden, float("-inf"))[:, None, :, None],
                )
            )
        return works

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, pages = self._layers[layer]
        keys.index_put_(self._at, k)
        values.index_put_(self._at, v)
        works = self._works[layer]
        with together(self._n_gathered > _ALONE_ELEMENTS):
            return self._attend_all(works, q, pages)

    def _attend_all(self, works: list[_Work], q: Tensor, pages: Tensor) -> Tensor:
        if len(works) == 1 and isinstance(works[0].rows, slice):
            return self._attend(works[0], q, pages)
        out = q.new_empty(self._n_rows, self.config.n_heads * self.config.head_dim)
        for work in works:
            out[work.rows] = self._attend(work, q[work.rows], pages)
        return out

    def _attend(self, work: _Work, q: Tensor, pages: Tensor) -> Tensor:
        heads, dim, share = self.kv.n_kv_heads, self.kv.head_dim, self._share
        tasks, count = work.n_tasks, work.n_queries
        batch, rows = tasks * heads, count * share
        k, v = pages.index_select(0, work.pages).view(2, batch, -1, dim).unbind(0)
        # The query heads of one kv head are rows of its matmul: K and V are never repeated.
        if count > 1:
            q = q.reshape(tasks, count, heads, share, dim).transpose(1, 2)
        q = q.reshape(batch, rows, dim)
        if extra := -rows % self._row_multiple:
            q = F.pad(q, (0, 0, 0, extra))
        scores = torch.bmm(q, k.transpose(1, 2))
        by_head = scores[:, :rows].view(tasks, heads, count, share, -1)
        torch.add(work.bias, by_head, alpha=self._scale, out=by_head)
        out = self._weighted(torch.softmax(scores, dim=-1), v)
        if extra:
            out = out[:, :rows]
        if count > 1:
            out = out.view(tasks, heads, count, share * dim).transpose(1, 2)
        return out.reshape(tasks * count, heads * share * dim)

    def _weighted(self, weights: Tensor, v: Tensor) -> Tensor:
        """bmm(weights, v), added up over blocks of keys in the order of their positions."""
        block = self._key_block
        if v.shape[1] <= block:
            return torch.bmm(weights, v)
        out = torch.zeros(*weights.shape[:2], v.shape[2], dtype=torch.float32)
        for w, part in zip(weights.split(block, dim=2), v.split(block, dim=1)):
            out.add_(torch.bmm(w, part))
        return out.to(v.dtype)


def _rows(first: list[int], count: int) -> slice | Tensor:
    """The rows [f, f + count) of every f, as a slice where they follow each other."""
    if first == list(range(first[0], first[0] + len(first) * count, count)):
        return slice(first[0], first[0] + len(first) * count)
    return torch.tensor([row for f in first for row in range(f, f + count)])
