"""A model by name or path: weights checked against the configuration, tokenizer, decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from astrai.kernels.linear import Weight, has_int4_kernel
from astrai.models.config import ModelConfig, config_from_hf
from astrai.models.decoder import Decoder
from astrai.models.gguf import (
    ROPE_DIVISORS,
    GGUFFile,
    config_from_gguf,
    hf_name,
    weights_from_gguf,
)
from astrai.models.pull import resolve
from astrai.models.registry import PRESETS
from astrai.models.tokenizer import ByteTokenizer, Tokenizer

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INT4 = "int4"
_FLOAT_KINDS = ("F64", "F32", "F16", "BF16")  # of safetensors
_IGNORED = ("rotary_emb.inv_freq",)  # written by old exports; recomputed here
_DUMMY_STD = 0.02


class LoadedModel(NamedTuple):
    decoder: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    name: str
    dtype: torch.dtype  # of what is computed and of the KV cache

    @property
    def precision(self) -> str:
        """In what the weights are held and what is computed: "bfloat16", or "int4 weights, ..."."""
        computed = str(self.dtype).removeprefix("torch.")
        return f"int4 weights, {computed}" if self.decoder.n_int4 else computed


class FoundTensor(NamedTuple):
    source: str  # "file: tensor", for messages
    shape: tuple[int, ...]


def load_model(
    name_or_path: str,
    dtype: str | None = None,
    device: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
) -> LoadedModel:
    """The model `name_or_path`: a known name, a GGUF file, a Hugging Face directory or hub id.

    dtype: None chooses the fastest the device has matrix units for, "int4" computes in bfloat16
    and keeps the 4-bit matrices of a GGUF file as they are; None does so too where that was
    measured to be faster. load_format "dummy": random weights of a preset's or a directory's
    configuration, drawn with `seed`.

    Raises FileNotFoundError for a missing file and ValueError for a corrupt, incomplete or
    unsupported one; both name the file, and the tensor or field with its numbers.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"{load_format = }, expected one of {LOAD_FORMATS}")
    device = choose_device(device)
    torch_dtype, keep_int4 = choose_dtype(dtype, device), keeps_int4(dtype, device)
    weights: dict[str, Weight]
    if load_format == "dummy":
        config, tokenizer = _dummy_parts(name_or_path)
        weights = dummy_weights(config, torch_dtype, device, seed)
    else:
        path = resolve(name_or_path)
        if path.is_dir() and load_format == "gguf":
            path = _only_gguf(path)
        if path.is_dir():
            config = read_config(path)
            weights = weights_from_directory(path, config, torch_dtype)
            tokenizer = Tokenizer.from_directory(path)
        elif load_format == "safetensors":
            raise ValueError(f"{path}: load_format safetensors needs a directory")
        else:
            file = GGUFFile(path)
            config = config_from_gguf(file)
            check_tensors(config, _gguf_tensors(file))
            weights = weights_from_gguf(file, config, torch_dtype, keep_int4)
            tokenizer = Tokenizer.from_gguf(file)
    decoder = Decoder(config, weights, torch_dtype, device)
    if dtype == INT4 and not decoder.n_int4:
        raise ValueError(
            f"{dtype = }, but {name_or_path} has no 4-bit matrices to keep: "
            "expected a GGUF file of type Q4_0 or Q4_1"
        )
    return LoadedModel(
        decoder, tokenizer, config, tokenizer.eos_token_ids, _short_name(name_or_path), torch_dtype
    )


def choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{device = }, but this installation of torch sees no CUDA device")
    return device


