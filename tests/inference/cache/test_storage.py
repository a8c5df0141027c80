from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.inference.cache.storage import CacheView, PagedCache


def make_cache(n_pages: int = 8, page_size: int = 16) -> PagedCache:
    return PagedCache(2, n_pages, page_size, 3, 4, torch.float32)


def test_shapes() -> None:
    kv = PagedCache(24, 8, 64, 4, 64, torch.bfloat16)
    assert kv.k_cache.shape == kv.v_cache.shape == (24, 8, 64, 4, 64)
    assert kv.bytes_per_page == 2 * 24 * 64 * 4 * 64 * 2
    assert kv.bytes_per_page * kv.n_pages == kv.pages.nbytes


def test_head_pages_are_the_caches_by_head() -> None:
    kv = make_cache()
    kv.pages.normal_()
    rows = kv.head_pages(1).view(8, 2, 3, 16, 4)
    assert torch.equal(rows[5, 0, 2], kv.k_cache[1, 5, :, 2])
    assert torch.equal(rows[5, 1, 2], kv.v_cache[1, 5, :, 2])


def test_write_crosses_page_borders() -> None:
    kv = make_cache(page_size=16)
    view = CacheView(kv, [[5, 2, 7]], [40])
    k, v = torch.randn(2, 20, 3, 4)
    view.write(1, [list(range(14, 34))], k, v)
    assert torch.equal(kv.k_cache[1, 5, 14:], k[:2])
    assert torch.equal(kv.k_cache[1, 2], k[2:18])
    assert torch.equal(kv.v_cache[1, 7, :2], v[18:])
    assert not kv.pages[0].any()
    assert torch.equal(view.gather(1)[0].v[14:34], v)


@given(st.data(), st.sampled_from([16, 32, 64]))
@settings(max_examples=30, deadline=None)
def test_gather_returns_what_was_written(data: st.DataObject, page_size: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=4))
    need = [-(-n // page_size) for n in lengths]
    frames = data.draw(st.permutations(range(sum(need) + 2)))
    tables = [frames[sum(need[:i]) : sum(need[: i + 1])] for i in range(len(need))]
    kv = make_cache(sum(need) + 2, page_size)
    k, v = torch.randn(2, sum(lengths), 3, 4)
    view = CacheView(kv, tables, lengths)
    order = data.draw(st.permutations(range(sum(lengths))))
    where = [(i, p) for i, n in enumerate(lengths) for p in range(n)]
    for part in (order[::2], order[1::2]):  # in any order, task by task
        rows = [[r for r in part if where[r][0] == i] for i in range(len(lengths))]
        flat = torch.tensor([r for task in rows for r in task], dtype=torch.int64)
        view.write(0, [[where[r][1] for r in task] for task in rows], k[flat], v[flat])
    for i, found in enumerate(view.gather(0)):
        own = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
        assert torch.equal(found.k, k[own])
        assert torch.equal(found.v, v[own])


def test_copy_and_clear_touch_one_frame() -> None:
    kv = make_cache()
    kv.pages.normal_()
    before = kv.pages.clone()
    kv.copy_page(3, 6)
    assert torch.equal(kv.pages[:, 6], before[:, 3])
    kv.clear_pages([3])
    assert not kv.pages[:, 3].any()
    others = [0, 1, 2, 4, 5, 7]
    assert torch.equal(kv.pages[:, others], before[:, others])


@pytest.mark.parametrize(
    ("tables", "lengths", "message"),
    [
        ([[0]], [1, 2], "expected len"),
        ([[0]], [17], "length = 17"),
        ([[0, 8]], [17], r"frames in \[0, 8\)"),
    ],
)
def test_bad_views_are_refused(tables: list[list[int]], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheView(make_cache(), tables, lengths)


def test_bad_writes_are_refused() -> None:
    view = CacheView(make_cache(), [[1]], [4])
    rows = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match=r"position = 16 of task 0"):
        view.write(0, [[16]], rows, rows)
    with pytest.raises(ValueError, match=r"k\.shape"):
        view.write(0, [[1, 2]], rows, rows)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="page_size = 0"):
        PagedCache(1, 1, 0, 1, 1)
