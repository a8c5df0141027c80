"""Attention on the CPU by compiled code that reads K and V in place: see `kernels/numba`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from astrai.kernels.attention import AttentionBatch, check_batch
from astrai.kernels.cpu.attention import CALL, compiled, scratch_bytes
from astrai.kernels.cpu.lanes import LANES
from astrai.kernels.cpu.run import DTYPES, alone, shared
from astrai.kernels.cpu.threads import n_together

if TYPE_CHECKING:
    from astrai.inference.cache.storage import PagedCache
    from astrai.models.config import ModelConfig

# Bytes of keys and values from which on threads are worth meeting for.
_ALONE_BYTES = 1 << 16


class NumbaAttention:
    """Owns the rows of the tick and the scratch of its threads. Does not own the cache.

    Groups change nothing: every row is attended by itself.
    """

    def __init__(self, kv: PagedCache, config: ModelConfig) -> None:
        if reason := refusal(kv.dtype, kv.page_size, kv.head_dim):
            raise ValueError(f"attention backend 'numba': {reason}")
        if kv.device.type != "cpu":  # its addresses mean nothing here
            raise ValueError(f"attention backend 'numba': {kv.device = }, expected a CPU")
        self.kv = kv
        self.config = config
        self._pages = [kv.pages[layer].data_ptr() for layer in range(kv.n_layers)]
        self._share = config.n_heads // config.n_kv_heads
        self._scratch = np.zeros(0, np.uint8)
        self._counters = np.zeros(2, np.int64)
        self._call = np.zeros(1, CALL)
        self._argument = self._call.ctypes.data
        fixed = {
            "n_kv_heads": kv.n_kv_heads,
            "share": self._share,
            "head_dim": kv.head_dim,
            "page_size": kv.page_size,
            "size": kv.dtype.itemsize,
            "threads": self._counters.ctypes.data,
            "units": self._counters.ctypes.data + 8,
        }
        for name, value in fixed.items():
            self._call[name] = value
        code = compiled(kv.head_dim, kv.dtype.itemsize)
        self._write, self._attend = alone(code.write.address), shared(code.attend.address)

    def plan(self, batch: AttentionBatch) -> None:
        check_batch(batch, self.kv.page_size)
        positions: list[int] = []
        first_pages: list[int] = []
        tables: list[int] = []
        for start, count, table in zip(batch.starts, batch.counts, batch.page_tables):
            positions += range(start, start + count)
            first_pages += [len(tables)] * count
            tables += table
        # Kept: the call holds their addresses.
        self._rows = [np.array(x, np.int64) for x in (positions, first_pages, tables)]
        frames = self._rows[2]
        if frames.min() < 0 or frames.max() >= self.kv.n_pages:
            raise ValueError(f"{tables = }, expected frames in [0, {self.kv.n_pages})")
        call, longest = self._call, max(positions) + 1
        for name, array in zip(("positions", "first_pages", "tables"), self._rows):
            call[name] = array.ctypes.data
        call["n_rows"] = self._n_rows = len(positions)
        n_bytes = 2 * self.kv.n_kv_heads * self.kv.head_dim * self.kv.dtype.itemsize
        self._n_threads = n_together() if sum(positions) * n_bytes > _ALONE_BYTES else 1
        size = scratch_bytes(self._share, self.kv.head_dim, longest + self.kv.page_size)
        if len(self._scratch) < size * self._n_threads:
            self._scratch = np.zeros(size * self._n_threads, np.uint8)
        call["scratch"], call["scratch_size"] = self._scratch.ctypes.data, size

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(self._n_rows, self.config.n_heads * self.config.head_dim)
        call, kv = self._call, self.kv
        for name, x in (("q", q), ("k", k), ("v", v)):
            row, *within = x.stride()
            if within != [kv.head_dim, 1] or len(x) != self._n_rows or x.dtype != kv.dtype:
                raise ValueError(
                    f"{name}: {x.shape = }, {x.stride() = }, {x.dtype = }, expected {kv.dtype}, "
                    f"{self._n_rows} rows of heads that follow each other"
                )
            call[name], call[f"{name}_stride"] = x.data_ptr(), row * kv.dtype.itemsize
        call["out"], call["pages"] = out.data_ptr(), self._pages[layer]
        call["window"] = self.config.layer_windows[layer] or 0
        self._counters[:] = 0
        self._write(self._argument)
        self._attend(self._argument, self._n_threads)
        return out


def refusal(dtype: torch.dtype, page_size: int, head_dim: int) -> str | None:
    """Why this backend cannot serve such a cache; None if it can."""
    if dtype not in DTYPES:
        return f"{dtype = }, expected one of {DTYPES}"
    if page_size % LANES or head_dim % LANES:
        return f"{page_size = }, {head_dim = }, expected multiples of {LANES}"
    return None
