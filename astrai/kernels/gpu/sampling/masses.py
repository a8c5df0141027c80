"""What the sampling kernels share: the largest logit of a row, and fixed-point sums below it.

A row is cut into chunks of CHUNK tokens, one program each; what a chunk found is put together
again by whoever needs the row. Sums are of 64-bit integers, so their order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from astrai.kernels.gpu.heads import release_next, wait_for_inputs

CHUNK = 2048
# A row that is truncated also keeps the largest logit of each block of this many tokens.
BLOCK = 64
# The sets of a row's largest weights that are counted, so that one of them has the right size.
LEVELS = 3


@triton.constexpr_function
def run_of(bits: int, vocab: int) -> int:
    """Neighbouring logits of so many bits that one load brings: 16 bytes, if rows begin at such."""
    return min(128 // bits, vocab & -vocab)


@triton.jit
def row_peak(
    peaks: tl.tensor, row: tl.tensor, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tensor:
    """The largest logit of a row, NaN if it has one; found by each warp, so that none waits."""
    LANES: tl.constexpr = min(CHUNKS, 32)
    place = peaks + row * N_CHUNKS
    c = tl.arange(0, LANES)
    top = tl.load(place + c, c < N_CHUNKS, float("-inf"), cache_modifier=".cg")
    for i in tl.static_range(LANES, CHUNKS, LANES):
        more = tl.load(place + i + c, i + c < N_CHUNKS, float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, more, propagate_nan=tl.PropagateNan.ALL)
    bad = tl.sum((top != top).to(tl.int32), axis=0)
    return tl.where(bad > 0, float("nan"), tl.max(top, axis=0))


@triton.jit
def heat_of(temperatures: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """float32: the temperature of a slot, 0 = greedy, else one that float32 can divide by."""
    heat = tl.load(temperatures + slot)
    return tl.where(heat > 0.0, tl.minimum(tl.maximum(heat, 1.0e-30), 1.0e30), 0.0)


@triton.jit
def _widened(x: tl.tensor) -> tl.tensor:
    """float32. This way the upper one of two bfloat16 in a register takes one instruction."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_chunk(
    logits: tl.tensor, row: tl.tensor, chunk: tl.tensor, VOCAB: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    place = logits + row * VOCAB + at
    if chunk < VOCAB // CHUNK:
        x = _widened(tl.load(place, cache_modifier=".cg"))
    else:
        x = _widened(tl.load(place, at < VOCAB, float("-inf"), cache_modifier=".cg"))
    return x


