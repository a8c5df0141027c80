from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.engine import Engine, Message
from astrai.inference.task import Task
from astrai.observe.recorder import Recorder
from astrai.observe.recording import Recording
from astrai.observe.replay import replay
from astrai.observe.trace import trace_events
from tests.mocks import Bench, make_task

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings").glob("*.jsonl"))


def recorded(path: Path, bench: Bench, **options: Any) -> tuple[Engine, Recorder]:
    recorder = Recorder(path, bench.scheduler, {"depth": bench.runner.depth}, **options)
    bench.events.attach(recorder)
    return Engine(bench.scheduler, bench.runner, bench.deliver), recorder


def family(first: int, prompt: list[int], max_tokens: int, n: int = 1, **options: Any) -> Task:
    """The choices of one request; the first leads."""
    tasks = [make_task(first + i, prompt, max_tokens, seed=i, index=i, **options) for i in range(n)]
    tasks[0].siblings = tasks[1:]
    return tasks[0]


def mixed_run(path: Path, seed: int, **options: Any) -> Bench:
    """Shared prefixes, choices, priorities, tenants, aborts, stops and errors in a small pool."""
    rng = random.Random(seed)
    bench = Bench(16, page_size=4, max_slots=3, prefill_budget=9, **options)
    engine, recorder = recorded(path, bench)
    first = 0
    for _ in range(30):
        n = rng.choice([1, 1, 1, 2, 3])
        prompt = [rng.randrange(2)] * rng.randint(1, 9) + list(range(rng.randint(0, 12)))
        output = rng.randint(1, 20)
        task = family(
            first,
            prompt,
            output,
            n,
            stop_ids=frozenset({5, 6, 7}),
            namespace=rng.choice(["", "tenant"]),
            priority=rng.choice([0, 0, 1]),
            params=SamplingParams(
                max_tokens=output, prompt_logprobs=rng.choice([None, None, None, 0])
            ),
        )
        if rng.random() < 0.1:
            bench.runner.nan_on.add(first)
        if rng.random() < 0.1:
            task.stop_check = broken_after(rng.randint(1, 5))
        engine.post(Message(add=[task]))
        first += n
        for _ in range(rng.randint(0, 12)):
            engine.step()
        if rng.random() < 0.3:
            engine.post(Message(abort=[rng.randrange(first)]))
        if rng.random() < 0.05:
            bench.books.drop_cached()
    while not engine.idle:
        engine.step()
    recorder.close()
    return bench


def broken_after(n: int) -> Any:
    seen: list[int] = []

    def check(token: int) -> str | None:
        seen.append(token)
        if len(seen) == n:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "mock")
        return None

    return check


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), depth=st.integers(0, 2), prefix_cache=st.booleans())
def test_a_replay_decides_what_the_run_decided(
    tmp_path_factory: pytest.TempPathFactory, seed: int, depth: int, prefix_cache: bool
) -> None:
    path = tmp_path_factory.mktemp("replay") / "run.jsonl"
    bench = mixed_run(path, seed, depth=depth, prefix_cache=prefix_cache)
    replayed = replay(Recording(path), check_every=1)
    assert replayed.difference is None, str(replayed.difference)
    assert replayed.n_ticks == bench.scheduler.n_tick and replayed.n_tasks == len(bench.ends)


@pytest.mark.parametrize("group_decode", ["length", "position", "off"])
@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_every_configuration_is_replayed(tmp_path: Path, group_decode: str, batching: str) -> None:
    path = tmp_path / "run.jsonl"
    mixed_run(path, 3, group_decode=group_decode, batching=batching, ageing_ticks=5)
    assert replay(Recording(path)).difference is None
    assert Recording(path).header.scheduler.batching == batching


