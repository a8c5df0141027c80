"""Products on Hopper: of large weights with 2 to 256 rows, and gate, up and SiLU of any more.

The same as `astrai.kernels.triton.product`, with what a Triton program cannot have: columns that
need not be a power of two, so that one wave of blocks owns all of a weight; rows in steps of 32;
and weights that come while the kernel before still runs. See product.cu.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from astrai.kernels.hopper.build import SHARED_BYTES, Kernel, Source, tensor_map
from astrai.kernels.triton.launch import launch

MOST_ROWS = 256  # of one tile
# Narrow blocks: past this many rows they wait for x, and the library's products are faster.
_MOST_PLAIN_ROWS, _MOST_PART_ROWS = 192, 224
# Numbers of the smallest weight for which these are faster than Triton's and the library's.
_LEAST_NUMBERS = 1 << 24
# With more rows than a tile's, at least this share of what the blocks compute must be of use.
_LEAST_USED = 0.75
_MULTIPROCESSORS = 132
_STEP = 64  # of K
_NUMBERS = {torch.bfloat16: "bf16", torch.float16: "f16"}
_MOST_STAGES = 9


class Cut(NamedTuple):
    """How one product runs."""

    rows: int  # of a tile, padding included
    columns: int  # of a tile; gate and up are two
    split: int = 1  # blocks that share one sum
    many: bool = False  # tiles of gate, up and SiLU follow each other in a block

    @property
    def stages(self) -> int:
        """Steps of K under way: as many as shared memory holds."""
        return min(_MOST_STAGES, (SHARED_BYTES - 1024 - self._staging) // self._stage)

    @property
    def shared_bytes(self) -> int:
        return 1024 + self._staging + self.stages * self._stage

    @property
    def _stage(self) -> int:
        return (self.rows + self.columns) * _STEP * 2 + 16  # and two barriers

    @property
    def _staging(self) -> int:
        return self.rows * (self.columns + 16) if self.many else 0

    @property
    def rebalanced(self) -> bool:
        """Do the sums need registers of the copying warps?"""
        return self.columns > 128 and self.rows > 192


def cut_of(n_rows: int, n: int, k: int, silu: bool = False, parts: bool = False) -> Cut | None:
    """For n_rows of x and a weight [n, k] ([2 n, k] with SiLU); None: leave it to others.

    parts: sums may be shared. Equal work for every multiprocessor, in blocks as wide as it allows:
    x is read by each of them.
    """
    width = 2 * n if silu else n
    if n_rows < 2 or width % 64 or k % _STEP:
        return None
    if silu and n_rows > MOST_ROWS:
        cut = Cut(MOST_ROWS, 192, many=True)
        computed = _waves(cut, n_rows, width) * _MULTIPROCESSORS * cut.rows * cut.columns
        return cut if n_rows * width >= _LEAST_USED * computed else None
    most = MOST_ROWS if silu else _MOST_PART_ROWS if parts else _MOST_PLAIN_ROWS
    if n_rows > most or width * k < _LEAST_NUMBERS:
        return None
    rows = -(-n_rows // 32) * 32
    if not parts:
        fits = [Cut(rows, columns) for columns in (192, 128, 64) if width % columns == 0]
        return min(fits, key=lambda cut: _waves(cut, n_rows, width) * cut.columns)
    split = 1
    while 2 * split * width // 64 <= _MULTIPROCESSORS and k % (2 * split * _STEP) == 0:
        split *= 2
    return Cut(rows, 64, split)


def _tiles(cut: Cut, n_rows: int, width: int) -> int:
    return -(-width // cut.columns) * -(-n_rows // cut.rows)


def _waves(cut: Cut, n_rows: int, width: int) -> int:
    return -(-_tiles(cut, n_rows, width) // _MULTIPROCESSORS)


def part_numbers(n: int, k: int) -> int:
    """float32 numbers that the parts of a weight [n, k] need, whatever the rows."""
    cut = cut_of(_MOST_PART_ROWS, n, k, parts=True)
    return 0 if cut is None else _MOST_PART_ROWS * n * cut.split


@cache
def kernel_of(cut: Cut, dtype: torch.dtype, silu: bool, parts: bool, bias: bool) -> Kernel:
    groups = cut.columns // 64
    number = _NUMBERS[dtype]
    # Registers of one instruction are counted against those of a launch, not of a warp.
    halves = 2 if cut.rebalanced else 1
    numbers = {
        "ROWS": cut.rows, "COLUMNS": cut.columns, "STAGES": cut.stages, "HALVES": halves,
        "PARTS": int(parts), "SILU": int(silu), "BIAS": int(bias), "REBALANCE": int(cut.rebalanced),
        "MANY": int(cut.many),
    }  # fmt: skip
    defined = [f"#define {name} {value}" for name, value in numbers.items()]
    defined += [f'#define NUMBER "{number}"', _multiply(cut.rows // halves, number)]
    return Kernel(
        Source(Path(__file__).with_name("product.cu"), "product", "\n".join(defined)),
        threads=groups * 128 + (128 if cut.rebalanced else 32),
        shared_bytes=cut.shared_bytes,
    )


def _multiply(rows: int, number: str) -> str:
    """`multiply`: sums += or = a @ bᵀ of 64 columns, `rows` rows, 16 of K; PTX wgmma.mma_async."""
    count = rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(
    float (&sums)[{count}], unsigned long long a, unsigned long long b, int add) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{number}.{number} "
      "{{{registers}}}, %{count}, %{count + 1}, add, 1, 1, 0, 0;\\n}}"
      : {operands} : "l"(a), "l"(b), "r"(add));
}}"""


