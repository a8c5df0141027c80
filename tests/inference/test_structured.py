"""Structured output: what is asked, what it compiles to, and that the output always matches."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import GrammarError, StructuredOutput
from astrai.inference import grammar
from astrai.inference.engine import Engine, Message
from astrai.inference.grammar import Grammars, Matcher
from astrai.inference.task import Entry, Outcome, Task
from astrai.models.tokenizer import ByteTokenizer
from astrai.runtime.runner import sample_row
from astrai.runtime.sampling.sampler import Sampler
from tests.mocks import Bench, MockRunner, make_task

VOCAB, EOS = 272, 257  # a little more than the tokenizer has, as padded vocabularies do
TOKENIZER = ByteTokenizer()
GRAMMARS = Grammars(TOKENIZER, VOCAB, (EOS,))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def matcher_of(asked: StructuredOutput) -> Matcher:
    GRAMMARS.wait(asked)
    matcher = GRAMMARS.matcher(asked)
    assert matcher is not None
    return matcher


def allowed(mask: np.ndarray) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode()


class NoisyRunner(MockRunner):
    """Draws from logits that are noise of (seed, position), with a lean to what ends things."""

    def __init__(self, bench: Bench, depth: int) -> None:
        super().__init__(bench.books, depth)
        self.sampler = Sampler(VOCAB, bench.scheduler.config.max_slots, "cpu")
        self.ignores_masks: set[int] = set()

    def _sample(self, task: Task, n: int) -> Outcome:
        import torch

        output = task.tokens[task.n_prompt :]
        noise = np.random.default_rng((task.seed, n)).normal(size=VOCAB).astype(np.float32)
        noise[[*b'"}],', EOS]] += 4.0
        if task.id in self.ignores_masks:
            return Outcome(0)
        row = sample_row(Entry(task, n - 1, 1, True, task.epoch), output)
        (drawn,) = self.sampler.sample(torch.from_numpy(noise)[None], [row])
        self.last[task.id] = drawn.token
        return Outcome(drawn.token, error=drawn.error)


class Desk(Bench):
    """The mock engine with noise for a model and a compiler of grammars."""

    def __init__(self, n_pages: int = 200, depth: int = 0, **config: Any) -> None:
        super().__init__(n_pages, page_size=16, depth=depth, **config)
        self.noisy = NoisyRunner(self, depth)
        self.runner = self.noisy
        self.errors: dict[int, str | None] = {}
        self.engine = Engine(self.scheduler, self.noisy, self._keep, grammars=GRAMMARS)

    def _keep(self, updates: list[Any]) -> None:
        self.deliver(updates)
        for update in updates:
            self.errors[update.task.id] = update.task.error

    def run(self, *tasks: Task, until: Callable[[], bool] | None = None) -> None:
        self.engine.post(Message(add=tasks))
        for _ in range(20_000):
            if self.engine.idle or (until is not None and until()):
                break
            self.engine.step()
        self.scheduler.check()


def task_of(
    number: int, asked: StructuredOutput | None, max_tokens: int = 100, **params: Any
) -> Task:
    params.setdefault("stop_token_ids", ())
    chosen = SamplingParams(structured=asked, max_tokens=max_tokens, **params)
    stops = frozenset(chosen.stop_token_ids) | (frozenset() if chosen.ignore_eos else {EOS})
    return make_task(number, [1, 2, 3], max_tokens, seed=number, stop_ids=stops, params=chosen)


# ── what is asked ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "structured has nothing, expected exactly one of"),
        ({"regex": "a", "choice": ("a",)}, "structured has regex and choice, expected exactly"),
        ({"json_object": 1}, "json_object = 1, expected true or false"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, "json_schema is a JSON list, expected an object"),
        ({"json_schema": "true"}, "json_schema is a JSON bool, expected an object"),
        ({"json_schema": {"type": "object"}}, "expected text"),
        ({"regex": ""}, "regex = '', expected text"),
        ({"regex": "a" * 16_385}, "regex has 16385 bytes, expected at most 16384"),
        ({"grammar": "é" * 65_537}, "grammar has 131074 bytes, expected at most 131072"),
        ({"grammar": "\ud800"}, "lone surrogate"),
        ({"choice": []}, "choice = [], expected a list of strings"),
        ({"choice": "abc"}, "choice = 'abc', expected a list of strings"),
        ({"choice": ["a", ""]}, "choice[1] = '', expected a string with text"),
        ({"choice": ["a" * 100_000] * 2}, "choice has 200000 bytes, expected at most 131072"),
    ],
)
def test_what_is_malformed_is_refused_where_it_is_born(given: Any, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        StructuredOutput(**given)


def test_plain_data_that_knows_its_field() -> None:
    asked = StructuredOutput(choice=["a", "b"], source="guided_choice")  # type: ignore[arg-type]
    assert asked.choice == ("a", "b")
    assert asked == StructuredOutput(choice=("a", "b"))
    assert hash(asked) == hash(StructuredOutput(choice=("a", "b")))
    assert pickle.loads(pickle.dumps(SamplingParams(structured=asked))).structured == asked
    with pytest.raises(ValueError, match="guided_regex: regex has 20000 bytes"):
        StructuredOutput(regex="a" * 20_000, source="guided_regex")
    with pytest.raises(ValueError, match="structured = 'x', expected a StructuredOutput"):
        SamplingParams(structured="x")  # type: ignore[arg-type]


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, astrai.front.structured, astrai.inference.grammar;"
        "sys.exit(bool({'torch', 'llguidance'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── what it compiles to ─────────────────────────────────────────────────────────────────────────


def walk(asked: StructuredOutput, seed: int, limit: int = 300) -> str | None:
    """A text made of allowed tokens; None if it did not end within `limit`."""
    rng = random.Random(seed)
    matcher, tokens = matcher_of(asked), []
    for _ in range(limit):
        choices = allowed(matcher.mask())
        ends = [token for token in choices if token in (*b'"}]', EOS)]
        tokens.append(rng.choice(ends if ends and rng.random() < 0.5 else choices))
        if matcher.advance(tokens[-1]):
            return text_of(tokens)
    return None


@pytest.mark.parametrize("seed", range(5))
def test_every_walk_through_the_masks_matches(seed: int) -> None:
    code = walk(StructuredOutput(regex=r"[A-Z]{2}-\d+(\.\d)?"), seed)
    assert code is not None
    assert re.fullmatch(r"[A-Z]{2}-\d+(\.\d)?", code)
    assert allowed(matcher_of(StructuredOutput(regex=r"\d|[\d/]{2}")).mask()) == [*b"/0123456789"]
    words = ("yes", "no", "<eos>", 'a "b"\\\n/ é|(x)', "yes, but")
    assert walk(StructuredOutput(choice=words), seed) in words
    for ebnf in ('root ::= "yes" | "no"', 'start: A | "no"\nA: "yes"'):
        assert walk(StructuredOutput(grammar=ebnf), seed) in ("yes", "no")
    mixed = 'start: "<call>" call "</call>"\ncall: %json {"type": "integer"}'
    call = walk(StructuredOutput(grammar=mixed), seed)
    assert call is not None
    assert re.fullmatch(r"<call>-?\d+</call>", call)
    person = walk(StructuredOutput(json_schema=json.dumps(PERSON)), seed)
    if person is not None:
        jsonschema.validate(json.loads(person), PERSON)
    something = walk(StructuredOutput(json_object=True), seed)
    assert something is None or isinstance(json.loads(something), dict)


def test_only_lark_without_quotes_means_a_special_token() -> None:
    for lark in ('start: <bos> "x"', 'start: <[256]> "x"'):
        assert allowed(matcher_of(StructuredOutput(grammar=lark)).mask()) == [256]
    quoted = StructuredOutput(grammar='start: "<bos>" "x"')
    for text in (quoted, StructuredOutput(choice=("<bos>x",)), StructuredOutput(regex="<bos>x")):
        assert walk(text, 0) == "<bos>x"
    assert walk(StructuredOutput(json_schema='{"const": "<eos>"}'), 0) == '"<eos>"'
    with pytest.raises(GrammarError, match="unknown special token"):
        GRAMMARS.wait(StructuredOutput(grammar='start: <python_tag> "x"'))


def test_white_space_in_json_is_bounded() -> None:
    matcher = matcher_of(StructuredOutput(json_schema=json.dumps(PERSON)))
    matcher.advance(ord("{"))
    for _ in range(40):
        assert ord(" ") in allowed(matcher.mask())
        matcher.advance(ord(" "))
    assert allowed(matcher.mask()) == [ord('"')]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"json_schema": '{"not": {"type": "string"}}'}, r"Unimplemented keys: \[\"not\"\]"),
        (
            {"json_schema": '{"not": {"type": "string"}, "x-guidance": {"lenient": true}}'},
            r"Unimplemented keys: \[\"not\"\]",
        ),
        ({"json_schema": '{"$ref": "#/$defs/x"}'}, "Pointer '/[$]defs/x' does not exist"),
        ({"json_schema": '{"$ref": "http://example.com/x"}'}, "not present in a registry"),
        ({"json_schema": '{"allOf": [false]}'}, "schema is false"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "nothing"}, "the grammar is refused"),
        ({"grammar": "root ::= other"}, "Rule 'other' not found"),
        ({"json_schema": json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})},
         "no mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_name(asked: Any, why: str) -> None:
    for _ in range(2):  # compiled, then remembered
        with pytest.raises(GrammarError, match=f"^response_format: .*{why}") as caught:
            GRAMMARS.wait(StructuredOutput(**asked, source="response_format"))
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "rules",
    [
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"',
        "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(9000)) + 'A9000: "a"',
    ],
    ids=["rules", "terminals"],
)
def test_rules_nested_thousands_deep_do_not_overflow_a_stack(rules: str) -> None:
    matcher = matcher_of(StructuredOutput(grammar=rules))
    assert allowed(matcher.mask()) == [ord("a")]
    assert matcher.advance(ord("a"))


@pytest.mark.parametrize(
    ("lark", "error"),
    [("start: " + "(" * 30_000, "nested"), ("root ::= " + "(" * 30_000, "refused")],
)
def test_brackets_nested_thousands_deep_are_refused(lark: str, error: str) -> None:
    with pytest.raises(GrammarError, match=error):
        GRAMMARS.wait(StructuredOutput(grammar=lark))


def test_what_is_held_off_yields_where_nothing_else_may_follow() -> None:
    matcher = matcher_of(StructuredOutput(regex="a+b"))
    assert allowed(matcher.mask([ord("b")])) == [ord("a")]
    matcher.advance(ord("a"))
    assert allowed(matcher.mask([EOS, ord("b")])) == [ord("a")]
    assert allowed(matcher.mask([ord("a"), ord("b")])) == [ord("a"), ord("b")]
    assert allowed(matcher.mask([31, 32, 271])) == [ord("a"), ord("b")]


def test_a_token_that_does_not_match_is_an_error_of_this_matcher_alone() -> None:
    one, other = (matcher_of(StructuredOutput(regex="a+b")) for _ in range(2))
    with pytest.raises(GrammarError, match=r"^structured: token 120 cannot be matched: .*'x'"):
        one.advance(ord("x"))
    assert not other.advance(ord("a"))
    assert other.advance(ord("b"))


def test_a_grammar_that_takes_too_long_per_token_ends_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher = matcher_of(StructuredOutput(regex="a*"))
    clock = iter(range(1000))
    monkeypatch.setattr(grammar.time, "thread_time", lambda: next(clock) * 0.006)
    for _ in range(25):  # a mask and an advance: 7 ms more than a token may take
        matcher.mask()
        matcher.advance(ord("a"))
    with pytest.raises(GrammarError, match=r"took 0\.2 s more than the 0\.005 s"):
        for _ in range(5):
            matcher.mask()
            matcher.advance(ord("a"))


# ── compiling, beside the loop ──────────────────────────────────────────────────────────────────


class SlowCompiler:
    """In place of the compiler: holds each job until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[StructuredOutput] = []
        self.go = threading.Event()
        self._compile = grammar._compiled
        monkeypatch.setattr(grammar, "_compiled", self)

    def __call__(self, asked: StructuredOutput, table: Any) -> Any:
        self.asked.append(asked)
        self.go.wait(20)
        return self._compile(asked, table)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCompiler]:
    compiler = SlowCompiler(monkeypatch)
    yield compiler
    compiler.go.set()


