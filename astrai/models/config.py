"""What distinguishes one model from another, as plain data, and how config.json becomes it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from astrai.models.registry import Family, find_family

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class RopeFrequencies(NamedTuple):
    inverse: torch.Tensor  # float32 [head_dim // 2]: radians per position
    attention_factor: float  # cos and sin are multiplied by it


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the halves kind: dimension i turns with dimension i + head_dim // 2."""

    theta: float
    # None | "linear" (factor) | "llama3" (factor, low_freq_factor, high_freq_factor,
    # original_max_positions) | "yarn" (factor, beta_fast, beta_slow, truncate, attention_factor,
    # original_max_positions) | "divisors" (divisors: one per frequency)
    scaling: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def frequencies(self, head_dim: int) -> RopeFrequencies:
        """Computed in float32, in the order of operations the checkpoints were trained with."""
        import torch

        steps = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        turns = self.theta**steps
        p = self.parameters
        match self.scaling:
            case None:
                return RopeFrequencies(1.0 / turns, 1.0)
            case "linear":
                return RopeFrequencies(1.0 / turns / p["factor"], 1.0)
            case "divisors":
                divisors = torch.tensor(p["divisors"], dtype=torch.float32)
                return RopeFrequencies(1.0 / turns / divisors, 1.0)
            case "llama3":
                return RopeFrequencies(_llama3(1.0 / turns, p), 1.0)
            case "yarn":
                return RopeFrequencies(
                    _yarn(turns, head_dim, self.theta, p), float(p["attention_factor"])
                )
        raise ValueError(f"rope scaling {self.scaling!r} is not supported")


def _llama3(inverse: torch.Tensor, p: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    import torch

    original = p["original_max_positions"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > original / low, inverse / p["factor"], inverse)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / p["factor"] + smooth * scaled
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, blended, scaled)


def _yarn(turns: torch.Tensor, head_dim: int, theta: float, p: Mapping[str, Any]) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): a linear ramp from extrapolated to interpolated frequencies."""
    import torch

    def dimension_of(rotations: float) -> float:
        span = p["original_max_positions"] / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(theta))

    low, high = dimension_of(p["beta_fast"]), dimension_of(p["beta_slow"])
    if p["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp divides by their difference
    ramp = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1 - torch.clamp((ramp - low) / (high - low), 0, 1)
    return (1.0 / (p["factor"] * turns)) * (1 - keep) + (1.0 / turns) * keep


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder needs to know besides the weights."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int  # context length
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    attention_bias: bool  # of q, k and v
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm over head_dim of q and k, before rope
    # A position attends to the last `window` positions, itself included; None = to all.
    layer_windows: tuple[int | None, ...]
    layer_rope: tuple[bool, ...]  # False: the layer applies no rope

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} = {value}, expected more than 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads = } is not a multiple of {self.n_kv_heads = }; "
                "every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim = }, expected an even number (rope turns pairs)")
        for name in ("layer_windows", "layer_rope"):
            if len(getattr(self, name)) != self.n_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, expected {self.n_layers}"
                )
        for window in self.layer_windows:
            if window is not None and window <= 0:
                raise ValueError(f"sliding window = {window}, expected more than 0")

    @property
    def sliding_window(self) -> int | None:
        """The widest window when every layer has one (no older position is ever read)."""
        windows = [w for w in self.layer_windows if w is not None]
        return max(windows) if len(windows) == self.n_layers else None


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "max_positions",
    "rms_norm_eps",
)

# Fields that change the arithmetic, with the values under which they do not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu", None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "position_embedding_type": (None, "rope"),
}
# Fields of other families: anything but a neutral value would be ignored arithmetic.
_FOREIGN = re.compile(
    r"softcap|expert|moe|quant|multiplier|scaling|_scale$|scale_|alibi|mamba|conv_|"
    r"clip_qkv|nextn|lora_rank|attention_chunk|attn_temperature|query_pre_attn"
)
_READ = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "no_rope_layers",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
    }
)
# Training, bookkeeping, and what the tokenizer or the sampling parameters say instead.
_NO_EFFECT = frozenset(
    {
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "is_llama_config",
        "auto_map",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "_attn_implementation_autoset",
        "cache_implementation",
        "transformers.js_config",
        "task_specific_params",
        "unsloth_version",
        "unsloth_fixed",
        "mlp_dropout",
        "name_or_path",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "_commit_hash",
        "classifier_dropout",
    }
)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json.

    Raises ValueError naming the field for an unsupported architecture or feature, a missing
    field or a wrong type.
    """
    architecture, family = find_family(raw)
    _refuse_unimplemented(raw, architecture)
    raw = {**family.defaults, **raw}
    n_layers = _integer(raw, "num_hidden_layers")
    n_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    max_positions = _integer(raw, "max_position_embeddings")
    attention_bias = _flag(raw, "attention_bias")
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if n_heads <= 0 or hidden_size % n_heads:
            raise ValueError(
                f"{hidden_size = } is not a multiple of num_attention_heads = "
                f"{n_heads} and gives no head_dim"
            )
        head_dim = hidden_size // n_heads
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=(
            n_heads
            if raw.get("num_key_value_heads") is None
            else _integer(raw, "num_key_value_heads")
        ),
        head_dim=int(head_dim),
        max_positions=max_positions,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=_flag(raw, "mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        layer_windows=_windows(raw, family, n_layers),
        layer_rope=_rope_layers(raw, family, n_layers),
    )


