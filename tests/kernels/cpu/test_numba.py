"""What only the compiled kernels of the CPU have: their lanes, their threads, what they refuse."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import config as numba_config
from numba import njit, types
from numba.core.ccallback import CFunc

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch, cpu_backend
from astrai.kernels.cpu import keep, run
from astrai.kernels.cpu.compiled_attention import NumbaAttention
from astrai.kernels.cpu.keep import kept, sources
from astrai.kernels.cpu.lanes import (
    LANES,
    dots16,
    dots64,
    load,
    load_short,
    short_dots64,
    splat,
    store,
    store_one,
    store_short,
    total,
)
from tests.kernels.harness import make_config


@njit(error_model="numpy")
def round_all(source: int, target: int, n: int) -> None:
    for i in range(0, n, LANES):
        store_short(target + 2 * i, load(source + 4 * i))


@njit(error_model="numpy")
def sum_up(source: int, target: int) -> None:
    store_one(target, total(load(source)))


@njit(error_model="numpy")
def multiply(q: int, keys: int, step: int, out: int, kind: int) -> None:
    sums = splat(np.float32(0.0))
    if kind == 0:
        sums = dots64(q, keys, step)
    elif kind == 1:
        sums = dots16(q, keys, step)
    else:
        sums = short_dots64(q, keys, step)
    store(out, sums)


@njit(error_model="numpy")
def widen(source: int, target: int) -> None:
    store(target, load_short(source))


def test_bfloat16_is_rounded_as_by_torch() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0))
    bits[:6] = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F800000, 0x7FC00001, 0x7F7FFFFF, 0x7F800001]
    )
    x = bits.to(torch.int32).view(torch.float32)
    found = torch.zeros(4096, dtype=torch.bfloat16)
    round_all(x.data_ptr(), found.data_ptr(), 4096)
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.zeros(16)
    widen(found.data_ptr(), back.data_ptr())
    torch.testing.assert_close(back, found[:16].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kind", "n"), [(0, 64), (1, 16), (2, 64)])
def test_products_are_in_their_lanes_and_added_up_as_by_total(kind: int, n: int) -> None:
    generator = torch.Generator().manual_seed(kind)
    dtype = torch.bfloat16 if kind == 2 else torch.float32
    q, keys = torch.randn(n, generator=generator), torch.randn(16, n, generator=generator).to(dtype)
    found = torch.zeros(16)
    multiply(q.data_ptr(), keys.data_ptr(), n * dtype.itemsize, found.data_ptr(), kind)
    torch.testing.assert_close(found, (keys.double() @ q.double()).float(), rtol=1e-5, atol=1e-5)
    if n == 16:
        one = torch.zeros(1)
        for lane in range(16):
            product = q * keys[lane]
            sum_up(product.data_ptr(), one.data_ptr())
            assert one.item() == found[lane].item()


def attend(kv: PagedCache, batch: AttentionBatch, seed: int = 0) -> torch.Tensor:
    config = make_config("window")
    rows = torch.randn(
        sum(batch.counts), config.n_heads + 2 * config.n_kv_heads, config.head_dim,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    q, k, v = rows.split((config.n_heads, config.n_kv_heads, config.n_kv_heads), dim=1)
    backend = NumbaAttention(kv, config)
    backend.plan(batch)
    return backend.run(0, q, k, v)


def new_cache(n_pages: int) -> PagedCache:
    config = make_config("window")
    kv = PagedCache(1, n_pages, 16, config.n_kv_heads, config.head_dim, torch.float32)
    kv.pages.normal_(generator=torch.Generator().manual_seed(1))
    return kv


def test_what_a_row_does_not_see_is_not_read() -> None:
    """Neither what follows its position nor what lies before its window, in the same page too."""
    batch = AttentionBatch([100], [1], [list(range(7))], [])
    expected = attend(new_cache(7), batch)
    kv = new_cache(7)
    begin = 100 - 45 + 1
    for position in [*range(begin), *range(101, 112)]:
        kv.pages[0, position // 16, :, position % 16] = float("nan")
    assert torch.equal(attend(kv, batch), expected)


def test_without_a_team_of_threads_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = random.Random(0).sample(range(80), 80)
    batch = AttentionBatch(
        [300, 0, 511], [1, 200, 1], [frames[:19], frames[20:33], frames[40:72]], []
    )
    expected = attend(new_cache(80), batch)
    monkeypatch.setattr(run, "_parallel", None)
    assert torch.equal(attend(new_cache(80), batch), expected)


def test_caches_that_it_cannot_read_are_refused() -> None:
    config = make_config("window")
    with pytest.raises(ValueError, match=r"'numba'.*float16"):
        NumbaAttention(PagedCache(1, 1, 16, 2, 16, torch.float16), config)
    with pytest.raises(ValueError, match=r"'numba'.*page_size = 24, head_dim = 16.*16"):
        NumbaAttention(PagedCache(1, 1, 24, 2, 16, torch.float32), config)
    with pytest.raises(ValueError, match=r"'numba'.*'meta'.*expected a CPU"):
        NumbaAttention(PagedCache(1, 1, 16, 2, 16, torch.float32, "meta"), config)


def test_what_the_kernels_would_misread_is_refused() -> None:
    config, kv = make_config("window"), new_cache(2)
    backend = NumbaAttention(kv, config)
    with pytest.raises(ValueError, match=r"tables = \[1, 2\], expected frames in \[0, 2\)"):
        backend.plan(AttentionBatch([20], [1], [[1, 2]], []))
    backend.plan(AttentionBatch([20], [1], [[1, 0]], []))
    q, k = torch.zeros(1, 4, 16), torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match=r"q: .*torch.bfloat16, expected torch.float32"):
        backend.run(0, q.bfloat16(), k, k)
    with pytest.raises(ValueError, match=r"k: .*expected torch.float32, 1 rows"):
        backend.run(0, q, torch.zeros(1, 16, 2).mT, k)
    with pytest.raises(ValueError, match=r"v: .*\[2, 2, 16\]"):
        backend.run(0, q, k, torch.zeros(2, 2, 16))


def test_what_is_kept_is_found_again_until_a_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file of the directory than the function's own, too."""
    monkeypatch.setattr(numba_config, "CACHE_DIR", str(tmp_path))
    signature = types.void(types.int64)

    def make(version: int) -> Callable[[int], None]:
        def function(x: int) -> None:
            _ = version

        return function

    assert [kept(signature, make(v)).cache_hits for v in (1, 1, 2, 1)] == [0, 1, 0, 1]
    for source in Path(keep.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(keep, "__file__", str(tmp_path / "keep.py"))
    before = sources.__wrapped__()
    assert before == sources()
    with (tmp_path / "lanes.py").open("a") as file:
        file.write("# another\n")
    assert before != sources.__wrapped__()


def test_with_no_place_to_keep_code_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(CFunc, "enable_caching", refuse)
    made = kept(types.int64(types.int64), lambda x: x + 1)
    assert made.ctypes(2) == 3


def test_damaged_files_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_config, "CACHE_DIR", str(tmp_path))
    signature = types.int64(types.int64)

    def double(x: int) -> int:
        return 2 * x

    kept(signature, double)
    for kind in ("nbc", "nbi"):
        files = list(tmp_path.rglob(f"*.{kind}"))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:40] + b"damaged")
        assert kept(signature, double).ctypes(3) == 6


def test_the_default_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_backend(torch.bfloat16, 64, 128) == "numba"
    assert cpu_backend(torch.float16, 64, 128) == "cpu"
    assert cpu_backend(torch.float32, 8, 128) == "cpu"
    monkeypatch.setitem(sys.modules, "astrai.kernels.cpu.compiled_attention", None)
    assert cpu_backend(torch.bfloat16, 64, 128) == "cpu"
