from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from astrai.kernels.norm import RmsNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (40, 576), (5, 3, 64), (2, 17)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_equals_its_definition(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + 0.5).mul_(scale).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    found = RmsNorm(weight, 1e-5, x.dtype)(x)
    expected = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_every_number_of_rows(dtype: torch.dtype) -> None:
    x = torch.randn(50, 576).to(dtype)
    norm = RmsNorm(torch.randn(576).to(dtype), 1e-5, dtype)
    together = norm(x)
    for n in (1, 2, 7, 16, 33):
        assert torch.equal(norm(x[3 : 3 + n]), together[3 : 3 + n])