def _refuse_unimplemented(raw: Mapping[str, Any], architecture: str) -> None:
    neutral: tuple[Any, ...] = (None, 0, 1, "", [], {})
    unknown = []
    for key, value in raw.items():
        if key in _MUST_BE:
            if value not in _MUST_BE[key]:
                raise ValueError(
                    f"{key} = {value!r} is not implemented for {architecture}; "
                    f"expected {_MUST_BE[key][0]!r}"
                )
        elif key in _READ or key in _NO_EFFECT:
            continue
        elif (
            _FOREIGN.search(key) and value is not False and (value is True or value not in neutral)
        ):
            raise ValueError(f"{key} = {value!r} is not implemented")
        elif value is not None and value is not False:
            unknown.append(key)
    if unknown:
        logger.warning("config: fields not read: %s", ", ".join(sorted(unknown)))


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} = {value!r}, expected an integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} = {value!r}, expected a number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r}, expected true or false")
    return bool(value)


# Per scaling kind: the parameters it needs, and the optional ones with their defaults.
_ROPE_KINDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "linear": (("factor",), {}),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), {}),
    "yarn": ((), {"beta_fast": 32, "beta_slow": 1, "truncate": True}),
}
_ROPE_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN_ONLY = {"factor", "attention_factor", "mscale", "mscale_all_dim"}


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(v, Mapping) for v in given.values()):
        raise ValueError("rope parameters per layer type are not implemented")
    theta = given.get("rope_theta")
    if theta is None:
        theta = _number(raw, "rope_theta", 10_000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor = {given['partial_rotary_factor']} is not implemented"
        )
    if kind == "default":
        return RopeConfig(float(theta))
    if kind not in _ROPE_KINDS:
        raise ValueError(
            f"rope scaling {kind!r} is not implemented; "
            f"implemented: default, {', '.join(_ROPE_KINDS)}"
        )
    required, optional = _ROPE_KINDS[kind]
    known = _ROPE_COMMON | {*required, *optional, "original_max_position_embeddings"}
    known |= _YARN_ONLY if kind == "yarn" else set()
    if stray := sorted(key for key in given if key not in known and given[key] is not None):
        raise ValueError(f"rope scaling {kind!r} does not take {', '.join(stray)}")
    parameters: dict[str, Any] = {key: _number(given, key) for key in required}
    parameters |= {k: d if given.get(k) is None else given[k] for k, d in optional.items()}
    if kind != "linear":
        original = raw.get("original_max_position_embeddings")
        if original is None:
            original = given.get("original_max_position_embeddings") or max_positions
        parameters["original_max_positions"] = original
    if kind == "yarn":
        parameters |= _yarn_factors(given, max_positions / parameters["original_max_positions"])
    return RopeConfig(float(theta), kind, parameters)


def _yarn_factors(given: Mapping[str, Any], implied: float) -> dict[str, float]:
    factor = _number(given, "factor", implied)
    attention = given.get("attention_factor")
    if attention is None:
        scale, over = given.get("mscale"), given.get("mscale_all_dim")
        if not (scale and over):
            scale, over = 1.0, 0.0
        growth = 0.1 * math.log(factor) if factor > 1 else 0.0
        attention = (growth * scale + 1.0) / (growth * over + 1.0)
    return {"factor": factor, "attention_factor": float(attention)}


def _windows(raw: Mapping[str, Any], family: Family, n_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    kinds = raw.get("layer_types")
    if family.windows != "by layer":
        if kinds is not None and len(set(kinds)) > 1:
            raise ValueError(f"mixed layer_types are not implemented for {family.model_type}")
        if family.windows == "all":
            return (None if window is None else _integer(raw, "sliding_window"),) * n_layers
        if window is not None or (kinds and kinds[0] != "full_attention"):
            raise ValueError(
                f"sliding_window = {window} is not implemented for {family.model_type}"
            )
        return (None,) * n_layers
    if not _flag(raw, "use_sliding_window"):
        window = None
    if kinds is None:
        if family.no_rope_layers:
            sliding = [not rope for rope in _rope_layers(raw, family, n_layers)]
        else:
            sliding = [i >= _integer(raw, "max_window_layers") for i in range(n_layers)]
        return tuple(window if slides else None for slides in sliding)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types {sorted(unknown)} are not implemented")
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "layer_types has sliding_attention, but sliding_window is unset or "
            "use_sliding_window is false"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_layers(raw: Mapping[str, Any], family: Family, n_layers: int) -> tuple[bool, ...]:
    if not family.no_rope_layers:
        return (True,) * n_layers
    flags = raw.get("no_rope_layers")  # 1: the layer uses rope, despite the name
    if flags is None:
        every = raw.get("no_rope_layer_interval", 4)
        return tuple((i + 1) % every != 0 for i in range(n_layers))
    return tuple(bool(flag) for flag in flags[:n_layers])
