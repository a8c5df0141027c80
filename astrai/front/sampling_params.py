"""What a request asks of the sampler, checked where it is born."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from astrai.front.structured import StructuredOutput

MAX_N = 16_384
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
_U64 = (1 << 64) - 1


class LogitBias(Mapping[int, float]):
    """A read-only mapping token id -> bias that copies, pickles and compares like a dict."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[int, float]) -> None:
        self._items = dict(items)

    def __getitem__(self, token: int) -> float:
        return self._items[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler. Checked here, once; a refused field is named.

    Sequence fields are stored as tuples (a lone string counts as one, None as none) and
    `logit_bias` as a read-only mapping, so the object never changes after it is made.
    """

    n: int = 1  # completions per prompt, 1 .. MAX_N
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]; 1 = off
    top_k: int = 0  # 0 or -1 = off, stored as 0
    min_p: float = 0.0  # [0, 1], relative to the most probable token; 0 = off
    repetition_penalty: float = 1.0  # > 0, over prompt and output; 1 = off
    presence_penalty: float = 0.0  # [-2, 2], over the output
    frequency_penalty: float = 0.0  # [-2, 2], per occurrence in the output
    logit_bias: Mapping[int, float] | None = None  # token id -> [-100, 100]
    seed: int | None = None  # any signed or unsigned 64-bit integer; None = drawn at arrival
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    # None = up to the context length; 0 = only what is asked of the prompt is computed
    max_tokens: int | None = 16
    logprobs: int | None = None  # alternatives per token, 0 .. MAX_LOGPROBS (0 = the token's own)
    prompt_logprobs: int | None = None  # likewise, for each prompt token
    # The prompt's hidden states as one vector, their mean or the last; with max_tokens = 0
    pooling: Literal["mean", "last"] | None = None
    bad_words: Sequence[str] = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured: StructuredOutput | None = None  # what the output must match

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_pooling()
        self._set("stop", _strings("stop", self.stop))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} = {getattr(self, name)!r}, expected true or false")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise ValueError(f"structured = {self.structured!r}, expected a StructuredOutput")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    @property
    def truncated(self) -> bool:
        """Tokens are drawn, and not from the whole vocabulary."""
        return not self.greedy and bool(self.top_k or self.top_p < 1.0 or self.min_p)

    @property
    def reads_whole_prompt(self) -> bool:
        """Something is asked of every position of the prompt, so none can come from the cache."""
        return self.prompt_logprobs is not None or self.pooling == "mean"

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id named here is not one of the model's `vocab_size` ids."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias or ()),
        ):
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(f"{name} names token {token}, expected < {vocab_size = }")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
            ("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
            ("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
        ):
            self._set(name, _number(name, getattr(self, name), low, high))
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0.0:
                raise ValueError(f"{name} = {getattr(self, name)}, expected > 0")
        top_k = _integer("top_k", self.top_k, -1)
        self._set("top_k", max(top_k, 0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, -(1 << 63), _U64))

    def _check_lengths(self) -> None:
        self._set("n", _integer("n", self.n, 1, MAX_N))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, 0))
            if self.max_tokens == 0 and self.prompt_logprobs is None and self.pooling is None:
                raise ValueError(
                    "max_tokens = 0, expected >= 1 unless prompt_logprobs or pooling is asked for"
                )
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens = {self.min_tokens}, expected <= max_tokens = {self.max_tokens}"
                )

    def _check_pooling(self) -> None:
        if self.pooling is None:
            return
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling = {self.pooling!r}, expected 'mean' or 'last'")
        for name, wanted in (("max_tokens", 0), ("n", 1), ("prompt_logprobs", None)):
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"{name} = {getattr(self, name)}, expected {wanted} with pooling: "
                    "nothing is sampled"
                )


def resolve_seed(seed: int | None, index: int = 0) -> int:
    """The 64-bit seed of completion `index` of a request; drawn from the OS if `seed` is None.

    Completion 0 uses the request's own seed; the others mix it with their index (SplitMix64,
    Steele, Lea and Flood, 2014), so that they are unlike the completions of a neighbouring seed.
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    if index == 0:
        return seed & _U64
    z = (seed + index * 0x9E3779B97F4A7C15) & _U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
    return z ^ (z >> 31)


def early_ends(
    params: SamplingParams, n_output: int, eos_token_ids: Collection[int]
) -> frozenset[int]:
    """While fewer than `min_tokens` are out, every id that would end the task."""
    if n_output >= params.min_tokens:
        return frozenset()
    # With ignore_eos the end-of-sequence id ends nothing, so there is nothing to hold off.
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)


def bad_word_ends(
    output_ids: Sequence[int], bad_word_ids: Sequence[Sequence[int]]
) -> frozenset[int]:
    """The last token of every bad word whose other tokens are the end of `output_ids`."""
    banned = set()
    for word in bad_word_ids:
        start = len(output_ids) - (len(word) - 1)
        if start >= 0 and list(output_ids[start:]) == list(word[:-1]):
            banned.add(word[-1])
    return frozenset(banned)


def _number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}, expected a number")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name} = {value!r}, expected a finite number in [{low:g}, {high:g}]")
    return number


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}, expected an integer")
    number = int(value)
    if number < low or (high is not None and number > high):
        wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} = {number}, expected {wanted}")
    return number


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} = {value!r}, expected a string or a list of strings")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}[{i}] = {text!r}, expected a string that is not empty")
    return tuple(value)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} = {value!r}, expected a list of token ids")
    return tuple(_integer(f"{name}[{i}]", token, 0) for i, token in enumerate(value))


def _bias(value: object) -> LogitBias:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias = {value!r}, expected a mapping of token id to number")
    return LogitBias(
        {
            _integer("logit_bias key", token, 0): _number(
                f"logit_bias[{token}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS
            )
            for token, bias in value.items()
        }
    )