@triton.jit
def weight_of(x: tl.tensor, peak: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """float32 in [0, 1]: exp((x - peak) / heat), the quotient rounded correctly.

    exp(-64) for what is below it and what is not finite: either has no mass.

    From the rounded inverse of a divisor, a product and its remainder give the rounded quotient
    (Markstein, IBM J. Res. Dev. 34(1), 1990), unless something underflows: a quotient nearer to 0
    than 2**-30, but of all these exp is 1; or a remainder where both heat and logits are tiny,
    which are therefore multiplied by a power of two.
    """
    tiny = (heat < 2.0**-40) & (tl.abs(peak) < 2.0**60)
    grow = tl.where(tiny, 2.0**64, 1.0)
    heat *= grow
    inverse = tl.div_rn(1.0, heat)
    # One instruction, and the same as (x - peak) * grow: each product is exact.
    d = tl.maximum(x * grow - peak * grow, -64.0 * heat)
    q = d * inverse
    q = tl.fma(tl.fma(q, -heat, d), inverse, q)
    # The same as tl.exp, which also takes care of results below 2**-126.
    return libdevice.fast_expf(q)


@triton.jit
def fixed(e: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return (e * scale).to(tl.int64)


@triton.jit
def _units(x: tl.tensor, ZERO: tl.constexpr, RUN: tl.constexpr, THREADS: tl.constexpr) -> tl.tensor:
    """int64 [THREADS]: how many units in the last place `x` are above the float of bits ZERO."""
    n = x.to(tl.int32, bitcast=True) - ZERO
    n = tl.reshape(n, [n.numel // (RUN * THREADS), THREADS, RUN])
    # 32 bits hold what a thread has: at most 2**23 of each of at most 64 tokens.
    return tl.sum(tl.sum(n, axis=2), axis=0).to(tl.int64)


@triton.jit
def mass_of(
    e: tl.tensor, BITS: tl.constexpr, RUN: tl.constexpr, THREADS: tl.constexpr
) -> tl.tensor:
    """int64: the sum of floor(e * 2**BITS) of float32 `e` in [0, 1].

    RUN: the neighbours that a thread holds. Conversions to 64 bits are slow, so floats count: 1 + e
    rounded down has units of 2**-23 in its last place, and 2**(23 - BITS) + what is left of e (e -
    (upper - 1), exactly) has units of 2**-BITS, if these are no less than 2**-46.
    """
    if BITS > 46:
        return tl.sum(fixed(e, 2.0**BITS), axis=0)
    BASE: tl.constexpr = 2.0 ** (23 - BITS)
    upper = libdevice.add_rz(e, 1.0)
    lower = libdevice.add_rz(e, (1.0 + BASE) - upper)
    n = _units(upper, 127 << 23, RUN, THREADS) << (BITS - 23)
    return tl.sum(n + _units(lower, (150 - BITS) << 23, RUN, THREADS), axis=0)


@triton.jit
def scaled(fraction: tl.tensor, whole: tl.tensor) -> tl.tensor:
    """int64: floor(fraction * whole / 2**62), exactly, of numbers in [0, 2**62)."""
    f, w = fraction.to(tl.uint64), whole.to(tl.uint64)
    return ((tl.umulhi(f, w) << 2) | ((f * w) >> 62)).to(tl.int64)


@triton.jit
def load_words(pairs: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """uint64: two int32 words of a slot, the low one first."""
    low = tl.load(pairs + 2 * slot).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(pairs + 2 * slot + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)


@triton.jit
def peaks_kernel(
    logits: tl.tensor, peaks: tl.tensor, best: tl.tensor, block_peaks: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Per chunk its largest logit (NaN if it has one) and where that is first; per block likewise.

    BLOCKS: of a chunk; 0 = the blocks do not matter. Goes from the last chunk to the first, unlike
    the kernels before and after it: what one has touched last may still be in the cache.
    """
    wait_for_inputs(PDL)
    release_next(PDL)
    RUN: tl.constexpr = run_of(logits.dtype.element_ty.primitive_bitwidth, VOCAB)
    row = tl.program_id(0).to(tl.int64)
    chunk = N_CHUNKS - 1 - tl.program_id(1)
    x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
    peak = tl.max(x, axis=0)
    # The place in the run, then of the run; below 0 where there is a NaN.
    runs = tl.reshape(x, [CHUNK // RUN, RUN])
    place = tl.where(runs == peak, tl.arange(0, RUN)[None, :], CHUNK)
    place = tl.min(tl.where(runs == runs, place, -CHUNK), axis=1)
    place = tl.min(place + RUN * tl.arange(0, CHUNK // RUN), axis=0)
    tl.store(peaks + row * N_CHUNKS + chunk, tl.where(place < 0, float("nan"), peak))
    tl.store(best + row * N_CHUNKS + chunk, chunk * CHUNK + place)
    if BLOCKS > 0:
        b = tl.arange(0, BLOCKS)
        tops = tl.max(tl.reshape(x, [BLOCKS, BLOCK]), axis=1)
        tl.store(block_peaks + (row * N_CHUNKS + chunk) * BLOCKS + b, tops)


@triton.jit
def masses_kernel(
    logits: tl.tensor, temperatures: tl.tensor, slots: tl.tensor, peaks: tl.tensor,
    masses: tl.tensor, levels: tl.tensor, counts: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Per chunk the sum of its weights, and how many reach each level if the row has levels.

    LEVELS: 0 = no row has levels. THREADS: of a program, none with more than 64 tokens.
    """
    RUN: tl.constexpr = run_of(logits.dtype.element_ty.primitive_bitwidth, VOCAB)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    # The kernel before this one does not write what is read before the wait, and has itself waited
    # for those that do: it releases this one after that.
    heat = heat_of(temperatures, tl.load(slots + row))
    if heat > 0.0:
        x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
        wait_for_inputs(PDL)
        release_next(PDL)
        e = weight_of(x, row_peak(peaks, row, N_CHUNKS, CHUNKS), heat)
        tl.store(masses + row * N_CHUNKS + chunk, mass_of(e, BITS, RUN, THREADS))
        if LEVELS > 0:
            lowest = tl.load(levels + row * LEVELS)
            if lowest > 0.0:
                for i in tl.static_range(LEVELS):
                    level = tl.load(levels + row * LEVELS + i)
                    n = tl.sum((e >= level).to(tl.int32), axis=0)
                    tl.store(counts + (row * LEVELS + i) * N_CHUNKS + chunk, n)
    else:
        wait_for_inputs(PDL)
        release_next(PDL)
