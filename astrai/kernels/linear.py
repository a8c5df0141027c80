"""Linear layers: the weight packed once for the device it runs on."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of rows the packed layout is chosen for. Results do not depend on it.
_PACK_ROWS = 8


class DenseLinear:
    """y = x Wᵀ + b with the weight [out, in] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
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


Linear = DenseLinear | PackedLinear


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The linear layer of weight [out, in] for its device and dtype.

    The one place to add another kind of packing (quantised weights, say).
    """
    packs = (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
    return PackedLinear(weight, bias) if packs else DenseLinear(weight, bias)
