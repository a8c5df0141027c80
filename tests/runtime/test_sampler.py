from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from astrai.front.sampling_params import SamplingParams
from astrai.runtime.sampling.sampler import (
    ARRAY_ROWS,
    CPU_ROWS,
    NUCLEUS,
    Sampled,
    Sampler,
    SampleRow,
    draw_bits,
    draw_bits_of,
    philox4x32,
)


def row(
    params: SamplingParams | None = None,
    *,
    seed: int = 0,
    position: int = 0,
    slot: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    banned: tuple[int, ...] = (),
    **fields: Any,
) -> SampleRow:
    params = params or SamplingParams(**fields)
    return SampleRow(params, seed, position, slot, prompt or [], output or [], banned)


def sample(logits: list[list[float]], *rows: SampleRow) -> list[Sampled]:
    return Sampler(len(logits[0]), 64, "cpu").sample(torch.tensor(logits), rows)


# --- the reference: one row, from the definition, in Python floats ---------------------------


class Reference(NamedTuple):
    tokens: list[int]  # what may be drawn, in vocabulary order
    probabilities: list[float]
    margin: float  # how near the nearest decision of a truncation was


def edited(logits: list[float], r: SampleRow) -> list[float]:
    p = r.params
    x = list(logits)
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set(r.prompt_ids) | set(r.output_ids):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(r.output_ids):
        x[token] -= p.frequency_penalty * r.output_ids.count(token) + p.presence_penalty
    for token in r.banned:
        x[token] = -math.inf
    return x


def reference(logits: list[float], r: SampleRow) -> Reference:
    p = r.params
    x = edited(logits, r)
    peak = max(x)
    if p.greedy:
        rivals = [peak - v for v in x if v != peak]
        return Reference([x.index(peak)], [1.0], min(rivals, default=1.0))
    e = [math.exp((v - peak) / p.temperature) for v in x]
    ranked = sorted((v for v in e if v > 0), reverse=True)
    floor, margin = 0.0, 1.0

    def gap(below: float, at: float) -> float:
        return 1.0 if below == at else abs(at - below)

    if 0 < p.top_k < len(ranked):
        floor = ranked[p.top_k - 1]
        margin = min(margin, *(gap(v, floor) for v in ranked))
    if p.top_p < 1.0:
        kept = [v for v in ranked if v >= floor]
        total, mass = sum(kept), 0.0
        for v in kept:
            margin = min(margin, abs(mass / total - p.top_p), gap(v, floor))
            if mass / total < p.top_p:
                floor = v
            mass += v
        margin = min(margin, *(gap(v, floor) for v in kept))
    margin = min([margin, *(gap(v, p.min_p) for v in e if p.min_p)])
    floor = max(floor, p.min_p)
    tokens = [i for i, v in enumerate(e) if v >= floor and v > 0]
    total = sum(e[i] for i in tokens)
    return Reference(tokens, [e[i] / total for i in tokens], margin)


def may_be(ref: Reference, token: int, u: float, slack: float = 1e-5) -> bool:
    """Whether inverting the CDF at u gives this token, up to rounding."""
    if token not in ref.tokens:
        return False
    at = ref.tokens.index(token)
    low = sum(ref.probabilities[:at])
    return low - slack <= u <= low + ref.probabilities[at] + slack


