"""Tiny random models of every family, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from astrai.models.tokenizer import ByteTokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}

# Name -> model type of transformers, and what differs from SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "smollm2": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48,
                          "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 21, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 21,
                               "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biased": ("qwen3", {"head_dim": 16, "attention_bias": True,
                               "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 21,
                                   "no_rope_layers": [1, 0, 0, 1]}),
}  # fmt: skip


def build(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """float32; every parameter random, biases and norms too, so that none can be left out."""
    model_type, differences = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **(SHAPE | differences))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1.0
    return model


def save(family: str, directory: Path, **options: Any) -> transformers.PreTrainedModel:
    model = build(family)
    model.save_pretrained(directory, **options)
    save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=ByteTokenizer()._backend, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(directory)
