"""Sixteen float32 numbers as one value of compiled code, with every order of operations fixed.

A compiler that may reorder a sum does so differently from place to place, and a row's bits would
depend on where they are computed. Here nothing is reordered: lane i is lane i on every machine,
whatever the width of its vectors, and `total` adds the lanes up in one tree. Addresses are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16

_INT64, _INT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)

Build = Callable[..., Any]  # (builder, *values) -> value


class Lanes(types.Type):
    """The type, as Numba sees it."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


# ── functions of compiled code, from the instructions that they stand for ───────────────────────


def _code(build: Build, result: Any) -> Callable[..., Any]:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = build(builder, *values)
        return context.get_dummy_value() if result is types.void else made

    return code


def unary(result: Any, kind: Any, build: Build) -> Any:
    @intrinsic
    def operation(context: Any, x: Any) -> Any:
        return result(kind), _code(build, result)

    return operation


def binary(result: Any, kinds: tuple[Any, Any], build: Build) -> Any:
    @intrinsic
    def operation(context: Any, x: Any, y: Any) -> Any:
        return result(*kinds), _code(build, result)

    return operation


def ternary(result: Any, kinds: tuple[Any, Any, Any], build: Build) -> Any:
    @intrinsic
    def operation(context: Any, x: Any, y: Any, z: Any) -> Any:
        return result(*kinds), _code(build, result)

    return operation


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _past(builder: Any, address: Any, n_bytes: int) -> Any:
    return builder.add(address, ir.Constant(_INT64, n_bytes))


def _all(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _read(builder: Any, address: Any) -> Any:
    return builder.load(_at(builder, address, _VECTOR), align=4)


def _write(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _at(builder, address, _VECTOR), align=4)


def _read_short(builder: Any, address: Any) -> Any:
    """bfloat16 is the upper half of a float32."""
    short = builder.load(_at(builder, address, _SHORTS), align=2)
    return builder.bitcast(builder.shl(builder.zext(short, _INTS), _all(16)), _VECTOR)


def _write_short(builder: Any, address: Any, value: Any) -> None:
    """Rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = builder.bitcast(value, _INTS)
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    near = builder.add(bits, builder.add(odd, _all(0x7FFF)))
    near = builder.select(builder.fcmp_unordered("uno", value, value), _all(0x7FC00000), near)
    short = builder.trunc(builder.lshr(near, _all(16)), _SHORTS)
    builder.store(short, _at(builder, address, _SHORTS), align=2)


class Numbers(NamedTuple):
    """How the numbers of a dtype lie in memory."""

    size: int  # bytes
    read: Build  # (builder, address) -> lanes
    write: Build  # (builder, address, lanes)


FLOAT32 = Numbers(4, _read, _write)
BFLOAT16 = Numbers(2, _read_short, _write_short)


# ── arithmetic ──────────────────────────────────────────────────────────────────────────────────


def _of_vectors(name: str, n: int) -> Build:
    """The intrinsic of LLVM with n vectors as arguments."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * n)

    def build(builder: Any, *values: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic(f"{name}.v16f32", fnty=kind), values)

    return build


_fused = _of_vectors("llvm.fma", 3)


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


def _total(builder: Any, value: Any) -> Any:
    """Lane i and lane i + 8, then i + 4, i + 2, i + 1."""
    for width in (8, 4, 2, 1):
        kind = ir.VectorType(_INT, width)
        low = builder.shuffle_vector(value, value, ir.Constant(kind, list(range(width))))
        high = ir.Constant(kind, list(range(width, 2 * width)))
        value = builder.fadd(low, builder.shuffle_vector(value, value, high))
    return builder.extract_element(value, ir.Constant(_INT, 0))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """b where it is larger, else a, so also where one of them is NaN."""
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    """b where it is smaller, else a, so also where one of them is NaN."""
    return builder.select(builder.fcmp_ordered("<", b, a), b, a)


def _power_of_two(builder: Any, exponent: Any) -> Any:
    """Of whole numbers in [-127, 127]; of -127 it is 0."""
    whole = builder.fptosi(exponent, _INTS)
    return builder.bitcast(builder.shl(builder.add(whole, _all(127)), _all(23)), _VECTOR)


def _ticket(builder: Any, address: Any) -> Any:
    one = ir.Constant(_INT64, 1)
    return builder.atomic_rmw("add", _at(builder, address, _INT64), one, "seq_cst")


def _prefetch(builder: Any, address: Any) -> Any:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
    read_keep_data = (ir.Constant(_INT, value) for value in (0, 3, 1))
    return builder.call(function, (builder.inttoptr(address, byte), *read_keep_data))


# The numbers of sums whose halves are folded together again and again: bits reversed.
_FOLDED = [int(f"{i:04b}"[::-1], 2) for i in range(LANES)]


def _fold(builder: Any, sums: list[Any]) -> Any:
    """Lane i is the total of sums[_FOLDED[i]], added up in the order of `_total`.

    All 16 together take a third of the instructions of one after the other.
    """
    width = LANES // 2
    while width:
        # Of each run of lanes that belong to one sum the upper half goes onto the lower; the halves
        # of two vectors make one.
        low = [run + i for run in range(0, LANES, 2 * width) for i in range(width)]
        high = [i + width for i in low]
        low_of_both, high_of_both = (
            ir.Constant(_INTS, half + [LANES + i for i in half]) for half in (low, high)
        )
        sums = [
            builder.fadd(
                builder.shuffle_vector(a, b, low_of_both),
                builder.shuffle_vector(a, b, high_of_both),
            )
            for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :])
        ]
        width //= 2
    return sums[0]