# Logits on a grid, so that ties are common.
logit_rows = st.lists(st.integers(-24, 24).map(lambda n: n / 4), min_size=2, max_size=40)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], SampleRow]:
    logits = draw(logit_rows)
    ids = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 10, 100])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.03, 0.5, 0.9, 0.97])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.04, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.6, -0.6])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.4])),
        logit_bias=draw(st.sampled_from([None, {0: 3.0}, {0: -100.0, 1: 2.5}])),
    )
    seed, position = draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**20))
    banned = tuple(draw(st.sets(st.integers(1, len(logits) - 1), max_size=len(logits) // 2)))
    r = SampleRow(params, seed, position, 0, draw(ids), draw(ids), banned)
    return logits, r


@settings(max_examples=600, deadline=None)
@given(cases())
def test_agrees_with_the_reference(case: tuple[list[float], SampleRow]) -> None:
    logits, r = case
    ref = reference(logits, r)
    assume(ref.margin > 1e-5)  # nearer than that, float32 may decide otherwise
    (result,) = sample([logits], r)
    assert result.error is None
    assert may_be(ref, result.token, draw_bits(r.seed, r.position) / 2**62)


@settings(max_examples=60, deadline=None)
@given(st.lists(cases(), min_size=2, max_size=20), st.randoms(), st.sampled_from([300, 1031]))
def test_a_row_does_not_depend_on_the_batch(
    drawn: list[tuple[list[float], SampleRow]], order: random.Random, size: int
) -> None:
    logits = torch.full((len(drawn), size), -3.0)
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(drawn)))
    rows = []
    for i, (values, r) in enumerate(drawn):
        logits[i, : len(values)] = torch.tensor(values)
        logprobs = order.choice([None, 0, 1, 5])
        fields = {f: getattr(r.params, f) for f in r.params.__slots__}
        rows.append(r._replace(params=SamplingParams(**{**fields, "logprobs": logprobs}), slot=i))
    before = logits.clone()
    sampler = Sampler(size, len(rows), "cpu")
    together = sampler.sample(logits, rows)
    assert torch.equal(logits, before)
    alone = [sampler.sample(logits[i : i + 1].clone(), [r]) for i, r in enumerate(rows)]
    assert [result for (result,) in alone] == together
    mixed = list(range(len(rows)))
    order.shuffle(mixed)
    shuffled = Sampler(size, len(rows), "cpu").sample(logits[mixed], [rows[i] for i in mixed])
    assert shuffled == [together[i] for i in mixed]


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 40}, {"logprobs": 3}])
def test_same_bits_at_full_width_in_any_batch(fields: dict[str, Any]) -> None:
    """A real vocabulary, where work is split over threads and vector tails differ."""
    size, n = 50_257, CPU_ROWS + 3
    logits = torch.randn(n, size, generator=torch.Generator().manual_seed(1)) * 4
    rows = [row(seed=i, position=i, slot=i, temperature=0.9, **fields) for i in range(n)]
    sampler = Sampler(size, n, "cpu")
    together = sampler.sample(logits, rows)
    assert [sampler.sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(rows)] == (
        together
    )
    assert sampler.sample(logits[2:7].clone(), rows[2:7]) == together[2:7]


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 5000}, {"top_p": 1 - 1e-15}, {"min_p": 1e-30}, {"top_p": 1 - 1e-15, "top_k": 4999}],
)
def test_a_truncation_that_drops_nothing_changes_no_draw(fields: dict[str, Any]) -> None:
    size = 5000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(2)).expand(200, -1)
    plain = [row(seed=3, position=i, slot=i) for i in range(200)]
    cut = [row(seed=3, position=i, slot=i, **fields) for i in range(200)]
    sampler = Sampler(size, 200, "cpu")
    batch = logits.contiguous()
    assert sampler.sample(batch, plain) == sampler.sample(batch, cut)


def test_top_p_finds_the_same_set_with_and_without_the_short_way() -> None:
    """Rows whose nucleus is larger than the short list, beside rows whose nucleus is small."""
    size, p = 4 * NUCLEUS, 0.8
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(5))
    logits[::2] *= 20
    rows = [row(seed=i, slot=i, top_p=p) for i in range(6)]
    together = Sampler(size, 6, "cpu").sample(logits, rows)
    for i, r in enumerate(rows):
        ref = reference(logits[i].tolist(), r)
        assert (len(ref.tokens) > NUCLEUS) == (i % 2 == 1)
        assert may_be(ref, together[i].token, draw_bits(r.seed, r.position) / 2**62)
        assert Sampler(size, 6, "cpu").sample(logits[i : i + 1].clone(), [r]) == [together[i]]


# --- the draw ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the published known answers of philox4x32-10
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_draws_of_one_row_and_of_many_are_the_same() -> None:
    rng = random.Random(0)
    seeds = [rng.randrange(2**64) for _ in range(3 * ARRAY_ROWS)]
    positions = [rng.randrange(2**40) for _ in seeds]
    assert draw_bits_of(seeds, positions).tolist() == list(map(draw_bits, seeds, positions))
    assert draw_bits_of(seeds[:3], positions[:3]).tolist() == (
        list(map(draw_bits, seeds[:3], positions[:3]))
    )


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected))


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_distribution(vary: str) -> None:
    logits, n = [1.0, 0.0, -1.0, 2.0, -2.0, 0.5, 0.5, -0.5], 20_000
    sampler = Sampler(8, n, "cpu")
    rows = [row(slot=0, **{vary: i}) for i in range(n)]
    tokens = [s.token for s in sampler.sample(torch.tensor([logits] * n), rows)]
    ref = reference(logits, rows[0])
    counts = [tokens.count(t) for t in range(8)]
    # 24.32 is the 99.9 % point for 7 degrees of freedom; the draws are fixed.
    assert chi_square(counts, [p * n for p in ref.probabilities]) < 24.32
    # Neighbouring draws are independent: 64 pairs, 63 degrees of freedom.
    pairs = [8 * a + b for a, b in zip(tokens[::2], tokens[1::2])]
    joint = [p * q * n / 2 for p in ref.probabilities for q in ref.probabilities]
    assert chi_square([pairs.count(i) for i in range(64)], joint) < 103.4


