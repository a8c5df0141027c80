from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from astrai.models import gguf as ours
from astrai.models.gguf import GGUFFile, config_from_gguf, hf_name, weights_from_gguf
from astrai.models.loading import load_model
from astrai.models.registry import FAMILIES
from astrai.models.tokenizer import _BYTE_OF
from tests.models import tiny
from tests.models.test_families import logits_through_pages

TO_GGUF = {hf: name for name, hf in (ours._TENSORS | ours._LAYER_TENSORS).items()}
METADATA = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def gguf_name(name: str) -> str:
    """The inverse of hf_name."""
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{TO_GGUF[part]}.{suffix}"
    return f"{TO_GGUF[stem]}.{suffix}"


def pairs_from_halves(tensor: np.ndarray, n_heads: int) -> np.ndarray:
    """The permutation that exporting tools apply: halves to interleaved pairs."""
    rows = tensor.shape[0]
    halves = tensor.reshape(n_heads, 2, rows // n_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    characters = {byte: char for char, byte in _BYTE_OF.items()}
    tokens = [characters[b] for b in range(256)] + ["<bos>", "<eos>", "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)


def export(
    family: str,
    path: Path,
    quantize: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], None] = lambda fields, tensors: None,
) -> torch.nn.Module:
    """Write a tiny model as a GGUF file, as exporting tools do; `change` may spoil it."""
    model = tiny.build(family)
    config = model.config.to_dict()
    of = FAMILIES[type(model).__name__]
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fields: dict[str, Any] = {f"{of.gguf}.{key}": config[hf] for key, hf in METADATA.items()}
    fields[f"{of.gguf}.rope.dimension_count"] = head_dim
    fields[f"{of.gguf}.attention.key_length"] = head_dim
    fields[f"{of.gguf}.rope.freq_base"] = config["rope_parameters"]["rope_theta"]
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        value = parameter.numpy()
        part = name.split(".")[-2]
        if of.gguf_permuted and part in heads:
            value = pairs_from_halves(value, heads[part])
        tensors[gguf_name(name)] = value
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", of.gguf))
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    write_tokenizer(writer)
    for name, value in tensors.items():
        kind = quantize if value.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    "family", ["llama2", "llama-biased", "smollm2", "qwen2", "qwen3", "smollm3"]
)
def test_an_exported_family_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = export(family, path)
    loaded = load_model(str(path), dtype="float32", device="cpu")
    assert loaded.eos_token_ids == (257,)
    ids = torch.arange(0, 280, 7)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    got = logits_through_pages(loaded, ids, [len(ids)], "reference")
    assert (got - expected).abs().max().item() < 1e-4