def test_compiled_once_and_the_least_recently_used_is_dropped(
    monkeypatch: pytest.MonkeyPatch, slow: SlowCompiler
) -> None:
    monkeypatch.setattr(grammar, "MAX_COMPILED", 2)
    slow.go.set()
    grammars = Grammars(TOKENIZER, VOCAB, (EOS,))
    for regex in ("a", "b", "a", "c", "a", "b"):
        grammars.wait(StructuredOutput(regex=regex, source=f"field_{len(slow.asked)}"))
    assert [asked.regex for asked in slow.asked] == ["a", "b", "c", "b"]


def test_a_model_without_an_end_of_sequence_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"^x: the model has no end-of-sequence token$"):
        Grammars(TOKENIZER, VOCAB, (VOCAB,)).wait(StructuredOutput(regex="a", source="x"))


def test_a_compilation_that_hangs_is_given_up_and_counted(
    monkeypatch: pytest.MonkeyPatch, slow: SlowCompiler
) -> None:
    grammars = Grammars(TOKENIZER, VOCAB, (EOS,))
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.02)
    asked = [StructuredOutput(regex=f"a{i}") for i in range(5)]
    for one in asked[:4]:
        with pytest.raises(GrammarError, match=r"the regex did not compile in 0\.02 s"):
            grammars.wait(one)
    with pytest.raises(GrammarError, match="4 grammars are still compiling"):
        grammars.wait(asked[4])
    slow.go.set()
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 20.0)
    for one in asked:
        grammars.wait(one)
    assert len(slow.asked) == 5


