"""The time below which no implementation on this hardware can go: bytes and operations.

Each decode step reads every weight once (the head included, embedding rows not) and every live
position once, at the bandwidth of a large copy; prefill adds its operations. What is measured is
compared with that, so that machines and models compare.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from astrai.front.llm import LLM
    from astrai.inference.cache.storage import PagedCache
    from astrai.models.decoder import Decoder

# Operations per second of a GPU's prefill: what large products of one H100 reach.
GPU_RATE = 750e12


class Machine(NamedTuple):
    """What this device can do."""

    bandwidth: float  # bytes per second of a large copy, read and written counted
    rate: float  # operations per second of large products


class Cost(NamedTuple):
    """What a model asks for."""

    step_bytes: int  # weights that a decode step reads
    position_bytes: int  # K and V of one position
    position_flops: int  # of one prefill position, attention apart
    pair_flops: int  # of attention, per query and key

    def prefill_flops(self, n: int, start: int = 0) -> int:
        """Positions [start, start + n) of one prompt."""
        pairs = (start + n) * (start + n + 1) // 2 - start * (start + 1) // 2
        return n * self.position_flops + pairs * self.pair_flops

    def decode_bytes(self, context: float, n_rows: int = 1) -> float:
        """One step of rows at this many positions each."""
        return self.step_bytes + n_rows * context * self.position_bytes


def machine(device: torch.device) -> Machine:
    """Measured; the rate of a GPU is a constant, so that figures of several runs compare."""
    on_gpu = device.type == "cuda"
    # Beyond any cache: 512 MiB on a GPU, 128 MiB on a CPU.
    x = torch.randn((1 << 28) if on_gpu else (1 << 26), device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    seconds = _median_seconds(lambda: y.copy_(x), device)
    bandwidth = 2 * x.numel() * x.element_size() / seconds
    if on_gpu:
        return Machine(bandwidth, GPU_RATE)
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        product = functools.partial(torch.mm, a, b)
        rates.append(2 * 512 * 1024 * 1024 / _median_seconds(product, device))
    return Machine(bandwidth, max(rates))


def cost_of(decoder: Decoder, kv: PagedCache) -> Cost:
    c = decoder.config
    heads = c.n_heads * c.head_dim
    attention = c.hidden_size * (2 * heads + 2 * c.n_kv_heads * c.head_dim)
    matrices = attention + 3 * c.hidden_size * c.intermediate_size
    return Cost(
        decoder.step_bytes,
        kv.bytes_per_page // kv.page_size,
        2 * c.n_layers * matrices,
        4 * c.n_layers * heads,
    )


def floor_of(llm: LLM) -> tuple[Cost, Machine]:
    runner = llm.engine.runner
    decoder, kv = runner.decoder, runner.kv  # type: ignore[attr-defined]
    return cost_of(decoder, kv), machine(decoder.device)


def batch_seconds(
    cost: Cost, on: Machine, prompts: Sequence[int], outputs: Sequence[int], slots: int
) -> float:
    """All requests at once, at most `slots` running: numbers of tokens in and out."""
    steps = max(*outputs, -(-sum(outputs) // slots)) if len(outputs) > 1 else outputs[0]
    positions = sum(n * p + n * (n + 1) // 2 for p, n in zip(prompts, outputs))
    moved = steps * cost.step_bytes + positions * cost.position_bytes
    return moved / on.bandwidth + sum(map(cost.prefill_flops, prompts)) / on.rate


def first_token_seconds(cost: Cost, on: Machine, n: int, cached: int = 0) -> float:
    """A prompt of `n` tokens, of which the first `cached` need not be computed."""
    moved = cost.decode_bytes(cached)
    return moved / on.bandwidth + cost.prefill_flops(n - cached, cached) / on.rate


def reached(floor: float, measured: float) -> str:
    return f"{floor / measured:.0%} of it reached"


def _median_seconds(work: Callable[[], object], device: torch.device, times: int = 8) -> float:
    seconds = []
    for _ in range(times):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])