@pytest.mark.parametrize(("bits", "token"), [(0, 2), (2**62 - 1, 4)])
def test_a_token_without_mass_is_never_drawn(
    bits: int, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "astrai.runtime.sampling.sampler.draw_bits_of", lambda seeds, _: np.full(len(seeds), bits)
    )
    none = -math.inf
    assert sample([[none, -900.0, 1.0, none, 2.0, none]], row())[0].token == token
    wide = [none] * 700
    wide[token * 100] = 0.5
    assert sample([wide], row())[0].token == token * 100


# --- each step, on numbers one can follow ------------------------------------------------------


def drawable(logits: list[float], **fields: Any) -> set[int]:
    rows = [row(position=i, **fields) for i in range(400)]
    return {s.token for s in sample([logits] * 400, *rows)}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    results = sample([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]], row(temperature=0), row(temperature=0))
    assert [s.token for s in results] == [1, 0]


def test_top_k_keeps_ties_of_the_last() -> None:
    assert drawable([3.0, 2.0, 2.0, 1.0], top_k=2) == {0, 1, 2}
    assert drawable([3.0, 2.5, 2.0, 1.0], top_k=2) == {0, 1}
    assert drawable([3.0, 2.5, 2.0, 1.0], top_k=1) == {0}


def test_top_p_is_the_smallest_set_that_reaches_p() -> None:
    quarters = [math.log(0.5), math.log(0.25), math.log(0.125), math.log(0.125)]
    assert drawable(quarters, top_p=0.49) == {0}
    assert drawable(quarters, top_p=0.51) == {0, 1}
    assert drawable(quarters, top_p=0.74) == {0, 1}
    assert drawable(quarters, top_p=0.76) == {0, 1, 2, 3}  # the tie of the last one stays
    assert drawable(quarters, top_p=1e-12) == {0}
    assert drawable([0.0, 0.0], top_p=0.5) == {0, 1}
    # Of the mass that top_k left: 0.5 / 0.75 reaches 0.6.
    assert drawable(quarters, top_p=0.6, top_k=2) == {0}


def test_a_top_p_below_every_share_keeps_the_largest() -> None:
    assert drawable([0.0, 1.0, 0.9], top_p=1e-30) == {1}


def test_top_p_counts_the_ties_that_top_k_kept() -> None:
    logits = [math.log(0.4), *[math.log(0.2)] * 3]
    assert drawable(logits, top_k=2, top_p=0.39) == {0}
    assert drawable(logits, top_k=2, top_p=0.5) == {0, 1, 2, 3}


def test_min_p_is_relative_to_the_largest() -> None:
    assert drawable([0.0, math.log(0.31), math.log(0.29)], min_p=0.3) == {0, 1}
    assert drawable([0.0, 0.0, -0.1], min_p=1.0) == {0, 1}


def test_extreme_temperatures() -> None:
    assert drawable([1.0, 1.0 + 1e-6, 0.0], temperature=1e-300) == {1}
    assert drawable([1.0, -50.0, 50.0, 0.0], temperature=1e300, banned=(3,)) == {0, 1, 2}


def test_extreme_logits() -> None:
    huge = 3.0e38
    assert drawable([huge, -huge, -math.inf]) == {0}
    assert drawable([-huge, -huge, -math.inf]) == {0, 1}


def test_penalties() -> None:
    logits = [2.0, 1.9, -1.0, -1.1]
    greedy = {"temperature": 0}
    repeated = row(**greedy, repetition_penalty=2.0, prompt=[0])
    assert sample([logits], repeated)[0].token == 1
    assert sample([logits], row(**greedy, presence_penalty=0.2, prompt=[0]))[0].token == 0
    assert sample([logits], row(**greedy, presence_penalty=0.2, output=[0]))[0].token == 1
    both = row(**greedy, presence_penalty=2.0, repetition_penalty=1.01, prompt=[0])
    assert sample([logits], both)[0].token == 0
    twice = row(**greedy, frequency_penalty=0.06, output=[0, 0])
    assert sample([logits], twice)[0].token == 1
    once = row(**greedy, frequency_penalty=0.06, output=[0])
    assert sample([logits], once)[0].token == 0
    negative = row(**greedy, repetition_penalty=2.0, prompt=[2], output=[2], banned=(0, 1))
    assert sample([logits], negative)[0].token == 3


def test_a_slot_that_changes_hands_forgets_its_prompt() -> None:
    sampler = Sampler(3, 1, "cpu")
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    fields = {"temperature": 0, "repetition_penalty": 2.0}
    assert sampler.sample(logits, [row(**fields, prompt=[0])])[0].token == 1
    assert sampler.sample(logits, [row(**fields, prompt=[1])])[0].token == 0
    assert sampler.sample(logits, [row(**fields, prompt=[0])])[0].token == 1


