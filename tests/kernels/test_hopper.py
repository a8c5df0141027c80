"""Products in CUDA C++: how they are cut, and that every one compiles; what they compute is checked
on a GPU, by bench/gpu_check.py."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.kernels.gpu.launch import compile_ahead, launch
from astrai.kernels.hopper import build
from astrai.kernels.hopper import product as hopper
from astrai.kernels.hopper.build import SHARED_BYTES, Kernel, Source, compiled, machine_code
from astrai.kernels.hopper.product import Cut, cut_of, kernel_of, part_numbers, product

pytest.importorskip("cuda.bindings.nvrtc", reason="for Linux on x86_64")

MULTIPROCESSORS = 132
KINDS = ["plain", "silu", "parts"]
LONG = [300, 512, 1000, 16384]


class Weight(NamedTuple):
    n: int
    k: int
    kind: str  # plain, silu or parts

    @property
    def silu(self) -> bool:
        return self.kind == "silu"

    @property
    def width(self) -> int:
        return 2 * self.n if self.silu else self.n

    @property
    def in_one_wave(self) -> bool:
        waves = {c: -(-self.n // c // MULTIPROCESSORS) for c in (192, 128, 64) if self.n % c == 0}
        return waves[min(waves, key=lambda columns: columns * waves[columns])] == 1

    def cut(self, n_rows: int) -> Cut | None:
        return cut_of(n_rows, self.n, self.k, self.silu, self.kind == "parts")

    @property
    def rows(self) -> range:
        """Those of one wave of blocks that pay."""
        numbers = self.width * self.k
        large, narrow = numbers >= 1 << 24, 4 * self.n // 64 <= MULTIPROCESSORS
        if numbers < 1 << 20:
            return range(0)
        if self.silu:
            return range(2, 257)
        if self.kind == "plain" and large:
            return range(2, 193 if self.in_one_wave else 161)
        if self.kind == "plain":
            return range(65, 257)
        most = 256 if narrow else 224 if self.k > self.n else 160
        return range(2 if large else 129, most + 1)

    def kernel(self, cut: Cut, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Kernel:
        return kernel_of(cut, dtype, self.silu, self.kind == "parts", bias)


QKV, OUTPUT = Weight(6144, 4096, "plain"), Weight(4096, 4096, "parts")
GATE, DOWN = Weight(12288, 4096, "silu"), Weight(4096, 12288, "parts")
SMALL_GATE, SMALL_DOWN = Weight(8192, 2048, "silu"), Weight(2048, 8192, "parts")
# Qwen3-0.6B's.
LEAST = [
    Weight(4096, 1024, "plain"), Weight(1024, 2048, "parts"),
    Weight(3072, 1024, "silu"), Weight(1024, 3072, "parts"),
]  # fmt: skip
HEAD = Weight(151936, 1024, "plain")
WEIGHTS = [QKV, OUTPUT, GATE, DOWN, SMALL_GATE, SMALL_DOWN, *LEAST, HEAD]


def assert_fits(weight: Weight, n_rows: int, cut: Cut) -> None:
    """The cut fits the weight, and its kernel one multiprocessor."""
    kernel, many = weight.kernel(cut), n_rows > 256
    assert cut.many == many and (not many or weight.silu)
    assert cut.rows % (32 if weight.silu else 16) == 0 and cut.rows <= 256
    if not many:  # as few tiles, of equal rows, as that takes
        tall = -(-n_rows // cut.rows)
        assert tall * cut.rows < n_rows + 32 * tall and (tall == 1 or cut.rows >= 48)
        blocks = tall * cut.split * weight.width // cut.columns
        assert blocks <= MULTIPROCESSORS or cut.split == tall == 1
    assert weight.k % (64 * cut.split) == 0
    assert many or weight.width % cut.columns == 0
    assert cut.stages >= 3 and kernel.shared_bytes == cut.shared_bytes <= SHARED_BYTES
    # At most 1,023 bytes before the first stage, for alignment; two barriers for each.
    stages = 128 * (cut.rows + cut.columns) * cut.stages
    left = cut.shared_bytes - 1023 - stages - 16 * cut.stages
    staging = cut.rows * (2 * (cut.columns // 2 if weight.silu else cut.columns) + 16)
    assert left >= (staging if many else 0)
    if weight.kind == "parts":
        assert n_rows * weight.n * cut.split <= part_numbers(weight.n, weight.k)
        assert cut.split == 1 or weight.k // cut.split >= 768
    else:
        assert cut.split == 1 and (many or staging <= stages)
    # Sums, and some twenty registers beside them.
    a_thread = 160 if cut.rebalanced else 65536 // (-(-kernel.threads // 128) * 128)
    assert cut.rows // 2 + 20 <= min(a_thread, 255)
    if cut.rebalanced:  # of the registers of the launch
        a_launch = 65536 // kernel.threads // 8 * 8
        assert 128 * (cut.columns // 64 * 160 + 24) <= kernel.threads * a_launch


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_cut_fits_the_weight_and_the_multiprocessor(weight: Weight) -> None:
    cuts = {n_rows: cut for n_rows in range(1, 258) if (cut := weight.cut(n_rows)) is not None}
    assert [*cuts] == [*weight.rows]
    cuts |= {n_rows: cut for n_rows in LONG if (cut := weight.cut(n_rows)) is not None}
    assert (16384 in cuts) == weight.silu
    for n_rows, cut in cuts.items():
        assert_fits(weight, n_rows, cut)


@given(st.sampled_from(KINDS), st.integers(1, 600), st.integers(1, 600), st.integers(1, 40_000))
def test_a_cut_of_any_size_fits(kind: str, n: int, k: int, n_rows: int) -> None:
    weight = Weight(64 * n, 64 * k, kind)
    for rows in (1 + n_rows % 256, n_rows):
        cut = weight.cut(rows)
        if rows <= 256:
            assert (cut is not None) == (rows in weight.rows)
        if cut is not None:
            assert_fits(weight, rows, cut)


def test_one_wave_of_blocks_owns_the_weight_where_its_size_allows() -> None:
    assert GATE.cut(100) == Cut(128, 192)  # 128 blocks
    assert SMALL_GATE.cut(100) == Cut(128, 128)  # 128 blocks
    assert DOWN.cut(33) == Cut(48, 64, split=2)  # 2 x 64
    assert SMALL_DOWN.cut(100) == Cut(112, 64, split=4)  # 4 x 32
    assert SMALL_DOWN.cut(224) == Cut(112, 64, split=2)  # 2 x 2 x 32
    assert LEAST[0].cut(200) == Cut(112, 64)  # 2 x 64
    assert LEAST[1].cut(256) == Cut(64, 64, split=2)  # 4 x 2 x 16
    assert LEAST[3].cut(256) == Cut(128, 64, split=4)  # 2 x 4 x 16
    assert Weight(4096, 12288 + 64, "parts").cut(33) == Cut(48, 64)  # steps that two cannot share
    assert HEAD.cut(33) == Cut(64, 128)  # nine waves
    assert GATE.cut(16384) == Cut(256, 192, many=True)


@pytest.mark.parametrize(
    ("n_rows", "weight"),
    [
        (1, GATE), (257, GATE), (257, DOWN), (193, QKV), (161, HEAD), (161, OUTPUT), (225, DOWN),
        (300, GATE),
        (64, LEAST[0]), (128, LEAST[1]), (128, LEAST[3]), (200, Weight(960, 1024, "plain")),
        (64, Weight(12288, 4096 + 32, "silu")),
        (64, Weight(12288 + 16, 4096, "silu")), (64, Weight(4096 + 8, 12288, "parts")),
        (16384, Weight(12288, 4096 + 32, "silu")), (16384, Weight(12288 + 16, 4096, "silu")),
    ],
)  # fmt: skip
def test_what_does_not_fit_or_pay_is_left_to_others(n_rows: int, weight: Weight) -> None:
    assert weight.cut(n_rows) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_compiles_with_its_numbers_in_registers(kind: str) -> None:
    sources: set[Source] = set()
    for weight in (weight for weight in WEIGHTS if weight.kind == kind):
        cuts = [cut for rows in (*range(32, 257, 32), 16384) if (cut := weight.cut(rows))]
        sources |= {weight.kernel(cut).source for cut in cuts}
        # Those of the most rows have the fewest registers to spare.
        sources.add(weight.kernel(cuts[-1], torch.float16, bias=kind != "parts").source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda source: compiled(source, [b"--ptxas-options=-v"])[1], sources)
    for source, said in zip(sources, logs):
        local = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)
        assert local == ["0", "0", "0"], f"{said}\n{source.defined}"
        # Matrix instructions one by one, or registers that are not handed over.
        assert "serialized" not in said and "ignored" not in said, f"{said}\n{source.defined}"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where machine code is kept: nothing yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kept"))
    machine_code.cache_clear()
    return tmp_path / "kept"


def test_machine_code_is_compiled_once_and_then_read(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _source(kept, 'extern "C" __global__ void product(int* x) { *x = NUMBER; }')
    sources = [first._replace(defined=f"#define NUMBER {i}") for i in (1, 2)]
    codes = [machine_code(source).result() for source in sources]
    assert codes[0].startswith(b"\x7fELF") and codes[0] != codes[1]
    assert len(list(kept.rglob("*.cubin"))) == 2
    monkeypatch.setattr(build, "compiled", None)
    for _ in range(2):
        assert [machine_code(source).result() for source in sources] == codes
        machine_code.cache_clear()


def test_the_compiler_writes_to_nobody_elses_bytes(kept: Path) -> None:
    singles = [bytes([i]) for i in range(256)]
    compiled(_source(kept, 'extern "C" __global__ void product(int* x) { *x = 1; }'))
    assert singles == [i.to_bytes(1, "big") for i in range(256)]
    assert [single[0] for single in singles] == [*range(256)]


def test_a_source_that_does_not_compile_says_why(kept: Path) -> None:
    source = _source(kept, 'extern "C" __global__ void product() { nothing_like_it(); }')
    with pytest.raises(RuntimeError, match="nothing_like_it"):
        machine_code(source).result()


def test_kernels_are_compiled_ahead_and_not_launched(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = GATE.cut(2)
    assert cut is not None
    kernel = GATE.kernel(cut)
    monkeypatch.setattr(Kernel, "__getitem__", None)
    compile_ahead(lambda: launch(kernel, (1,))((), (), False))
    assert machine_code(kernel.source).done() and len(list(kept.rglob("*.cubin"))) == 1


def test_a_warm_up_starts_a_compilation_and_does_not_wait(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, kernel = threading.Event(), Kernel(Source(Path("product.cu"), "product", ""), 1, 0)
    monkeypatch.setattr(build, "compiled", lambda source: (b"code" if held.wait(10) else b"", ""))
    monkeypatch.setattr(Source, "text", b"")
    kernel.warmup()
    assert machine_code.cache_info().currsize == 1 and not machine_code(kernel.source).done()
    held.set()
    assert kernel.run == b"code"


@pytest.mark.parametrize(
    ("rows", "k", "out", "cut", "silu", "message"),
    [
        (4, 128, (1, 4, 64), Cut(32, 64, 2), False, "equal parts"),
        (4, 128, (4, 64), Cut(32, 64, 2), False, "equal parts"),
        (4, 128, (2, 4, 64), Cut(32, 64, 2), True, "equal parts"),
        (40, 128, (40, 64), Cut(48, 64), True, "expected to fit"),
        (4, 96, (4, 64), Cut(32, 64), False, "expected to fit"),
        (4, 192, (2, 4, 64), Cut(32, 64, 2), False, "expected to fit"),
        (4, 128, (4, 96), Cut(32, 64), False, "expected to fit"),
        (400, 128, (400, 64), Cut(256, 192, many=True), False, "expected to fit"),
        (400, 128, (400, 100), Cut(256, 192, many=True), True, "expected to fit"),
    ],
)
def test_what_a_cut_does_not_fit_is_refused(
    rows: int, k: int, out: tuple[int, ...], cut: Cut, silu: bool, message: str
) -> None:
    x, weight = torch.zeros(rows, k), torch.zeros(out[-1] * (2 if silu else 1), k)
    with pytest.raises(ValueError, match=message):
        product(x, weight, torch.zeros(out), cut, silu=silu)


def _half(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 128)}, "x.dtype = torch.float32, expected one of"),
        ({"weight": _half(64, 64)}, "weight: .* expected .64, 128."),
        ({"weight": _half(128, 128)}, "weight: .* expected .64, 128."),
        ({"weight": torch.zeros(64, 128, dtype=torch.half)}, "weight: .*float16"),
        ({"out": _half(8, 64)}, "out: .* expected .4, 64."),
        ({"out": torch.zeros(4, 64)}, "out: .*float32, expected .4, 64., torch.bfloat16"),
        ({"out": _half(1, 4, 64)}, "out: .* expected .1, 4, 64., torch.float32"),
        ({"bias": _half(32)}, "bias: .* expected .64,."),
        ({"x": _half(128, 4).t()}, "x: expected contiguous"),
        ({"weight": _half(64 * 128 + 1)[1:].view(64, 128)}, "weight: .* multiple of 16 bytes"),
        ({"silu": True}, "weight: .* expected .128, 128."),
    ],
)
def test_what_the_kernel_would_misread_is_refused(changed: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {
        "x": _half(4, 128), "weight": _half(64, 128), "out": _half(4, 64), "bias": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        product(**(fine | {"cut": Cut(32, 64)} | changed))


@pytest.mark.parametrize(
    ("n_rows", "weight", "grid"),
    [
        (192, QKV, (96, 1)), (256, GATE, (128, 1)), (224, DOWN, (64, 2)),
        (224, SMALL_DOWN, (64, 2)), (16384, GATE, (132, 1)), (256, LEAST[1], (64, 2)),
        (2560, Weight(1024, 512, "silu"), (110, 1)),  # 10 x 11 tiles
    ],
)  # fmt: skip
def test_blocks_are_launched_for_every_tile(
    n_rows: int, weight: Weight, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[int, ...]] = []

    def note(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        launched.append(grid)
        return lambda values, types, pdl: None

    monkeypatch.setattr(hopper, "launch", note)
    monkeypatch.setattr(hopper, "tensor_map", lambda *_: None)
    cut = weight.cut(n_rows)
    assert cut is not None
    sizes = (cut.split, n_rows, weight.n) if weight.kind == "parts" else (n_rows, weight.n)
    x, w = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((n_rows, weight.k), (weight.width, weight.k))
    )
    kind = torch.float32 if weight.kind == "parts" else torch.bfloat16
    out = torch.empty(sizes, dtype=kind, device="meta")
    product(x, w, out, cut, silu=weight.silu)
    assert launched == [grid]


def _source(at: Path, text: str) -> Source:
    file = at.parent / "product.cu"
    file.write_text(text)
    return Source(file, "product", "")
