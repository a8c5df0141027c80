"""The GPU path in one command: kernels against references, logits, W1, one stream, start.

    python bench/gpu_check.py [--shapes qwen3-0.6b,llama-3.2-1b,qwen3-8b] [--parts check,w1,...]

Needs torch, triton, transformers, numpy and safetensors, and no weights: shapes are real, weights
random. Prints the floor beside each figure, and ends in one JSON line.

W1: 256 prompts and outputs of uniform(100, 1024) tokens, all at once, at most 256 running,
temperature 0.6, end-of-sequence ignored. One stream: 32 tokens in, (time of 513 out - time of 1) /
512. Floors are those of astrai/bench/_floor.py, which `astrai bench` prints too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

STARTED = time.perf_counter()
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch  # noqa: E402

from astrai.bench._common import w_nano  # noqa: E402
from astrai.bench._floor import Machine, batch_seconds, cost_of, machine  # noqa: E402
from astrai.config import SchedulerConfig  # noqa: E402
from astrai.front.sampling_params import SamplingParams  # noqa: E402
from astrai.inference.cache.books import Books  # noqa: E402
from astrai.inference.cache.storage import PagedCache  # noqa: E402
from astrai.inference.engine import Engine, Message  # noqa: E402
from astrai.inference.events import EventLog  # noqa: E402
from astrai.inference.scheduler import Scheduler  # noqa: E402
from astrai.inference.task import Entry, Task, Update  # noqa: E402
from astrai.kernels.gpu.prefill_attention import TILE  # noqa: E402
from astrai.kernels.gpu.sampling.sampling import SamplingScratch  # noqa: E402
from astrai.models.config import config_from_hf  # noqa: E402
from astrai.models.decoder import Decoder  # noqa: E402
from astrai.models.loading import dummy_weights  # noqa: E402
from astrai.models.registry import PRESETS  # noqa: E402
from astrai.runtime import collector  # noqa: E402
from astrai.runtime.gpu.launch import STEPS, GpuLaunch, new_results, scored  # noqa: E402
from astrai.runtime.gpu.model import workspace_bytes  # noqa: E402
from astrai.runtime.gpu.runner import Form, GpuRunner, step_form  # noqa: E402
from astrai.runtime.gpu.sampling import Need, SlotEdits, draw  # noqa: E402
from astrai.runtime.gpu.uploads import SlotState  # noqa: E402
from astrai.runtime.runner import sample_row  # noqa: E402
from astrai.runtime.sampling.sampler import Sampled, Sampler  # noqa: E402

SHAPES = "qwen3-0.6b,llama-3.2-1b,qwen3-8b"
PARTS = "start,check,stream,w1"
DEVICE = "cuda"


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f}]", *words, flush=True)


class Rig:
    """An engine around a decoder, driven in this thread."""

    def __init__(
        self,
        decoder: Decoder,
        kv_tokens: int,
        max_slots: int = 256,
        prefill_budget: int = 16384,
        max_model_len: int = 4096,
        page_size: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        c = decoder.config
        n_pages = kv_tokens // page_size
        self.kv = PagedCache(
            c.n_layers, n_pages, page_size, c.n_kv_heads, c.head_dim, decoder.dtype, DEVICE
        )
        events = EventLog()
        self.scheduler = Scheduler(
            SchedulerConfig(max_slots=max_slots, prefill_budget=prefill_budget, group_decode="off"),
            Books(n_pages, page_size, prefix_cache, events),
            time.monotonic,
            events,
        )
        sampler = Sampler(c.vocab_size, max_slots, DEVICE)
        self.runner = GpuRunner(decoder, self.kv, sampler, max_slots, prefill_budget, max_model_len)
        self.outputs: dict[int, list[int]] = {}
        self.engine = Engine(self.scheduler, self.runner, self._deliver)
        self._ids = 0

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            if update.task.error:
                raise RuntimeError(f"task {update.task.id}: {update.task.error}")
            self.outputs.setdefault(update.task.id, []).extend(update.token_ids)

    def run(
        self, prompts: list[list[int]], counts: list[int], temperature: float
    ) -> list[list[int]]:
        tasks = []
        for prompt, n in zip(prompts, counts):
            params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n)
            tasks.append(
                Task(self._ids, str(self._ids), prompt, params, max_tokens=n, seed=self._ids)
            )
            self._ids += 1
        self.engine.post(Message(add=tasks))
        while not self.engine.idle:
            self.engine.step()
        self.scheduler.check()
        return [self.outputs.pop(task.id) for task in tasks]


# ── parts ───────────────────────────────────────────────────────────────────────────────────────


def make_decoder(shape: str) -> Decoder:
    config = config_from_hf(PRESETS[shape])
    return Decoder(config, dummy_weights(config, torch.bfloat16, DEVICE), torch.bfloat16, DEVICE)


def w1_requests(seed: int) -> tuple[list[list[int]], list[int]]:
    requests = w_nano(seed)
    return [r.prompt_ids for r in requests], [r.max_tokens for r in requests]


def measure_w1(decoder: Decoder, on: Machine, runs: int = 2) -> dict[str, Any]:
    rig = Rig(decoder, kv_tokens=285_000)
    c, gib = decoder.config, 1 << 30
    work = workspace_bytes(c, 2, 256, 16384) / gib
    pages = rig.kv.bytes_per_page * rig.kv.n_pages / gib
    say(f"memory: workspace {work:.1f} GiB, KV pool {pages:.1f} GiB of 285,000 tokens")
    begun = time.perf_counter()
    rig.run(*w1_requests(1), temperature=0.6)
    say(f"W1 warm-up {time.perf_counter() - begun:.2f} s")
    prompts, counts = w1_requests(0)
    clock = HostClock(rig)
    collector.settle()  # as `assemble` does
    times = []
    for _ in range(runs):
        rig.scheduler.books.drop_cached()
        begun = time.perf_counter()
        rig.run(prompts, counts, temperature=0.6)
        times.append(time.perf_counter() - begun)
    clock.stop()
    floor = batch_seconds(cost_of(decoder, rig.kv), on, [len(p) for p in prompts], counts, 256)
    best = min(times)
    say(
        f"W1 {best:.2f} s of {[round(t, 2) for t in times]}, {sum(counts) / best:.0f} tok/s, "
        f"floor {floor:.2f} s, {floor / best:.0%} of it reached; {clock.summary()}"
    )
    print("\n".join(clock.timeline()), flush=True)
    result = {"seconds": best, "floor": floor, "tokens_per_second": sum(counts) / best}
    return result | clock.figures()


class HostClock:
    """What the host does per tick: scheduling, launching, waiting."""

    def __init__(self, rig: Rig) -> None:
        self.spent: dict[str, list[float]] = {"tick": [], "launch": [], "wait": []}
        self.rows: list[int] = []
        self.prefilled: list[int] = []
        self.at: list[float] = []
        self._undo: list[Callable[[], None]] = []
        self._wrap(rig.scheduler, "tick")
        self._wrap(rig.runner, "launch")
        # Of the class: a launch that knew of this clock would be in a cycle, and outlive its tick.
        self._wrap(GpuLaunch, "wait")

    def _wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            out = inner(*args)
            self.spent[name].append(time.perf_counter() - begun)
            if name == "launch":
                self.rows.append(len(args[0].entries))
                self.prefilled.append(sum(e.n for e in args[0].entries.values() if e.n > 1))
                self.at.append(begun)
            return out

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, inner))

    def stop(self) -> None:
        for undo in self._undo:
            undo()

    def figures(self) -> dict[str, float]:
        full = [i for i, n in enumerate(self.rows) if n > 200]
        out = {}
        for label, values in self.spent.items():
            chosen = [values[i] for i in full if i < len(values)]
            if chosen:
                out[f"host_{label}_ms"] = round(statistics.median(chosen) * 1e3, 3)
        return out

    def timeline(self) -> list[str]:
        """Where the ticks' time went: those with prefill, then by number of rows."""
        ticks: dict[str, list[float]] = {}
        for i in range(1, len(self.at) - 1):
            n = self.rows[i]
            edge = next(e for e in (8, 32, 64, 128, 192, 1024) if n <= e)
            label = "prefill" if self.prefilled[i - 1] else f"{edge:4d} rows or fewer"
            if self.at[i + 1] - self.at[i] < 1.0:  # not the pause between two runs
                ticks.setdefault(label, []).append((self.at[i + 1] - self.at[i]) * 1e3)
        return [
            f"{label:22s} {len(v):5d} ticks, {sum(v):7.0f} ms, median {statistics.median(v):6.2f}, "
            f"longest {max(v):6.2f}"
            for label, v in sorted(ticks.items())
        ]

    def summary(self) -> str:
        figures = ", ".join(f"{k} {v:.2f}" for k, v in self.figures().items())
        return f"per tick of more than 200 rows: {figures}"


