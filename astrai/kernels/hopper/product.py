"""Products on Hopper: with 2 to 256 rows, and gate, up and SiLU of any more.

The same as `astrai.kernels.gpu.product`, with what a Triton program cannot have: columns that
need not be a power of two, so that one wave of blocks owns all of a weight; rows in steps of 16;
and weights that come while the kernel before still runs. See product.cu.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from astrai.kernels.gpu.launch import launch
from astrai.kernels.hopper.build import SHARED_BYTES, Kernel, Source, tensor_map

MOST_ROWS = 256  # of one tile
# Numbers of a weight that is worth it, and of one that is large.
_LEAST_NUMBERS, _LARGE = 1 << 20, 1 << 24
# Others are faster with fewer rows of a small weight, and with more in one narrow tile: of a large
# weight if no sums are shared, sooner if it takes several waves of blocks; of any if they are, and
# sooner if the weight is no longer than wide.
_LEAST_PLAIN, _MOST_PLAIN, _MOST_IN_WAVES = 65, 192, 160
_LEAST_PARTS, _MOST_PARTS, _MOST_WIDE_PARTS = 129, 224, 160
# More rows than this are two tiles, if one wave of blocks computes both.
_ONE_TILE, _ONE_SHARED_TILE = 96, 128
# Tiles of rows are not made smaller than this to have more blocks, nor shares of K.
_LEAST_ROWS, _LEAST_SHARE = 56, 768
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

    parts: sums may be shared. What measured fastest: one wave of blocks, narrow ones where that
    gives every multiprocessor its own.
    """
    width = 2 * n if silu else n
    numbers = width * k
    if n_rows < 2 or width % 64 or k % _STEP or numbers < _LEAST_NUMBERS:
        return None
    if silu:
        return _gated_cut(n_rows, width)
    if parts:
        return _shared_cut(n_rows, width, k)
    return _plain_cut(n_rows, width, numbers >= _LARGE)


def _plain_cut(n_rows: int, width: int, large: bool) -> Cut | None:
    cut = _whole_cut(n_rows, width)
    least, most = _LEAST_PLAIN, MOST_ROWS
    if large:
        least, most = 2, _MOST_PLAIN if _waves(cut, n_rows, width) == 1 else _MOST_IN_WAVES
    if not least <= n_rows <= most:
        return None
    if large or n_rows <= _ONE_TILE or 2 * _tiles(cut, n_rows, width) > _MULTIPROCESSORS:
        return cut
    return cut._replace(rows=_tile_rows(n_rows, 2))


def _gated_cut(n_rows: int, width: int) -> Cut | None:
    if n_rows <= MOST_ROWS:
        return _whole_cut(n_rows, width)
    cut = Cut(MOST_ROWS, 192, many=True)
    computed = _waves(cut, n_rows, width) * _MULTIPROCESSORS * cut.rows * cut.columns
    return cut if n_rows * width >= _LEAST_USED * computed else None


def _whole_cut(n_rows: int, width: int) -> Cut:
    """All rows in one tile, and blocks as wide as one wave of them allows: x is read by each."""
    rows = _up(n_rows, 32)
    fits = [Cut(rows, columns) for columns in (192, 128, 64) if width % columns == 0]
    return min(fits, key=lambda cut: _waves(cut, n_rows, width) * cut.columns)


def _shared_cut(n_rows: int, width: int, k: int) -> Cut | None:
    wide = width // 64
    tall = 2 if n_rows > _ONE_SHARED_TILE and 4 * wide <= _MULTIPROCESSORS else 1
    least = _LEAST_PARTS if width * k < _LARGE else 2
    most = MOST_ROWS if tall == 2 else _MOST_PARTS if k > width else _MOST_WIDE_PARTS
    if not least <= n_rows <= most:
        return None
    split = 1
    while (
        2 * split * tall * wide <= _MULTIPROCESSORS
        and k % (2 * split * _STEP) == 0
        and k // (2 * split) >= _LEAST_SHARE
    ):
        split *= 2
    while 2 * split * tall * wide <= _MULTIPROCESSORS and n_rows // (2 * tall) >= _LEAST_ROWS:
        tall *= 2
    return Cut(_tile_rows(n_rows, tall), 64, split)


def _tile_rows(n_rows: int, tall: int) -> int:
    """Of each of `tall` tiles."""
    return _up(-(-n_rows // tall), 16)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _tiles(cut: Cut, n_rows: int, width: int) -> int:
    return -(-width // cut.columns) * -(-n_rows // cut.rows)


def _waves(cut: Cut, n_rows: int, width: int) -> int:
    return -(-_tiles(cut, n_rows, width) // _MULTIPROCESSORS)


def part_numbers(n: int, k: int) -> int:
    """float32 numbers that the parts of a weight [n, k] need, whatever the rows."""
    cuts = ((m, cut_of(m, n, k, parts=True)) for m in range(1, MOST_ROWS + 1))
    return max((m * n * cut.split for m, cut in cuts if cut is not None), default=0)


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
    fits = silu if cut.many else width % cut.columns == 0
    fits = fits and cut.rows % (32 if silu else 16) == 0
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
