"""The fused kernels against torch and the general sampler, through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.front.sampling_params import SamplingParams
from astrai.kernels.gpu.elementwise import embed, rms_norm, scatter, silu_mul
from astrai.kernels.gpu.launch import compile_ahead, launch
from astrai.kernels.gpu.matvec import matvec
from astrai.kernels.gpu.product import Tile, add_norm, part_numbers, product, tile_of
from astrai.kernels.gpu.sampling.sampling import SamplingScratch, sample
from astrai.runtime.sampling.sampler import Sampler, SampleRow


@pytest.mark.parametrize("k", [96, 2048, 3072, 4608])
def test_matvec_with_norm_bias_and_residual(k: int) -> None:
    torch.manual_seed(0)
    n, eps = 37, 1e-5
    x, weight, bias, gain = torch.randn(1, k), torch.randn(n, k), torch.randn(n), torch.rand(k)
    out = torch.randn(1, n)
    expected = out + F.linear(F.rms_norm(x, (k,), gain, eps), weight, bias)
    matvec(x, weight, out, bias=bias, norm=gain, eps=eps, add=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def test_matvec_with_silu() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 64), torch.randn(66, 64), torch.randn(66)
    gate, up = F.linear(x, weight, bias).chunk(2, dim=1)
    out = torch.empty(1, 33)
    matvec(x, weight, out, bias=bias, silu=True)
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=1e-4, atol=1e-4)


def test_matvec_takes_one_row() -> None:
    with pytest.raises(ValueError, match="expected one row"):
        matvec(torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 4))


def test_elementwise() -> None:
    torch.manual_seed(0)
    x, gain, out = torch.randn(5, 96), torch.rand(96), torch.empty(5, 96)
    rms_norm(x, gain, out, 1e-5)
    torch.testing.assert_close(out, F.rms_norm(x, (96,), gain, 1e-5))
    gate_up, acted = torch.randn(3, 200), torch.empty(3, 100)
    silu_mul(gate_up, acted)
    torch.testing.assert_close(acted, F.silu(gate_up[:, :100]) * gate_up[:, 100:])


def test_embed_takes_the_last_token_where_the_host_has_none() -> None:
    table = torch.arange(40.0).view(10, 4)
    last = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    tokens, slots, positions = torch.tensor(
        [[7, -1, -1], [0, 0, 1], [5, 5, 8]], dtype=torch.int32
    ).unbind(0)
    out = torch.empty(3, 4)
    embed(table, tokens, slots, positions, last, out)
    assert torch.equal(out, table[[7, 2, 3]])  # an odd position's token is the second


def test_scatter() -> None:
    state = torch.zeros(8, dtype=torch.int32)
    scatter(state, torch.tensor([3, 30, 5, 50, 7, 70], dtype=torch.int32), 2)
    assert state.tolist() == [0, 0, 0, 30, 0, 50, 0, 0]


def test_sampling_agrees_with_the_general_sampler() -> None:
    vocab, n, slots_n = 5003, 24, 40
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    logits = (torch.randn(n, vocab) * 3).bfloat16().float()
    slots = torch.randperm(slots_n)[:n].int()
    positions = torch.randint(0, 4000, (n,)).int()
    heat, seeds = torch.zeros(slots_n), torch.zeros(slots_n, 2, dtype=torch.int32)
    rows = []
    for i in range(n):
        temperature, seed = [0.0, 0.6, 1.0, 1.7][i % 4], int(rng.integers(1 << 63)) * 2 + 1
        slot = int(slots[i])
        heat[slot] = temperature
        seeds[slot] = torch.from_numpy(np.array([seed], np.uint64).view(np.int32).copy())
        params = SamplingParams(temperature=temperature)
        rows.append(SampleRow(params, seed, int(positions[i]) + 1, slot, [], []))
    last, tokens = torch.zeros(slots_n, 2, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    tops, before = torch.empty(n), positions.clone()
    scratch = SamplingScratch(vocab, n, torch.device("cpu"))
    sample(scratch, logits, heat, seeds, slots, positions, last, tokens, tops)
    expected = [drawn.token for drawn in Sampler(vocab, slots_n, "cpu").sample(logits, rows)]
    assert tokens.tolist() == expected
    assert torch.equal(positions, before + 1)
    assert last[slots.long(), (positions & 1).long()].tolist() == expected


def test_sampling_reports_what_is_not_finite() -> None:
    logits = torch.randn(2, 700)
    logits[1, 650] = float("nan")
    heat, seeds = torch.tensor([0.0, 1.0]), torch.zeros(2, 2, dtype=torch.int32)
    slots, positions = torch.tensor([0, 1]).int(), torch.tensor([4, -1]).int()
    last, tokens = torch.zeros(2, 2, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    tops = torch.empty(2)
    scratch = SamplingScratch(700, 2, torch.device("cpu"))
    sample(scratch, logits, heat, seeds, slots, positions, last, tokens, tops)
    assert tokens[0] == logits[0].argmax() and tops[0] == logits[0].max()
    assert tops[1].isnan() and 0 <= tokens[1] < 700
    assert positions.tolist() == [5, -1]  # padding stays where it is


@pytest.mark.parametrize("n_rows", [2, 19, 40, 70])
@pytest.mark.parametrize("silu", [False, True])
def test_product_of_rows(n_rows: int, silu: bool) -> None:
    torch.manual_seed(0)
    n, k = 48, 80  # no multiple of a tile's sides
    x, weight = torch.randn(n_rows, k), torch.randn(2 * n if silu else n, k)
    bias, out = torch.randn(len(weight)), torch.full((n_rows, n), float("nan"))
    tile = tile_of(n_rows, n, k, silu)
    assert tile is not None
    product(x, weight, out, tile, bias=bias, silu=silu)
    expected = F.linear(x, weight, bias)
    if silu:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_rows", [3, 33, 200])
def test_parts_of_a_product_onto_the_residual_stream(n_rows: int) -> None:
    torch.manual_seed(0)
    n, k, eps = 40, 1100, 1e-5
    x, weight, bias, gain = torch.randn(n_rows, k), torch.randn(n, k), torch.randn(n), torch.rand(n)
    hidden, out = torch.randn(n_rows, n), torch.full((n_rows, n), float("nan"))
    expected = hidden + F.linear(x, weight, bias)
    tile = tile_of(n_rows, n, k, parts=True)
    assert tile is not None and tile.split > 1
    assert tile.split * n_rows * n <= part_numbers(n, k)
    parts = torch.full((tile.split, n_rows, n), float("nan"))
    product(x, weight, parts, tile)
    add_norm(parts, hidden, gain, out, eps, bias=bias)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out, F.rms_norm(expected, (n,), gain, eps), rtol=1e-4, atol=1e-3)


def test_product_refuses_a_tile_of_other_parts() -> None:
    tile = Tile(16, 64, 32, 2, 4, 3, swap=False)
    with pytest.raises(ValueError, match="expected equal parts"):
        product(torch.zeros(2, 64), torch.zeros(4, 64), torch.zeros(2, 4), tile)


class FakeKernel:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.launched: list[int] = []
        self.compiled: list[tuple[tuple[int, ...], int]] = []
        self.readied = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[[int], None]:
        return self.launched.append

    def warmup(self, value: int, grid: tuple[int, ...]) -> FakeKernel:
        self.compiled.append((grid, value))
        return self

    @property
    def run(self) -> None:
        self.readied += 1


def test_compiling_ahead_launches_nothing() -> None:
    kernel = FakeKernel()

    def work() -> None:
        launch(kernel, (3,))(5)
        launch(kernel, (4,))(6)

    compile_ahead(work)
    assert (kernel.launched, kernel.readied) == ([], 1)
    assert kernel.compiled == [((3,), 5), ((4,), 6)]
    work()
    assert kernel.launched == [5, 6]


def test_a_failure_while_compiling_ahead_leaves_launches_as_they_were() -> None:
    kernel = FakeKernel()
    with pytest.raises(ZeroDivisionError):
        compile_ahead(lambda: 1 / 0)
    launch(kernel, (1,))(7)
    assert kernel.launched == [7]