class Grammars:
    """Compiles in some asks, refuses some schemas; its matchers are complete after some tokens."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.compiled: set[int] = set()

    def matcher(self, asked: StructuredOutput) -> Any:
        chance = self.rng.random()
        if id(asked) not in self.compiled and chance < 0.7:
            if chance < 0.1:
                raise ValueError("the schema cannot be compiled")
            return None
        self.compiled.add(id(asked))
        return Matcher(self.rng.randint(1, 9))


class Matcher:
    eos_ids = (5,)

    def __init__(self, n: int) -> None:
        self.left = n

    def advance(self, token: int) -> bool:
        self.left -= 1
        if token == 11:
            raise ValueError("token 11 cannot be matched")
        return self.left <= 0


@pytest.mark.parametrize("depth", [0, 1])
def test_grammars_come_when_they_came(tmp_path: Path, depth: int) -> None:
    rng = random.Random(2)
    bench = Bench(30, page_size=4, max_slots=3, depth=depth)
    _, recorder = recorded(tmp_path / "run.jsonl", bench)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver, grammars=Grammars(rng))  # type: ignore[arg-type]
    first = 0
    asked = [StructuredOutput(json_object=True) for _ in range(40)]
    for i in range(40):
        n = rng.choice([1, 1, 2])
        structured = asked[i] if rng.random() < 0.6 else None
        params = SamplingParams(max_tokens=15, structured=structured)
        prompt = [rng.randrange(3)] * rng.randint(1, 14)
        engine.post(Message(add=[family(first, prompt, 15, n, params=params)]))
        first += n
        for _ in range(rng.randint(0, 6)):
            engine.step()
    while not engine.idle:
        engine.step()
    recorder.close()
    replayed = replay(Recording(tmp_path / "run.jsonl"), check_every=1)
    assert replayed.difference is None, str(replayed.difference)
    assert {"stop", "error", "length"} <= set(bench.ends.values())
    assert replayed.waits["grammar"] > 0
    events = list(trace_events(Recording(tmp_path / "run.jsonl")))
    drawn = {e["tid"] - 1 for e in events if e["ph"] == "i" and e["name"].startswith("ends")}
    assert drawn == set(bench.ends)


def test_page_tables_of_what_still_runs_are_the_same(tmp_path: Path) -> None:
    bench = Bench(40, page_size=4)
    engine, recorder = recorded(tmp_path / "run.jsonl", bench)
    engine.post(Message(add=[family(i, list(range(10)), 30) for i in range(3)]))
    for _ in range(12):
        engine.step()
    recorder.close()
    tables = {task.id: task.page_table for task in bench.scheduler.running.values()}
    replayed = replay(Recording(tmp_path / "run.jsonl"))
    assert replayed.page_tables == tables and len(tables) == 3 and all(tables.values())


@pytest.mark.parametrize("kind", ["take", "share", "admit", "return", "decode", "index", "phase"])
def test_a_difference_names_its_first_tick(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.jsonl"
    mixed_run(path, 5)
    header, *lines = path.read_text().splitlines()
    kinds = list(json.loads(header)["kinds"])
    if kind == "phase":  # a decision of the configuration: another budget changes the chunks
        fields = json.loads(header)
        fields["scheduler"]["prefill_budget"] = 4
        path.write_text("\n".join([json.dumps(fields), *lines]) + "\n")
        difference = replay(Recording(path)).difference
        assert difference is not None and difference.tick == 1
        return
    changed, tick = [header], None
    for line in lines:
        step = json.loads(line)
        for event in step[3:]:
            if tick is None and kinds[event[0]] == kind and step[0] > 10 and len(event) > 1:
                tick = step[0]
                event[-1 if kind in ("take", "share", "return", "decode", "index") else 2] = [99]
        changed.append(json.dumps(step))
    path.write_text("\n".join(changed) + "\n")
    difference = replay(Recording(path)).difference
    assert difference is not None and difference.tick == tick
    assert difference.expected is not None and difference.got is not None
    assert kind in str(difference) and f"tick {tick}" in str(difference) and "99" in str(difference)


def test_an_end_that_no_replay_can_reach_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    mixed_run(path, 5)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:20] + lines[21:]) + "\n")  # a tick is missing
    with pytest.raises((ValueError, RuntimeError)):
        difference = replay(Recording(path)).difference
        raise RuntimeError(str(difference))


def test_a_younger_kind_or_value_does_not_make_an_old_recording_differ(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    mixed_run(path, 11)
    header, *lines = path.read_text().splitlines()
    fields = json.loads(header)
    names = list(fields["kinds"])
    prefix, admit = names.index("prefix"), names.index("admit")
    fields["kinds"]["an older kind"] = fields["kinds"].pop("prefix")  # unknown then
    fields["kinds"] = {
        name: fields["kinds"].get(name, fields["kinds"].get("an older kind"))
        for name in [n if n != "prefix" else "an older kind" for n in names]
    }
    fields["kinds"]["admit"] = fields["kinds"]["admit"][:3]
    kept = [json.dumps(fields)]
    for line in lines:
        step = json.loads(line)
        before = step[3 : 3 + step[2]]
        events = [e for e in step[3 + step[2] :] if e[0] != prefix]
        events = [e[:4] if e[0] == admit else e for e in events]
        kept.append(json.dumps([*step[:3], *before, *events]))
    path.write_text("\n".join(kept) + "\n")
    assert replay(Recording(path)).difference is None


def test_replay_and_its_reader_import_no_torch() -> None:
    code = "import sys, astrai.observe.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recordings_of_the_past_are_still_what_the_scheduler_does(path: Path) -> None:
    replayed = replay(Recording(path), check_every=1)
    assert replayed.difference is None, str(replayed.difference)
    assert replayed.n_events > 0
