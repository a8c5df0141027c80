"""GGUF files: header, configuration and tensors under their Hugging Face names.

The format is described in the specification that the `gguf` package ships with
(docs/gguf.md): little endian, a header of typed key/value pairs, tensor descriptions, then
aligned tensor data. The header is parsed here because a vocabulary is a hundred thousand small
strings and the reader of the package, which keeps a view of each, needs 1.7 s for one of 49152
tokens; dequantisation is the package's own.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astrai.kernels.linear import INT4_GROUP, Int4Weight, Weight
from astrai.models.config import ModelConfig, RopeConfig, config_from_hf
from astrai.models.registry import FAMILIES, architecture_of_gguf

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
# Elements dequantised at a time: float32 temporaries of this size stay in a core's cache.
_CHUNK = 1 << 18

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"
# Types of 4-bit codes in blocks of 32 columns: float16 scale, for Q4_1 float16 minimum, 16 bytes of
# which byte i holds column i low and column i + 16 high.
_Q4_0, _Q4_1 = 2, 3


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # rows first, as torch has it
    kind: int  # ggml type number
    start: int  # first byte in the file
    n_bytes: int


class _Cursor:
    """Reads header values in order. Owns the position, not the bytes."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise ValueError(
                f"{self.path}: truncated: header needs {end} bytes or more, "
                f"the file has {len(self.data)}"
            )
        raw = self.data[self.at : end]
        self.at = end
        return raw

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in _SCALARS:
                raw = self.take(count * struct.calcsize(_SCALARS[item]))
                return np.frombuffer(raw, dtype=_SCALARS[item]).tolist()
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: unknown value type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])