def measure_stream(decoder: Decoder, on: Machine) -> dict[str, Any]:
    rig = Rig(decoder, kv_tokens=8192, max_slots=8, prefill_budget=512, prefix_cache=False)
    rng = random.Random(0)

    def seconds(n: int) -> float:
        prompt = [rng.randrange(10000) for _ in range(32)]
        torch.cuda.synchronize()
        begun = time.perf_counter()
        rig.run([prompt], [n], temperature=0.6)
        return time.perf_counter() - begun

    seconds(20)
    first = statistics.median(seconds(1) for _ in range(7))
    step = (statistics.median(seconds(513) for _ in range(3)) - first) / 512
    floor = cost_of(decoder, rig.kv).decode_bytes(288) / on.bandwidth
    say(
        f"one stream {step * 1e3:.3f} ms/token, floor {floor * 1e3:.3f} ms, "
        f"{floor / step:.0%} of it reached; first token {first * 1e3:.2f} ms"
    )
    return {"step_ms": step * 1e3, "floor_ms": floor * 1e3, "first_token_ms": first * 1e3}


def first_token(shape: str) -> None:
    """In a process of its own: from its start to the first token."""
    marks = {"imports": time.perf_counter() - STARTED}
    decoder = make_decoder(shape)
    torch.cuda.synchronize()
    marks["weights"] = time.perf_counter() - STARTED
    rig = Rig(decoder, kv_tokens=65536, max_slots=256, prefill_budget=2048)
    rig.run([list(range(32))], [1], temperature=0.6)
    marks["first token"] = time.perf_counter() - STARTED
    rig.run([list(range(32))], [3], temperature=0.6)
    marks["third token"] = time.perf_counter() - STARTED
    print(json.dumps({name: round(t, 2) for name, t in marks.items()}))


