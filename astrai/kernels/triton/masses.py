"""What the sampling kernels share: the largest logit of a row, and fixed-point sums below it.

A row is cut into chunks of CHUNK tokens, one program each; what a chunk found is put together
again by whoever needs the row. Sums are of 64-bit integers, so their order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from astrai.kernels.triton.heads import release_next, wait_for_inputs

CHUNK = 2048
# A row that is truncated also keeps the largest logit of each block of this many tokens.
BLOCK = 64
# The sets of a row's largest weights that are counted, so that one of them has the right size.
LEVELS = 3


@triton.jit
def row_peak(
    peaks: tl.tensor, row: tl.tensor, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tensor:
    c = tl.arange(0, CHUNKS)
    p = tl.load(peaks + row * N_CHUNKS + c, mask=c < N_CHUNKS, other=float("-inf"))
    bad = tl.sum((p != p).to(tl.int32), axis=0)
    return tl.where(bad > 0, float("nan"), tl.max(p, axis=0))


@triton.jit
def heat_of(temperatures: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """float32: the temperature of a slot, 0 = greedy, else one that float32 can divide by."""
    heat = tl.load(temperatures + slot)
    return tl.where(heat > 0.0, tl.maximum(heat, 1.0e-30), 0.0)


@triton.jit
def load_chunk(
    logits: tl.tensor, row: tl.tensor, chunk: tl.tensor, VOCAB: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def weight_of(x: tl.tensor, peak: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """float32 in [0, 1]: exp((x - peak) / heat); 0 for what is not finite."""
    e = tl.exp(tl.div_rn(x - peak, heat))
    return tl.where(e == e, e, 0.0)


@triton.jit
def fixed(e: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return (e * scale).to(tl.int64)


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

    BLOCKS: of a chunk; 0 = the blocks do not matter.
    """
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    x = load_chunk(logits, row, chunk, VOCAB, CHUNK)
    peak = tl.max(x, axis=0)
    bad = tl.sum((x != x).to(tl.int32), axis=0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    where = tl.min(tl.where(x == peak, at, VOCAB), axis=0)
    tl.store(peaks + row * N_CHUNKS + chunk, tl.where(bad > 0, float("nan"), peak))
    tl.store(best + row * N_CHUNKS + chunk, where)
    if BLOCKS > 0:
        b = tl.arange(0, BLOCKS)
        tops = tl.max(tl.reshape(x, [BLOCKS, BLOCK]), axis=1)
        tl.store(block_peaks + (row * N_CHUNKS + chunk) * BLOCKS + b, tops)


@triton.jit
def masses_kernel(
    logits: tl.tensor, temperatures: tl.tensor, slots: tl.tensor, peaks: tl.tensor,
    masses: tl.tensor, levels: tl.tensor, counts: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr,
    LEVELS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Per chunk the sum of its weights, and how many reach each level if the row has levels.

    LEVELS: 0 = no row has levels.
    """
    wait_for_inputs(PDL)
    release_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    heat = heat_of(temperatures, tl.load(slots + row))
    if heat > 0.0:
        peak = row_peak(peaks, row, N_CHUNKS, CHUNKS)
        e = weight_of(load_chunk(logits, row, chunk, VOCAB, CHUNK), peak, heat)
        tl.store(masses + row * N_CHUNKS + chunk, tl.sum(fixed(e, scale), axis=0))
        if LEVELS > 0:
            lowest = tl.load(levels + row * LEVELS)
            if lowest > 0.0:
                for i in tl.static_range(LEVELS):
                    level = tl.load(levels + row * LEVELS + i)
                    n = tl.sum((e >= level).to(tl.int32), axis=0)
                    tl.store(counts + (row * LEVELS + i) * N_CHUNKS + chunk, n)