def choose_dtype(dtype: str | None, device: str) -> torch.dtype:
    """What is computed in, by name; None: bfloat16 where the device multiplies it natively, else
    float32."""
    if dtype == INT4:
        return torch.bfloat16
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype = }, expected one of {', '.join([*DTYPES, INT4])}")
        return DTYPES[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16
    # Only what was measured: elsewhere, and where torch cannot tell, float32.
    native = _cpu_capabilities()
    fast = native.get("avx512_bf16") or native.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def keeps_int4(dtype: str | None, device: str) -> bool:
    """Whether 4-bit matrices stay as they are. ValueError if `dtype` asks for what cannot be."""
    if dtype == INT4:
        if device != "cpu":
            raise ValueError(f"{dtype = } needs device 'cpu', {device = }")
        if not has_int4_kernel():
            found = torch.backends.cpu.get_cpu_capability()
            raise ValueError(f"{dtype = } needs a CPU with AVX512, found {found}")
    if dtype is not None:
        return dtype == INT4
    # Matrix units (AMX) read a long prompt many times as fast as the 4-bit kernel: not there.
    native = _cpu_capabilities()
    measured = native.get("avx512_bf16") and not native.get("amx_bf16")
    return bool(device == "cpu" and measured and has_int4_kernel())


def _cpu_capabilities() -> Mapping[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight the decoder takes."""
    c = config
    hidden, q, kv = c.hidden_size, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    matrices = {
        "self_attn.q_proj": (q, hidden, c.attention_bias),
        "self_attn.k_proj": (kv, hidden, c.attention_bias),
        "self_attn.v_proj": (kv, hidden, c.attention_bias),
        "self_attn.o_proj": (hidden, q, c.output_bias),
        "mlp.gate_proj": (c.intermediate_size, hidden, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, hidden, c.mlp_bias),
        "mlp.down_proj": (hidden, c.intermediate_size, c.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if c.qk_norm:
        norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
    for layer in range(c.n_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, biased) in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if biased:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"{prefix}.{name}.weight"] = (size,)
    return shapes


def check_tensors(config: ModelConfig, found: Mapping[str, FoundTensor]) -> None:
    """ValueError unless `found` is exactly what `config` needs, before anything is read."""
    expected = expected_tensors(config)
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{len(missing)} tensors are missing: {_few(missing)}")
    if unexpected := [found[name].source for name in found if name not in expected]:
        raise ValueError(
            f"{len(unexpected)} tensors are not part of {config.architecture}: {_few(unexpected)}"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{found[name].source}: shape found {found[name].shape}, expected {shape}"
            )


def _few(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _gguf_tensors(file: GGUFFile) -> dict[str, FoundTensor]:
    return {
        hf_name(name) or name: FoundTensor(f"{file.path}: {name}", info.shape)
        for name, info in file.tensors.items()
        if name != ROPE_DIVISORS
    }


def _only_gguf(path: Path) -> Path:
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{path}: {len(files)} GGUF files, expected 1; name the file")
    return files[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory's config.json."""
    path = directory / "config.json"
    raw = _read_json(path)
    try:
        return config_from_hf(raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def weights_from_directory(
    directory: Path, config: ModelConfig, dtype: torch.dtype
) -> dict[str, Weight]:
    """Every weight of `config` from the directory's safetensors files, as `dtype` on the CPU."""
    from safetensors import safe_open

    tied = config.tie_embeddings
    where: dict[str, Path] = {}
    found: dict[str, FoundTensor] = {}
    for path, names in _shards(directory).items():
        header = _read_header(path)
        for name in header if names is None else names:
            if name.endswith(_IGNORED) or (tied and name == "lm_head.weight"):
                continue
            if name not in header:
                raise ValueError(f"{path}: tensor {name} is in the index but not in the file")
            where[name] = path
            found[name] = FoundTensor(f"{path}: {name}", header[name])
    try:
        check_tensors(config, found)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    weights: dict[str, Weight] = {}
    for path in dict.fromkeys(where.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, its in where.items() if its == path):
                weights[name] = file.get_tensor(name).to(dtype)
    return weights


def _shards(directory: Path) -> dict[Path, list[str] | None]:
    """Files of weights, each with the tensors the index says it has (None: all it has)."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return {single: None}
        others = sorted(p.name for p in directory.glob("*.bin"))
        also = f" ({_few(others)} would need unpickling and is not read)" if others else ""
        raise FileNotFoundError(f"{directory}: neither {single.name} nor {index.name}{also}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map is missing")
    shards: dict[Path, list[str] | None] = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file:
            raise ValueError(f"{index}: {file!r} is not a file name")
        if not (directory / file).is_file():
            n = sum(1 for its in weight_map.values() if its == file)
            raise FileNotFoundError(
                f"{directory / file}: no such file; {index.name} puts {n} tensors in it"
            )
        shards[directory / file] = [name for name, its in weight_map.items() if its == file]
    return shards


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name from a safetensors header (8 bytes of length, then JSON), sizes checked."""
    present = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > present:
            raise ValueError(
                f"{path}: truncated: the header ends at byte {8 + length}, the file has {present}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: the header is not valid JSON: {error}") from error
    shapes = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in _FLOAT_KINDS:
            raise ValueError(
                f"{path}: tensor {name}: dtype {info['dtype']} is not supported; "
                f"expected one of {', '.join(_FLOAT_KINDS)}"
            )
        end = 8 + length + info["data_offsets"][1]
        if end > present:
            raise ValueError(
                f"{path}: truncated: tensor {name} ends at byte {end}, the file has {present}"
            )
        shapes[name] = tuple(info["shape"])
    return shapes


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Weight]:
    """Random weights of `config`'s shapes: norms 1, the rest normal with std 0.02."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Weight] = {}
    for name, shape in expected_tensors(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weights[name] = tensor.fill_(1.0)
        else:
            weights[name] = tensor.normal_(0.0, _DUMMY_STD, generator=generator)
    return weights


def _dummy_parts(name: str) -> tuple[ModelConfig, Tokenizer]:
    if name.lower() in PRESETS:
        return config_from_hf(PRESETS[name.lower()]), ByteTokenizer()
    path = Path(name)
    if not path.is_dir():
        raise ValueError(
            f"load_format dummy: {name!r} is neither a directory nor one of {', '.join(PRESETS)}"
        )
    has_tokenizer = any(path.glob("tokenizer*"))
    tokenizer = Tokenizer.from_directory(path) if has_tokenizer else ByteTokenizer()
    return read_config(path), tokenizer


def _short_name(name_or_path: str) -> str:
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return name_or_path
    return path.stem if path.is_file() else path.resolve().name