def test_what_nobody_waits_for_any_more_is_not_begun(slow: SlowCompiler) -> None:
    grammars = Grammars(TOKENIZER, VOCAB, (EOS,))
    first, second, gone, last = (StructuredOutput(regex=f"a{i}") for i in range(4))
    assert [grammars.matcher(one) for one in (first, second, gone)] == [None] * 3
    grammars._jobs[gone].asked_at -= 2 * grammar.ABANDONED_SECONDS
    slow.go.set()
    grammars.wait(last)
    assert gone not in slow.asked and set(slow.asked) == {first, second, last}
    grammars.wait(gone)
    assert gone in slow.asked


def test_who_waits_for_a_grammar_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, slow: SlowCompiler
) -> None:
    desk = Desk(max_slots=1)
    desk.engine.grammars = Grammars(TOKENIZER, VOCAB, (EOS,))
    events: list[tuple[str, tuple[Any, ...]]] = []
    desk.events.attach(lambda tick, kind, values: events.append((kind, values)))
    waiting = task_of(0, StructuredOutput(regex="[ab]{3}"))
    others = [task_of(i, None, 5) for i in (1, 2)]
    desk.run(waiting, *others, until=lambda: len(desk.ends) == 2)
    assert set(desk.ends) == {1, 2}
    assert waiting.finish_reason is None
    assert desk.scheduler.wait_ticks["grammar"] > 5
    slow.go.set()
    desk.run()
    assert desk.ends[0] == "stop"
    assert waiting.waits["grammar"] > 5
    assert all("grammar" not in other.waits for other in others)
    kinds = [kind for kind, values in events if values[0] == 0 or values[:2] == ("grammar", 0)]
    assert ("wait", ("grammar", 0, 1)) in events
    assert ("grammar", (0, None)) in events
    assert kinds.index("wait") < kinds.index("grammar") < kinds.index("admit")


