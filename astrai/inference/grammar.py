"""Grammars at work: compiled off the loop, kept, and asked per token what may follow."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from astrai.front.structured import MAX_WHITESPACE, GrammarError, StructuredOutput

if TYPE_CHECKING:
    from astrai.models.tokenizer import Tokenizer

COMPILE_SECONDS = 10.0  # what takes longer is refused
COMPILERS = 2  # threads that compile at once
MAX_OVERDUE = 4  # threads that may be past their time before no new one is started
ABANDONED_SECONDS = 1.0  # nobody asked for that long: one that is not begun is not compiled
MAX_COMPILED = 128  # grammars kept, least recently used out
# Bounds of the compiler itself; its fuel is spent at 14k to 50k units per millisecond. Ambiguous
# grammars need many items; hundreds of optional properties need a few thousand.
COMPILE_FUEL = 1_000_000
STEP_FUEL = 200_000
STEP_ITEMS = 10_000
# Processor time that a task may take of the loop for its grammar: at once, and per token. Usual
# ones take a hundredth of it.
BURST_SECONDS = 0.2
TOKEN_SECONDS = 0.005
# A grammar of MAX_BYTES may nest its rules 16k deep, and the compiler descends into them: 64 MiB
# were enough, the usual 8 were not. Memory is taken as it is used.
_STACK_BYTES = 256 << 20
_MAX_MESSAGE = 500  # characters of the compiler's message


class Matcher:
    """Where one task's output stands in its grammar.

    Owns its state and the memory of one mask. The compiled grammar is shared. For one thread.
    """

    __slots__ = ("_inner", "_left", "_mask", "_source", "eos_ids")

    def __init__(self, inner: Any, n_words: int, eos_ids: tuple[int, ...], source: str) -> None:
        self._inner = inner
        self._mask = np.zeros(n_words, dtype=np.int32)
        self._source = source
        self._left = BURST_SECONDS
        self.eos_ids = eos_ids  # these end the output, where the grammar lets it end

    def advance(self, token: int) -> bool:
        """Take the next token of the output; True if the output is complete: nothing may follow.

        Raises GrammarError if the grammar does not allow the token, or gives up.
        """
        began = time.thread_time()
        if not self._inner.consume_token(token):
            raise self._error(f"token {token} cannot be matched")
        self._charge(began + TOKEN_SECONDS)
        return bool(self._inner.is_stopped())

    def mask(self, held_off: Collection[int] = ()) -> np.ndarray:
        """int32[ceil(vocab_size / 32)]: bit i % 32 of word i // 32 says that token i may follow.

        Tokens `held_off` may not, unless nothing else may. Valid until the next call. Raises
        GrammarError if the grammar gives up.
        """
        mask = self._mask
        began = time.thread_time()
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():
            raise self._error("no mask")
        self._charge(began)
        if held_off:
            kept = mask.view(np.uint32).copy()
            for token in held_off:
                kept[token // 32] &= ~np.uint32(1 << token % 32)
            if kept.any():
                mask[:] = kept.view(np.int32)
        return mask

    def _charge(self, began: float) -> None:
        self._left = min(self._left - (time.thread_time() - began), BURST_SECONDS)
        if self._left < 0:
            raise GrammarError(
                self._source,
                f"the grammar took {BURST_SECONDS:g} s more than the {TOKEN_SECONDS:g} s that it "
                "may take for each token: it is too ambiguous",
            )

    def _error(self, what: str) -> GrammarError:
        return GrammarError(self._source, f"{what}: {_short(self._inner.get_error())}")


@dataclass(slots=True, eq=False)
class _Job:
    asked: StructuredOutput
    asked_at: float  # when somebody who waits for it looked last
    began: float | None = None  # None: no compiler was free yet
    ended: threading.Event = field(default_factory=threading.Event)
    compiled: Any = None
    error: str | None = None

    def overdue(self, now: float) -> bool:
        return self.began is not None and now - self.began > COMPILE_SECONDS


class Grammars:
    """Compiles what requests ask for in threads of its own, and keeps it.

    Owns the compiled grammars, the compile threads and, once it was needed, the table of what
    bytes each token is. A compilation past its time is given up; its thread cannot be ended, so
    it is counted, and past MAX_OVERDUE of them nothing new is begun. For one thread.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        self._n_words = -(-vocab_size // 32)
        self._kept: OrderedDict[StructuredOutput, _Job] = OrderedDict()
        self._jobs: dict[StructuredOutput, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._table: Any = None
        self._table_lock = threading.Lock()

    def matcher(self, asked: StructuredOutput) -> Matcher | None:
        """At the start of the output; None while it is being compiled, which this call may begin.

        Who waits asks again and again: what nobody asks for any more is not begun. Raises
        GrammarError if it is refused, or took more than COMPILE_SECONDS.
        """
        self._collect()
        if (done := self._kept.get(asked)) is not None:
            self._kept.move_to_end(asked)
            if done.error is not None:
                raise GrammarError(asked.source, done.error)
            return self._started(done.compiled.deep_copy(), asked)
        now = time.monotonic()
        n_overdue = sum(job.overdue(now) for job in self._jobs.values())
        if (job := self._jobs.get(asked)) is None:
            if n_overdue >= MAX_OVERDUE:
                raise GrammarError(
                    asked.source,
                    f"{n_overdue} grammars are still compiling after {COMPILE_SECONDS:g} s: "
                    "no other is begun before one of them ends",
                )
            job = self._jobs[asked] = _Job(asked, now)
            self._queue.append(job)
        job.asked_at = now
        if job.overdue(now):
            raise GrammarError(
                asked.source, f"the {asked.kind} did not compile in {COMPILE_SECONDS:g} s"
            )
        n_busy = sum(job.began is not None for job in self._jobs.values()) - n_overdue
        while self._queue and n_busy < COMPILERS:
            job = self._queue.popleft()
            if now - job.asked_at > ABANDONED_SECONDS:
                del self._jobs[job.asked]
            else:
                self._start(job)
                n_busy += 1
        return None

    def wait(self, asked: StructuredOutput) -> None:
        """Return once `asked` is compiled. Raises GrammarError as `matcher` does."""
        while self.matcher(asked) is None:
            self._jobs[asked].ended.wait(0.05)

    def _collect(self) -> None:
        for asked, job in list(self._jobs.items()):
            if job.ended.is_set():
                del self._jobs[asked]
                self._kept[asked] = job
        while len(self._kept) > MAX_COMPILED:
            self._kept.popitem(last=False)

    def _start(self, job: _Job) -> None:
        job.began = time.monotonic()
        thread = threading.Thread(
            target=self._compile, args=(job,), name="astrai-grammar", daemon=True
        )
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)

    def _compile(self, job: _Job) -> None:
        """In a thread of the job. The first mask is part of it: it warms what all copies share."""
        try:
            table = self._tokens(job.asked)
            compiled = _compiled(job.asked, table)
            if why := compiled.get_error():
                job.error = f"the {job.asked.kind} is refused: {_short(why)}"
            else:
                self._started(compiled, job.asked).mask()
                job.compiled = compiled
        except GrammarError as error:
            job.error = str(error).removeprefix(f"{job.asked.source}: ")
        except ImportError as error:
            job.error = f"structured output needs astrai[structured]: {error}"
        # The compiler's panics are no Exceptions; whatever it was, it ends this job only.
        except BaseException as error:
            job.error = f"the {job.asked.kind} is refused: {_short(str(error))}"
        finally:
            job.ended.set()

    def _started(self, inner: Any, asked: StructuredOutput) -> Matcher:
        return Matcher(inner, self._n_words, self._eos_ids, asked.source)

    def _tokens(self, asked: StructuredOutput) -> Any:
        with self._table_lock:
            if self._table is None:
                if not self._eos_ids:
                    raise GrammarError(asked.source, "the model has no end-of-sequence token")
                self._table = _token_table(self._tokenizer, self._vocab_size, self._eos_ids)
            return self._table


class _Vocabulary:
    """The vocabulary as the compiler reads it: what bytes a token is, and a text's usual tokens.

    Where a grammar leaves one text only, the compiler allows only the usual token of it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self._tokenizer = tokenizer
        self._special = frozenset(self.special_token_ids)
        names = sorted((self.tokens[i].decode() for i in self._special), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        usual = {text: i for i, text in enumerate(self.tokens) if text and i not in self._special}
        self._id_of = usual
        self._longest = max(map(len, usual), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens that are exactly the bytes of `text`, none of them special."""
        ids: list[int] = []
        begin = 0
        # The name of a special token written in a text is text: it is cut, so as not to be read.
        cuts = [found.start() + 1 for found in self._names.finditer(text)]
        for end in (*cuts, len(text)):
            ids += self._tokenizer.encode(text[begin:end], add_special_tokens=False)
            begin = end
        data = text.encode()
        same = b"".join(self.tokens[i] for i in ids if i < len(self.tokens)) == data
        return ids if same and not self._special.intersection(ids) else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """For tokenizers that put a space before every text: the longest token, again and again."""
        ids = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            found = next((n for n in sizes if data[:n] in self._id_of), 0)
            if not found:
                raise ValueError(f"no token begins as {data[:8]!r} does")
            ids.append(self._id_of[data[:found]])
            data = data[found:]
        return ids


def _token_table(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids))
    return LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(eos_ids))


def _compiled(asked: StructuredOutput, table: Any) -> Any:
    """The grammar's matcher at its start; `get_error` of it says why it is refused."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        verbose_errors=False,
    )
    return LLMatcher(table, _internal(asked), log_level=0, limits=limits)


def _internal(asked: StructuredOutput) -> str:
    """In the compiler's own format."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if asked.regex is not None:
        # \d as most callers mean it, not the digits of every script.
        digits = regex_to_lark(asked.regex, "d")
        grammar: str = LLMatcher.grammar_from_lark(f"start: /{digits}/")
    elif asked.choice is not None:
        # As a regex, because a quoted string that is the text of a special token would be that.
        grammar = LLMatcher.grammar_from_regex("|".join(map(re.escape, asked.choice)))
    elif asked.grammar is not None:
        grammar = grammar_from("grammar", asked.grammar)
    else:
        schema = asked.json_schema if asked.json_schema is not None else '{"type": "object"}'
        space = rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}"
        # No schema may switch off what makes the output valid.
        strict = {"lenient": False, "coerce_one_of": False}
        grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": space}, strict)
    return grammar


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
