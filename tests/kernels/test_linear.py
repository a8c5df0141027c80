from __future__ import annotations

import pytest
import torch

from astrai.kernels import linear as ours
from astrai.kernels.linear import (
    DenseLinear,
    Int4Linear,
    Int4Weight,
    PackedLinear,
    has_int4_kernel,
    make_linear,
    stacked,
)

needs_int4 = pytest.mark.skipif(not has_int4_kernel(), reason="no 4-bit kernel on this CPU")
INT4_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
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


def random_int4(n_out: int, n_in: int, seed: int = 0) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n_out, n_in // 32, generator=generator) * 0.02 + 1e-3
    return Int4Weight(
        torch.randint(16, (n_out, n_in), generator=generator, dtype=torch.uint8),
        scale,
        torch.randn(scale.shape, generator=generator) * scale,
    )


def check_int4(weight: Int4Weight, bias: torch.Tensor | None = None, n_rows: int = 7) -> None:
    """To the rounding of the result, and of each scale and zero, to bfloat16."""
    linear = make_linear(weight, bias)
    assert isinstance(linear, Int4Linear)
    x = torch.randn(n_rows, weight.codes.shape[1]).to(torch.bfloat16)
    exact = weight.dense(torch.float64)
    product = x.double() @ exact.T
    expected = product if bias is None else product + bias.double()
    rounded = weight._replace(scale=weight.scale.bfloat16(), zero=weight.zero.bfloat16())
    slack = x.double().abs() @ (rounded.dense(torch.float64) - exact).abs().T
    error = (linear(x).double() - expected).abs()
    rounding = 2**-8 * (product.abs() + expected.abs()) * (1 + 2**-7)
    assert bool((error <= slack * (1 + 2**-7) + rounding + 1e-6).all())
    assert slack.mean() < 0.1 * product.abs().mean()  # else this would say nothing


@needs_int4
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n_out", "n_in"), [*INT4_SHAPES, (16, 32), (48, 96), (80, 64), (112, 160), (64, 32)]
)
def test_int4_equals_the_dequantised_weight(n_out: int, n_in: int, bias: bool) -> None:
    b = torch.randn(n_out).to(torch.bfloat16) if bias else None
    for n_rows in (1, 7):
        check_int4(random_int4(n_out, n_in), b, n_rows)


def cancelling_int4(n_out: int, n_in: int) -> tuple[Int4Weight, torch.Tensor]:
    """A weight and rows of x whose products sum to nothing but rounding: the columns come in
    groups of equal x and opposite weight."""
    generator = torch.Generator().manual_seed(0)
    half = n_in // 64
    codes = torch.randint(1, 16, (n_out, half, 32), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n_out, half, generator=generator) + 0.5
    scale *= torch.exp2(torch.randint(-8, 8, scale.shape, generator=generator))
    x = torch.randn(64, half, 32, generator=generator)
    order = torch.randperm(2 * half, generator=generator)
    scales = torch.cat((scale, scale), dim=1)[:, order]
    weight = Int4Weight(
        torch.cat((codes, 16 - codes), dim=1)[:, order].flatten(1),
        scales,
        torch.zeros_like(scales),
    )
    return weight, torch.cat((x, x), dim=1)[:, order].flatten(1).to(torch.bfloat16)


@needs_int4
@pytest.mark.parametrize(("n_out", "n_in"), INT4_SHAPES)
def test_int4_gives_the_same_bits_for_every_number_of_rows(n_out: int, n_in: int) -> None:
    weight, x = cancelling_int4(n_out, n_in)
    linear = make_linear(weight)
    assert isinstance(linear, Int4Linear)
    together = linear(x)
    for n in range(1, 65):
        assert torch.equal(linear(x[64 - n :]), together[64 - n :]), f"{n = }"
    for i in range(64):
        assert torch.equal(linear(x[i : i + 1]), together[i : i + 1]), f"{i = }"
    backwards = make_linear(Int4Weight(*(part.flip(1) for part in weight)))
    assert not torch.equal(backwards(x.flip(1)), together)  # else the order would not show


@needs_int4
def test_int4_takes_rows_that_are_not_contiguous() -> None:
    linear = make_linear(random_int4(64, 96))
    x = torch.randn(5, 2, 96).to(torch.bfloat16)
    assert torch.equal(linear(x[:, 0]), linear(x[:, 0].contiguous()))


@needs_int4
def test_quick_packing_is_the_packing_of_torch() -> None:
    codes = random_int4(192, 96).codes
    assert torch.equal(ours._pack_int4(codes), ours._pack_int4_slowly(codes))
    assert ours._lays_int4_in_halves()


def test_codes_the_kernel_does_not_take_are_multiplied_as_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfit, fit = random_int4(24, 64), random_int4(32, 64)
    x = torch.randn(3, 64).to(torch.bfloat16)
    for kernel, weight in ((True, unfit), (False, fit)):
        monkeypatch.setattr(ours, "has_int4_kernel", lambda kernel=kernel: kernel)
        linear = make_linear(weight)
        assert not isinstance(linear, Int4Linear)
        assert torch.equal(linear(x), make_linear(weight.dense(torch.bfloat16))(x))


def test_stacked() -> None:
    one, two = random_int4(32, 64), random_int4(16, 64, seed=1)
    both = stacked([one, two])
    assert isinstance(both, Int4Weight)
    rows = [weight.dense(torch.float32) for weight in (one, two)]
    assert torch.equal(both.dense(torch.float32), torch.cat(rows))
    assert torch.equal(stacked(rows), torch.cat(rows))
    with pytest.raises(ValueError, match="1 of 2 weights are 4-bit codes"):
        stacked([one, rows[1]])
