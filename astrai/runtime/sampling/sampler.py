"""From logits to tokens: vectorised over the rows of a tick, with no generator state.

What happens to a row, in this order:

0. what its grammar does not allow becomes -inf (structured output);
1. logit_bias is added;
2. repetition penalty over prompt and output (positive logits divided, others multiplied),
   then presence and frequency penalties over the output (subtracted);
3. banned tokens become -inf (min_tokens, bad_words);
4. temperature 0: the largest logit wins, the lowest id among equals. Otherwise
   e = exp((logit - largest) / temperature), and
5. top_k, then top_p over what top_k left, then min_p: each a threshold on e, so tokens that
   tie with the last one kept are kept;
6. one uniform number from (seed, position) picks a token by inverse CDF in vocabulary order.

Log-probabilities are those of the raw logits, before step 0.

Every sum over the vocabulary (the mass of a row, its CDF, the top_p mass) is a sum of 64-bit
integers, the fixed-point values of e. Integer sums do not depend on their order and everything
else is element by element, so a row gets the same token alone, in any batch and by any path.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from astrai.front.sampling_params import SamplingParams

# Rows that go through the vocabulary-wide work at once. Small on a CPU, so that the scratch
# stays in its cache; on a GPU, so that the scratch stays a small part of its memory.
CPU_ROWS = 8
DEVICE_ROWS = 64
# The CDF is searched in two levels: blocks of this many tokens, then one block.
BLOCK = 256
# A CPU looks for the top_p set among this many tokens before it sorts the vocabulary.
NUCLEUS = 1024
# Temperatures that float32 can divide by; beyond these a draw is greedy, or uniform, either way.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30
# From this many rows on, the random numbers of a tick are computed as one array.
ARRAY_ROWS = 16

Words = TypeVar("Words", int, "np.ndarray")


class SampleRow(NamedTuple):
    """What the sampler must know of one row. The list `prompt_ids` is never changed in place."""

    params: SamplingParams
    seed: int  # 64 bits
    position: int  # index in the sequence of the token being drawn
    slot: int
    prompt_ids: list[int]
    output_ids: list[int]
    banned: tuple[int, ...] = ()  # token ids that must not be drawn now
    # int32[ceil(vocab_size / 32)], if not None: bit i % 32 of word i // 32 lets token i be drawn.
    mask: np.ndarray | None = None
    refused: str | None = None  # why nothing may be drawn: the row ends in this error


class Sampled(NamedTuple):
    token: int  # -1 if there is an error
    logprob: float | None = None  # of `token`, in the raw distribution; None if not asked for
    top: tuple[tuple[int, float], ...] | None = None  # most probable first, lowest id among equals
    rank: int | None = None  # of `token` in the raw distribution, 1 = most probable
    error: str | None = None  # why this row has no token


class Score(NamedTuple):
    """How probable a given token was. See `Sampled` for the fields."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): 128 bits from (counter, key).

    All words hold 32 bits, as Python integers or as uint64 arrays.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def draw_bits(seed: int, position: int) -> int:
    """The 62 random bits of (seed, position); divided by 2**62 they are uniform in [0, 1)."""
    low = 0xFFFFFFFF
    key = (seed & low, (seed >> 32) & low)
    x0, x1, _, _ = philox4x32((position & low, position >> 32, 0, 0), key)
    return (x0 | x1 << 32) >> 2


