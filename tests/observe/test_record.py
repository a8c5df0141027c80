from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from astrai.inference.engine import Engine, Message
from astrai.inference.events import KINDS, EventLog
from astrai.observe.live.source import Playback
from astrai.observe.recorder import Recorder, part_path
from astrai.observe.recording import Event, Recording
from astrai.observe.replay import replay
from tests.mocks import Bench, make_task


def run(path: Path, n: int = 4, repeat: int = 1, **options: Any) -> tuple[Bench, list[Event]]:
    """A recorded run, with every event as another reader saw it."""
    bench = Bench(12, max_slots=3)
    seen: list[Event] = []
    recorder = Recorder(path, bench.scheduler, {"depth": 0, "model": "mock"}, **options)
    bench.events.attach(recorder)
    bench.events.attach(lambda *event: seen.append(Event(*event)))
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    for turn in range(repeat):
        tasks = [make_task(100 * turn + i, range(10 + i), 16) for i in range(n)]
        tasks[0].siblings = [make_task(100 * turn + 99, range(10), 16, seed=1, index=1)]
        engine.post(Message(add=tasks))
        while not engine.idle:
            engine.step()
    recorder.close()
    return bench, seen


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_read_is_what_readers_saw(tmp_path: Path) -> None:
    _, seen = run(tmp_path / "run.jsonl")
    snapshot, *read = Recording(tmp_path / "run.jsonl").events()
    assert snapshot.kind == "snapshot" and snapshot.values[1]["n_pages"] == 12
    start = min(event.values[0] for event in seen if event.kind == "phases") - 6.0
    assert len(read) == len(seen)
    for ours, theirs in zip(read, seen, strict=True):
        assert ours[:2] == theirs[:2]
        for name, a, b in zip(KINDS[ours.kind], ours.values, theirs.values, strict=True):
            if isinstance(b, float):
                assert a == pytest.approx(b - start, abs=10), name
            else:
                assert a == b, (ours.kind, name)
    kinds = {event.kind for event in read}
    assert {"arrive", "admit", "take", "share", "prefill", "decode", "groups", "tick"} <= kinds
    assert {"wait", "fork", "copy", "index", "return", "preempt", "end", "phases"} <= kinds
    assert {"launch", "read", "results"} <= kinds
    for event in read:
        if event.kind == "tick":
            assert sum(event.values[3:6]) == 12


def test_a_recording_plays_in_the_live_page(tmp_path: Path) -> None:
    bench, _ = run(tmp_path / "run.jsonl")
    playback = Playback(Recording(tmp_path / "run.jsonl").events())
    player = playback.player()
    assert player["last"] == bench.scheduler.n_tick - 1
    playback.control(playing=False, at=player["last"])
    assert playback.player()["tick"] == bench.scheduler.n_tick
    assert playback.pull().whole()


def test_times_count_from_the_start_of_the_recording(tmp_path: Path) -> None:
    _, seen = run(tmp_path / "run.jsonl")
    times = [e.values[0] for e in Recording(tmp_path / "run.jsonl").events() if e.kind == "tick"]
    wall = [e.values[0] for e in seen if e.kind == "tick"]
    assert [b - times[0] for b in times] == [b - wall[0] for b in wall]
    assert 0 < times[0] < 20  # the mock's clock gains a second with each reading


def test_the_header_has_what_replay_needs(tmp_path: Path) -> None:
    run(tmp_path / "run.jsonl")
    header = Recording(tmp_path / "run.jsonl").header
    assert (header.n_pages, header.page_size, header.depth) == (12, 4, 0)
    assert header.scheduler.max_slots == 3 and header.about == {"model": "mock"}
    assert header.whole and set(KINDS) <= set(header.kinds)


def test_no_token_is_written_unless_asked_for(tmp_path: Path) -> None:
    bench = Bench(40, page_size=4, prefill_budget=100)
    prompt = [71, 72, 73, 74, 75, 76, 77, 78, 79]
    for path, prompts in ((tmp_path / "a.jsonl", False), (tmp_path / "b.jsonl", True)):
        bench = Bench(40, page_size=4, prefill_budget=100)
        recorder = Recorder(path, bench.scheduler, {"depth": 0}, prompts=prompts)
        bench.events.attach(recorder)
        engine = Engine(bench.scheduler, bench.runner, bench.deliver)
        engine.post(Message(add=[make_task(0, prompt, 6), make_task(1, prompt, 6, namespace="b")]))
        while not engine.idle:
            engine.step()
        recorder.close()
    texts = [
        event.values
        for step in Recording(tmp_path / "b.jsonl").steps()
        for event in (*step.before, *step.events)
        if event.kind == "text"
    ]
    assert texts == [(0, prompt, bench.outputs[0]), (1, prompt, bench.outputs[1])]
    written = (tmp_path / "a.jsonl").read_text()
    assert "71,72" not in written and "71,72" in (tmp_path / "b.jsonl").read_text()
    content = {
        event.values[0]: event.values[1]
        for step in Recording(tmp_path / "a.jsonl").steps()
        for event in step.before
        if event.kind == "content"
    }
    assert len(content[0]) == 2 and not set(content[0]) & set(content[1])  # another tenant
    again = [
        values[1]
        for step in Recording(tmp_path / "b.jsonl").steps()
        for _, kind, values in step.before
        if kind == "content" and values[0] == 0
    ]
    assert content[0] != again[0]  # another key in each recording: nothing to compare it with


