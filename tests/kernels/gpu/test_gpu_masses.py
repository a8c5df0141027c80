"""What the sampling kernels share, through Triton's interpreter, against numpy, bit by bit."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch

import tests.kernels.triton_interpreter as interpreter

# isort: split
import triton
import triton.language as tl

from astrai.front.sampling_params import SamplingParams
from astrai.kernels.gpu.sampling.masses import CHUNK, masses_kernel, peaks_kernel, weight_of
from astrai.kernels.gpu.sampling.sampling import SamplingScratch, _find_chunk, sample
from astrai.runtime.sampling.sampler import Sampler, SampleRow

CPU = torch.device("cpu")
TEMPERATURES = [1e-30, 3.1e-13, 0.05, 0.3, 0.6, 0.7, 1.0, 1.9999999, 30.0, 1e30]


def weights(x: np.ndarray, peak: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """As the rule says it; 0 for what is not finite."""
    with np.errstate(all="ignore"):
        e = np.exp((x - peak) / heat)
    return np.where(np.isnan(e), np.float32(0), e)


@triton.jit
def _weights_kernel(x, peak, heat, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, weight_of(tl.load(x + i), tl.load(peak + i), tl.load(heat + i)))


@triton.jit
def _find_kernel(masses, bits, out, N_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(bits + row).to(tl.uint64)
    chunk, goal = _find_chunk(masses, row, low, N_CHUNKS, CHUNKS)
    tl.store(out + 2 * row, chunk.to(tl.int64))
    tl.store(out + 2 * row + 1, goal)


def floats(rng: np.random.Generator, size: int) -> np.ndarray:
    """Of any bits, some of them of bfloat16's."""
    bits = rng.integers(0, 1 << 32, size, dtype=np.uint32)
    bits[::3] &= 0xFFFF0000
    return bits.view(np.float32)


def as_fraction(x: np.float32) -> Fraction:
    return Fraction(float(x))


def test_the_interpreter_rounds_as_the_device() -> None:
    rng = np.random.default_rng(0)
    few = [rng.standard_normal(3000).astype(np.float32) for _ in range(3)]
    x, y, z = (
        few[0],
        few[1],
        -(few[0] * few[1]) * np.float32([1, 1 + 2**-20, 3e-8])[np.arange(3000) % 3],
    )
    for a, b, c, got in zip(x, y, z, interpreter.fma(x, y, z)):
        exact = as_fraction(a) * as_fraction(b) + as_fraction(c)
        near = [np.nextafter(got, np.float32(s)) for s in (-np.inf, np.inf)]
        assert all(abs(as_fraction(n) - exact) >= abs(as_fraction(got) - exact) for n in near)
    e = np.exp(-np.abs(few[0]) * 20).astype(np.float32)
    for a, got in zip(e, interpreter.add_rz(e, np.float32([1.0]))):
        exact = as_fraction(a) + 1
        assert as_fraction(got) <= exact < as_fraction(np.nextafter(got, np.float32(9)))