def test_aborted_while_its_grammar_compiles(slow: SlowCompiler) -> None:
    desk = Desk()
    desk.engine.grammars = Grammars(TOKENIZER, VOCAB, (EOS,))
    leader, sibling = (
        task_of(0, StructuredOutput(regex="a")),
        task_of(1, StructuredOutput(regex="a")),
    )
    leader.siblings = [sibling]
    desk.run(leader, until=lambda: desk.scheduler.n_tick > 2)
    desk.engine.post(Message(abort=[0]))
    for _ in range(3):
        desk.engine.step()
    assert desk.ends == {0: "abort"}
    assert list(desk.scheduler.gated) == [1]
    slow.go.set()
    desk.run()
    assert desk.ends == {0: "abort", 1: "stop"}


def test_a_refused_grammar_ends_its_choices_and_nothing_else() -> None:
    desk = Desk()
    bad = StructuredOutput(regex="(", source="guided_regex")
    leader, sibling = task_of(0, bad), task_of(1, bad)
    leader.siblings = [sibling]
    desk.run(leader, task_of(2, StructuredOutput(choice=("a", "b"))), task_of(3, None, 4))
    assert [desk.ends[i] for i in range(4)] == ["error", "error", "stop", "length"]
    assert str(desk.errors[0]).startswith("guided_regex: the regex is refused")
    assert desk.errors[0] == desk.errors[1]
    assert not desk.outputs[0]


