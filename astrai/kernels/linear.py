"""Linear layers: the weight packed once for the device it runs on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai.kernels.cpu.threads import together

# The number of rows the packed layout is chosen for. Results do not depend on it.
_PACK_ROWS = 8
# Columns that share one scale and zero in a 4-bit weight.
INT4_GROUP = 32
# Outputs that the 4-bit kernel computes side by side, and whole ones of which it needs.
_INT4_BLOCK, _INT4_OUTPUTS = 64, 16


class Int4Weight(NamedTuple):
    """A weight [out, in] as codes: w = (code - 8) * scale + zero, for 32 columns each."""

    codes: Tensor  # uint8 [out, in], each 0 to 15
    scale: Tensor  # float32 [out, in / 32]
    zero: Tensor  # float32 [out, in / 32]

    def dense(self, dtype: torch.dtype) -> Tensor:
        groups = self.codes.unflatten(1, (-1, INT4_GROUP)).float()
        values = torch.addcmul(self.zero[..., None], groups - 8, self.scale[..., None])
        return values.flatten(1).to(dtype)


Weight = Tensor | Int4Weight


def stacked(weights: Sequence[Weight]) -> Weight:
    """Weights [out_i, in] of one kind as one, each below the one before."""
    if len(weights) == 1:
        return weights[0]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(dense) == len(weights):
        return torch.cat(dense)
    codes = [weight for weight in weights if isinstance(weight, Int4Weight)]
    if len(codes) == len(weights):
        return Int4Weight(*(torch.cat(parts) for parts in zip(*codes)))
    raise ValueError(
        f"{len(codes)} of {len(weights)} weights are 4-bit codes, expected all or none"
    )


class DenseLinear:
    """y = x Wᵀ + b with the weight [out, in] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        with together():
            return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same on the CPU, with the weight re-laid once for its vector or matrix units.

    A row's result does not depend on how many rows stand beside it: the packed kernels add up
    a row in one order for any number of rows from two on. For a lone row some shapes take another
    kernel, which adds up in another order: there a lone row is computed twice.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.weight = _pack(weight)
        self._pads = _lone_row_differs(*weight.shape, weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self._pads and x.shape[0] == 1:
            return _packed_linear(x.expand(2, -1), self.weight, self.bias)[:1]
        return _packed_linear(x, self.weight, self.bias)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
    return packed


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    linear: Any = torch.ops.mkldnn._linear_pointwise.default
    with together():
        out: Tensor = linear(x, weight, bias, "none", [], "")
    return out


@functools.cache
def _lone_row_differs(n_out: int, n_in: int, dtype: torch.dtype) -> bool:
    """Whether one row alone is added up in another order than the same row beside another.

    The terms of the trial cancel, so that what is left is rounding, which any other order changes.
    A few hundred outputs show it; their number decides nothing about the order.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(min(n_out, 1024), -(-n_in // 2), generator=generator)
    half *= torch.exp2(torch.randint(-8, 8, half.shape, generator=generator))
    order = torch.randperm(2 * half.shape[1], generator=generator)
    weight = _pack(torch.cat((half, -half), dim=1)[:, order][:, :n_in].to(dtype))
    row = torch.ones(1, n_in, dtype=dtype)
    alone = _packed_linear(row, weight, None)
    return not torch.equal(alone[0], _packed_linear(row.expand(2, -1), weight, None)[0])


class Int4Linear:
    """The same on the CPU from 4-bit codes, x and y bfloat16; made only where `fits_int4`.

    Each product is dequantised in registers and added up in float32, column after column: a row's
    result does not depend on the rows beside it.
    """

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.codes = _pack_int4(weight.codes.contiguous())
        # [in / 32, out, 2]
        self.scale_and_zero = (
            torch.stack((weight.scale.T, weight.zero.T), dim=-1).to(torch.bfloat16).contiguous()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        with together():
            out: Tensor = product(x.contiguous(), self.codes, INT4_GROUP, self.scale_and_zero)
        return out if self.bias is None else out.add_(self.bias)


def has_int4_kernel() -> bool:
    """Whether this CPU has a 4-bit kernel worth running: elsewhere it is a loop over scalars."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu")
    )


def fits_int4(weight: Int4Weight) -> bool:
    """Whether the 4-bit kernel takes a weight of this shape."""
    n_out, n_in = weight.codes.shape
    return n_out % _INT4_OUTPUTS == 0 and n_in % INT4_GROUP == 0


def _pack_int4(codes: Tensor) -> Tensor:
    """codes uint8 [out, in] -> uint8 [out, in / 2] in the order of the 4-bit kernel."""
    if codes.shape[0] % _INT4_BLOCK == 0 and _lays_int4_in_halves():
        return _in_halves(codes)
    return _pack_int4_slowly(codes)


def _pack_int4_slowly(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def _in_halves(codes: Tensor) -> Tensor:
    """For each block of 64 outputs and each column 32 bytes: output i low, output i + 32 high."""
    halves = codes.view(-1, 2, _INT4_BLOCK // 2, codes.shape[1])
    both = halves[:, 0] | (halves[:, 1] << 4)
    return both.transpose(1, 2).contiguous().view(codes.shape[0], -1)


@functools.cache
def _lays_int4_in_halves() -> bool:
    """Whether the order of this build of torch is the one of `_in_halves`, 60 times as fast as
    torch's own packing."""
    generator = torch.Generator().manual_seed(0)
    shape = (2 * _INT4_BLOCK, INT4_GROUP)
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    return torch.equal(_in_halves(codes), _pack_int4_slowly(codes))


Linear = DenseLinear | PackedLinear | Int4Linear


def make_linear(weight: Weight, bias: Tensor | None = None) -> Linear:
    """The linear layer of weight [out, in] for its device and dtype.

    The one place that chooses a packing. A 4-bit weight that the kernel does not take is
    multiplied as bfloat16, as its neighbours are.
    """
    if isinstance(weight, Int4Weight):
        if has_int4_kernel() and fits_int4(weight):
            return Int4Linear(weight, bias)
        weight = weight.dense(torch.bfloat16)
    packs = (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
    return PackedLinear(weight, bias) if packs else DenseLinear(weight, bias)
