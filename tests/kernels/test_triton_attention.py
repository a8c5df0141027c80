"""The Triton backend against the reference, on the CPU through Triton's interpreter."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.inference.cache.storage import KVCache
from astrai.kernels.attention import AttentionBatch
from astrai.kernels.attention.reference import ReferenceAttention
from astrai.kernels.attention.triton import TritonAttention


class Case(NamedTuple):
    dim: int
    kv_heads: int
    group: int
    page: int
    window: int | None
    starts: list[int]
    counts: list[int]


CASES = [
    Case(64, 2, 4, 16, None, [200, 77, 0, 91], [1, 1, 1, 1]),
    Case(128, 1, 2, 64, None, [130, 0], [70, 65]),
    Case(96, 2, 3, 32, None, [63, 64, 10], [1, 5, 1]),
    Case(256, 1, 1, 128, None, [140, 30], [1, 3]),
    Case(64, 1, 7, 16, 7, [180, 3, 40], [1, 1, 20]),
    Case(128, 2, 1, 64, 70, [181, 69, 70], [1, 1, 1]),
    Case(64, 1, 2, 16, None, [63, 127, 64], [3, 2, 66]),  # chunks that begin where a block ends
]


def pools(case: Case) -> tuple[KVCache, KVCache, list[list[int]]]:
    """A pool for each backend with the same keys; in the second, whatever is not written is NaN."""
    torch.manual_seed(0)
    needed = [-(-(s + c) // case.page) for s, c in zip(case.starts, case.counts)]
    frames = list(range(sum(needed) + 2))
    random.Random(0).shuffle(frames)
    tables = [[frames.pop() for _ in range(n)] for n in needed]
    full, poisoned = (
        KVCache(1, sum(needed) + 2, case.page, case.kv_heads, case.dim, torch.float32)
        for _ in range(2)
    )
    full.pages.normal_()
    poisoned.pages.fill_(float("nan"))
    for start, table in zip(case.starts, tables):
        for i, frame in enumerate(table):
            live = min(max(start - i * case.page, 0), case.page)
            poisoned.pages[:, frame, :, :live] = full.pages[:, frame, :, :live]
    return full, poisoned, tables


@pytest.mark.parametrize("case", CASES)
def test_same_as_reference_and_reads_nothing_unwritten(case: Case) -> None:
    full, poisoned, tables = pools(case)
    heads = case.kv_heads * case.group
    config: Any = SimpleNamespace(
        n_heads=heads, n_kv_heads=case.kv_heads, head_dim=case.dim, layer_windows=(case.window,)
    )
    rows = sum(case.counts)
    q = torch.randn(rows, heads, case.dim)
    k, v = torch.randn(2, rows, case.kv_heads, case.dim).unbind(0)
    batch = AttentionBatch(case.starts, case.counts, tables, [])
    found = []
    for backend in (ReferenceAttention(full, config), TritonAttention(poisoned, config)):
        backend.plan(batch)
        found.append(backend.run(0, q, k, v))
    assert (found[0] - found[1]).abs().max().item() < 1e-5
    for start, count, table in zip(case.starts, case.counts, tables):
        for p in range(start, start + count):
            at = (slice(None), table[p // case.page], slice(None), p % case.page)
            assert torch.equal(full.pages[at], poisoned.pages[at])


def test_a_second_tick_finds_clean_counters() -> None:
    """Parts of a head are merged by the last to arrive, who leaves the counter as it was."""
    case = Case(64, 1, 2, 64, None, [1500], [1])
    full, _, tables = pools(case)
    config: Any = SimpleNamespace(n_heads=2, n_kv_heads=1, head_dim=64, layer_windows=(None,))
    q, k, v = torch.randn(1, 2, 64), torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    backend = TritonAttention(full, config)
    out = []
    for _ in range(2):
        backend.plan(AttentionBatch(case.starts, case.counts, tables, []))
        out.append(backend.run(0, q, k, v))
    assert torch.equal(out[0], out[1])
