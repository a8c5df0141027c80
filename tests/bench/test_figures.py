"""Each figure stands beside its floor: the benchmarks on a tiny model of random weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def shape(tmp_path: Path) -> str:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 10_016, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        (
            "throughput --workload nano --requests 2 --repeat 1 --slots 2",
            [("floor_seconds", "seconds")],
        ),
        (
            "latency --repeat 1 --output-tokens 9",
            [
                ("floor_first_token_ms", "first_token_ms"),
                ("floor_ms_per_token", "ms_per_token"),
            ],
        ),
        (
            "prefix --repeat 2 --shared-tokens 64 --own-tokens 8",
            [("floor_cold_ms", "cold_ms"), ("floor_warm_ms", "warm_ms")],
        ),
    ],
)
def test_a_figure_and_its_floor(
    capsys: pytest.CaptureFixture[str], shape: str, flags: str, pairs: list[tuple[str, str]]
) -> None:
    name, *rest = flags.split()
    bench = importlib.import_module(f"astrai.bench.{name}")
    bench.main([*rest, "--shape", shape, "--dtype", "float32", "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["model"] == shape
    for floor, figure in pairs:
        assert 0 < result[floor] < result[figure]
