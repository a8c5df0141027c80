"""What a decoder layer does with each row by itself, between its products: norm, rope, SiLU.

`TorchRows` works everywhere; `rows_of` gives compiled code where it can be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from astrai.kernels.norm import RmsNorm

if TYPE_CHECKING:
    from astrai.models.config import ModelConfig

# Elements from which on PyTorch shares an elementwise operation among threads.
_SHARED_ELEMENTS = 32_768

# q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim]
Heads = tuple[Tensor, Tensor, Tensor]


class Rows(Protocol):
    """Owns rope tables. All results may share memory with the arguments."""

    def begin(self, positions: Tensor) -> None:
        """Before the layers of a pass: int64 [T], the position of each row."""

    def add_norm(self, hidden: Tensor, added: Tensor | None, norm: RmsNorm) -> Tensor:
        """hidden, float32 [T, hidden_size], += added; its norm, in the dtype of the weights."""

    def turn(
        self, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, rope: bool
    ) -> Heads:
        """qkv: [T, n_heads + 2 * n_kv_heads, head_dim]; norm, then rope, of q and k."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * size], gate then up -> silu(gate) * up, [T, size]."""


class _Rope(NamedTuple):
    cos: Tensor  # [T, n_heads + n_kv_heads, head_dim]
    sin: Tensor  # the same, its first half negated


class TorchRows:
    """By PyTorch's operators, on any device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._heads = (config.n_heads, config.n_kv_heads)
        cos, sin = rope_tables(config, config.max_positions)
        self._cos = torch.cat((cos, cos), dim=1).to(device=device, dtype=dtype)
        self._sin = torch.cat((-sin, sin), dim=1).to(device=device, dtype=dtype)

    def begin(self, positions: Tensor) -> None:
        # Laid out for every head: the multiplications of all layers then run over whole rows.
        cos, sin = (
            table[positions][:, None].expand(-1, sum(self._heads), -1).contiguous()
            for table in (self._cos, self._sin)
        )
        self._rope = _Rope(cos, sin)

    def add_norm(self, hidden: Tensor, added: Tensor | None, norm: RmsNorm) -> Tensor:
        if added is not None:
            hidden.add_(added)
        return norm(hidden).to(self._dtype)

    def turn(
        self, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, rope: bool
    ) -> Heads:
        n_heads, n_kv = self._heads
        qk, v = qkv.split_with_sizes((n_heads + n_kv, n_kv), 1)
        if q_norm is not None and k_norm is not None:
            q, k = qk.split_with_sizes(self._heads, 1)
            qk = torch.cat((q_norm(q), k_norm(k)), dim=1)
        if rope:
            qk = _rotate(qk, self._rope)
        q, k = qk.split_with_sizes(self._heads, 1)
        return q, k, v

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        return _silu(gate).mul_(up)


def rows_of(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Rows:
    """The fastest for these sizes and this device."""
    if device.type == "cpu":
        try:
            from astrai.kernels.cpu.rowwise import NumbaRows, fits
        except ImportError:  # Numba does not come with every system
            return TorchRows(config, dtype, device)
        if fits(config, dtype):
            return NumbaRows(config, dtype)
    return TorchRows(config, dtype, device)


def rope_tables(config: ModelConfig, n_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [n_positions, head_dim // 2]."""
    inverse, factor = config.rope.frequencies(config.head_dim)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), inverse)
    return angles.cos() * factor, angles.sin() * factor


def _silu(x: Tensor) -> Tensor:
    """silu of x [T, size], each row the same whatever T is.

    Two threads share a larger tensor at some element in the middle of a row, and the few elements
    before that border get another kernel's exponential. Smaller pieces are never shared.
    """
    if x.device.type != "cpu" or x.numel() <= _SHARED_ELEMENTS:
        return F.silu(x)
    return torch.cat([F.silu(part) for part in x.split(max(1, _SHARED_ELEMENTS // x.shape[1]))])


def _rotate(x: Tensor, rope: _Rope) -> Tensor:
    """x [T, heads, head_dim]: (a, b) of each head becomes (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * rope.cos).addcmul_(swapped, rope.sin)
