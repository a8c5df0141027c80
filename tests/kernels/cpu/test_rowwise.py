"""The compiled row-wise operations of the CPU against PyTorch's, and row by row."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from astrai.kernels.cpu.rowwise import NumbaRows
from astrai.kernels.norm import RmsNorm
from astrai.kernels.rowwise import Rows, TorchRows, rows_of
from astrai.models.config import ModelConfig
from tests.kernels.harness import make_config

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
T = 9


def config_of(**changes: Any) -> ModelConfig:
    return make_config("q and k norms", **changes)


def both(dtype: torch.dtype) -> tuple[Rows, Rows]:
    config = config_of()
    return TorchRows(config, dtype, CPU), NumbaRows(config, dtype)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 0.02  # one step of bfloat16 here or there
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def norm_of(size: int, dtype: torch.dtype = torch.float32) -> RmsNorm:
    return RmsNorm(1 + numbers(size, seed=5) / 3, 1e-5, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_add_norm(dtype: torch.dtype, adds: bool) -> None:
    slow, fast = both(dtype)
    added = numbers(T, 48, seed=1, dtype=dtype) if adds else None
    hidden, theirs = numbers(T, 48), numbers(T, 48)
    close(fast.add_norm(hidden, added, norm_of(48)), slow.add_norm(theirs, added, norm_of(48)))
    assert torch.equal(hidden, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_turn(dtype: torch.dtype, norms: bool, rope: bool) -> None:
    q_norm, k_norm = (norm_of(32, dtype), norm_of(32, dtype)) if norms else (None, None)
    positions = torch.tensor([0, 1, 2, 2047, 5, 5, 77, 3, 1000])
    results = []
    for rows in both(dtype):
        rows.begin(positions)
        results.append(rows.turn(numbers(T, 8, 32, dtype=dtype), q_norm, k_norm, rope))
    for found, expected, heads in zip(results[1], results[0], (4, 2, 2), strict=True):
        assert found.shape == (T, heads, 32)
        # Between its operators PyTorch's way rounds to bfloat16.
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    slow, fast = both(dtype)
    gate_up = numbers(T, 160, dtype=dtype)
    gate_up[0, :6] = torch.tensor([-200.0, 200.0, -88.0, 88.0, float("nan"), -0.0]).to(dtype)
    close(fast.gate(gate_up), slow.gate(gate_up.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    _, rows = both(dtype)
    norm = norm_of(32, dtype)

    def run(part: slice) -> list[Tensor]:
        rows.begin(torch.arange(T)[part])
        hidden = numbers(T, 48)[part].clone()
        qkv, gate_up = numbers(T, 8, 32, dtype=dtype), numbers(T, 160, dtype=dtype)
        normed = rows.add_norm(hidden, numbers(T, 48, seed=1, dtype=dtype)[part], norm_of(48))
        turned = rows.turn(qkv[part].clone(), norm, norm, True)
        return [hidden, normed, *turned, rows.gate(gate_up[part])]

    together = run(slice(0, T))
    for i in range(T):
        for alone, found in zip(run(slice(i, i + 1)), together, strict=True):
            assert torch.equal(alone[0], found[i])


def test_rows_with_gaps_are_refused() -> None:
    _, rows = both(torch.float32)
    with pytest.raises(ValueError, match=r"stride\(\) = \(320, 2\), expected rows without gaps"):
        rows.gate(numbers(T, 320)[:, ::2])


def test_rows_of_another_dtype_are_refused() -> None:
    _, rows = both(torch.bfloat16)
    rows.begin(torch.arange(T))
    with pytest.raises(ValueError, match=r"torch\.float32, .*expected .* of torch.bfloat16"):
        rows.gate(numbers(T, 160))
    with pytest.raises(ValueError, match=r"torch\.float32, .*expected .* of torch.bfloat16"):
        rows.turn(numbers(T, 8, 32), None, None, True)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, .*expected .* of torch.float32"):
        rows.add_norm(numbers(T, 48, dtype=torch.bfloat16), None, norm_of(48))


@pytest.mark.parametrize("positions", [[0, 2048], [-1, 5]])
def test_positions_outside_the_tables_are_refused(positions: list[int]) -> None:
    _, rows = both(torch.float32)
    with pytest.raises(ValueError, match=r"expected int64 positions within \[0, 2048\)"):
        rows.begin(torch.tensor(positions))
    with pytest.raises(ValueError, match=r"torch.int32, 0 to 5"):
        rows.begin(torch.tensor([0, 5], dtype=torch.int32))


def test_which_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(config: ModelConfig, dtype: torch.dtype) -> type[Rows]:
        return type(rows_of(config, dtype, CPU))

    assert chosen(config_of(), torch.bfloat16) is NumbaRows
    assert chosen(config_of(), torch.float16) is TorchRows
    assert chosen(config_of(hidden_size=40), torch.bfloat16) is TorchRows
    assert chosen(config_of(head_dim=16), torch.bfloat16) is TorchRows
    monkeypatch.setitem(sys.modules, "astrai.kernels.cpu.rowwise", None)
    assert chosen(config_of(), torch.bfloat16) is TorchRows
