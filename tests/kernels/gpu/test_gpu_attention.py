"""The Triton backend against the reference, on the CPU through Triton's interpreter."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch
from astrai.kernels.gpu.backend import TritonAttention
from astrai.kernels.gpu.prefill_attention import TILE, prefill_attention, write_keys
from astrai.kernels.reference import ReferenceAttention


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


def pools(case: Case) -> tuple[PagedCache, PagedCache, list[list[int]]]:
    """A pool for each backend with the same keys; in the second, whatever is not written is NaN."""
    torch.manual_seed(0)
    needed = [-(-(s + c) // case.page) for s, c in zip(case.starts, case.counts)]
    frames = list(range(sum(needed) + 2))
    random.Random(0).shuffle(frames)
    tables = [[frames.pop() for _ in range(n)] for n in needed]
    full, poisoned = (
        PagedCache(1, sum(needed) + 2, case.page, case.kv_heads, case.dim, torch.float32)
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


TURNED = [
    Case(64, 2, 2, 16, None, [63, 0], [3, 70]),
    Case(128, 3, 1, 64, 70, [130, 1], [5, 66]),
    Case(96, 1, 3, 32, None, [10, 64], [40, 2]),
    Case(256, 1, 2, 128, 20, [127], [9]),
    Case(32, 5, 1, 16, None, [0], [11]),
]


@pytest.mark.parametrize("norm, rope", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("case", TURNED)
def test_prefill_norms_and_turns(case: Case, norm: bool, rope: bool) -> None:
    full, poisoned, tables = pools(case)
    heads, dim, eps = case.kv_heads * case.group, case.dim, 1e-5
    config: Any = SimpleNamespace(
        n_heads=heads, n_kv_heads=case.kv_heads, head_dim=dim, layer_windows=(case.window,)
    )
    entries = list(enumerate(zip(case.starts, case.counts)))
    at = [(i, p) for i, (start, count) in entries for p in range(start, start + count)]
    # Rows of padding follow, which belong to no tile; no position has angles past the last one.
    slots, positions = torch.tensor([*at, (0, -1), (0, -1)], dtype=torch.int32).T.contiguous()
    qkv = torch.randn(len(slots), (heads + 2 * case.kv_heads) * dim)
    qkv[len(at) :] = float("nan")
    angles = torch.rand(int(positions.max()) + 1, dim // 2) * 6
    tables_of_rope = (angles.cos(), angles.sin())
    gains = torch.rand(2, dim) + 0.5

    def turned(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        if norm:
            x = F.rms_norm(x, (dim,), gain, eps)
        if rope:
            cosine, sine = (table[positions[: len(at)].long(), None] for table in tables_of_rope)
            low, high = x.chunk(2, dim=-1)
            x = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
        return x

    q, k, v = qkv[: len(at)].view(len(at), -1, dim).split((heads, *(2 * [case.kv_heads])), dim=1)
    reference = ReferenceAttention(full, config)
    reference.plan(AttentionBatch(case.starts, case.counts, tables, []))
    expected = reference.run(0, turned(q, gains[0]), turned(k, gains[1]), v)

    width = max(map(len, tables))
    frames = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
    tiles, row = [[0, 0, 0, 0]], 0  # the first is padding
    for i, (start, count) in entries:
        for done in range(0, count, TILE):
            tiles.append([row + done, start + done, min(TILE, count - done), i])
        row += count
    how: Any = {"rope": tables_of_rope if rope else None, "eps": eps}
    before, found = poisoned.pages.clone(), torch.full((len(slots), heads * dim), float("nan"))
    write_keys(
        qkv, poisoned.pages[0], frames, slots, positions, k_weight=gains[1] if norm else None, **how
    )
    prefill_attention(
        qkv, found, poisoned.pages[0], frames, torch.tensor(tiles, dtype=torch.int32), len(tiles),
        q_weight=gains[0] if norm else None, window=case.window, **how,
    )  # fmt: skip
    assert (found[: len(at)] - expected).abs().max().item() < 1e-5
    assert found[len(at) :].isnan().all()
    for i, p in at:
        place = (0, tables[i][p // case.page], slice(None), p % case.page)
        torch.testing.assert_close(poisoned.pages[place], full.pages[place], rtol=1e-5, atol=1e-6)
        before[place] = poisoned.pages[place]
    assert torch.equal(before.nan_to_num(7.0), poisoned.pages.nan_to_num(7.0))  # nothing else


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