def test_llama3_scaling_comes_as_divisors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def add_divisors(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        plain = tiny.build("llama3.2").model.rotary_emb
        head_dim = 2 * plain.inv_freq.numel()
        base = 10_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
        tensors["rope_freqs.weight"] = (base / plain.inv_freq.numpy()).astype(np.float32)

    model = export("llama3.2", path, change=add_divisors)
    loaded = load_model(str(path), dtype="float32", device="cpu")
    assert loaded.config.rope.scaling == "divisors"
    ids = torch.arange(0, 280, 4)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    got = logits_through_pages(loaded, ids, [len(ids)], "reference")
    assert (got - expected).abs().max().item() < 1e-4


def test_yarn_from_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def add_yarn(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        fields["llama.rope.scaling.type"] = "yarn"
        fields["llama.rope.scaling.factor"] = 4.0
        fields["llama.rope.scaling.original_context_length"] = 128

    model = export("llama-yarn", path, change=add_yarn)
    config = config_from_gguf(GGUFFile(path))
    inverse, factor = config.rope.frequencies(config.head_dim)
    assert torch.equal(inverse, model.model.rotary_emb.inv_freq)
    assert factor == pytest.approx(model.model.rotary_emb.attention_scaling)


ROUND_TRIP = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
DECODED = [*ROUND_TRIP, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DECODED)
def test_every_type_is_what_the_package_decodes(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, with a last one that is not full."""
    monkeypatch.setattr(ours, "_CHUNK", 512)
    number = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[number]
    columns = max(block, 32)
    rows = 5 if columns == 256 else 51
    raw = np.random.default_rng(0).integers(
        0, 60, (rows, columns // block * block_bytes), dtype=np.uint8
    )
    if kind in ("F32", "F16"):
        raw = raw.view({"F32": np.float32, "F16": np.float16}[kind])
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = GGUFFile(path).tensor("t", dtype)
    whole = torch.from_numpy(gguf.quants.dequantize(raw, number).astype(np.float32)).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, whole)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantised_model_is_near_its_original(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = export("llama3", path, GGMLQuantizationType[kind])
    file = GGUFFile(path)
    weights = weights_from_gguf(file, config_from_gguf(file), torch.float32)
    step = {"Q8_0": 1 / 127, "Q4_1": 1 / 15}[kind]
    for name, value in model.state_dict().items():
        spread = (value.max() - value.min()).item()
        assert (weights[name] - value).abs().max().item() <= spread * step


@given(
    heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 4), biased=st.booleans()
)
def test_the_permutation_is_undone(heads: int, half: int, columns: int, biased: bool) -> None:
    shape = (heads * 2 * half,) if biased else (heads * 2 * half, columns)
    original = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    permuted = torch.from_numpy(pairs_from_halves(original, heads).copy())
    assert torch.equal(ours._halves_from_pairs(permuted, heads), torch.from_numpy(original))


def test_header_equals_that_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export("qwen2", path)
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    for key, value in file.metadata.items():
        assert reader.fields[key].contents() == value
    assert {t.name: tuple(map(int, t.shape))[::-1] for t in reader.tensors} == {
        t.name: t.shape for t in file.tensors.values()
    }
    assert [t.data_offset for t in reader.tensors] == [t.start for t in file.tensors.values()]


def test_names_map_there_and_back() -> None:
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.11.self_attn.q_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
    ):
        assert hf_name(gguf_name(name)) == name
    assert hf_name("blk.0.ffn_gate_inp.weight") is None


def spoil_field(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda fields, tensors: fields.update({key: value})


def drop_field(key: str) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda fields, tensors: fields.pop(key) and None


def drop_tensor(name: str) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda fields, tensors: tensors.pop(name) is None or None


def set_tensor(name: str, *shape: int) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda fields, tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            spoil_field("general.architecture", "mamba"),
            "'mamba' is not supported; supported: llama",
        ),
        (spoil_field("llama.expert_count", 8), "llama.expert_count = 8 is not implemented"),
        (spoil_field("llama.attention.scale", 0.5), "llama.attention.scale"),
        (spoil_field("llama.rope.dimension_count", 8), "rope.dimension_count = 8"),
        (spoil_field("llama.rope.scaling.type", "longrope"), "rope.scaling.factor is missing"),
        (spoil_field("llama.attention.head_count_kv", 3), "4 is not a multiple of .*= 3"),
        (drop_field("llama.block_count"), "key llama.block_count is missing"),
        (drop_tensor("blk.2.ffn_up.weight"), "1 tensors are missing: model.layers.2.mlp.up_proj"),
        (drop_tensor("token_embd.weight"), "tensor token_embd.weight is missing"),
        (set_tensor("blk.0.ffn_gate_exps.weight", 2, 2), "blk.0.ffn_gate_exps.weight"),
        (
            set_tensor("blk.1.ffn_up.weight", 96, 32),
            r"blk.1.ffn_up.weight: shape found \(96, 32\), expected \(96, 64\)",
        ),
        (
            set_tensor("rope_freqs.weight", 3),
            r"rope_freqs.weight: shape found = \(3,\), expected = \(8,\)",
        ),
    ],
)
def test_spoilt_files_are_refused_by_name(
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.gguf"
    export("llama3", path, change=change)
    with pytest.raises(ValueError, match=message):
        load_model(str(path), dtype="float32", device="cpu")


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export("llama3", path)
    whole = path.read_bytes()
    for size in (5, 40, 3000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"truncated.*the file has {size}"):
            GGUFFile(path)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="GGUF version 1"):
        GGUFFile(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")