def test_a_steady_decode_is_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    bench = Bench(2000, page_size=16, max_slots=64, prefill_budget=1000)
    recorder = Recorder(path, bench.scheduler, {"depth": 0})
    bench.events.attach(recorder)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.post(Message(add=[make_task(i, [i, i], 40) for i in range(64)]))
    while not engine.idle:
        engine.step()
    recorder.close()
    lengths = sorted(len(line) for line in path.read_text().splitlines())
    assert lengths[len(lengths) // 2] < 250


def test_rotation_goes_on_in_the_next_file_and_forgets_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, repeat=8, max_bytes=6000, max_files=100)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 3 and all(part.stat().st_size < 7000 for part in parts)
    assert replay(Recording(path)).difference is None
    whole = list(Recording(path).events())
    second = Recording(part_path(path, 1))
    rest = list(second.events())[1:]
    assert not second.header.whole and rest == whole[-len(rest) :]
    with pytest.raises(ValueError, match=r"run.1.jsonl is part 1 .* begins after tick \d+"):
        replay(second)

    run(path, repeat=8, max_bytes=6000, max_files=2)
    kept = [part for part in sorted(tmp_path.iterdir()) if ".old." not in part.name]
    assert len(kept) == 2 and path not in kept


def test_the_last_three_recordings_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    texts = []
    for n in (2, 3, 4, 2, 3):
        run(path, n, repeat=4, max_bytes=8000)
        texts.append({part.name: part.read_text() for part in tmp_path.glob("run*.jsonl")})
    assert set(texts[0]) >= {"run.jsonl", "run.1.jsonl"}
    for age, old in enumerate(("old", "old2", "old3"), 2):
        for part in ("", ".1"):
            assert texts[4][f"run.{old}{part}.jsonl"] == texts[5 - age][f"run{part}.jsonl"]
        assert replay(Recording(tmp_path / f"run.{old}.jsonl")).difference is None
    assert not list(tmp_path.glob("run.old4*"))


def test_a_full_disk_ends_the_recording_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def __init__(self, file: Any, room: int) -> None:
            self.file, self.room = file, room

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            n = min(self.room, len(data))
            self.room -= n
            return self.file.write(data[:n])

        def close(self) -> None:
            self.file.close()

    path = tmp_path / "run.jsonl"
    bench = Bench(12, max_slots=3)
    recorder = Recorder(path, bench.scheduler, {"depth": 0})
    recorder._file = Full(recorder._file, 3000)  # type: ignore[assignment]
    bench.events.attach(recorder)
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    with caplog.at_level(logging.WARNING):
        for turn in range(9):
            engine.post(Message(add=[make_task(turn, range(10), 16)]))
            while not engine.idle:
                engine.step()
    recorder.close()
    assert len(bench.ends) == 9 and not bench.events, "the engine pays for a recording that ended"
    assert [record.message for record in caplog.records] == [recorder.error]
    assert recorder.error is not None and "No space left" in recorder.error
    assert len(path.read_bytes()) == json_header_size(path) + 3000
    assert replay(Recording(path)).difference is None  # up to the torn line


def json_header_size(path: Path) -> int:
    return len(path.read_bytes().split(b"\n", 1)[0]) + 1


def test_what_cannot_be_written_ends_the_recording_only(tmp_path: Path) -> None:
    bench = Bench(12)
    recorder = Recorder(tmp_path / "run.jsonl", bench.scheduler, {})
    bench.events.attach(recorder)
    bench.events.emit("refuse", object(), "why")
    bench.scheduler.tick()
    assert not bench.events and recorder.error is not None and "TypeError" in recorder.error
    recorder.close()


def test_a_reader_that_raises_is_detached(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog()
    seen: list[int] = []

    def broken(tick: int, kind: str, values: tuple[Any, ...]) -> None:
        raise KeyError("broken")

    log.attach(broken)
    log.attach(lambda tick, kind, values: seen.append(values[0]))
    log.emit("abort", 1)
    log.emit("abort", 2)
    assert seen == [1, 2] and len(caplog.records) == 1 and "abort" in caplog.text
    log.detach(broken)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    bench = Bench(12)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Recorder(tmp_path / "nowhere" / "run.jsonl", bench.scheduler, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a recording"),
        ("hello\n", "is not a recording"),
        ("[1,2]\n", "is not a recording"),
        ('{"a": 1}\n', "is not a recording"),
        ('{"astrai_recording": 99}\n', "format 99, expected 1"),
    ],
)
def test_what_is_no_recording_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        Recording(tmp_path / "x.jsonl")
    assert "x.jsonl" in str(caught.value)


def test_with_nobody_attached_the_log_is_falsy() -> None:
    log = EventLog()
    seen: list[str] = []

    def reader(tick: int, kind: str, values: tuple[Any, ...]) -> None:
        seen.append(kind)

    assert not log
    log.attach(reader)
    assert log
    log.emit("abort", 1)
    log.detach(reader)
    assert not log and seen == ["abort"]