def test_bias_and_ban() -> None:
    assert sample([[2.0, 1.0]], row(temperature=0, logit_bias={1: 1.5}))[0].token == 1
    assert sample([[2.0, 1.0]], row(temperature=0, banned=(0,)))[0].token == 1
    assert sample([[2.0, 1.0]], row(banned=(0, 0), logit_bias={0: 100.0}))[0].token == 1


# --- one bad row hurts only itself -------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 2}, {"min_p": 0.1}],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_finite_peak_is_an_error(bad: float, fields: dict[str, Any]) -> None:
    good = [0.5, 1.0, 0.0]
    logits = [good, [0.0, bad, 0.0], good, [-math.inf] * 3]
    rows = [row(**fields, position=i, logprobs=1) for i in range(4)]
    results = sample(logits, *rows)
    assert [results[0], results[2]] == [sample([good], r)[0] for r in (rows[0], rows[2])]
    for i in (1, 3):
        assert results[i].token == -1
        assert "largest logit" in (results[i].error or "")
        assert results[i].logprob is None


def test_a_row_with_everything_banned_is_an_error() -> None:
    results = sample([[0.0, 1.0], [0.0, 1.0]], row(banned=(0, 1)), row(temperature=0))
    assert results[0].error == "no token can be drawn: the largest logit is -inf"
    assert results[1] == Sampled(1)


@pytest.mark.parametrize(
    ("r", "name"),
    [
        (row(banned=(7,)), "banned"),
        (row(logit_bias={9: 1.0}), "logit_bias"),
        (row(repetition_penalty=2.0, prompt=[1, 7]), "prompt"),
        (row(presence_penalty=1.0, output=[-1]), "output"),
    ],
)
def test_ids_outside_the_vocabulary_are_that_rows_error(r: SampleRow, name: str) -> None:
    results = sample([[0.0, 1.0, 0.0]] * 2, r, row(temperature=0, banned=(1,)))
    assert results[0].token == -1
    assert name in (results[0].error or "")
    assert results[1].token == 0


@pytest.mark.parametrize(
    "logits", [torch.zeros(1, 4), torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.bfloat16)]
)
def test_wrong_logits_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected contiguous"):
        Sampler(3, 4, "cpu").sample(logits, [row()])


def test_no_rows() -> None:
    assert Sampler(3, 4, "cpu").sample(torch.zeros(0, 3), []) == []


# --- log-probabilities -------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(3)) * 3
    exact = logits.double().log_softmax(1)
    rows = [
        row(seed=i, temperature=0.7, logprobs=i % 6, logit_bias={3: 5.0}, banned=(4,), slot=i)
        for i in range(20)
    ]
    for i, result in enumerate(Sampler(500, 20, "cpu").sample(logits, rows)):
        assert result.logprob == pytest.approx(float(exact[i, result.token]), abs=1e-6)
        assert result.rank == 1 + int((logits[i] > logits[i, result.token]).sum())
        best = exact[i].topk(i % 6)
        assert result.top is not None
        assert [token for token, _ in result.top] == best.indices.tolist()
        assert [value for _, value in result.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_logprobs_only_where_asked_for() -> None:
    results = sample([[0.0, 1.0]] * 3, row(), row(logprobs=0), row(logprobs=1))
    assert (results[0].logprob, results[0].top, results[0].rank) == (None, None, None)
    assert results[1].top == ()
    assert results[2].top == ((1, pytest.approx(-0.31326, abs=1e-5)),)


def test_equal_alternatives_come_in_order_of_id() -> None:
    (result,) = sample([[1.0, 2.0, 1.0, 1.0, 2.0]], row(temperature=0, logprobs=3))
    assert [token for token, _ in result.top or ()] == [1, 4, 0]


def test_more_alternatives_than_tokens() -> None:
    (result,) = sample([[1.0, 2.0]], row(temperature=0, logprobs=20))
    assert [token for token, _ in result.top or ()] == [1, 0]


def test_prompt_logprobs() -> None:
    n = 2 * CPU_ROWS + 1
    logits = torch.randn(n, 100, generator=torch.Generator().manual_seed(4))
    targets = [(7 * i) % 100 for i in range(n)]
    scores = Sampler(100, 8, "cpu").prompt_logprobs(logits, targets, top=2)
    exact = logits.double().log_softmax(1)
    assert len(scores) == n
    for i, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(exact[i, targets[i]]), abs=1e-6)
        assert score.rank == 1 + int((logits[i] > logits[i, targets[i]]).sum())
        assert [token for token, _ in score.top] == exact[i].topk(2).indices.tolist()
    with pytest.raises(ValueError, match="target token 100"):
        Sampler(100, 8, "cpu").prompt_logprobs(logits[:1], [100], top=0)
