"""The families one decoder covers, as data. Adding a family is adding one entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """How one architecture reads its config.json. A bias of None: the config's own flag decides."""

    model_type: str
    gguf: str  # general.architecture of its GGUF files
    gguf_permuted: bool = False  # its GGUF files hold q and k rows for interleaved rope
    qkv_bias: bool | None = None  # None: attention_bias
    output_bias: bool | None = None  # None: attention_bias
    mlp_bias: bool | None = None  # None: mlp_bias
    qk_norm: bool = False
    windows: Literal["none", "all", "by layer"] = "none"
    no_rope_layers: bool = False  # reads no_rope_layers / no_rope_layer_interval
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields absent in config.json


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", gguf="llama", gguf_permuted=True),
    "MistralForCausalLM": Family(
        "mistral",
        gguf="llama",
        gguf_permuted=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows="all",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        gguf="qwen2",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        windows="by layer",
        defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        gguf="qwen3",
        mlp_bias=False,
        qk_norm=True,
        windows="by layer",
        defaults={
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        gguf="smollm3",
        gguf_permuted=True,
        windows="by layer",
        no_rope_layers=True,
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
    ),
}


def find_family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The architecture's name and family of a config.json.

    Raises ValueError naming the architecture and the supported ones.
    """
    names = config.get("architectures") or [
        name for name, f in FAMILIES.items() if f.model_type == config.get("model_type")
    ]
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    shown = names or config.get("model_type")
    raise ValueError(f"architecture {shown!r} is not supported; supported: {', '.join(FAMILIES)}")


def architecture_of_gguf(name: str) -> str:
    """The architecture that reads GGUF files whose general.architecture is `name`."""
    for architecture, family in FAMILIES.items():
        if family.gguf == name:
            return architecture
    supported = ", ".join(dict.fromkeys(f.gguf for f in FAMILIES.values()))
    raise ValueError(f"GGUF architecture {name!r} is not supported; supported: {supported}")


# Shapes of well known models, for measuring without their weights (load_format "dummy").
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
}
