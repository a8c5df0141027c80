"""Attention on the GPU: K and V are read in place through the page tables, lengths are ragged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from astrai.kernels.attention import AttentionBatch, check_batch
from astrai.kernels.gpu.decode_attention import (
    DecodePlan,
    DecodeShape,
    decode_attention,
    plan_decode,
)
from astrai.kernels.gpu.prefill_attention import TILE, prefill_attention, write_keys

if TYPE_CHECKING:
    from astrai.inference.cache.storage import PagedCache
    from astrai.models.config import ModelConfig


class _Chunks(NamedTuple):
    """Entries of more than one position."""

    rows: Tensor  # int64, of the flat batch
    slots: Tensor  # int32, one per row: the entry
    positions: Tensor  # int32, one per row
    tiles: Tensor  # int32 [n_tiles, 4]


class _Steps(NamedTuple):
    """Entries of one position."""

    rows: Tensor
    slots: Tensor
    positions: Tensor
    plans: dict[int | None, DecodePlan]  # by window


class TritonAttention:
    """Owns the indices of the tick and the scratch of the kernels. Does not own the cache."""

    def __init__(self, kv: PagedCache, config: ModelConfig) -> None:
        self.kv = kv
        self.config = config
        self._shape: DecodeShape | None = None

    def plan(self, batch: AttentionBatch) -> None:
        check_batch(batch, self.kv.page_size)
        width = max(len(table) for table in batch.page_tables)
        tables = [table + [0] * (width - len(table)) for table in batch.page_tables]
        self._tables = self._tensor(tables)
        firsts = [0]
        steps: list[int] = []
        chunks: list[int] = []
        for i, count in enumerate(batch.counts):
            (steps if count == 1 else chunks).append(i)
            firsts.append(firsts[-1] + count)
        self._n_rows = firsts[-1]
        self._steps = self._plan_steps(batch, steps, firsts) if steps else None
        self._chunks = self._plan_chunks(batch, chunks, firsts) if chunks else None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = torch.cat((q, k, v), dim=1).flatten(1)
        out = qkv.new_empty(self._n_rows, self.config.n_heads * self.config.head_dim)
        pages, window = self.kv.pages[layer], self.config.layer_windows[layer]
        if (chunks := self._chunks) is not None:
            rows = qkv[chunks.rows]
            write_keys(rows, pages, self._tables, chunks.slots, chunks.positions)
            part = out.new_empty(len(rows), out.shape[1])
            prefill_attention(
                rows, part, pages, self._tables, chunks.tiles, len(chunks.tiles), window=window
            )
            out[chunks.rows] = part
        if (steps := self._steps) is not None and self._shape is not None:
            part = out.new_empty(len(steps.slots), out.shape[1])
            decode_attention(
                self._shape,
                qkv[steps.rows],
                part,
                pages,
                self._tables,
                steps.slots,
                steps.positions,
                steps.plans[window],
                window=window,
            )
            out[steps.rows] = part
        return out

    def _plan_steps(self, batch: AttentionBatch, steps: list[int], firsts: list[int]) -> _Steps:
        if self._shape is None or self._shape.max_rows < len(steps):
            c, kv = self.config, self.kv
            self._shape = DecodeShape(
                c.n_heads, c.n_kv_heads, c.head_dim, kv.page_size, len(steps), kv.device
            )
        positions = self._tensor([batch.starts[i] for i in steps])
        slots = self._tensor(steps)
        plans = {
            window: plan_decode(self._shape, positions, slots, self._shape.new_plan(), window)
            for window in set(self.config.layer_windows)
        }
        rows = self._tensor([firsts[i] for i in steps]).long()
        return _Steps(rows, slots, positions, plans)

    def _plan_chunks(self, batch: AttentionBatch, chunks: list[int], firsts: list[int]) -> _Chunks:
        rows: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        for i in chunks:
            start, count = batch.starts[i], batch.counts[i]
            for done in range(0, count, TILE):
                n = min(TILE, count - done)
                tiles.append((len(rows) + done, start + done, n, i))
            rows += range(firsts[i], firsts[i] + count)
            slots += [i] * count
            positions += range(start, start + count)
        return _Chunks(
            self._tensor(rows).long(),
            self._tensor(slots),
            self._tensor(positions),
            self._tensor(tiles),
        )

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.kv.device)
