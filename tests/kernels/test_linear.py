from __future__ import annotations

import pytest
import torch

from astrai.kernels.linear import DenseLinear, PackedLinear, make_linear

SHAPES = [(960, 576), (576, 1536), (33, 17), (512, 2048), (64, 3072)]  # (out, in)


def cancelling(n_out: int, n_in: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight whose rows sum to nothing but rounding, which any other order of the sum changes."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(n_out, n_in // 2 + 1, generator=generator)
    half *= torch.exp2(torch.randint(-8, 8, half.shape, generator=generator))
    order = torch.randperm(2 * half.shape[1], generator=generator)
    return torch.cat((half, -half), dim=1)[:, order][:, :n_in].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_same_bits_for_every_number_of_rows(dtype: torch.dtype, n_out: int, n_in: int) -> None:
    linear = make_linear(cancelling(n_out, n_in, dtype))
    x = torch.ones(96, n_in, dtype=dtype)
    together = linear(x)
    for n in (1, 2, 3, 5, 8, 12, 17, 32, 63):
        assert torch.equal(linear(x[7 : 7 + n]), together[7 : 7 + n]), f"{n = }"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 40])
def test_packed_equals_dense(bias: bool, n_rows: int) -> None:
    weight, b = torch.randn(48, 64), torch.randn(48) if bias else None
    x = torch.randn(n_rows, 64)
    torch.testing.assert_close(PackedLinear(weight, b)(x), DenseLinear(weight, b)(x))


def test_a_dtype_without_a_packing_stays_dense() -> None:
    assert isinstance(make_linear(torch.randn(8, 8, dtype=torch.float64)), DenseLinear)
