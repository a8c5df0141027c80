"""Tiny random decoders, and scripts that run their tasks through pages in any grouping."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astrai.inference.cache.storage import PagedCache
from astrai.kernels.attention import AttentionBatch, load_backend
from astrai.models.config import ModelConfig, config_from_hf
from astrai.models.decoder import Decoder
from astrai.models.loading import dummy_weights

SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "one kv head": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64},
    "no groups": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
    "window": {
        "architectures": ["MistralForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 45,
    },
    "q and k norms": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def make_config(shape: str, **changes: Any) -> ModelConfig:
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    return config_from_hf(raw | SHAPES[shape] | changes)


def make_decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    weights = dummy_weights(config, torch.float32, "cpu")
    for name, weight in weights.items():
        if not name.endswith("norm.weight"):
            weight *= 10.0  # attention that prefers some keys
    return Decoder(config, weights, dtype)


class Chunk(NamedTuple):
    task: int
    count: int


Tick = list[Chunk]


def whole(tokens: list[list[int]]) -> list[Tick]:
    return [[Chunk(i, len(t))] for i, t in enumerate(tokens)]


def one_by_one(tokens: list[list[int]]) -> list[Tick]:
    return [[Chunk(i, 1)] for i, t in enumerate(tokens) for _ in t]


def mixed(tokens: list[list[int]], rng: random.Random) -> Iterator[Tick]:
    """Ticks of decode steps and prefill chunks of several tasks, until all are through."""
    left = [len(t) for t in tokens]
    while any(left):
        waiting = [i for i, n in enumerate(left) if n]
        tick = []
        for i in rng.sample(waiting, rng.randint(1, len(waiting))):
            count = min(left[i], rng.choice([1, 1, 1, 2, 7, 30, 64, 150]))
            left[i] -= count
            tick.append(Chunk(i, count))
        yield tick


def random_groups(decodes: list[int], rng: random.Random) -> list[list[int]]:
    decodes = rng.sample(decodes, len(decodes))
    groups = []
    while decodes:
        n = rng.randint(1, len(decodes))
        groups.append(decodes[:n])
        decodes = decodes[n:]
    return groups


def run(
    decoder: Decoder,
    backend: str,
    tokens: list[list[int]],
    ticks: list[Tick] | Iterator[Tick],
    rng: random.Random,
    page_size: int = 16,
) -> list[Tensor]:
    """Hidden states of every task, [len(tokens[i]), hidden_size] each."""
    config = decoder.config
    need = [-(-len(t) // page_size) for t in tokens]
    frames = rng.sample(range(sum(need) + 3), sum(need))
    tables = [[frames.pop() for _ in range(n)] for n in need]
    kv = PagedCache(
        config.n_layers,
        sum(need) + 3,
        page_size,
        config.n_kv_heads,
        config.head_dim,
        decoder.dtype,
    )
    kv.pages.normal_(generator=torch.Generator().manual_seed(0))  # what former holders left
    attention = load_backend(backend)(kv, config)
    done = [0] * len(tokens)
    out: list[list[Tensor]] = [[] for _ in tokens]
    for tick in ticks:
        starts = [done[c.task] for c in tick]
        decodes = [i for i, c in enumerate(tick) if c.count == 1]
        attention.plan(
            AttentionBatch(
                starts=starts,
                counts=[c.count for c in tick],
                page_tables=[tables[c.task] for c in tick],
                groups=random_groups(decodes, rng),
            )
        )
        ids = [x for s, c in zip(starts, tick) for x in tokens[c.task][s : s + c.count]]
        positions = [p for s, c in zip(starts, tick) for p in range(s, s + c.count)]
        hidden = decoder.forward(torch.tensor(ids), torch.tensor(positions), attention.run)
        for c, rows in zip(tick, hidden.split([c.count for c in tick])):
            done[c.task] += c.count
            out[c.task].append(rows)
    return [torch.cat(rows) for rows in out]


def random_tokens(rng: random.Random, lengths: list[int], vocab_size: int = 128) -> list[list[int]]:
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]
