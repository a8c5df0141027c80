"""Attention over pages: plan once per tick, run once per layer.

A backend is loaded when it is first asked for, so that a CPU user imports no GPU package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from astrai.inference.cache.storage import PagedCache
    from astrai.models.config import ModelConfig


class AttentionBatch(NamedTuple):
    """One tick's rows. Entry i owns rows [sum(counts[:i]), sum(counts[:i]) + counts[i]).

                 starts[i]            starts[i] + counts[i]
    positions  0 ────┬──────────────────────┬─────────────
               in the pages already    this tick: written, then attended
    """

    starts: list[int]  # first position of each entry
    counts: list[int]  # positions of each entry; 1 = decode
    page_tables: list[list[int]]  # frames of each entry's task, at least up to its last position
    # Decode entries (count 1) that share one dense matmul, as indices of entries; an entry is in
    # at most one group, and one in none is attended by itself.
    groups: list[list[int]]


class AttentionBackend(Protocol):
    """Owns what a tick's plan computed. Does not own the cache it reads and writes."""

    def __init__(self, kv: PagedCache, config: ModelConfig) -> None: ...

    def plan(self, batch: AttentionBatch) -> None:
        """Once per tick, before the first `run` of it."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [T, n_kv_heads, head_dim] into the pages, then attend.

        q: [T, n_heads, head_dim], rope applied to q and k. Returns [T, n_heads * head_dim].
        """


BACKENDS: dict[str, tuple[str, str]] = {
    "reference": ("astrai.kernels.reference", "ReferenceAttention"),
    "cpu": ("astrai.kernels.cpu.matmul_attention", "CpuAttention"),
    "numba": ("astrai.kernels.cpu.compiled_attention", "NumbaAttention"),
    "triton": ("astrai.kernels.gpu.backend", "TritonAttention"),
}


def load_backend(name: str) -> type[AttentionBackend]:
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name = }, expected one of {sorted(BACKENDS)}")
    module, attribute = BACKENDS[name]
    backend: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return backend


def cpu_backend(dtype: torch.dtype, page_size: int, head_dim: int) -> str:
    """The name of the fastest backend of the CPU for such a cache."""
    try:
        from astrai.kernels.cpu.compiled_attention import refusal
    except ImportError:  # Numba does not come with every system
        return "cpu"
    return "cpu" if refusal(dtype, page_size, head_dim) else "numba"


def check_batch(batch: AttentionBatch, page_size: int) -> None:
    """ValueError unless the batch says for every row where it is written and who attends it."""
    n = len(batch.starts)
    if len(batch.counts) != n or len(batch.page_tables) != n:
        raise ValueError(f"{len(batch.counts) = }, {len(batch.page_tables) = }, expected {n}")
    for i, (start, count, table) in enumerate(zip(batch.starts, batch.counts, batch.page_tables)):
        room = len(table) * page_size
        if start < 0 or count < 1 or start + count > room:
            raise ValueError(f"entry {i}: {start = }, {count = }, expected within [0, {room})")
    grouped = [i for group in batch.groups for i in group]
    if len(set(grouped)) != len(grouped) or any(
        not 0 <= i < n or batch.counts[i] != 1 for i in grouped
    ):
        raise ValueError(f"{batch.groups = }, expected entries of count 1, each at most once")
