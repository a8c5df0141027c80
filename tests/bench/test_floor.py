"""Floors are sums of bytes and operations; W1 is the workload that everybody runs."""

from __future__ import annotations

import pytest
import torch

from astrai.bench._common import w_nano
from astrai.bench._floor import (
    Cost,
    Machine,
    batch_seconds,
    cost_of,
    first_token_seconds,
    machine,
)
from astrai.inference.cache.storage import PagedCache
from astrai.models.config import config_from_hf
from astrai.models.decoder import Decoder
from astrai.models.loading import dummy_weights

COST = Cost(step_bytes=1000, position_bytes=10, position_flops=7, pair_flops=3)
ON = Machine(bandwidth=100.0, rate=50.0)


def test_w1_is_the_published_workload() -> None:
    requests = w_nano(0)
    assert len(requests) == 256
    assert sum(len(r.prompt_ids) for r in requests) == 142_827
    assert sum(r.max_tokens for r in requests) == 133_966


def test_a_batch_reads_weights_per_step_and_keys_per_position() -> None:
    # Two requests side by side: three steps; 2 + 3 and 1 + 2 + 3 positions are read.
    flops = 1 * 7 + 1 * 3
    moved = 3 * 1000 + (5 + 6) * 10
    prompts, outputs = [1, 0], [2, 3]
    assert batch_seconds(COST, ON, prompts, outputs, 2) == pytest.approx(moved / 100 + flops / 50)
    # One slot: five steps.
    assert batch_seconds(COST, ON, prompts, outputs, 1) == pytest.approx(
        (moved + 2 * 1000) / 100 + flops / 50
    )


def test_what_is_cached_is_read_and_not_computed() -> None:
    whole, rest = COST.prefill_flops(10), COST.prefill_flops(4, start=6)
    assert whole == COST.prefill_flops(6) + rest
    assert first_token_seconds(COST, ON, 10, cached=6) == pytest.approx(1060 / 100 + rest / 50)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_weights_but_the_embedding(tied: bool) -> None:
    config = config_from_hf({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    })  # fmt: skip
    decoder = Decoder(config, dummy_weights(config, torch.float32, "cpu"), torch.float32, "cpu")
    cost = cost_of(decoder, PagedCache(2, 4, 16, 2, 8, torch.float32))
    # Projections q and o, k and v, three of the MLP; two norms a layer and the last; the head.
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert cost.position_flops == 2 * matrices
    numbers = matrices + 5 * 32 + 64 * 32
    assert cost.step_bytes >= 4 * numbers  # packed weights may be padded
    assert cost.step_bytes < decoder.weight_bytes or tied
    assert cost.position_bytes == 2 * 2 * 2 * 8 * 4
    assert cost.pair_flops == 4 * 2 * 32


def test_the_machine_is_measured() -> None:
    found = machine(torch.device("cpu"))
    assert found.bandwidth > 1e8 and found.rate > 1e8
