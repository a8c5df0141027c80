from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from astrai.observe import trace
from astrai.observe.recording import Recording
from tests.observe.test_replay import mixed_run


def traced(path: Path, **options: Any) -> tuple[Recording, list[dict[str, Any]]]:
    recording = Recording(path)
    target = path.with_suffix(".json")
    n = trace.write_trace(recording, target, **options)
    whole = json.loads(target.read_text())
    assert n == len(whole["traceEvents"]) and whole["displayTimeUnit"] == "ms"
    return recording, whole["traceEvents"]


def tracks(events: list[dict[str, Any]], phase: str) -> dict[tuple[int, int], list[Any]]:
    found: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for event in events:
        if event["ph"] == phase:
            found[event["pid"], event["tid"]].append(event)
    return found


@pytest.mark.parametrize("depth", [0, 1])
def test_tracks_are_named_and_in_time_and_nothing_overlaps(tmp_path: Path, depth: int) -> None:
    mixed_run(tmp_path / "run.jsonl", 3, depth=depth)
    _, events = traced(tmp_path / "run.jsonl")
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    processes = {event["pid"] for event in events if event["name"] == "process_name"}
    spans = tracks(events, "X")
    assert set(spans) <= named and {pid for pid, _ in spans} == {1, 2, 3} <= processes
    assert {tid for pid, tid in spans if pid == trace.SLOTS} <= {1, 2, 3}
    for track in spans.values():
        for before, after in itertools.pairwise(track):
            assert before["dur"] >= 0 and after["dur"] >= 0
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002
    for track in tracks(events, "C").values():
        by_name = itertools.groupby(sorted(track, key=lambda e: e["name"]), lambda e: e["name"])
        for _, counter in by_name:
            times = [event["ts"] for event in counter]
            assert times == sorted(times)


def test_every_request_is_drawn_from_arrival_to_end(tmp_path: Path) -> None:
    bench = mixed_run(tmp_path / "run.jsonl", 10)
    recording, events = traced(tmp_path / "run.jsonl")
    told = list(recording.events())
    spans = tracks(events, "X")
    ends = {e["tid"] - 1: e for e in events if e["ph"] == "i" and e["name"].startswith("ends: ")}
    assert {task: e["args"]["reason"] for task, e in ends.items()} == bench.ends
    preempted = [values[0] for _, kind, values in told if kind == "preempt"]
    drawn = [
        tid - 1
        for (pid, tid), track in spans.items()
        for event in track
        if pid == trace.REQUESTS and event["name"] == "preempted"
    ]
    assert sorted(drawn) == sorted(preempted) and preempted
    for task, end in ends.items():
        track = spans[trace.REQUESTS, task + 1]
        assert track[0]["name"] == "queued"
        assert sum(e["dur"] for e in track) == pytest.approx(end["ts"] - track[0]["ts"], abs=1)
    pages = [e["args"] for e in events if e["ph"] == "C" and e["name"] == "pages"]
    assert all(sum(p.values()) == 16 for p in pages)


def test_phases_follow_each_other_in_every_tick(tmp_path: Path) -> None:
    bench = mixed_run(tmp_path / "run.jsonl", 5)
    _, events = traced(tmp_path / "run.jsonl")
    track = tracks(events, "X")[trace.ENGINE, trace.PHASES]
    assert [e["name"] for e in track] == ["cleanup", "refill", "prefill", "decode"] * (
        bench.scheduler.n_tick
    )
    device = tracks(events, "X")[trace.ENGINE, trace.DEVICE]
    assert len(device) == bench.runner.n_launches
    assert all(e["args"]["prefill tokens"] + e["args"]["decode rows"] > 0 for e in device)


def test_a_range_of_ticks(tmp_path: Path) -> None:
    mixed_run(tmp_path / "run.jsonl", 6)
    _, events = traced(tmp_path / "run.jsonl", first=20, last=29)
    track = tracks(events, "X")[trace.ENGINE, trace.PHASES]
    assert sorted({e["args"]["tick"] for e in track}) == list(range(20, 30))
