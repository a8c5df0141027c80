from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from astrai.kernels.linear import Int4Weight, has_int4_kernel
from astrai.models import gguf as ours
from astrai.models import loading
from astrai.models.gguf import GGUFFile, config_from_gguf, hf_name, weights_from_gguf
from astrai.models.loading import LoadedModel, load_model
from astrai.models.registry import FAMILIES
from astrai.models.tokenizer import _BYTE_OF
from tests.kernels.test_linear import check_int4
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
    kinds: Mapping[str, GGMLQuantizationType] = {},
) -> torch.nn.Module:
    """Write a tiny model as a GGUF file, as exporting tools do; `change` may spoil it. Matrices
    are of type `quantize`, those of a part in `kinds` ("attn_q") of that type."""
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
        kind = GGMLQuantizationType.F32
        if value.ndim == 2:
            kind = kinds.get(name.split(".")[-2], quantize)
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


INT4_KINDS = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1]
needs_int4 = pytest.mark.skipif(not has_int4_kernel(), reason="no 4-bit kernel on this CPU")


@pytest.mark.parametrize("kind", INT4_KINDS)
def test_codes_are_what_the_package_dequantises(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export("llama-biased", path, kind)
    file = GGUFFile(path)
    config = config_from_gguf(file)
    kept = weights_from_gguf(file, config, torch.float32, keep_int4=True)
    dense = weights_from_gguf(file, config, torch.float32)
    codes = {name: weight for name, weight in kept.items() if isinstance(weight, Int4Weight)}
    assert len(codes) == 7 * config.n_layers + 1  # and the head, which is not tied
    for name, weight in codes.items():
        torch.testing.assert_close(weight.dense(torch.float32), dense[name], rtol=0, atol=1e-8)
    assert all(torch.equal(kept[name], dense[name]) for name in kept.keys() - codes.keys())


def check_against_dequantised(path: Path) -> LoadedModel:
    """The model at `path` with its codes kept, which is as near to float32 as bfloat16 is."""
    ids = torch.arange(0, 280, 7)
    models, logits = {}, {}
    for dtype in ("float32", "bfloat16", "int4"):
        models[dtype] = load_model(str(path), dtype=dtype, device="cpu")
        logits[dtype] = logits_through_pages(models[dtype], ids, [len(ids)], "reference")
    for dtype in ("float32", "bfloat16"):
        assert models[dtype].decoder.n_int4 == 0
        assert models[dtype].precision == dtype
    assert models["int4"].precision == "int4 weights, bfloat16"
    assert models["int4"].decoder.weight_bytes < models["bfloat16"].decoder.weight_bytes
    off = {dtype: (logits[dtype] - logits["float32"]).std().item() for dtype in logits}
    assert 0 < off["int4"] < 1.5 * off["bfloat16"]
    return models["int4"]


@needs_int4
@pytest.mark.parametrize("kind", INT4_KINDS)
@pytest.mark.parametrize("family", ["llama3", "llama-biased", "qwen2", "qwen3"])
def test_a_model_of_codes_computes_what_its_dequantised_one_does(
    family: str, kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    export(family, path, kind)
    kept = check_against_dequantised(path)
    # Not the head, tied or not: its 300 outputs are not whole sixteens.
    assert kept.decoder.n_int4 == 4 * kept.config.n_layers


@needs_int4
def test_a_fused_matrix_of_several_types_is_dequantised(tmp_path: Path) -> None:
    """As in files of type Q4_K_M and the like, whose v is finer than its q and k."""
    path = tmp_path / "model.gguf"
    kinds = {"attn_v": GGMLQuantizationType.Q8_0, "token_embd": GGMLQuantizationType.Q8_0}
    export("llama3", path, GGMLQuantizationType.Q4_1, kinds=kinds)
    kept = check_against_dequantised(path)
    assert kept.decoder.n_int4 == 3 * kept.config.n_layers


def test_int4_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    export("llama3", path, GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(loading, "has_int4_kernel", lambda: True)
    with pytest.raises(ValueError, match=r"'int4', but .*model.gguf has no 4-bit matrices"):
        load_model(str(path), dtype="int4", device="cpu")
    with pytest.raises(ValueError, match="'int4' needs device 'cpu', device = 'cuda:0'"):
        loading.keeps_int4("int4", "cuda:0")
    monkeypatch.setattr(loading, "has_int4_kernel", lambda: False)
    with pytest.raises(ValueError, match="'int4' needs a CPU with AVX512, found "):
        load_model(str(path), dtype="int4", device="cpu")


@pytest.mark.parametrize(
    ("capabilities", "kept"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"avx512_f": True}, False),
        ({}, False),
    ],
)
def test_codes_are_kept_unasked_where_that_was_measured(
    capabilities: dict[str, bool], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(loading, "has_int4_kernel", lambda: True)
    assert loading.keeps_int4(None, "cpu") == kept
    assert not loading.keeps_int4(None, "cuda")
    assert not loading.keeps_int4("bfloat16", "cpu")
    assert loading.keeps_int4("int4", "cpu")


@needs_int4
def test_real_matrices(smollm2_path: Path) -> None:
    file = GGUFFile(smollm2_path)
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_down"):
        for layer in (0, 14, 29):
            check_int4(file.int4(f"blk.{layer}.{part}.weight"))


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