def measure_start(shape: str) -> dict[str, Any]:
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        for label in ("cold", "warm"):
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, os.path.abspath(__file__), "--first-token", shape],
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            total = time.perf_counter() - begun
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            out[label] = json.loads(done.stdout.splitlines()[-1]) | {"process": round(total, 2)}
            say(f"start, {label} kernel cache: {out[label]}")
    return out


# ── checks ──────────────────────────────────────────────────────────────────────────────────────


def check_attention(n_trials: int = 12) -> float:
    """Random shapes against the reference; everything not written before is NaN."""
    from astrai.kernels.attention import AttentionBatch
    from astrai.kernels.gpu.backend import TritonAttention
    from astrai.kernels.reference import ReferenceAttention

    rng = random.Random(0)
    torch.manual_seed(0)
    worst = 0.0
    for _ in range(n_trials):
        dim, kv_heads, page = rng.choice([64, 96, 128, 256]), rng.choice([1, 2, 8]), 0
        page = rng.choice([16, 32, 64, 128])
        group, window = rng.choice([1, 2, 4, 7]), rng.choice([None, None, 7, 300])
        config = SimpleNamespace(
            n_heads=kv_heads * group, n_kv_heads=kv_heads, head_dim=dim, layer_windows=(window,)
        )
        n = rng.choice([1, 3, 40])
        starts = [rng.randint(0, 3000) for _ in range(n)]
        counts = [rng.choice([1, 1, 1, 5, 130]) for _ in range(n)]
        needed = [-(-(s + c) // page) for s, c in zip(starts, counts)]
        frames = list(range(sum(needed) + 2))
        rng.shuffle(frames)
        tables = [[frames.pop() for _ in range(k)] for k in needed]
        pools = [
            PagedCache(1, sum(needed) + 2, page, kv_heads, dim, torch.bfloat16, DEVICE)
            for _ in range(2)
        ]
        pools[0].pages.normal_()
        pools[1].pages.fill_(float("nan"))
        for s, table in zip(starts, tables):
            for i, frame in enumerate(table):
                live = min(max(s - i * page, 0), page)
                pools[1].pages[:, frame, :, :live] = pools[0].pages[:, frame, :, :live]
        rows = sum(counts)
        q, k, v = (
            torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16)
            for heads in (kv_heads * group, kv_heads, kv_heads)
        )
        batch = AttentionBatch(starts, counts, tables, [])
        found = []
        for pool, kind in zip(pools, (ReferenceAttention, TritonAttention)):
            backend = kind(pool, config)  # type: ignore[arg-type]
            backend.plan(batch)
            found.append(backend.run(0, q, k, v).float())
        error = ((found[1] - found[0]).norm() / found[0].norm()).item()
        if not error < 1e-2:
            raise RuntimeError(f"{error = } for {config}, {page = }, {starts = }, {counts = }")
        worst = max(worst, error)
    say(f"attention: {n_trials} random shapes, worst error {worst:.1e}")
    return worst


def check_products(n_trials: int = 40) -> float | None:
    """Random products in CUDA C++ against float32, outputs poisoned; None: not a Hopper."""
    from astrai.kernels.hopper.build import available
    from astrai.kernels.hopper.product import MOST_ROWS, cut_of, product

    if not available(torch.device(DEVICE)):
        return None
    rng, worst = random.Random(0), 0.0
    torch.manual_seed(0)
    while n_trials:
        kind = rng.choice(["plain", "silu", "parts"])
        dtype = rng.choice([torch.bfloat16, torch.half])
        silu, parts = kind == "silu", kind == "parts"
        rows = rng.randint(2, rng.choice([MOST_ROWS, 12 * MOST_ROWS]))
        n, k = 64 * rng.randint(8, 200), 64 * rng.randint(8, 200)
        if (cut := cut_of(rows, n, k, silu, parts)) is None:
            continue
        n_trials -= 1
        width = 2 * n if silu else n
        x, weight, bias = (
            torch.randn(size, device=DEVICE, dtype=dtype) for size in ((rows, k), (width, k), width)
        )
        weight *= k**-0.5
        has_bias = not parts and rng.random() < 0.5
        out = torch.full((cut.split, rows, n), float("nan"), device=DEVICE)
        out = out if parts else out[0].to(dtype)
        product(x, weight, out, cut, bias=bias if has_bias else None, silu=silu, pdl=True)
        found = out.sum(0) if parts else out.float()
        expected = torch.nn.functional.linear(
            x.float(), weight.float(), bias.float() if has_bias else None
        )
        if silu:
            gate, up = expected.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < (1e-4 if parts else 3e-3):
            raise RuntimeError(f"{error = } for {rows = }, {n = }, {k = }, {kind}, {dtype}, {cut}")
        worst = max(worst, error)
    say(f"products in CUDA C++: worst error {worst:.1e}")
    return worst


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 21}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "smollm3": ("smollm3", {}),
}
SMALL = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def check_logits() -> dict[str, float]:
    """Each family, bf16, against transformers in float32: no worse than transformers in bf16."""
    import transformers

    out = {}
    for name, (model_type, differences) in FAMILIES.items():
        config = transformers.AutoConfig.for_model(model_type, **(SMALL | differences))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = model.to(DEVICE).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.05)
                if key.endswith("norm.weight"):
                    parameter += 1.0
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        raw = config.to_dict() | {"architectures": [type(model).__name__]}
        decoder = Decoder(config_from_hf(raw), weights, torch.bfloat16, DEVICE)
        ids = torch.randint(0, 1000, (1, 90), device=DEVICE)
        with torch.inference_mode():
            theirs = model(ids).logits[0].float()
            exact = model.float()(ids).logits[0]
        ours = logits_of(decoder, ids[0].tolist())
        error = ((ours - exact).norm() / exact.norm()).item()
        their_error = ((theirs - exact).norm() / exact.norm()).item()
        say(f"logits {name}: error {error:.1e}, transformers in bf16 {their_error:.1e}")
        if not error < 1.5 * their_error + 1e-3:
            raise RuntimeError(f"logits of {name}: {error = }, {their_error = }")
        out[name] = error
    return out