def test_an_engine_without_a_compiler_refuses() -> None:
    desk = Desk()
    desk.engine.grammars = None
    desk.run(task_of(0, StructuredOutput(regex="a")))
    assert desk.ends == {0: "error"}


# ── the output matches ──────────────────────────────────────────────────────────────────────────

scalars = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[a-c]{1,4}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "green", 7, None, {"a": [1]}]},
        {"const": 'a "quoted" thing'},
        {"type": ["integer", "null"]},
    ]
)


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.lists(st.sampled_from(["a", "b", "long name", "ü", '"']), unique=True, max_size=3)
    objects = st.builds(
        lambda keys, parts, n, more: {
            "type": "object",
            "properties": dict(zip(keys, parts)),
            "required": keys[:n],
            "additionalProperties": more,
        },
        names,
        st.lists(inner, min_size=3, max_size=3),
        st.integers(0, 3),
        st.sampled_from([False, {"type": "integer"}]),
    )
    arrays = st.builds(
        lambda items, low, more: {
            "type": "array",
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    either = st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3))
    return objects | arrays | either


schemas = st.recursive(scalars, composed, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10_000), depth=st.integers(0, 1))
def test_the_output_validates_unless_cut(schema: Any, seed: int, depth: int) -> None:
    desk = Desk(depth=depth)
    task = task_of(seed, StructuredOutput(json_schema=json.dumps(schema)), 200)
    desk.run(task)
    assert desk.ends[seed] in ("stop", "length"), desk.errors
    if desk.ends[seed] == "stop":
        value = json.loads(text_of(desk.outputs[seed]))
        jsonschema.validate(value, schema)
    else:
        assert len(desk.outputs[seed]) == 200


def a_crowd(n: int) -> list[Task]:
    """Tasks of all kinds, some unconstrained, one with three choices."""
    kinds = [
        StructuredOutput(json_schema=json.dumps(PERSON)),
        StructuredOutput(regex="[ab]{20,40}"),
        None,
        StructuredOutput(choice=("left", "right")),
    ]
    tasks = [task_of(i, kinds[i % 4], 60) for i in range(n)]
    tasks[0].siblings = [task_of(n + i, kinds[0], 60) for i in (0, 1)]
    for index, sibling in enumerate(tasks[0].siblings, 1):
        sibling.index = index
    return tasks


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("pages", "slots"), [(200, 8), (6, 4)])
def test_nobody_changes_the_output_of_another(depth: int, pages: int, slots: int) -> None:
    alone: dict[int, list[int]] = {}
    for task in [one for first in a_crowd(8) for one in (first, *first.siblings)]:
        task.siblings = []
        desk = Desk()
        desk.run(task)
        alone |= desk.outputs
    desk = Desk(n_pages=pages, depth=depth, max_slots=slots)
    desk.run(*a_crowd(8))
    assert desk.outputs == alone
    assert pages > 6 or desk.scheduler.n_preemptions > 0


def test_preempted_and_overlapped_it_goes_on_where_it_was() -> None:
    desk = Desk(n_pages=8, depth=1, max_slots=4)
    desk.run(*[task_of(i, StructuredOutput(regex="[ab]{50}"), 60) for i in range(4)])
    assert set(desk.ends.values()) == {"stop"}
    assert desk.scheduler.n_preemptions > 0
    assert all(re.fullmatch("[ab]{50}", text_of(tokens)) for tokens in desk.outputs.values())


# ── with the other parameters ───────────────────────────────────────────────────────────────────


def ended(asked: StructuredOutput, max_tokens: int = 100, **params: Any) -> tuple[str, str, Any]:
    """Text, finish reason and stop reason or error of one task."""
    desk = Desk()
    task = task_of(7, asked, max_tokens, **params)
    desk.run(task)
    reason = task.error if task.finish_reason == "error" else task.stop_reason
    return text_of(desk.outputs[7]), str(task.finish_reason), reason


