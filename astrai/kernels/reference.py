"""The slow, obvious attention that the fast ones are held equal to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from astrai.inference.cache.storage import CacheView, PagedCache
from astrai.kernels.attention import AttentionBatch, check_batch

if TYPE_CHECKING:
    from astrai.models.config import ModelConfig


class ReferenceAttention:
    """Per entry: gather, mask, softmax in float32. Works on any device; groups change nothing.

    Owns the view of the tick. Does not own the cache.
    """

    def __init__(self, kv: PagedCache, config: ModelConfig) -> None:
        self.kv = kv
        self.config = config

    def plan(self, batch: AttentionBatch) -> None:
        check_batch(batch, self.kv.page_size)
        self._batch = batch
        lengths = [start + count for start, count in zip(batch.starts, batch.counts)]
        self._view = CacheView(self.kv, batch.page_tables, lengths)
        self._positions = [
            list(range(start, start + count)) for start, count in zip(batch.starts, batch.counts)
        ]

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._view.write(layer, self._positions, k, v)
        window = self.config.layer_windows[layer]
        rows = q.split(self._batch.counts)
        out = [
            _attend(rows[i], keys, values, self._batch.starts[i], window)
            for i, (keys, values) in enumerate(self._view.gather(layer))
        ]
        return torch.cat(out).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """q [count, n_heads, head_dim] at positions start, start + 1, ... -> the same shape.

    k, v: [length, n_kv_heads, head_dim], positions 0, 1, ...
    """
    share = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(share, dim=1)
    values = v.float().repeat_interleave(share, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * q.shape[2] ** -0.5
    at = torch.arange(start, start + q.shape[0], device=q.device)[:, None]
    key_at = torch.arange(k.shape[0], device=q.device)[None, :]
    hidden = key_at > at
    if window is not None:  # a position sees itself and the window - 1 before it
        hidden = hidden | (key_at <= at - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
