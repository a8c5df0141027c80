"""The whole GPU path on the CPU, through Triton's interpreter, against the plain runner."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.config import SchedulerConfig
from astrai.front.sampling_params import SamplingParams
from astrai.inference.cache.books import Books
from astrai.inference.cache.storage import PagedCache
from astrai.inference.engine import Engine, Message
from astrai.inference.events import EventLog
from astrai.inference.scheduler import Scheduler
from astrai.inference.task import Entry, Plan, Task, TokenLogprob, Update
from astrai.kernels.attention import load_backend
from astrai.kernels.hopper import product as hopper
from astrai.kernels.linear import DenseLinear
from astrai.models import decoder as decoder_module
from astrai.models.config import config_from_hf
from astrai.models.decoder import Decoder
from astrai.models.loading import dummy_weights
from astrai.runtime.gpu.model import GpuModel
from astrai.runtime.gpu.runner import GpuLaunch, GpuRunner
from astrai.runtime.runner import Runner
from astrai.runtime.sampling.sampler import Sampler

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1,
}  # fmt: skip
MAX_SLOTS, BUDGET = 4, 40
ASKED: list[dict[str, Any]] = [
    {}, {"temperature": 0.0}, {"top_k": 5, "min_p": 0.01},
    {"presence_penalty": 1.0, "top_p": 0.9, "logit_bias": {5: 4.0, 7: -50.0}},
    {"logprobs": 2, "temperature": 0.0, "frequency_penalty": 1.0},
    {"min_tokens": 2, "repetition_penalty": 1.3}, {"top_p": 0.5, "top_k": 40},
]  # fmt: skip


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setattr(decoder_module, "make_linear", DenseLinear)  # as on a GPU
    config = config_from_hf(SHAPE)
    weights = dummy_weights(config, torch.float32, "cpu")
    for name, weight in weights.items():
        if not name.endswith("norm.weight"):
            weight *= 8.0
    return Decoder(config, weights, torch.float32, "cpu")


def make_tasks(n: int) -> list[Task]:
    rng = random.Random(0)
    common = [rng.randrange(300) for _ in range(40)]
    tasks = []
    for i in range(n):
        prompt = (common if i % 3 == 0 else []) + [
            rng.randrange(300) for _ in range(rng.randint(1, 40))
        ]
        count = rng.randint(2, 9)
        params = SamplingParams(
            max_tokens=count, prompt_logprobs=1 if i == 4 else None, **ASKED[i % len(ASKED)]
        )
        tasks.append(Task(i, str(i), prompt, params, count, seed=1000 + i, stop_ids=frozenset([7])))
    return tasks


def run(
    decoder: Decoder, kind: str, n_pages: int, tasks: list[Task], budget: int = BUDGET
) -> tuple[list[Task], Scheduler, dict[int, list[TokenLogprob]]]:
    """The tasks when all have ended, their scheduler, and by task what was said of each token."""
    c = decoder.config
    kv = PagedCache(c.n_layers, n_pages, 16, c.n_kv_heads, c.head_dim, torch.float32)
    events = EventLog()
    books = Books(n_pages, 16, True, events)
    config = SchedulerConfig(max_slots=MAX_SLOTS, prefill_budget=budget)
    scheduler = Scheduler(config, books, time.monotonic, events)
    sampler = Sampler(c.vocab_size, MAX_SLOTS, "cpu")
    runner: Any
    if kind == "plain":
        runner = Runner(decoder, kv, load_backend("reference")(kv, c), sampler)
    else:
        runner = GpuRunner(decoder, kv, sampler, MAX_SLOTS, budget, max_model_len=128)
    ends: list[Update] = []
    engine = Engine(scheduler, runner, ends.extend)
    engine.post(Message(add=tasks))
    for _ in range(1000):
        if engine.idle:
            break
        engine.step()
    assert engine.idle
    scheduler.check()
    scored: dict[int, list[TokenLogprob]] = {}
    for update in ends:
        scored.setdefault(update.task.id, []).extend(update.logprobs)
    return tasks, scheduler, scored


def check_same(expected: list[Task], found: list[Task]) -> None:
    for a, b in zip(expected, found, strict=True):
        assert (a.tokens, a.finish_reason, a.error) == (b.tokens, b.finish_reason, b.error)


def test_same_tokens_where_hopper_has_a_kernel_of_its_own(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of that kernel; torch answers for it."""
    asked: set[str] = set()

    def product(
        x: Tensor, weight: Tensor, out: Tensor, cut: hopper.Cut, *,
        bias: Tensor | None = None, silu: bool = False, pdl: bool = False,
    ) -> None:  # fmt: skip
        hopper._check(x, weight, out, cut, bias, silu)
        asked.add("parts" if out.dim() == 3 else "silu" if silu else "plain")
        if out.dim() == 3:
            shares = zip(x.chunk(cut.split, dim=1), weight.chunk(cut.split, dim=1))
            out.copy_(torch.stack([a @ b.t() for a, b in shares]))
        elif silu:
            gate, up = F.linear(x, weight, bias).chunk(2, dim=1)
            out.copy_(F.silu(gate) * up)
        else:
            out.copy_(F.linear(x, weight, bias))

    def scratch(model: GpuModel, kv: PagedCache, max_rows: int) -> None:
        whole(model, kv, max_rows)
        model._hopper = True

    whole = GpuModel._scratch
    monkeypatch.setattr(GpuModel, "_scratch", scratch)
    for name, number in {"_LEAST_NUMBERS": 0, "_LARGE": 0, "_LEAST_SHARE": 64}.items():
        monkeypatch.setattr(hopper, name, number)
    monkeypatch.setitem(hopper._NUMBERS, torch.float32, "f32")
    monkeypatch.setattr(hopper, "product", product)
    expected, *_ = run(decoder, "plain", 40, make_tasks(8))
    found, *_ = run(decoder, "gpu", 40, make_tasks(8))
    check_same(expected, found)
    assert asked == {"plain", "silu", "parts"}