def test_weights_are_those_of_the_rounded_quotient() -> None:
    rng = np.random.default_rng(1)
    size, n = 1 << 16, 12
    for turn in range(n):
        heat = np.exp(rng.uniform(np.log(1e-30), np.log(1e30), size)).astype(np.float32)
        heat[: size // 4] = rng.choice(np.float32(TEMPERATURES), size // 4)
        heat = np.clip(heat, np.float32(1e-30), np.float32(1e30))
        if turn % 2:  # quotients of every size down to -20
            peak = floats(rng, size)
            peak = np.where(np.isfinite(peak), peak, np.float32(1))
            peak = np.clip(peak, -heat * 1e5, heat * 1e5).astype(np.float32)
            x = peak - heat * np.exp(rng.uniform(-30, 3, size)).astype(np.float32)
        else:
            x, peak = floats(rng, size), floats(rng, size)
            x[::7], peak[::11], peak[::13] = -np.inf, np.inf, np.nan
            x, peak = np.where(x > peak, peak, x), np.where(x > peak, x, peak)
        expected = weights(x, peak, heat)
        out = torch.empty(size)
        _weights_kernel[(1,)](*map(torch.from_numpy, (x, peak, heat)), out, SIZE=size)
        got = out.numpy()
        massless = expected < np.exp(np.float32(-63))
        assert np.array_equal(got[~massless], expected[~massless])
        assert got[massless].max(initial=0) < np.exp(np.float32(-62)) < 2.0**-61


def some_rows(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
    torch.manual_seed(vocab)
    flat = torch.full((vocab,), -3.5)
    single = torch.full((vocab,), -1000.0)
    single[vocab - 2] = 900.0
    faint = torch.full((vocab,), 0.0)  # below one unit, all but the last one
    faint[-1] = 45.0
    edge = torch.linspace(-40, 0, vocab)  # to both sides of one unit
    barred = torch.randn(vocab)
    barred[: vocab // 2] = float("-inf")
    spoilt, endless = torch.randn(vocab), torch.randn(vocab)
    spoilt[7], endless[vocab // 2] = float("nan"), float("inf")
    none = torch.full((vocab,), float("-inf"))
    asked = [
        (flat, 0.7), (single, 1.0), (faint, 1.0), (edge, 1.0), (edge, 0.9), (barred, 0.3),
        (torch.randn(vocab) * 4, 0.6), (torch.randn(vocab) * 4, 0.0), (torch.randn(vocab), 1e30),
        (torch.randn(vocab) * 1e-29, 1e-30), (spoilt, 1.0), (endless, 1.0), (none, 1.0),
    ]  # fmt: skip
    return torch.stack([row for row, _ in asked]).to(dtype), [heat for _, heat in asked]


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [5003, 20_006, 33_000])
def test_masses_are_exact(vocab: int, dtype: torch.dtype, threads: int) -> None:
    """Of weights that are all 1, of one among zeros, below one unit; of a chunk cut off."""
    logits, heat = some_rows(vocab, dtype)
    n, s = len(heat), SamplingScratch(vocab, len(heat), CPU)
    options = {"VOCAB": vocab, "CHUNK": CHUNK, "N_CHUNKS": s.n_chunks, "PDL": False}
    grid = (n, s.n_chunks)
    peaks_kernel[grid](logits, s.peaks, s.best, s.peaks, BLOCK=64, BLOCKS=0, **options)
    x = logits.float().numpy()
    padded = np.pad(x, ((0, 0), (0, s.n_chunks * CHUNK - vocab)), constant_values=-np.inf)
    chunks = padded.reshape(n, s.n_chunks, CHUNK)
    assert np.array_equal(s.peaks.numpy(), chunks.max(2), equal_nan=True)
    firsts = (chunks == chunks.max(2, keepdims=True)).argmax(2) + np.arange(s.n_chunks) * CHUNK
    whole = ~np.isnan(chunks).any(2)
    assert np.array_equal(s.best.numpy()[whole], firsts[whole])

    s.masses.fill_(-1)
    masses_kernel[grid](
        logits, torch.tensor(heat), torch.arange(n, dtype=torch.int32), s.peaks, s.masses,
        s.peaks, s.best, CHUNKS=triton.next_power_of_2(s.n_chunks), LEVELS=0, BITS=s.bits,
        THREADS=threads, **options,
    )  # fmt: skip
    for i, t in enumerate(heat):
        if t == 0.0:
            assert (s.masses[i] == -1).all()  # greedy rows are left alone
            continue
        e = weights(padded[i], x[i].max(), np.float32(t))
        units = (e * np.float32(2.0**s.bits)).astype(np.int64)
        assert s.masses[i].tolist() == units.reshape(s.n_chunks, CHUNK).sum(1).tolist()
    one = 1 << s.bits
    assert s.masses[0].sum() == vocab * one and s.masses[0, 0] == CHUNK * one
    assert s.masses[1].sum() == one == s.masses[2].sum()
    assert s.masses[-3:].eq(0).all()


@pytest.mark.parametrize("n_chunks", [1, 3, 32, 33, 75, 128])
def test_the_chunk_of_a_draw(n_chunks: int) -> None:
    rng = random.Random(n_chunks)
    rows, bits = [], []
    for row in range(40):
        most = rng.choice([1, 3, 1 << 20, (1 << 61) // n_chunks])
        mass = [rng.randint(0, most) if rng.random() < 0.7 else 0 for _ in range(n_chunks)]
        rows.append(mass if row else [0] * n_chunks)
        bits.append(rng.choice([0, (1 << 62) - 1, rng.randrange(1 << 62)]))
    out = torch.empty(len(rows), 2, dtype=torch.int64)
    _find_kernel[(len(rows),)](
        torch.tensor(rows), torch.tensor(bits), out,
        N_CHUNKS=n_chunks, CHUNKS=triton.next_power_of_2(n_chunks),
    )  # fmt: skip
    for mass, draw, found in zip(rows, bits, out.tolist()):
        goal, chunk = draw * sum(mass) >> 62, 0
        while chunk < n_chunks - 1 and mass[chunk] <= goal:
            goal -= mass[chunk]
            chunk += 1
        if sum(mass):
            assert found == [chunk, goal]
        else:
            assert found == [n_chunks - 1, 0]


def test_tokens_of_a_large_vocabulary_are_those_of_the_general_sampler() -> None:
    """More chunks than a warp has lanes, many rows and few, ends in a chunk."""
    vocab, n = 70_002, 10
    torch.manual_seed(0)
    logits = (
        torch.randn(n, vocab) * torch.tensor([0.0, 0.5, 3.0, 12.0, 4.0]).repeat(2)[:, None]
    ).bfloat16()
    heat = torch.tensor([1.0, 0.6, 1.3, 30.0, 0.0, 0.7, 1e-30, 0.1, 2.5, 1e30])
    slots, seeds = torch.arange(n, dtype=torch.int32), torch.zeros(n, 2, dtype=torch.int32)
    seeds[:, 0] = torch.arange(n) * 12345
    rows = [
        SampleRow(SamplingParams(temperature=float(heat[i])), i * 12345, 41, i, [], [])
        for i in range(n)
    ]
    expected = [d.token for d in Sampler(vocab, n, "cpu").sample(logits.float(), rows)]
    for count in (n, 2):
        tokens, tops = torch.empty(count, dtype=torch.int32), torch.empty(count)
        positions, last = torch.full((count,), 40).int(), torch.zeros(n, 2, dtype=torch.int32)
        scratch = SamplingScratch(vocab, count, CPU)
        sample(scratch, logits[:count], heat, seeds, slots[:count], positions, last, tokens, tops)
        assert tokens.tolist() == expected[:count]