def _dots(numbers: Numbers, chunks: int) -> Build:
    """(q, keys, step): products of q, float32 [16 * chunks], with 16 keys `step` bytes apart."""

    def build(builder: Any, q: Any, keys: Any, step: Any) -> Any:
        queries = [_read(builder, _past(builder, q, 64 * c)) for c in range(chunks)]
        sums = []
        for i in _FOLDED:
            key = builder.add(keys, builder.mul(step, ir.Constant(_INT64, i)))
            parts = [
                numbers.read(builder, _past(builder, key, 16 * numbers.size * c))
                for c in range(chunks)
            ]
            value = builder.fmul(queries[0], parts[0])
            for query, part in zip(queries[1:], parts[1:]):
                value = _fused(builder, query, part, value)
            sums.append(value)
        return _fold(builder, sums)

    return build


_f, _i, _v = types.float32, types.int64, lanes
_iii = (_i, _i, _i)
# Of 16 numbers in a row: (address), (address, lanes). One number: (address), (address, number).
load, store = unary(_v, _i, _read), binary(types.void, (_i, _v), _write)
load_short = unary(_v, _i, _read_short)
store_short = binary(types.void, (_i, _v), _write_short)
load_one = unary(_f, _i, lambda b, at: b.load(_at(b, at, _FLOAT), align=4))
store_one = binary(types.void, (_i, _f), lambda b, at, x: b.store(x, _at(b, at, _FLOAT), align=4))
prefetch = unary(types.void, _i, _prefetch)  # of the cache line at an address
load_int = unary(_i, _i, lambda b, at: b.load(_at(b, at, _INT64), align=8))
# The int64 at an address, which is then one more: no two threads get the same.
ticket = unary(_i, _i, _ticket)
splat, total = unary(_v, _f, _splat), unary(_f, _v, _total)
add = binary(_v, (_v, _v), lambda b, x, y: b.fadd(x, y))
sub = binary(_v, (_v, _v), lambda b, x, y: b.fsub(x, y))
mul = binary(_v, (_v, _v), lambda b, x, y: b.fmul(x, y))
div = binary(_v, (_v, _v), lambda b, x, y: b.fdiv(x, y))
larger, smaller = binary(_v, (_v, _v), _larger), binary(_v, (_v, _v), _smaller)
fma = ternary(_v, (_v, _v, _v), _fused)  # x * y + z, rounded once
nearest = unary(_v, _v, _of_vectors("llvm.rint", 1))
power_of_two = unary(_v, _v, _power_of_two)
# See `_dots`; of 64 numbers and of 16, float32 and bfloat16.
dots64, dots16 = ternary(_v, _iii, _dots(FLOAT32, 4)), ternary(_v, _iii, _dots(FLOAT32, 1))
short_dots64 = ternary(_v, _iii, _dots(BFLOAT16, 4))
short_dots16 = ternary(_v, _iii, _dots(BFLOAT16, 1))