class GGUFFile:
    """An open GGUF file: `metadata`, and `tensors` by GGUF name.

    Owns the mapping of the file; does not own the tensors it returns.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path}: not a GGUF file (its first 4 bytes are not {MAGIC!r})")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._data, path)
        cursor.take(4)
        version = cursor.scalar("<I")
        if version not in VERSIONS:
            raise ValueError(f"{path}: GGUF version {version}, expected one of {VERSIONS}")
        n_tensors, n_values = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        self.tensors = {info.name: info for info in self._read_infos(cursor, n_tensors)}

    def _read_infos(self, cursor: _Cursor, n_tensors: int) -> Iterator[TensorInfo]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        described = []
        for _ in range(n_tensors):
            name, n_dims = cursor.string(), cursor.scalar("<I")
            shape = tuple(cursor.scalar("<Q") for _ in range(n_dims))[::-1]
            described.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        base = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in described:
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except ValueError:
                raise ValueError(f"{self.path}: tensor {name}: unknown type {kind}") from None
            n_elements = int(np.prod(shape))
            if n_elements % block:
                raise ValueError(
                    f"{self.path}: tensor {name}: {n_elements} elements are not a multiple of "
                    f"the block of {block}"
                )
            info = TensorInfo(name, shape, kind, base + offset, n_elements // block * block_bytes)
            if info.start + info.n_bytes > len(self._data):
                raise ValueError(
                    f"{self.path}: truncated: tensor {name} ends at byte "
                    f"{info.start + info.n_bytes}, the file has {len(self._data)}"
                )
            yield info

    def need(self, key: str) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.path}: metadata key {key} is missing")
        return self.metadata[key]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name`, dequantised. Never holds it whole in float32 unless asked to."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        kind = GGMLQuantizationType(info.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        step = _CHUNK // block * block
        raw = np.frombuffer(self._data, np.uint8, info.n_bytes, info.start)
        out = torch.empty(info.shape, dtype=dtype)
        flat = out.view(-1)
        for first in range(0, flat.numel(), step):
            size = min(step, flat.numel() - first)
            at, end = first // block * block_bytes, (first + size) // block * block_bytes
            try:
                # One row of all blocks: the package goes over a matrix 16 rows at a time.
                values = dequantize(raw[at:end].reshape(1, -1), kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: tensor {name}: type {kind.name} is not supported"
                ) from None
            if not values.flags.writeable:
                values = values.copy()
            flat[first : first + size] = torch.from_numpy(values.reshape(-1))
        return out

    def is_int4(self, name: str) -> bool:
        """Whether `name` is a matrix of 4-bit codes that `int4` can return."""
        info = self.tensors[name]
        whole = len(info.shape) == 2 and info.shape[1] % INT4_GROUP == 0
        return whole and info.kind in (_Q4_0, _Q4_1)

    def int4(self, name: str) -> Int4Weight:
        """The matrix `name` as the codes it is stored in."""
        info = self.tensors[name]
        rows, columns = info.shape
        raw = np.frombuffer(self._data, np.uint8, info.n_bytes, info.start)
        blocks = raw.reshape(rows, columns // INT4_GROUP, -1)
        packed = blocks[..., -(INT4_GROUP // 2) :]
        codes = np.empty((*blocks.shape[:2], 2, INT4_GROUP // 2), np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, :, 0])
        np.right_shift(packed, 4, out=codes[:, :, 1])
        header = np.ascontiguousarray(blocks[..., : -(INT4_GROUP // 2)]).view("<f2")
        floats = torch.from_numpy(header.astype(np.float32))
        scale = floats[..., 0]
        # Q4_1: w = scale * code + minimum; Q4_0: w = scale * (code - 8).
        zero = floats[..., 1] + 8 * scale if info.kind == _Q4_1 else torch.zeros_like(scale)
        return Int4Weight(torch.from_numpy(codes).view(rows, columns), scale, zero)


# Metadata under the architecture's own prefix, and what config.json calls it.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL_FIELDS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_HANDLED = frozenset(
    {
        *_FIELDS,
        *_OPTIONAL_FIELDS,
        "attention.value_length",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
        "tensor_data_layout",
    }
)
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """ModelConfig of a GGUF file, through the same reading as a config.json.

    Raises ValueError naming the file and the metadata key that is missing or not implemented.
    """
    name = file.need("general.architecture")
    architecture = architecture_of_gguf(name)
    _refuse_unimplemented(file, name)
    raw: dict[str, Any] = {hf: file.need(f"{name}.{key}") for key, hf in _FIELDS.items()}
    for key, hf in _OPTIONAL_FIELDS.items():
        if f"{name}.{key}" in file.metadata:
            raw[hf] = file.metadata[f"{name}.{key}"]
    window = file.metadata.get(f"{name}.attention.sliding_window")
    if window and architecture == "LlamaForCausalLM":
        architecture = "MistralForCausalLM"
        raw["sliding_window"] = window
    elif window:
        raise ValueError(f"{file.path}: {name}.attention.sliding_window is not implemented")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor token_embd.weight is missing")
    raw |= {
        "architectures": [architecture],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "num_key_value_heads": raw.get("num_key_value_heads", raw["num_attention_heads"]),
        "rope_scaling": _rope_scaling(file, name),
    }
    try:
        config = config_from_hf(raw)
        config = replace(config, output_bias="blk.0.attn_output.bias" in file.tensors)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    rotated = file.metadata.get(f"{name}.rope.dimension_count", config.head_dim)
    value_length = file.metadata.get(f"{name}.attention.value_length", config.head_dim)
    if rotated != config.head_dim or value_length != config.head_dim:
        raise ValueError(
            f"{file.path}: {name}.rope.dimension_count = {rotated}, attention.value_length = "
            f"{value_length}: both must equal the head size {config.head_dim}"
        )
    return _with_rope_divisors(file, config)


def _refuse_unimplemented(file: GGUFFile, name: str) -> None:
    for key, value in file.metadata.items():
        if not key.startswith(f"{name}."):
            continue
        short = key.removeprefix(f"{name}.")
        if short not in _HANDLED and not (short in _NEUTRAL and value == _NEUTRAL[short]):
            raise ValueError(f"{file.path}: metadata {key} = {value!r} is not implemented")


def _rope_scaling(file: GGUFFile, name: str) -> dict[str, Any] | None:
    prefix = f"{name}.rope.scaling."
    kind = file.metadata.get(f"{prefix}type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": file.need(f"{prefix}factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.need(f"{prefix}original_context_length")
        for key in ("beta_fast", "beta_slow"):
            scaling[key] = file.metadata.get(f"{prefix}yarn_{key}")
    return scaling


def _with_rope_divisors(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """Llama 3 scaling arrives as a tensor of divisors, one per frequency."""
    if ROPE_DIVISORS not in file.tensors:
        return config
    if config.rope.scaling is not None:
        raise ValueError(
            f"{file.path}: {ROPE_DIVISORS} together with rope scaling "
            f"{config.rope.scaling!r} is not implemented"
        )
    found, expected = file.tensors[ROPE_DIVISORS].shape, (config.head_dim // 2,)
    if found != expected:
        raise ValueError(f"{file.path}: {ROPE_DIVISORS}: shape {found = }, {expected = }")
    divisors = file.tensor(ROPE_DIVISORS, torch.float32).tolist()
    rope = RopeConfig(config.rope.theta, "divisors", {"divisors": tuple(divisors)})
    return replace(config, rope=rope)


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if it has none: "blk.3.attn_q.weight" is
    "model.layers.3.self_attn.q_proj.weight"."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"
    elif stem in _TENSORS:
        return f"{_TENSORS[stem]}.{suffix}"
    return None


def weights_from_gguf(
    file: GGUFFile, config: ModelConfig, dtype: torch.dtype, keep_int4: bool = False
) -> dict[str, Weight]:
    """Every tensor of the file, dequantised to `dtype` on the CPU, under its Hugging Face name.

    keep_int4: matrices of 4-bit codes stay so, except the embedding, whose rows are looked up.
    Names are not checked against `config` here (the caller does, for every format).
    """
    permuted: Mapping[str, int] = (
        {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
        if FAMILIES[config.architecture].gguf_permuted
        else {}
    )

    def load(name: str) -> tuple[str, Weight]:
        part = name.split(".")[-2]
        weight: Weight
        if keep_int4 and part != "token_embd" and file.is_int4(name):
            weight = file.int4(name)
            if part in permuted:
                weight = Int4Weight(*(_halves_from_pairs(t, permuted[part]) for t in weight))
        else:
            weight = file.tensor(name, dtype)
            if part in permuted:
                weight = _halves_from_pairs(weight, permuted[part])
        return hf_name(name) or name, weight

    names = [name for name in file.tensors if name != ROPE_DIVISORS]
    names.sort(key=lambda name: -file.tensors[name].n_bytes)
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(pool.map(load, names))


def _halves_from_pairs(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of each head from interleaved order (x0 y0 x1 y1 ..) to halves (x0 x1 .. y0 y1 ..)."""
    rows = tensor.shape[0]
    if rows % (2 * n_heads):
        raise ValueError(f"{rows = } of a q or k projection, expected a multiple of {2 * n_heads}")
    pairs = tensor.reshape(n_heads, rows // n_heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
