"""logit_bias, penalties and min_tokens inside the launch, against the general sampler."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import tests.kernels.triton_interpreter  # noqa: F401  (before the kernels)
from astrai.front.sampling_params import SamplingParams
from astrai.inference.task import Entry, Task
from astrai.kernels.gpu.sampling.edits import LISTED
from astrai.kernels.gpu.sampling.sampling import SamplingScratch, sample
from astrai.runtime.gpu.sampling import Need, SlotEdits
from astrai.runtime.gpu.uploads import SlotState
from astrai.runtime.runner import sample_row
from astrai.runtime.sampling.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 2100


class Rig:
    """Tasks in slots, and the two samplers on the same logits."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks, n = tasks, len(tasks)
        self.state = SlotState(n, 1, CPU)
        self.edits = SlotEdits(VOCAB, n, CPU)
        self.scratch = SamplingScratch(VOCAB, n, CPU)
        self.sampler = Sampler(VOCAB, n, "cpu")
        self.seat()

    def seat(self) -> None:
        self.state.forget()
        for i, task in enumerate(self.tasks):
            task.slot = i
            self.state.follow(task, 0)
        self.edits.seat(self.state.take_seated())
        for place, value in self.state.take_changes().tolist():
            self.state.arena[place] = value

    def draw(self, logits: Tensor, positions: list[int]) -> list[int]:
        """By the kernels: the token after each position."""
        n, state = len(self.tasks), self.state
        slots, at = torch.arange(n, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
        tokens, tops = torch.empty(n, dtype=torch.int32), torch.empty(n)
        edited = self.edits.edited(logits, slots, at, state.last, False)
        sample(
            self.scratch, edited, state.temperatures, state.seeds, slots, at, state.last,
            tokens, tops, state.limits,
        )  # fmt: skip
        return tokens.tolist()

    def expected(self, logits: Tensor, outputs: list[list[int]]) -> list[int]:
        rows = [
            sample_row(Entry(task, 0, task.n_prompt + len(output), True, 0), output)
            for task, output in zip(self.tasks, outputs)
        ]
        return [drawn.token for drawn in self.sampler.sample(logits.float(), rows)]


def some_tasks(n: int) -> list[Task]:
    """Prompts and biases over few tokens, which the logits below make likely."""
    rng = random.Random(n)
    tasks = []
    for i in range(n):
        bias = {rng.randrange(40): rng.uniform(-3, 3) for _ in range(rng.choice([0, 5, 30]))}
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
            presence_penalty=rng.choice([0.0, 0.7, -0.3]),
            frequency_penalty=rng.choice([0.0, 0.4, 1.1]),
            logit_bias=bias if i else None,
            min_tokens=rng.choice([0, 2, 9]),
            max_tokens=20,
        )
        prompt = [rng.randrange(40) for _ in range(rng.randint(1, 9))]
        ends = frozenset(rng.sample(range(40), 6))
        tasks.append(Task(i, str(i), prompt, params, 20, seed=i * 77, stop_ids=ends))
    return tasks


def some_logits(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    logits = torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, :40] += 6
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_what_the_general_sampler_draws(dtype: torch.dtype) -> None:
    """The device counts its own tokens; slots that are seated anew go on from what is known."""
    n = 12
    rig = Rig(some_tasks(n))
    outputs: list[list[int]] = [[] for _ in range(n)]
    for step in range(7):
        if step == 4:  # all tokens but the last, which only the device has
            for task, output in zip(rig.tasks, outputs):
                task.tokens[task.n_prompt :] = output[:-1]
            rig.seat()
        logits = some_logits(n, step, dtype)
        positions = [task.n_prompt + step - 1 for task in rig.tasks]
        drawn = rig.draw(logits, positions)
        assert drawn == rig.expected(logits, outputs)
        for output, token in zip(outputs, drawn):
            output.append(token)
    assert max(map(len, map(set, outputs))) > 2


def test_a_position_that_is_computed_twice_counts_once() -> None:
    """Also after the launch that follows it has run."""
    n = 6
    params = SamplingParams(frequency_penalty=2.0, repetition_penalty=1.5, temperature=0.5)
    rig = Rig([Task(i, str(i), [i, 9], params, 20, seed=i) for i in range(n)])
    drawn: dict[int, list[int]] = {}
    for at in (1, 2, 2, 3, 2, 3, 4, 5, 4, 5, 6):
        found = rig.draw(some_logits(n, at, torch.float32), [at] * n)
        assert drawn.setdefault(at, found) == found
    outputs = [[drawn[at][i] for at in range(1, 6)] for i in range(n)]
    assert drawn[6] == rig.expected(some_logits(n, 6, torch.float32), outputs)


def test_a_slot_that_changes_hands_forgets_its_edits() -> None:
    rig = Rig(some_tasks(4))
    rig.draw(some_logits(4, 0, torch.float32), [task.n_prompt - 1 for task in rig.tasks])
    rig.tasks = [Task(i, str(i), [5], SamplingParams(), 9, seed=i) for i in range(4)]
    rig.seat()
    logits = some_logits(4, 1, torch.float32)
    assert rig.draw(logits, [0] * 4) == rig.expected(logits, [[]] * 4)


@pytest.mark.parametrize(
    ("fields", "need"),
    [
        ({}, Need.HEAT),
        ({"temperature": 0.0, "top_k": 4}, Need.HEAT),
        ({"min_p": 0.1}, Need.LIMITS),
        ({"logit_bias": {3: 1.0}}, Need.EDITS),
        ({"min_tokens": 1}, Need.EDITS),
        ({"logit_bias": {VOCAB: 1.0}}, Need.GENERAL),
        ({"logit_bias": dict.fromkeys(range(LISTED + 1), 1.0)}, Need.GENERAL),
        ({"logprobs": 0}, Need.SCORES),
        ({"logprobs": 0, "logit_bias": {VOCAB: 1.0}}, Need.GENERAL),
    ],
)
def test_what_a_task_needs(fields: dict[str, object], need: Need) -> None:
    rig = Rig([Task(0, "0", [1], SamplingParams(**fields), 16, seed=0)])  # type: ignore[arg-type]
    assert rig.edits.needs == [need]
    assert (rig.edits.tables is not None) == (need is Need.EDITS)