def logits_of(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """Prefill of the first half, then one decode step per token (one row: the fused products)."""
    rig = Rig(decoder, 1024, max_slots=4, prefill_budget=256, max_model_len=512)
    runner, half = rig.runner, len(ids) // 2
    params = SamplingParams(max_tokens=1)
    task = Task(0, "0", ids, params, max_tokens=1, seed=0)
    task.slot, task.page_table = 0, list(range(16))
    rows = []
    with torch.cuda.stream(runner.stream), torch.inference_mode():
        runner.state.follow(task, 0)
        runner._upload_steps([], [])
        chunk = Form(0, half, -(-half // TILE), 0, Need.HEAT)
        runner._upload_chunks([Entry(task, 0, half, False, 0)], chunk)
        states: list[torch.Tensor] = []
        runner._compute(chunk, states.append)
        rows.append(runner.model.logits(states[0]).float())
        for position in range(half, len(ids)):
            runner._upload_steps([Entry(task, position, 1, True, 0)], [0])
            bucket = 1 if position % 2 else 4
            for name, fill in (("slots", 4), ("positions", -1), ("tokens", 0)):
                runner._steps.views[name][1:bucket] = fill
            logits = runner._compute(step_form(bucket, Need.HEAT))
            rows.append(logits[:1].float().clone())
    torch.cuda.synchronize()
    return torch.cat(rows)


def check_tokens(decoder: Decoder) -> dict[str, float]:
    """Greedy tokens of chunked, preempted and prefix-hit runs against an undisturbed one."""
    rng = random.Random(3)
    common = [rng.randrange(1000) for _ in range(150)]
    prompts = [
        common + [rng.randrange(1000) for _ in range(rng.randint(1, 300))] for _ in range(12)
    ]
    counts = [64] * len(prompts)
    plain = Rig(decoder, 16384, max_slots=16, prefill_budget=8192, prefix_cache=False)
    alone = [plain.run([p], [n], 0.0)[0] for p, n in zip(prompts, counts)]
    again = [plain.run([p], [n], 0.0)[0] for p, n in zip(prompts, counts)]
    if alone != again:
        raise RuntimeError("the same request alone gave other tokens the second time")
    rigs = {
        "batched": plain,
        "chunked": Rig(decoder, 16384, max_slots=16, prefill_budget=48, prefix_cache=False),
        "preempted": Rig(decoder, 2048, max_slots=16, prefill_budget=512, prefix_cache=False),
        "prefix hit": Rig(decoder, 16384, max_slots=16, prefill_budget=512),
    }
    out = {}
    for name, rig in rigs.items():
        rig.run([prompts[0]], [2], 0.0)
        found = rig.run(prompts, counts, 0.0)
        same = sum(a == b for a, b in zip(alone, found))
        first = [next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 64)
                 for a, b in zip(alone, found)]  # fmt: skip
        say(f"greedy {name}: {same}/{len(prompts)} equal, equal tokens {sum(first)}/{64 * 12}, "
            f"preemptions {rig.scheduler.n_preemptions}")  # fmt: skip
        out[name] = sum(first) / (64 * 12)
    return out


# What rows ask of the sampler: name → one after the other, in turn.
SAMPLING: dict[str, list[dict[str, Any]]] = {
    "plain": [{"temperature": t} for t in (0.0, 0.6, 1.0, 1.5)],
    "top_k": [{"top_k": k} for k in (1, 50, 1000, 20_000)],
    "top_p": [{"top_p": p} for p in (0.1, 0.9, 0.95, 0.999)],
    "min_p": [{"min_p": p} for p in (0.01, 0.05, 0.2, 1e-9)],
    "all": [{"temperature": t, "top_k": 50, "top_p": 0.95, "min_p": 0.02} for t in (0.6, 1.2)],
    # So flat that no few tokens hold the threshold: the whole row is searched.
    "flat": [{"temperature": 30.0, "top_p": 0.95}, {"temperature": 1e30, "top_k": 5}],
    "edits": [
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": dict.fromkeys(range(300), 5.0), "min_tokens": 90, "stop_token_ids": [7]},
        {"frequency_penalty": 1.1, "temperature": 0.0, "logit_bias": {5: -3.0, 6: 30.0}},
    ],
    "logprobs": [{"logprobs": n, "frequency_penalty": n / 10} for n in (0, 1, 5, 20)],
}


class SamplingRig:
    """The graph's sampling alone: `n` rows of random logits, asked in turn what `asked` says."""

    def __init__(self, n: int, asked: list[dict[str, Any]], dtype: torch.dtype, vocab: int) -> None:
        torch.manual_seed(n)
        device = torch.device(DEVICE)
        self.logits = (torch.randn(n, vocab, device=device) * 4).to(dtype)
        self.params = [SamplingParams(max_tokens=99, **asked[i % len(asked)]) for i in range(n)]
        self.state = SlotState(n, 1, device)
        self.edits = SlotEdits(vocab, n, device)
        self.tasks = []
        for i, params in enumerate(self.params):
            likely = self.logits[i].topk(96).indices.tolist()
            task = Task(i, str(i), likely[::2] * 2, params, 99, seed=i * 77)
            task.tokens += likely[:32] + likely[:8]
            task.slot = i
            self.state.follow(task, 0)
            self.tasks.append(task)
        self.edits.seat(self.state.take_seated())
        changes = torch.from_numpy(self.state.take_changes()).to(device)
        self.state.arena[changes[:, 0].long()] = changes[:, 1]
        self.slots = torch.arange(n, dtype=torch.int32, device=device)
        ends = [len(task.tokens) - 1 for task in self.tasks]
        self.positions = torch.tensor(ends, dtype=torch.int32, device=device)
        self.out = new_results(n, device).line(STEPS, n)
        self.scratch = SamplingScratch(vocab, n, device)

    def sample(self) -> None:
        draw(
            self.scratch, self.edits, self.state, self.logits, self.slots, self.positions, self.out,
            max(self.edits.needs), DEVICE == "cuda",
        )  # fmt: skip

    def drawn(self) -> list[Sampled]:
        tokens, scores = self.out.tokens.tolist(), self.out.scores.cpu().numpy()
        drawn = [Sampled(token) for token in tokens]
        for i, params in enumerate(self.params):
            if params.logprobs is not None:
                drawn[i] = scored(tokens[i], scores[i])
        return drawn

    def expected(self) -> list[Sampled]:
        n, vocab = self.logits.shape
        rows = [
            sample_row(Entry(task, 0, len(task.tokens), True, 0), task.tokens[task.n_prompt :])
            for task in self.tasks
        ]
        return Sampler(vocab, n, DEVICE).sample(self.logits.float(), rows)

    def microseconds(self) -> float:
        """Of one launch inside a captured graph of ten, the median of twenty replays."""
        self.sample()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                self.sample()
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 100)
        return statistics.median(times)


def alike(a: Sampled, b: Sampled) -> bool:
    """The same token, rank and alternatives in the same order; exp is computed in two ways."""
    if (a.token, a.rank) != (b.token, b.rank):
        return False
    if a.logprob is None or b.logprob is None:
        return a.logprob is b.logprob
    ours, theirs = (((row.token, row.logprob), *(row.top or ())) for row in (a, b))
    return len(ours) == len(theirs) and all(
        x[0] == y[0] and abs(x[1] - y[1]) < 1e-4 for x, y in zip(ours, theirs)
    )


def check_sampling(vocab: int = 151936) -> dict[str, dict[int, float]]:
    """The graph's sampling against the general sampler, and what it takes, by kind and rows."""
    n = 64
    for dtype in (torch.bfloat16, torch.float32):
        for name, asked in SAMPLING.items():
            rig = SamplingRig(n, asked, dtype, vocab)
            rig.sample()
            same = sum(alike(a, b) for a, b in zip(rig.drawn(), rig.expected()))
            say(f"sampling {name}, {dtype}: {same}/{n} tokens equal the general sampler's")
            if same < n - 1:  # the two compute exp in different ways
                raise RuntimeError(f"{name}, {dtype}: {same = } of {n}")
    took: dict[str, dict[int, float]] = {}
    if DEVICE == "cuda":
        for name, asked in SAMPLING.items():
            took[name] = {
                rows: SamplingRig(rows, asked, torch.bfloat16, vocab).microseconds()
                for rows in (1, 32, 256)
            }
            say(f"sampling {name}, us by rows:", {n: round(us, 1) for n, us in took[name].items()})
    return took


def check_bits(decoder: Decoder) -> dict[str, list[int]]:
    """Numbers of rows from which the first row of each product of a layer gets other bits.

    Every kernel repeats itself exactly; what differs is how many partial sums a dot product is cut
    into, which the library and our tiles choose by the number of rows.
    """
    rig = Rig(decoder, 4096, max_slots=256, prefill_budget=512)
    model, layer = rig.runner.model, rig.runner.model.layers[0]
    torch.manual_seed(0)
    changes: dict[str, list[int]] = {}
    for name in ("qkv", "output", "gate_up", "down"):
        linear = getattr(layer, name)
        wide = torch.randn(600, linear.weight.shape[1], device=DEVICE).to(decoder.dtype)
        before, changes[name] = None, []
        for n in (2, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 300, 500, 600):
            x = wide[:n].contiguous()
            out = torch.zeros(n, linear.weight.shape[0], device=DEVICE, dtype=decoder.dtype)
            if name in ("output", "down"):
                model._add(linear, x, out, layer.mlp_norm, torch.empty_like(out))
            else:
                model._multiply(linear, x, out)
            if before is not None and not torch.equal(before, out[0]):
                changes[name].append(n)
            before = out[0].clone()
    say(f"bits of row 0 change at numbers of rows: {changes}")
    return changes


def profile(decoder: Decoder, rows: int) -> None:
    """Kernel times of one decode step of `rows` rows at about 800 positions each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    rig = Rig(decoder, kv_tokens=rows * 1024, max_slots=256, prefill_budget=16384)
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(800)] for _ in range(rows)]
    tasks = [
        Task(i, str(i), p, SamplingParams(temperature=0.6, max_tokens=90), max_tokens=90, seed=i)
        for i, p in enumerate(prompts)
    ]
    rig.engine.post(Message(add=tasks))
    while not all(task.n_output > 5 for task in tasks):
        rig.engine.step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        rig.engine.step()
    torch.cuda.synchronize()
    say(f"{rows} rows: {(time.perf_counter() - begun) / 20 * 1e3:.3f} ms per tick")
    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(4):
            rig.engine.step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name, []).append(event.device_time)
    total = sum(sum(v) for v in spent.values())
    say(f"{rows} rows: kernels {total / 4:.0f} us per tick")
    for name, values in sorted(spent.items(), key=lambda item: -sum(item[1]))[:12]:
        print(f"    {sum(values) / 4:8.1f} us {len(values) / 4:6.1f} x {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--profile", default="")
    parser.add_argument("--first-token", default="")
    args = parser.parse_args()
    if args.first_token:
        first_token(args.first_token)
        return
    parts = args.parts.split(",")
    result: dict[str, Any] = {"torch": torch.__version__, "seed": 0}
    result["device"] = torch.cuda.get_device_name()
    on = machine(torch.device(DEVICE))
    result["copy_tb_s"] = round(on.bandwidth / 1e12, 3)
    say(f"{result['device']}, copy {on.bandwidth / 1e12:.2f} TB/s")
    shapes = args.shapes.split(",")
    if "start" in parts:
        result["start"] = measure_start(shapes[0])
    if "check" in parts:
        result["attention_error"] = check_attention()
        result["products_error"] = check_products()
        result["sampling_us"] = check_sampling()
        result["logits_error"] = check_logits()
    for shape in shapes:
        say("──", shape)
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()
        decoder = make_decoder(shape)
        figures: dict[str, Any] = {}
        if "check" in parts and shape == shapes[0]:
            figures["same_tokens"] = check_tokens(decoder)
            figures["bits_change_at"] = check_bits(decoder)
        if "stream" in parts:
            figures["stream"] = measure_stream(decoder, on)
        gc.collect()
        for rows in filter(None, args.profile.split(",")):
            profile(decoder, int(rows))
            gc.collect()
        if "w1" in parts:
            figures["w1"] = measure_w1(decoder, on, args.runs)
        result[shape] = figures
        del decoder
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