def test_complete_is_stop_and_cut_is_length() -> None:
    assert ended(StructuredOutput(regex="abc")) == ("abc", "stop", None)
    assert ended(StructuredOutput(regex="abc"), 3) == ("abc", "stop", None)
    assert ended(StructuredOutput(regex="abc"), 2) == ("ab", "length", None)


def test_min_tokens_and_ignore_eos_hold_the_end_off_while_the_grammar_goes_on() -> None:
    free = StructuredOutput(regex="a*")
    text, reason, stop = ended(free)
    assert (reason, stop) == ("stop", EOS)
    assert len(text) < 30
    text, reason, stop = ended(free, min_tokens=50)
    assert (reason, stop) == ("stop", EOS)
    assert len(text) >= 50
    assert ended(free, ignore_eos=True) == ("a" * 100, "length", None)
    for held in ({"min_tokens": 20}, {"ignore_eos": True}):
        assert ended(StructuredOutput(regex="a{5}"), **held) == ("a" * 5, "stop", None)
    stopped = ended(StructuredOutput(regex="[ab]{9}"), stop_token_ids=[ord("b")], min_tokens=4)
    assert stopped[1] == "stop"
    assert re.fullmatch("a{4,}b", stopped[0])
    forced = ended(StructuredOutput(regex="b{9}"), stop_token_ids=[ord("b")], min_tokens=4)
    assert forced == ("bbbbb", "stop", ord("b"))


def test_a_bad_word_that_the_grammar_insists_on_is_an_error() -> None:
    desk = Desk()
    task = task_of(0, StructuredOutput(regex="abc"))
    task.bad_words = ((ord("b"),),)
    desk.run(task, task_of(1, StructuredOutput(regex="abc")))
    assert desk.ends == {0: "error", 1: "stop"}
    assert "no token can be drawn" in str(desk.errors[0])


def test_a_stop_string_cuts_and_says_so() -> None:
    task = task_of(0, StructuredOutput(regex="a{9}"))
    calls = iter([None, None, "aaa"])
    task.stop_check = lambda token: next(calls)
    desk = Desk()
    desk.run(task)
    assert (desk.ends[0], task.stop_reason, text_of(desk.outputs[0])) == ("stop", "aaa", "aaa")


def test_a_matcher_that_fails_ends_its_task_only() -> None:
    desk = Desk()
    desk.noisy.ignores_masks.add(0)
    desk.run(*[task_of(i, StructuredOutput(regex="[ab]{9}")) for i in range(3)])
    assert desk.ends == {0: "error", 1: "stop", 2: "stop"}
    assert "token 0 cannot be matched" in str(desk.errors[0])


def test_masks_of_some_rows_leave_the_others_and_the_logits_alone() -> None:
    import torch

    sampler = Sampler(VOCAB, 8, "cpu")
    logits = torch.randn(6, VOCAB)
    before = logits.clone()
    params = SamplingParams(temperature=1.0, logprobs=2)
    tasks = [task_of(i, None) for i in range(6)]
    rows = [sample_row(Entry(task, 2, 1, True, 0), [])._replace(params=params) for task in tasks]
    plain = sampler.sample(logits, rows)
    mask = matcher_of(StructuredOutput(regex="[xyz]")).mask()
    masked = [row._replace(mask=mask) if i % 2 else row for i, row in enumerate(rows)]
    masked[3] = masked[3]._replace(params=SamplingParams(temperature=0.0, logprobs=2, top_k=5))
    masked[5] = masked[5]._replace(refused="no")
    drawn = sampler.sample(logits, masked)
    assert torch.equal(logits, before)
    assert [drawn[i] for i in (0, 2, 4)] == [plain[i] for i in (0, 2, 4)]
    for i in (1, 3):
        token = drawn[i].token
        assert token in b"xyz"
        assert drawn[i].logprob == pytest.approx(float(before[i].log_softmax(0)[token]), abs=1e-4)
        assert drawn[i].top == sampler.sample(logits, [rows[j] for j in range(6)])[i].top
    assert drawn[3].token == max(b"xyz", key=lambda token: before[3, token])
    assert drawn[5].error == "no"
