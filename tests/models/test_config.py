from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import transformers

from astrai.models.config import RopeConfig, config_from_hf
from astrai.models.loading import expected_tensors
from astrai.models.registry import FAMILIES, PRESETS
from tests.models import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"]}


def test_every_family_of_the_registry_is_among_the_tiny_models() -> None:
    tested = {type(tiny.build(name)).__name__ for name in tiny.FAMILIES}
    assert tested == set(FAMILIES)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_their_name_says(name: str) -> None:
    config = config_from_hf(PRESETS[name])
    billions = {"smollm2-135m": 0.135, "qwen3-0.6b": 0.596, "llama-3.2-1b": 1.236}
    billions |= {"qwen3-8b": 8.19}
    n = sum(math.prod(shape) for shape in expected_tensors(config).values())
    assert n / 1e9 == pytest.approx(billions[name], rel=0.01)


def test_absent_fields_take_the_defaults_of_the_family() -> None:
    llama = config_from_hf(LLAMA)
    assert (llama.n_kv_heads, llama.head_dim, llama.rope.theta) == (4, 16, 10_000.0)
    assert llama.sliding_window is None
    assert config_from_hf(SMOLLM3).rope.theta == 2_000_000.0
    assert config_from_hf(SMOLLM3).tie_embeddings
    mistral = config_from_hf(LLAMA | {"architectures": None, "model_type": "mistral",
                                      "num_key_value_heads": 2})  # fmt: skip
    assert mistral.sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.* not supported.*Qwen3ForCaus"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"use_moe": True}, "use_moe"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor = None, expected a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"sliding_window": 128}, "sliding_window = 128 is not implemented for llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size = '64', expected an integer"),
        ({"hidden_size": 66}, "not a multiple of num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 0}, "n_layers = 0"),
        ({"head_dim": 15}, "even number"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes', expected true or false"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None},
        {"num_local_experts": 0},
        {"residual_multiplier": 1.0},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"pretraining_tp": 2},
        {"rope_interleaved": False},
        {"torch_dtype": "bfloat16"},
    ],
)
def test_neutral_values_are_accepted(changes: dict[str, Any]) -> None:
    assert config_from_hf(LLAMA | changes) == config_from_hf(LLAMA)


def test_a_field_nobody_reads_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config_from_hf(LLAMA | {"some_new_field": 3})
    assert "some_new_field" in caplog.text


def test_windows_by_layer() -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert config_from_hf(QWEN2 | windowed).layer_windows == (None, 8, 8)
    assert config_from_hf(QWEN2 | windowed).sliding_window is None
    unused = windowed | {"use_sliding_window": False}
    assert config_from_hf(QWEN2 | unused).layer_windows == (None, None, None)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    given = config_from_hf(QWEN2 | windowed | {"layer_types": kinds})
    assert given.layer_windows == (8, None, 8)
    with pytest.raises(ValueError, match="sliding_window is unset"):
        config_from_hf(QWEN2 | unused | {"layer_types": kinds})
    with pytest.raises(ValueError, match="chunked_attention"):
        config_from_hf(QWEN2 | windowed | {"layer_types": ["chunked_attention"] * 3})
    with pytest.raises(ValueError, match="2 entries, expected 3"):
        config_from_hf(QWEN2 | windowed | {"layer_types": kinds[:2]})


def test_rope_layers() -> None:
    assert config_from_hf(SMOLLM3).layer_rope == (True, True, True)
    four = SMOLLM3 | {"num_hidden_layers": 4}
    assert config_from_hf(four).layer_rope == (True, True, True, False)
    assert config_from_hf(SMOLLM3 | {"no_rope_layers": [0, 1, 0, 1]}).layer_rope == (
        False,
        True,
        False,
    )
    with pytest.raises(ValueError, match="has 2 entries, expected 3"):
        config_from_hf(SMOLLM3 | {"no_rope_layers": [0, 1]})


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    tiny.LLAMA3_ROPE,
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    tiny.YARN_ROPE,
    {"rope_type": "yarn", "factor": 8.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
     "beta_fast": 24, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("parameters", ROPES)
@pytest.mark.parametrize("old_names", [False, True])
def test_rope_frequencies_are_those_of_transformers(
    parameters: dict[str, Any], theta: float, old_names: bool
) -> None:
    shape = {**tiny.SHAPE, "head_dim": 128, "max_position_embeddings": 131_072}
    theirs = transformers.LlamaConfig(**shape, rope_parameters={"rope_theta": theta, **parameters})
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    raw = {**shape, "architectures": ["LlamaForCausalLM"]}
    if old_names:
        scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "rope_type")}
        raw |= {"rope_scaling": {"type": parameters["rope_type"], **scaling}}
        raw |= {"rope_theta": parameters.get("rope_theta", theta)}
    else:
        raw |= {"rope_parameters": {"rope_theta": theta, **parameters}}
    inverse, factor = config_from_hf(raw).rope.frequencies(128)
    assert inverse.dtype == torch.float32
    assert torch.equal(inverse, rotary.inv_freq)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_unknown_scaling_is_refused_where_it_is_used() -> None:
    with pytest.raises(ValueError, match="'spiral'"):
        RopeConfig(10_000.0, "spiral").frequencies(64)
