from __future__ import annotations

import random

import pytest
import torch

from astrai.models.decoder import Decoder
from astrai.models.loading import dummy_weights
from tests.kernels.harness import (
    SHAPES,
    make_config,
    make_decoder,
    mixed,
    random_tokens,
    run,
    whole,
)


@pytest.mark.parametrize("backend", ["cpu", "numba"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_fast_path_equals_reference_path(shape: str, backend: str) -> None:
    rng = random.Random(3)
    decoder = make_decoder(make_config(shape), torch.float32)
    tokens = random_tokens(rng, [150, 40, 1, 77])
    slow = run(decoder, "reference", tokens, whole(tokens), rng)
    fast = run(decoder, backend, tokens, mixed(tokens, rng), rng)
    for x, y in zip(slow, fast):
        torch.testing.assert_close(y, x, atol=1e-4, rtol=1e-4)


def test_hidden_and_logits_shapes_and_dtypes() -> None:
    decoder = make_decoder(make_config("grouped heads"), torch.bfloat16)
    rng = random.Random(0)
    (hidden,) = run(decoder, "cpu", [[1, 2, 3]], whole([[1, 2, 3]]), rng)
    assert hidden.shape == (3, 48)
    assert hidden.dtype == torch.float32  # the residual stream is never rounded to bfloat16
    logits = decoder.logits(hidden)
    assert logits.shape == (3, 128)
    assert logits.dtype == torch.float32


def test_weights_are_taken_out_of_the_dict() -> None:
    config = make_config("grouped heads")
    weights = dummy_weights(config, torch.float32, "cpu")
    Decoder(config, weights, torch.float32)
    assert weights == {}


def test_a_missing_weight_is_named() -> None:
    config = make_config("grouped heads")
    weights = dummy_weights(config, torch.float32, "cpu")
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Decoder(config, weights, torch.float32)


@pytest.mark.parametrize("backend", ["cpu", "numba"])
def test_a_bad_row_spoils_no_other(backend: str) -> None:
    """A NaN in one task's page reaches no other task of the same dense matmul."""
    decoder = make_decoder(make_config("grouped heads"), torch.bfloat16)
    rng = random.Random(1)
    tokens = random_tokens(rng, [20, 50])
    clean = run(decoder, backend, tokens, mixed(tokens, random.Random(2)), random.Random(2))
    embedding = decoder.embedding
    decoder.embedding = embedding.clone()
    decoder.embedding[tokens[0][5]] = float("nan")
    tokens[1] = [t if t != tokens[0][5] else (t + 1) % 128 for t in tokens[1]]
    expected = run(decoder, backend, tokens[1:], whole(tokens[1:]), rng)[0]
    found = run(decoder, backend, tokens, mixed(tokens, random.Random(2)), random.Random(2))
    assert clean[0].isfinite().all()
    assert found[0].isnan().any()
    assert torch.equal(found[1], expected)
