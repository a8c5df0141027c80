"""One request inside the engine, as a few integers from which the rest is derived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from astrai.front.sampling_params import SamplingParams
    from astrai.inference.grammar import Matcher

FinishReason = Literal["stop", "length", "abort", "error"]
WaitReason = Literal["slots", "pages", "prefill", "results", "grammar"]
WAIT_REASONS: tuple[WaitReason, ...] = ("slots", "pages", "prefill", "results", "grammar")
Ranked = tuple[tuple[int, float], ...]  # (token id, log-probability), most probable first


class TokenLogprob(NamedTuple):
    """What the model thought of one token: log-probability, rank (1 = first), alternatives."""

    token: int
    logprob: float
    rank: int
    top: Ranked


class Outcome(NamedTuple):
    """What one entry of a plan gave."""

    token: int = -1  # -1: the entry samples nothing, or there is an error
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()  # of the prompt positions this entry computed
    pooled: Sequence[float] = ()  # what this entry adds to the pooled hidden state
    error: str | None = None  # this row could not be sampled (for instance NaN logits)


NOTHING = Outcome()


class Done(NamedTuple):
    """A launch whose outcomes are known already."""

    outcomes: list[Outcome]

    def wait(self) -> list[Outcome]:
        return self.outcomes


class Timings(NamedTuple):
    """Where the time of a task went, in seconds; None for what it never reached."""

    queued: float | None  # arrival to first admission
    prefill: float | None  # first admission to first token
    decode: float | None  # first token to end
    n_prompt: int
    n_cached: int  # of the prompt, found in the prefix cache at the first admission
    n_output: int
    n_preempted: int
    waits: dict[str, int]  # reason → ticks


# The fields of a task that a request decides.
_BORN = (
    "id",
    "request_id",
    "prompt",
    "params",
    "max_tokens",
    "seed",
    "stop_ids",
    "bad_words",
    "namespace",
    "priority",
    "index",
    "siblings",
)
# The fields, besides tokens, that its edge reads once it is admitted, has begun or has ended.
SEEN = (
    "arrived_at",
    "admitted_at",
    "first_token_at",
    "ended_at",
    "n_cached",
    "n_preempted",
    "waits",
    "prompt_logprobs",
    "pooled",
    "stop_reason",
    "error",
)


@dataclass(slots=True, eq=False)
class Task:
    """A task's tokens, how far they are computed, and what it holds.

        0              n_prompt                computed        len(tokens)       target
        ├─────────────────┼───────────────────────┼──────────────────┼──────────────┤
        │     prompt      │            output      known to the host │   pending    │
        ├─────── KV launched (in its pages) ───────┤◄───────── wanted ──────────────┤

    `pending` tokens are sampled by launches whose results are not read back yet. A decode step is
    the case `wanted == 1`; a prefill chunk is any other. Preemption sets `computed` to 0 and keeps
    the tokens.

    Owns its tokens and counters; its page frames and slot belong to it only while the books and the
    scheduler say so.
    """

    id: int
    request_id: str
    prompt: list[int]  # never changed; choices of one request share it
    params: SamplingParams
    max_tokens: int  # resolved: never None, and prompt + max_tokens fits the context
    seed: int
    stop_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_check: Callable[[int], str | None] | None = (
        None  # sees each new token; a matched stop string ends the task
    )
    namespace: str = ""
    priority: int = 0
    index: int = 0  # which of the n choices of its request
    siblings: list[Task] = field(
        default_factory=list
    )  # the other choices, to be forked once the prompt is computed

    # Where its output stands in what it asked for in params.structured; None until compiled.
    matcher: Matcher | None = None
    tokens: list[int] = field(init=False)  # prompt, then output
    n_prompt: int = field(init=False)
    computed: int = 0
    pending: int = 0
    page_table: list[int] = field(default_factory=list)
    n_indexed: int = 0  # leading pages of the table that the prefix cache can find, or never will
    slot: int = -1
    epoch: int = 0  # admissions so far: results of an earlier one must not touch the present pages
    leader: Task | None = None  # the sibling whose pages a fork shares

    key: tuple[int, int, int] = (0, 0, 0)  # order of admission: aged arrival, request, choice
    n_cached: int = 0  # prompt positions found in the cache at the first admission
    n_preempted: int = 0
    waits: dict[str, int] = field(default_factory=dict)  # reason → ticks
    wait_mark: dict[str, int] = field(
        default_factory=dict
    )  # the scheduler's counters when the wait began
    arrived_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None

    # What is asked of the prompt grows chunk by chunk.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: list[Sequence[float]] = field(default_factory=list)

    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A task crosses to a loop in another process as it was born."""
        return {name: getattr(self, name) for name in _BORN}

    def __setstate__(self, born: dict[str, Any]) -> None:
        self.__init__(**born)  # type: ignore[misc]

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.n_prompt = len(self.prompt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Prompt chunks give the log-probabilities of their tokens, once."""
        return self.params.prompt_logprobs is not None and self.index == 0 and self.n_output == 0

    @property
    def gated(self) -> bool:
        """What its output must match is not compiled yet."""
        return self.params.structured is not None and self.matcher is None

    @property
    def samples_nothing(self) -> bool:
        """It ends when its prompt is computed."""
        return self.max_tokens == 0

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def target(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def wanted(self) -> int:
        return len(self.tokens) + self.pending - self.computed

    @property
    def prefilling(self) -> bool:
        """Its next entry is a prefill chunk: the prompt, or what a preemption threw away."""
        return self.computed < self.n_prompt or len(self.tokens) + self.pending > self.computed + 1

    @property
    def decoding(self) -> bool:
        """Its next entry is one position: it may say more than is said or on its way, and what may
        follow does not depend on a token that the host does not know yet."""
        known = len(self.tokens) + self.pending
        return (
            self.n_prompt <= self.computed
            and known <= self.computed + 1
            and known < self.n_prompt + self.max_tokens
            and not (self.pending and self.params.structured is not None)
        )

    def timings(self) -> Timings:
        """Of an ended task: nothing in it changes any more."""
        return Timings(
            queued=_between(self.arrived_at, self.admitted_at),
            prefill=_between(
                self.admitted_at, self.ended_at if self.samples_nothing else self.first_token_at
            ),
            decode=_between(self.first_token_at, self.ended_at),
            n_prompt=self.n_prompt,
            n_cached=self.n_cached,
            n_output=self.n_output,
            n_preempted=self.n_preempted,
            waits=self.waits,
        )

    def check_fits(self, n_pages: int, page_size: int) -> None:
        """Raise ValueError, with both numbers, if a whole pool of `n_pages` could not hold it."""
        needed = -(-self.max_positions // page_size)
        if needed > n_pages:
            raise ValueError(
                f"the request needs {needed} pages of {page_size} positions (prompt "
                f"{self.n_prompt} + max_tokens {self.max_tokens}), the whole pool has {n_pages}"
            )

    @property
    def max_positions(self) -> int:
        """KV positions it can need at most: the last token it samples is never fed back."""
        return self.n_prompt + max(self.max_tokens - 1, 0)


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


class Entry(NamedTuple):
    """`n` positions from `start` on: a prefill chunk and a decode step differ only in length."""

    task: Task
    start: int
    n: int
    samples: bool  # a token is drawn from the logits of its last position
    epoch: int


@dataclass(slots=True)
class Plan:
    """What one tick runs: plain data, the same for a model, a mock, a replay or several devices.

    Order on the device: clears, copies, then the entries' writes and reads.
    """

    tick: int
    # Prefill chunks, then decode steps.
    entries: dict[Task, Entry] = field(default_factory=dict)
    # Page frames to zero: a failed task held them, and even a masked read would spread a NaN.
    clears: list[int] = field(default_factory=list)
    # Page frames (source, target): the partial pages of forks.
    copies: list[tuple[int, int]] = field(default_factory=list)
    # Decode entries that share one dense matmul.
    groups: list[list[Task]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.entries)


class Update(NamedTuple):
    """What a tick tells the edge about one task."""

    task: Task
    token_ids: list[int]
    logprobs: list[TokenLogprob]  # one per token if asked for, else empty
    finish_reason: FinishReason | None