def test_same_tokens_as_the_plain_runner(decoder: Decoder) -> None:
    """Chunked prefill, prefix hits, windows, and every kind of sampling."""
    expected, _, theirs = run(decoder, "plain", 40, make_tasks(7))
    found, _, ours = run(decoder, "gpu", 40, make_tasks(7))
    check_same(expected, found)
    assert len(theirs[4]) == found[4].n_output
    for x, y in zip(theirs[4], ours[4], strict=True):
        assert (x.token, x.rank, [t for t, _ in x.top]) == (y.token, y.rank, [t for t, _ in y.top])
        assert x.logprob == pytest.approx(y.logprob, abs=1e-3)
    for a, b in zip(expected[4].prompt_logprobs, found[4].prompt_logprobs, strict=True):
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_steps_and_short_chunks_share_a_pass(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that the general sampler draws, the end of a prompt, a chunk without end, a hit."""

    def tasks() -> list[Task]:
        rng = random.Random(2)
        common = rng.choices(range(300), k=20)
        prompts = [common, rng.choices(range(300), k=30), rng.choices(range(300), k=20)]
        prompts.append(common[:16] + rng.choices(range(300), k=5))
        made = []
        for i, prompt in enumerate(prompts):
            words = ((5,), (6, 7)) if i == 0 else ()
            made.append(
                Task(i, str(i), prompt, SamplingParams(max_tokens=8), 8, i, bad_words=words)
            )
        return made

    shared: list[tuple[list[Entry], list[Entry]]] = []
    inner = GpuRunner._run

    def spied(self: GpuRunner, launch: GpuLaunch, each: Any) -> None:
        if each.steps and each.chunks:
            steps, chunks = ([launch.entries[i] for i in at] for at in (each.steps, each.chunks))
            shared.append((steps, chunks))
        inner(self, launch, each)

    expected, *_ = run(decoder, "plain", 40, tasks(), budget=32)
    monkeypatch.setattr(GpuRunner, "_run", spied)
    found, *_ = run(decoder, "gpu", 40, tasks(), budget=32)
    check_same(expected, found)
    assert any(
        any(step.task.bad_words for step in steps)
        and {chunk.samples for chunk in chunks} == {True, False}
        for steps, chunks in shared
    )
    assert any(chunk.task.id == 3 and chunk.start == 16 for _, chunks in shared for chunk in chunks)


def test_preemption_changes_no_token(decoder: Decoder) -> None:
    def tasks() -> list[Task]:
        params = SamplingParams(max_tokens=8, top_p=0.9, frequency_penalty=1.0)
        return [Task(i, str(i), [i] * 14, params, 8, seed=i) for i in range(3)]

    expected, *_ = run(decoder, "plain", 40, tasks())
    found, scheduler, _ = run(decoder, "gpu", 4, tasks())
    assert scheduler.n_preemptions > 0
    check_same(expected, found)


def test_a_launch_that_fails_costs_no_token(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run again one by one, rows that look back need what the launch before them sampled."""

    def tasks() -> list[Task]:
        params = SamplingParams(max_tokens=6, presence_penalty=1.0)
        return [Task(i, str(i), [i] * 5, params, 6, seed=i) for i in range(MAX_SLOTS)]

    launch, failed = GpuRunner._launch, []

    def breaks(self: GpuRunner, plan: Plan) -> GpuLaunch:
        if plan.tick % 3 == 0 and len(plan.entries) > 1:
            failed.append(plan.tick)
            raise RuntimeError("the launch failed")
        return launch(self, plan)

    expected, *_ = run(decoder, "plain", 40, tasks())
    monkeypatch.setattr(GpuRunner, "_launch", breaks)
    found, *_ = run(decoder, "gpu", 40, tasks())
    assert failed
    check_same(expected, found)


def test_pooled_states_are_those_of_the_plain_runner(decoder: Decoder) -> None:
    """Beside each other and a decoding task, in chunks that meet inside the prompts."""

    def tasks() -> list[Task]:
        rng = random.Random(1)
        made = [Task(0, "0", [1, 2, 3], SamplingParams(max_tokens=6), 6, seed=0)]
        for i, pooling in enumerate(("mean", "last", "mean"), 1):
            params = SamplingParams(max_tokens=0, pooling=pooling)  # type: ignore[arg-type]
            made.append(Task(i, str(i), rng.choices(range(300), k=33), params, 0, seed=i))
        return made

    expected, *_ = run(decoder, "plain", 40, tasks())
    found, *_ = run(decoder, "gpu", 40, tasks())
    check_same(expected, found)
    for a, b in zip(expected, found, strict=True):
        assert len(a.pooled) == len(b.pooled)
        for part, other in zip(a.pooled, b.pooled):
            assert part == pytest.approx(other, abs=1e-3)
