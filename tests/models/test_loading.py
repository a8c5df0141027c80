from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from astrai.models.config import config_from_hf
from astrai.models.loading import (
    choose_dtype,
    dummy_weights,
    expected_tensors,
    load_model,
    weights_from_directory,
)
from astrai.models.registry import PRESETS
from tests.models import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny.save("llama3", directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(path: Path) -> dict[str, torch.Tensor]:
    from astrai.models.loading import read_config

    return weights_from_directory(path, read_config(path), torch.float32)


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_give_the_weights_of_one_file(directory: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny.save("llama3", sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = load(directory), load(sharded)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_loaded_model_says_what_it_is(directory: Path) -> None:
    loaded = load_model(str(directory), dtype="bfloat16", device="cpu")
    assert loaded.name == directory.name
    assert loaded.dtype == torch.bfloat16
    assert loaded.eos_token_ids == (257,)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"


def test_missing_tensor(directory: Path) -> None:
    edit_weights(directory, lambda w: w.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"1 tensors are missing: model.layers.2.mlp.up_proj.weig"):
        load(directory)


def test_unexpected_tensor(directory: Path) -> None:
    edit_weights(directory, lambda w: w.update({"model.layers.0.adapter.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"not part of LlamaForCausalLM: .*adapter.weight"):
        load(directory)


def test_rotary_buffers_of_old_exports_are_passed_over(directory: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(directory, lambda w: w.update({name: torch.ones(8)}))
    assert name not in load(directory)


def test_a_head_beside_tied_embeddings_is_passed_over(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)
    assert "lm_head.weight" not in load(directory)


def test_wrong_shape(directory: Path) -> None:
    edit_config(directory, intermediate_size=100)
    with pytest.raises(
        ValueError, match=r"_proj.weight: shape found \(96, 64\), expected \(100, 64\)"
    ):
        load(directory)


def test_quantised_tensors(directory: Path) -> None:
    edit_weights(
        directory, lambda w: w.update({"lm_head.weight": torch.zeros(300, 64, dtype=torch.int8)})
    )
    with pytest.raises(ValueError, match=r"lm_head.weight: dtype I8 is not supported"):
        load(directory)


def test_truncated_safetensors(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in (4, 100, 20_000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"truncated.*the file has {size}"):
            load(directory)


def test_corrupt_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:20] = b"not json at "
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="header is not valid JSON"):
        load(directory)


def test_missing_shard(tmp_path: Path) -> None:
    tiny.save("llama3", tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{gone.name}: no such file; .*\d+ tensors in it"):
        load(tmp_path)


def test_index_out_of_step_with_its_shards(tmp_path: Path) -> None:
    tiny.save("llama3", tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"]["lm_head.weight"] = next(
        f for f in files if f != content["weight_map"]["lm_head.weight"]
    )
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lm_head.weight is in the index but not in the file"):
        load(tmp_path)


def test_index_that_leaves_the_directory(tmp_path: Path) -> None:
    tiny.save("llama3", tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"'../elsewhere.safetensors' is not a file name"):
        load(tmp_path)


def test_only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors.*pytorch_model.bin"):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "found list"), ("{}", "architecture None is not supported")],
)
def test_bad_config(directory: Path, text: str, message: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_model(str(directory))


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load_model(str(directory))


def test_bad_arguments(directory: Path) -> None:
    with pytest.raises(ValueError, match="load_format = 'bin'"):
        load_model(str(directory), load_format="bin")
    with pytest.raises(ValueError, match="dtype = 'int4'"):
        load_model(str(directory), dtype="int4")
    with pytest.raises(ValueError, match="0 GGUF files"):
        load_model(str(directory), load_format="gguf")
    with pytest.raises(ValueError, match="neither a directory nor one of smollm2-135m"):
        load_model("gpt-5", load_format="dummy")


def test_dtype_by_device() -> None:
    assert choose_dtype(None, "cuda") == torch.bfloat16
    assert choose_dtype("float16", "cpu") == torch.float16
    assert choose_dtype("int4", "cpu") == torch.bfloat16
    assert choose_dtype(None, "cpu") in (torch.bfloat16, torch.float32)


def test_dummy_weights_depend_on_the_seed_only() -> None:
    config = config_from_hf(PRESETS["smollm2-135m"] | {"num_hidden_layers": 1, "vocab_size": 500})
    once = dummy_weights(config, torch.float32, "cpu", seed=3)
    again = dummy_weights(config, torch.float32, "cpu", seed=3)
    other = dummy_weights(config, torch.float32, "cpu", seed=4)
    assert {name: tuple(w.shape) for name, w in once.items()} == expected_tensors(config)
    assert all(torch.equal(once[name], again[name]) for name in once)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(once[name], other[name])
    assert once[name].std().item() == pytest.approx(0.02, rel=0.01)
    assert once["model.norm.weight"].eq(1.0).all()


def test_dummy_of_a_directory_needs_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    loaded = load_model(str(directory), dtype="float32", device="cpu", load_format="dummy")
    assert loaded.config.vocab_size == 300
