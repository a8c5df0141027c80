"""`Rows` of the CPU by compiled code: see `rows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from astrai.kernels.cpu.lanes import LANES
from astrai.kernels.cpu.rows import row_kernels
from astrai.kernels.cpu.run import DTYPES
from astrai.kernels.norm import RmsNorm
from astrai.kernels.rowwise import Heads, rope_tables

if TYPE_CHECKING:
    from astrai.models.config import ModelConfig


class NumbaRows:
    """In float32 inside, results rounded to the dtype of the weights."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._dtype, self._size = dtype, dtype.itemsize
        self._heads = (config.n_heads, config.n_kv_heads)
        self._dim, self._eps = config.head_dim, config.rms_norm_eps
        self._cosines, self._sines = rope_tables(config, config.max_positions)
        self._kernels = row_kernels()

    def begin(self, positions: Tensor) -> None:
        first, last = (int(x) for x in positions.aminmax())
        if first < 0 or last >= len(self._cosines) or positions.dtype != torch.int64:
            raise ValueError(
                f"{positions.dtype}, {first} to {last}, expected int64 positions within "
                f"[0, {len(self._cosines)})"
            )
        self._positions = positions.contiguous()

    def add_norm(self, hidden: Tensor, added: Tensor | None, norm: RmsNorm) -> Tensor:
        n_rows, width = hidden.shape
        out = hidden.new_empty(n_rows, width, dtype=self._dtype)
        more = 0 if added is None else _address(added, self._dtype)
        self._kernels.add_norm(
            _address(hidden, torch.float32), more, norm.exact.data_ptr(), out.data_ptr(), n_rows,
            width, self._size, norm.eps,
        )  # fmt: skip
        return out

    def turn(
        self, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, rope: bool
    ) -> Heads:
        n_heads, n_kv = self._heads
        if rope or q_norm is not None:
            cosines, sines = (x.data_ptr() if rope else 0 for x in (self._cosines, self._sines))
            weights = (0 if norm is None else norm.exact.data_ptr() for norm in (q_norm, k_norm))
            self._kernels.turn(
                _address(qkv, self._dtype), qkv.stride(0) * self._size, len(qkv), n_heads, n_kv,
                self._dim, self._size, self._positions.data_ptr(), cosines, sines, *weights,
                self._eps,
            )  # fmt: skip
        return qkv[:, :n_heads], qkv[:, n_heads : n_heads + n_kv], qkv[:, n_heads + n_kv :]

    def gate(self, gate_up: Tensor) -> Tensor:
        n_rows, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(n_rows, width)
        self._kernels.gate(
            _address(gate_up, self._dtype), out.data_ptr(), n_rows, width, self._size
        )
        return out


def _address(x: Tensor, dtype: torch.dtype) -> int:
    if not x.is_contiguous() or x.dtype != dtype:
        raise ValueError(
            f"{tuple(x.shape) = }, {x.dtype = }, {x.stride() = }, expected rows without gaps "
            f"of {dtype}"
        )
    return x.data_ptr()


def fits(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether these sizes and this dtype are what the kernels work on."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim // 2)
    return dtype in DTYPES and not any(size % LANES for size in sizes)