def draw_bits_of(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """`draw_bits` of many rows: int64[R]."""
    if len(seeds) < ARRAY_ROWS:
        return np.array([draw_bits(s, p) for s, p in zip(seeds, positions)], dtype=np.int64)
    low, zero = 0xFFFFFFFF, np.zeros(len(seeds), dtype=np.uint64)
    s = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    p = np.array(positions, dtype=np.uint64)
    x0, x1, _, _ = philox4x32((p & low, p >> 32, zero, zero), (s & low, s >> 32))
    return ((x0 | x1 << 32) >> 2).astype(np.int64)


class Sampler:
    """Draws one token per row of logits.

    Owns: scratch memory, and per slot the distinct ids of the prompt last seen there (a cache,
    checked by identity). Does not own: logits, tasks, slots, random state (there is none).
    """

    def __init__(self, vocab_size: int, max_slots: int, device: str | torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self._rows = min(max_slots, CPU_ROWS if on_cpu else DEVICE_ROWS)
        n_blocks = -(-vocab_size // BLOCK)
        # The sum of a row is at most vocab_size * 2**bits <= 2**61: `_scaled` needs < 2**62.
        self._bits = 61 - (vocab_size - 1).bit_length()
        self._e = torch.empty(self._rows, vocab_size, device=self.device)
        # The tail of the last block stays 0.
        self._w = torch.zeros(self._rows, n_blocks * BLOCK, dtype=torch.int64, device=self.device)
        self._prompts: list[tuple[list[int], np.ndarray] | None] = [None] * max_slots
        self.seen = np.zeros(vocab_size, dtype=bool)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One result per row of `logits` (float32 [R, vocab_size], the same on return)."""
        return self.launch(logits, rows).read()

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Sequence[SampleRow]) -> Draws:
        """`sample` without waiting for the device: `.tokens` is there for the next launch."""
        self._check_shape(logits, len(rows))
        edits = _Edits(self, logits, rows)
        tokens = _argmax(logits)
        peaks = logits.gather(1, tokens[:, None])
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        for start in range(0, len(drawn), self._rows):
            part = drawn[start : start + self._rows]
            if len(part) == len(rows):
                tokens = self._draw(logits, peaks, rows)
            else:
                index = torch.tensor(part, device=self.device)
                picked = self._draw(logits[index], peaks[index], [rows[i] for i in part])
                tokens[index] = picked
        edits.undo()
        wanted = {i: row.params.logprobs for i, row in enumerate(rows)}
        scored = {i: top for i, top in wanted.items() if top is not None}
        scores = self._scores(logits, list(scored), tokens, list(scored.values()))
        return Draws(tokens, peaks[:, 0], list(scored), scores, edits.errors)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, targets: Sequence[int], top: int) -> list[Score]:
        """How probable `targets[i]` was under `logits[i]` (float32 [P, vocab_size])."""
        self._check_shape(logits, len(targets))
        wrong = [t for t in targets if not 0 <= t < self.vocab_size]
        if wrong:
            raise ValueError(f"target token {wrong[0]}, expected in [0, {self.vocab_size})")
        tokens = torch.tensor(list(targets), dtype=torch.int64, device=self.device)
        parts = self._scores(logits, list(range(len(targets))), tokens, [top] * len(targets))
        return [score for part in parts for score in part.read()]

    def distinct_prompt_ids(self, row: SampleRow) -> np.ndarray:
        held = self._prompts[row.slot]
        if held is None or held[0] is not row.prompt_ids:
            held = (row.prompt_ids, np.unique(np.array(row.prompt_ids, dtype=np.int64)))
            self._prompts[row.slot] = held
        return held[1]

    def _check_shape(self, logits: Tensor, n_rows: int) -> None:
        shaped = logits.shape == (n_rows, self.vocab_size) and logits.is_contiguous()
        if not shaped or logits.dtype != torch.float32:
            raise ValueError(
                f"{tuple(logits.shape) = }, {logits.dtype = }, "
                f"expected contiguous {(n_rows, self.vocab_size)}, torch.float32"
            )

    def _draw(self, logits: Tensor, peaks: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """int64[r]: one token per row, r <= the rows of the scratch."""
        e = torch.sub(logits, peaks, out=self._e[: len(rows)])
        heat = [min(max(row.params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for row in rows]
        if any(t != 1.0 for t in heat):
            e /= torch.tensor(heat, device=self.device)[:, None]
        e.exp_()
        self._truncate(e, rows)
        blocks, ends = self._cdf(e)
        bits = draw_bits_of([row.seed for row in rows], [row.position for row in rows])
        # goal is in [0, mass): the token is the first whose cumulative sum exceeds it.
        goal = _scaled(torch.from_numpy(bits).to(self.device), ends[:, -1])[:, None]
        block = (ends <= goal).sum(1, keepdim=True).clamp_(max=ends.shape[1] - 1)
        goal -= (ends - blocks).gather(1, block)
        inner = self._w[: len(rows)].view(len(rows), -1, BLOCK)
        inner = inner.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(1)
        token = block * BLOCK + (inner <= goal).sum(1, keepdim=True)
        # Only a row without a finite largest logit gets here out of range; it ends in an error.
        return token[:, 0].clamp_(max=self.vocab_size - 1)

    def _cdf(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Block sums of the fixed-point `e` and their running sum, int64[r, blocks]; eats `e`."""
        w = self._w[: len(e)]
        w[:, : self.vocab_size] = e.mul_(2.0**self._bits)
        blocks = w.view(len(e), -1, BLOCK).sum(2)
        return blocks, blocks.cumsum(1)

    def _truncate(self, e: Tensor, rows: Sequence[SampleRow]) -> None:
        """Zeroes in place what top_k, top_p and min_p leave out of `e` (float32[r, V])."""
        limited, open_ended = [], []
        for i, row in enumerate(rows):
            if 0 < row.params.top_k < self.vocab_size:
                limited.append(i)
            elif row.params.top_p < 1.0:
                open_ended.append(i)
        if not (limited or open_ended or any(row.params.min_p for row in rows)):
            return
        # The largest e is 1, so min_p is itself the threshold.
        floors = torch.tensor([row.params.min_p for row in rows], device=self.device)[:, None]
        for part, cut in ((limited, self._limited_cut), (open_ended, self._open_cut)):
            if part:
                index = torch.tensor(part, device=self.device)
                group = e if len(part) == len(rows) else e[index]
                floor = cut(group, [rows[i].params for i in part])
                floors[index] = torch.maximum(floors[index], floor)
        e.masked_fill_(e < floors, 0.0)

    def _limited_cut(self, e: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """float32[r, 1]: the smallest e that top_k, then top_p, keep in each row."""
        k = torch.tensor([p.top_k for p in params], device=self.device)[:, None]
        largest = _largest(e, max(p.top_k for p in params))
        kth = largest.gather(1, k - 1)
        if all(p.top_p == 1.0 for p in params):
            return kth
        # Mass of all e >= kth: the first k of `largest`, and the ties of the k-th beyond it.
        kept = self._fixed(largest)
        kept.masked_fill_(torch.arange(kept.shape[1], device=self.device) >= k, 0)
        mass = kept.cumsum(1)
        ties = (e >= kth).sum(1, keepdim=True) - k
        goal = _goal(params, mass[:, -1:] + ties * self._fixed(kth))
        last = torch.minimum((mass < goal).sum(1, keepdim=True), k - 1)
        return largest.gather(1, last)

    def _open_cut(self, e: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """float32[r, 1]: the smallest e that top_p keeps in each row."""
        goal = _goal(params, self._fixed(e).sum(1, keepdim=True))
        width = self.vocab_size
        if self.device.type == "cpu":  # most often a few tokens hold the share: look there first
            width = min(width, NUCLEUS)
        while True:
            largest = _largest(e, width)
            mass = self._fixed(largest).cumsum(1)
            # The whole row holds at least `goal`, so the second turn is the last.
            if width == self.vocab_size or bool((mass[:, -1:] >= goal).all()):
                # The clamp is for rows without a finite largest logit, which end in an error.
                last = (mass < goal).sum(1, keepdim=True).clamp_(max=width - 1)
                return largest.gather(1, last)
            width = self.vocab_size

    def _fixed(self, e: Tensor) -> Tensor:
        """int64: `e` in fixed point; exact for what is not far below the largest of the row."""
        return (e * 2.0**self._bits).to(torch.int64)

    def _scores(
        self, logits: Tensor, index: list[int], tokens: Tensor, tops: list[int]
    ) -> list[_ScorePart]:
        """Scores of `tokens[i]` under `logits[i]` for every i of `index`, a few rows at a time."""
        parts = []
        for start in range(0, len(index), self._rows):
            rows = index[start : start + self._rows]
            whole = len(rows) == len(logits)
            picked = torch.tensor(rows, device=self.device)
            x = logits if whole else logits[picked]
            token = tokens if whole else tokens[picked]
            own = x.gather(1, token[:, None])
            peak = x.amax(1, keepdim=True)
            _, ends = self._cdf(torch.sub(x, peak, out=self._e[: len(x)]).exp_())
            rank = (x > own).sum(1) + 1
            part = _ScorePart(own[:, 0], peak[:, 0], ends[:, -1], rank, 2.0**self._bits)
            parts.append(part.with_top(x, tops[start : start + self._rows]))
        return parts


class Draws(NamedTuple):
    """The draws of one launch, still on the device."""

    tokens: Tensor  # int64[R]; meaningless where `read` reports an error
    peaks: Tensor  # float32[R], the largest edited logit of each row
    scored: list[int]  # the rows with log-probabilities, in the order of `scores`
    scores: list[_ScorePart]
    errors: dict[int, str]

    def read(self) -> list[Sampled]:
        """Waits for the device."""
        results = [Sampled(token) for token in self.tokens.tolist()]
        for i, score in zip(self.scored, (s for part in self.scores for s in part.read())):
            results[i] = Sampled(results[i].token, score.logprob, score.top, score.rank)
        results = [checked(row, peak) for row, peak in zip(results, self.peaks.tolist())]
        for i, why in self.errors.items():
            results[i] = Sampled(-1, error=why)
        return results


class _ScorePart(NamedTuple):
    own: Tensor  # float32[r], the logit of the token
    peak: Tensor  # float32[r], the largest logit
    mass: Tensor  # int64[r], sum of exp(logit - peak) * scale
    rank: Tensor  # int64[r]
    scale: float
    n_top: tuple[int, ...] = ()
    at: Tensor | None = None  # int64[m, 2]: (row, id) of the candidates for `top`, ids ascending
    values: Tensor | None = None  # float32[m], their logits

    def with_top(self, logits: Tensor, n_top: list[int]) -> _ScorePart:
        tops = tuple(min(n, logits.shape[1]) for n in n_top)
        if not any(tops):
            return self._replace(n_top=tops)
        counts = torch.tensor(tops, device=logits.device)[:, None]
        kth = _largest(logits, max(tops)).gather(1, (counts - 1).clamp_(min=0))
        # All that tie with the k-th: which of them a device's top-k returns is not defined.
        at = ((logits >= kth) & (counts > 0)).nonzero()
        return self._replace(n_top=tops, at=at, values=logits[at[:, 0], at[:, 1]])

    def read(self) -> list[Score]:
        found: list[list[tuple[int, float]]] = [[] for _ in self.n_top]
        if self.at is not None and self.values is not None:
            for (row, token), value in zip(self.at.tolist(), self.values.tolist()):
                found[row].append((token, value))
        scores = []
        read = (self.own.tolist(), self.peak.tolist(), self.mass.tolist(), self.rank.tolist())
        for n, tokens, own, peak, mass, rank in zip(self.n_top, found, *read):
            best = sorted(tokens, key=lambda pair: (-pair[1], pair[0]))[:n]
            scores.append(score_of(own, peak, mass / self.scale, rank, best))
        return scores


def score_of(
    own: float, peak: float, mass: float, rank: int, best: Sequence[tuple[int, float]]
) -> Score:
    """From logits: the token's, the largest, the sum of exp(logit - peak), the alternatives'."""
    if not (math.isfinite(peak) and mass > 0):
        return Score(math.nan, rank, ())
    log_mass = math.log(mass)
    top = tuple((token, value - peak - log_mass) for token, value in best)
    return Score(own - peak - log_mass, rank, top)


def checked(row: Sampled, peak: float) -> Sampled:
    """The row, or why it has no token; peak: its largest edited logit."""
    if not math.isfinite(peak):
        return Sampled(-1, error=f"no token can be drawn: the largest logit is {peak}")
    if row.logprob is not None and not math.isfinite(row.logprob):
        return Sampled(-1, error=f"the log-probability of token {row.token} is {row.logprob}")
    return row


class _Edits:
    """Steps 0 to 3 in place, and the way back.

    Rows whose ids are outside the vocabulary are left alone and named in `errors`.
    """

    def __init__(self, sampler: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        self.errors: dict[int, str] = {}
        self._vocab_size = sampler.vocab_size
        self._flat = logits.view(-1)
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._logits = logits
        self._unmasked: list[tuple[Tensor, Tensor]] = []  # rows, and what was there
        self._rows_of_cpu: list[tuple[int, np.ndarray]] = []  # likewise, without torch's threads
        self._mask(rows)
        biased: list[tuple[int, float]] = []
        penalised: list[np.ndarray] = []
        banned: list[int] = []
        for i, row in enumerate(rows):
            if row.refused is not None:
                self.errors[i] = row.refused
                continue
            bias = row.params.logit_bias or {}
            if not (row.banned or bias or row.params.penalised):
                continue
            try:
                self._check("banned", row.banned)
                self._check("logit_bias", bias)
                if row.params.penalised:
                    penalised.append(self._penalties(i, row, sampler))
            except ValueError as error:
                self.errors[i] = str(error)
                continue
            start = i * self._vocab_size
            biased += [(start + token, value) for token, value in bias.items()]
            banned += [start + token for token in row.banned]
        self._apply(biased, penalised, banned)

    def undo(self) -> None:
        while self._saved:
            at, values = self._saved.pop()
            self._flat[at] = values
        for rows, values in self._unmasked:
            self._logits[rows] = values
        for i, row in self._rows_of_cpu:
            self._logits.numpy()[i] = row

    def _mask(self, rows: Sequence[SampleRow]) -> None:
        """-inf for all tokens that the masks do not allow; whole rows are kept for `undo`."""
        masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
        if not masked:
            return
        if self._logits.device.type == "cpu":
            x = self._logits.numpy()
            for i, mask in masked:
                self._rows_of_cpu.append((i, x[i].copy()))
                x[i] += _penalty_of(mask)[: self._vocab_size]
            return
        at = torch.tensor([i for i, _ in masked], device=self._logits.device)
        values = self._logits[at]
        self._unmasked.append((at, values))
        words = torch.from_numpy(np.stack([mask for _, mask in masked])).to(at.device)
        shifts = torch.arange(32, dtype=torch.int32, device=at.device)
        barred = ((words[:, :, None] >> shifts & 1) == 0).view(len(masked), -1)
        self._logits[at] = values.masked_fill(barred[:, : self._vocab_size], -math.inf)

    def _apply(
        self,
        biased: list[tuple[int, float]],
        penalised: list[np.ndarray],
        banned: list[int],
    ) -> None:
        device = self._flat.device
        if biased:
            at = torch.tensor([place for place, _ in biased], device=device)
            added = torch.tensor([value for _, value in biased], device=device)
            self._write(at, self._flat[at] + added)
        if penalised:
            columns = torch.from_numpy(np.concatenate(penalised, axis=1)).to(device)
            at = columns[0].long()
            factor, minus = columns[1].float(), columns[2].float()
            x = self._flat[at]
            self._write(at, torch.where(x > 0, x / factor, x * factor) - minus)
        if banned:
            at = torch.tensor(banned, device=device)
            self._write(at, torch.full(at.shape, -math.inf, device=device))

    def _write(self, at: Tensor, values: Tensor) -> None:
        self._saved.append((at, self._flat[at]))
        self._flat[at] = values

    def _check(self, name: str, ids: Collection[int] | np.ndarray) -> None:
        if len(ids) and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(int(t) for t in ids if not 0 <= t < self._vocab_size)
            raise ValueError(f"{name} holds token {wrong}, expected in [0, {self._vocab_size})")

    def _penalties(self, i: int, row: SampleRow, sampler: Sampler) -> np.ndarray:
        """float64[3, m]: flat place (exact below 2**53), factor, subtracted; no place twice."""
        params = row.params
        ids, counts = np.unique(np.array(row.output_ids, dtype=np.int64), return_counts=True)
        self._check("output", ids[[0, -1]] if len(ids) else ids)
        if params.repetition_penalty != 1.0:
            prompt = sampler.distinct_prompt_ids(row)
            self._check("prompt", prompt[[0, -1]] if len(prompt) else prompt)
            sampler.seen[ids] = True
            rest = prompt[~sampler.seen[prompt]]
            sampler.seen[ids] = False
            ids = np.concatenate([ids, rest])
            counts = np.concatenate([counts, np.zeros_like(rest)])
        minus = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        places = ids + i * self._vocab_size
        return np.stack([places, np.full(len(ids), params.repetition_penalty), minus])


# Byte of a mask → what to add to eight logits, the lowest bit first.
_PENALTIES = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0.0, -math.inf)
_PENALTIES = _PENALTIES.astype(np.float32)


def _penalty_of(mask: np.ndarray) -> np.ndarray:
    """float32[32 * words]: 0 where the bit is set, else -inf.

    Adding them takes a tenth of the time that it takes to fill under a mask.
    """
    return _PENALTIES.take(mask.view(np.uint8), axis=0).reshape(-1)


def _argmax(x: Tensor) -> Tensor:
    """int64[R]: the lowest index of the largest value of each row; of a NaN, if there is one."""
    if x.device.type == "cpu":  # numpy's is vectorised: ten times as fast as torch's here
        return torch.from_numpy(x.numpy().argmax(1))
    return x.argmax(1)


def _largest(x: Tensor, k: int) -> Tensor:
    """float32[R, k]: the k largest values of each row, descending."""
    if (
        x.device.type == "cpu"
    ):  # numpy sorts with vector instructions: 30 times as fast as torch here
        values = x.numpy()
        if k < x.shape[1]:
            values = np.partition(values, x.shape[1] - k, axis=1)[:, x.shape[1] - k :]
        return torch.from_numpy(np.sort(values, axis=1)).flip(1)
    return x.topk(k, dim=1).values if k < x.shape[1] else x.sort(dim=1, descending=True).values


def share_of(params: SamplingParams) -> int:
    """top_p * 2**62, at least 1; 0 if it is off."""
    return max(int(params.top_p * (1 << 62)), 1) if params.top_p < 1.0 else 0


def _goal(params: Sequence[SamplingParams], total: Tensor) -> Tensor:
    """int64[r, 1]: the mass that top_p asks of each `total`; a row without top_p keeps all."""
    shares = [share_of(p) for p in params]
    share = torch.tensor(shares, device=total.device)[:, None]
    return torch.where(share > 0, _scaled(share, total), total).clamp_(min=1)


def _scaled(fraction: Tensor, whole: Tensor) -> Tensor:
    """floor(fraction / 2**62 * whole) exactly, for int64 in [0, 2**62).

    Schoolbook multiplication on halves of 31 bits: no partial sum reaches 2**63.
    """
    low = (1 << 31) - 1
    f1, f0, w1, w0 = fraction >> 31, fraction & low, whole >> 31, whole & low
    return f1 * w1 + ((f1 * w0 + f0 * w1 + (f0 * w0 >> 31)) >> 31)
