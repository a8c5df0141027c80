from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch, load_backend
from astrai.kernels.cpu.matmul_attention import CpuAttention
from tests.kernels.harness import SHAPES, make_config, random_groups


def make_cache(shape: str, page_size: int, n_pages: int, dtype: torch.dtype) -> PagedCache:
    config = make_config(shape)
    kv = PagedCache(config.n_layers, n_pages, page_size, config.n_kv_heads, config.head_dim, dtype)
    kv.pages.normal_(generator=torch.Generator().manual_seed(1))
    return kv


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(sorted(SHAPES)),
    page_size=st.sampled_from([16, 32, 64, 128]),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("backend", ["cpu", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference(
    dtype: torch.dtype, backend: str, seed: int, shape: str, page_size: int
) -> None:
    rng = random.Random(seed)
    config = make_config(shape)
    n = rng.randint(1, 6)
    starts = [rng.choice([0, 1, 15, 16, 63, 64, 130, rng.randrange(400)]) for _ in range(n)]
    counts = [rng.choice([1, 1, 1, 2, 17, 64, 129, rng.randint(1, 300)]) for _ in range(n)]
    need = [-(-(start + count) // page_size) for start, count in zip(starts, counts)]
    frames = rng.sample(range(sum(need) + 2), sum(need))
    tables = [[frames.pop() for _ in range(m)] for m in need]
    decodes = [i for i in range(n) if counts[i] == 1]
    batch = AttentionBatch(starts, counts, tables, random_groups(decodes, rng))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(
        sum(counts), config.n_heads + 2 * config.n_kv_heads, config.head_dim, generator=generator
    ).to(dtype)
    q, k, v = rows.split((config.n_heads, config.n_kv_heads, config.n_kv_heads), dim=1)
    results = []
    for name in ("reference", backend):
        kv = make_cache(shape, page_size, sum(need) + 2, dtype)
        attention = load_backend(name)(kv, config)
        attention.plan(batch)
        results.append((attention.run(1, q, k, v), kv.pages))
    (expected, pages), (found, found_pages) = results
    assert torch.equal(pages, found_pages)
    # bfloat16 scores and probabilities carry 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_same_position_group_equals_each_alone() -> None:
    config = make_config("grouped heads")
    kv = make_cache("grouped heads", 16, 8, torch.bfloat16)
    q = torch.randn(4, config.n_heads, config.head_dim).bfloat16()
    kv_rows = torch.randn(2, 4, config.n_kv_heads, config.head_dim).bfloat16()
    tables = [[0, 1], [2, 3], [4, 5], [6, 7]]
    attention = CpuAttention(kv, config)
    results = []
    for groups in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]], []):
        attention.plan(AttentionBatch([20] * 4, [1] * 4, tables, groups))
        results.append(attention.run(0, q, kv_rows[0], kv_rows[1]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", ["reference", "cpu", "numba"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (AttentionBatch([0], [1], [], [[0]]), "page_tables"),
        (AttentionBatch([16], [1], [[0]], [[0]]), "start = 16, count = 1"),
        (AttentionBatch([0], [0], [[0]], []), "count = 0"),
        (AttentionBatch([0, 0], [1, 1], [[0], [1]], [[0, 1], [1]]), "at most once"),
        (AttentionBatch([0], [2], [[0]], [[0]]), "of count 1"),
        (AttentionBatch([0], [1], [[0]], [[1]]), "of count 1"),
    ],
)
def test_bad_batches_are_refused(name: str, batch: AttentionBatch, message: str) -> None:
    kv = make_cache("no groups", 16, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        load_backend(name)(kv, make_config("no groups")).plan(batch)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*'cpu', 'numba', 'reference'"):
        load_backend("abacus")


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, astrai.kernels.attention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