def _check(
    x: Tensor, weight: Tensor, out: Tensor, cut: Cut, bias: Tensor | None, silu: bool
) -> None:
    """ValueError: the kernel would read or write something else."""
    (n_rows, k), n, parts = x.shape, out.shape[-1], out.dim() == 3
    if (out.shape[0] if parts else 1) != cut.split or (parts and (silu or bias is not None)):
        raise ValueError(f"{tuple(out.shape) = }, {cut.split = }, {silu = }, expected equal parts")
    width = 2 * n if silu else n
    fits = silu if cut.many else n_rows <= cut.rows and width % cut.columns == 0
    if not fits or k % (_STEP * cut.split) or n % 8:
        raise ValueError(f"{tuple(x.shape) = }, {tuple(weight.shape) = }, expected to fit {cut}")
    if x.dtype not in _NUMBERS:
        raise ValueError(f"{x.dtype = }, expected one of {list(_NUMBERS)}")
    expected = {
        "x": (x, (n_rows, k), x.dtype),
        "weight": (weight, (width, k), x.dtype),
        "out": (out, (cut.split, n_rows, n), torch.float32) if parts
        else (out, (n_rows, n), x.dtype),
        "bias": (bias, (width,), x.dtype),
    }  # fmt: skip
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape) = }, {tensor.dtype = }, expected {shape}, {dtype}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name}: expected contiguous numbers from a multiple of 16 bytes on")


def product(
    x: Tensor, weight: Tensor, out: Tensor, cut: Cut, *,
    bias: Tensor | None = None, silu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """out [R, N] = x [R, K] @ weight [N, K]ᵀ + bias; or float32 parts [split, R, N] of it.

    silu: weight and bias have 2 N rows, gate then up, and out is silu(gate) * up. All contiguous.
    ValueError: the cut, or a shape, dtype or place of these does not fit.
    """
    (n_rows, k), n, parts = x.shape, out.shape[-1], out.dim() == 3
    _check(x, weight, out, cut, bias, silu)
    kernel = kernel_of(cut, x.dtype, silu, parts, bias is not None)
    columns = cut.columns
    if silu:  # eights of gate and up by turns
        weights = tensor_map(
            weight, (k, 8, 2, n // 8), (k, n * k, 8 * k), (_STEP, 8, 2, columns // 16)
        )
    else:
        weights = tensor_map(weight, (k, n), (k,), (_STEP, columns))
    arguments = (
        (tensor_map(x, (k, n_rows), (k,), (_STEP, cut.rows)), None),
        (weights, None),
        (out.data_ptr(), ctypes.c_void_p),
        (bias.data_ptr() if bias is not None else 0, ctypes.c_void_p),
        (n_rows, ctypes.c_int),
        (n, ctypes.c_int),
        (k // _STEP // cut.split, ctypes.c_int),
    )
    values, types = zip(*arguments)
    n_tiles = _tiles(cut, n_rows, len(weight))
    n_blocks = min(n_tiles, _MULTIPROCESSORS) if cut.many else n_tiles
    launch(kernel, (n_blocks, cut.split))(values, types, pdl)
