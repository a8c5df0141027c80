"""Every family gives the logits of transformers in float32, however its positions are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch, load_backend
from astrai.models.loading import LoadedModel, load_model
from tests.models import tiny

N_TOKENS = 70
TOLERANCE = 1e-4
WAYS = {
    "whole": [N_TOKENS],
    "chunked": [1, 16, 30, 2, 21],
    "token by token": [1] * N_TOKENS,
    "prefill then decode": [50] + [1] * (N_TOKENS - 50),
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, torch.Tensor, torch.Tensor]:
    """The loaded model, token ids, and their logits by transformers."""
    directory = tmp_path_factory.mktemp(request.param)
    reference = tiny.save(request.param, directory)
    loaded = load_model(str(directory), dtype="float32", device="cpu")
    ids = torch.randint(
        0, tiny.SHAPE["vocab_size"], (N_TOKENS,), generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    return loaded, ids, expected


def logits_through_pages(
    loaded: LoadedModel, ids: torch.Tensor, counts: list[int], backend: str
) -> torch.Tensor:
    config = loaded.config
    kv = PagedCache(config.n_layers, 8, 16, config.n_kv_heads, config.head_dim, dtype=loaded.dtype)
    attention = load_backend(backend)(kv, config)
    table = [6, 1, 7, 0, 3]  # out of order: a page's place must not matter
    out, start = [], 0
    for count in counts:
        groups = [[0]] if count == 1 else []
        attention.plan(AttentionBatch([start], [count], [table], groups))
        positions = torch.arange(start, start + count)
        hidden = loaded.decoder.forward(ids[positions], positions, attention.run)
        out.append(loaded.decoder.logits(hidden))
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
@pytest.mark.parametrize("way", WAYS)
def test_same_logits_as_transformers(
    family: tuple[LoadedModel, torch.Tensor, torch.Tensor], way: str, backend: str
) -> None:
    loaded, ids, expected = family
    got = logits_through_pages(loaded, ids, WAYS[way], backend)
    assert got.shape == expected.shape
    assert expected.abs().max() > 0.5  # else the tolerance would say nothing
    assert (got - expected).abs().max().item() < TOLERANCE


def test_windows_and_rope_layers_are_not_all_alike(tmp_path: Path) -> None:
    """The windows of the tiny models are shorter than the text, so that they matter."""
    tiny.save("smollm3-window", tmp_path)
    config = load_model(str(tmp_path), dtype="float32", device="cpu").config
    assert config.layer_rope == (True, False, False, True)
    assert config.layer_windows == (None, 21, 21, None)
    assert N_TOKENS > 21
