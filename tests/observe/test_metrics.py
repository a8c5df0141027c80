from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from astrai.front.sampling_params import SamplingParams
from astrai.front.structured import StructuredOutput
from astrai.inference.engine import Engine, Message
from astrai.observe.metrics import Metrics
from astrai.observe.ticks import Ticks
from tests.mocks import Bench, SlowGrammars, make_task

Samples = dict[str, float]


def scrape(metrics: Metrics) -> Samples:
    """Every sample by name, labels other than `le` in braces."""
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def watched(**config: object) -> tuple[Bench, Engine, Metrics]:
    bench = Bench(**config)  # type: ignore[arg-type]
    metrics = Metrics(lambda: bench.books.pool.n_pages, lambda: bench.scheduler.config.max_slots)
    bench.events.attach(Ticks(metrics.apply))
    return bench, Engine(bench.scheduler, bench.runner, bench.deliver), metrics


def balanced(now: Samples) -> None:
    pages = ("astrai_pages_free", "astrai_pages_cached", "astrai_pages_held")
    assert sum(now[name] for name in pages) == now["astrai_pages_total"]
    assert now["astrai_slots_free"] + now["astrai_slots_used"] == now["astrai_slots_total"]
    assert now["astrai_slots_used"] == now["astrai_tasks_running"]
    ended = sum(v for k, v in now.items() if k.startswith("astrai_tasks_ended_total"))
    waiting = sum(v for k, v in now.items() if k.startswith("astrai_tasks_waiting"))
    arrived = now["astrai_tasks_arrived_total"]
    assert waiting == arrived - ended - now["astrai_tasks_running"]
    assert min(v for k, v in now.items() if not k.endswith("_sum")) >= 0


def test_before_the_first_tick_every_page_and_slot_is_free() -> None:
    _, _, metrics = watched(n_pages=7, max_slots=3)
    now = scrape(metrics)
    balanced(now)
    assert now["astrai_pages_free"] == 7 and now["astrai_slots_free"] == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 1]))
def test_every_scrape_balances_and_the_totals_are_those_of_the_tasks(seed: int, depth: int) -> None:
    bench, engine, metrics = watched(n_pages=12, max_slots=3, depth=depth)
    rng = random.Random(seed)
    engine.grammars = SlowGrammars(seed)  # type: ignore[assignment]
    tasks = []
    for i in range(15):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        n = rng.choice((1, 1, 3))
        gated = StructuredOutput(regex="a") if rng.random() < 0.2 else None
        params = SamplingParams(max_tokens=9, structured=gated)
        tasks += [
            make_task(100 * i + k, prompt, rng.randrange(1, 9), index=k, params=params)
            for k in range(n)
        ]
        tasks[-n].siblings = tasks[len(tasks) - n + 1 :]
        engine.post(Message(add=[tasks[-n]]))
        if rng.random() < 0.2:
            engine.post(Message(abort=[rng.choice(tasks).id]))
        for _ in range(rng.randrange(4)):
            engine.step()
            now = scrape(metrics)
            balanced(now)
            assert now["astrai_pages_held"] == bench.books.counts.held
            for reason in ("slots", "pages", "prefill"):
                assert now["astrai_tasks_waiting{reason=grammar}"] == len(bench.scheduler.gated)
                waiting = now[f"astrai_tasks_waiting{{reason={reason}}}"]
                assert not waiting or bench.scheduler.blocked == reason
    while not engine.idle:
        engine.step()
    now = scrape(metrics)
    balanced(now)
    assert now["astrai_output_tokens_total"] == sum(task.n_output for task in tasks)
    assert now["astrai_preemptions_total"] == sum(task.n_preempted for task in tasks)
    assert now["astrai_prefill_tokens_total"] + sum(entry.n_cached for entry in tasks) >= sum(
        task.n_prompt for task in tasks if task.finish_reason == "length"
    )
    for reason, ticks in bench.scheduler.wait_ticks.items():
        assert now[f"astrai_wait_ticks_total{{reason={reason}}}"] == ticks
    began = [task for task in tasks if task.first_token_at is not None]
    assert now["astrai_time_to_first_token_seconds_count"] == len(began)
    total = sum(task.first_token_at - task.arrived_at for task in began)  # type: ignore[operator]
    assert now["astrai_time_to_first_token_seconds_sum"] == pytest.approx(total)
    admitted = sum(task.admitted_at is not None for task in tasks)
    assert now["astrai_queue_seconds_count"] == admitted
    assert now["astrai_end_to_end_seconds_count"] == len(tasks)
    assert not metrics._live and not metrics._launched and not metrics._queued


def test_choices_that_go_on_without_their_first_wait_once() -> None:
    bench, engine, metrics = watched(n_pages=12, max_slots=1)
    engine.grammars = SlowGrammars(0)  # type: ignore[assignment]
    params = SamplingParams(max_tokens=9, structured=StructuredOutput(regex="a"))
    first, second = (make_task(i, [1, 2], 3, index=i, params=params) for i in range(2))
    runs, waits = make_task(8, [1], 9), make_task(9, [1], 9)
    first.siblings = [second]
    engine.post(Message(add=[runs, waits, first]))
    engine.post(Message(abort=[first.id]))
    engine.step()
    now = scrape(metrics)
    assert list(bench.scheduler.gated) == [second.id]
    balanced(now)
    assert now["astrai_tasks_waiting{reason=grammar}"] == 1
    assert now["astrai_tasks_waiting{reason=slots}"] == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_inter_token_seconds_has_one_observation_per_token_after_the_first(depth: int) -> None:
    bench, engine, metrics = watched(n_pages=40, max_slots=4, depth=depth)
    lengths = (1, 2, 9, 5, 5)
    engine.post(
        Message(add=[make_task(i, range(10 * i, 10 * i + 9), n) for i, n in enumerate(lengths)])
    )
    while not engine.idle:
        engine.step()
    now = scrape(metrics)
    assert bench.scheduler.n_preemptions == 0
    assert now["astrai_inter_token_seconds_count"] == sum(n - 1 for n in lengths)


def test_reading_under_load_always_balances() -> None:
    _bench, engine, metrics = watched(n_pages=64, max_slots=16)
    engine.post(Message(add=[make_task(i, range(i, i + 9), 30) for i in range(200)]))
    done = threading.Event()

    def load() -> None:
        while not engine.idle:
            engine.step()
        done.set()

    thread = threading.Thread(target=load)
    thread.start()
    n = 0
    while not done.is_set():
        balanced(scrape(metrics))
        n += 1
    thread.join()
    balanced(scrape(metrics))
    assert n > 3


def test_http_requests_are_counted_by_route_and_status() -> None:
    _, _, metrics = watched(n_pages=4)
    metrics.http("POST", "/v1/completions", 200, 0.3)
    metrics.http("POST", "/v1/completions", 400, 0.002)
    metrics.http("BREW-1", "none", 405, 0.001)
    metrics.http("BREW-2", "none", 405, 0.001)
    now = scrape(metrics)
    assert now["astrai_http_requests_total{method=other,route=none,status=405}"] == 2
    key = "astrai_http_requests_total{method=POST,route=/v1/completions,status=200}"
    assert now[key] == 1
    assert now["astrai_http_seconds_count"] == 4


def test_a_restarted_engine_keeps_counters_monotone() -> None:
    _bench, engine, metrics = watched(n_pages=8)
    engine.post(Message(add=[make_task(1, range(5), 9)]))
    for _ in range(5):
        engine.step()
    before = scrape(metrics)
    fresh = Bench(n_pages=8)
    fresh.events.attach(Ticks(metrics.apply))
    again = Engine(fresh.scheduler, fresh.runner, fresh.deliver)
    again.post(Message(add=[make_task(1, range(5), 2)]))
    for _ in _until_idle(again):
        now = scrape(metrics)
        balanced(now)
        for name, value in before.items():
            assert "_total" not in name or "pages" in name or now[name] >= value, name
    assert scrape(metrics)["astrai_output_tokens_total"] == (
        before["astrai_output_tokens_total"] + 2
    )


def test_a_reader_that_fails_is_dropped_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(n_pages=8)
    heard: list[int] = []

    def broken(tick: int, batch: object) -> None:
        raise RuntimeError("my books are wrong")

    bench.events.attach(Ticks(broken, lambda tick, batch: heard.append(tick)))
    engine = Engine(bench.scheduler, bench.runner, bench.deliver)
    engine.post(Message(add=[make_task(1, range(5), 4)]))
    for _ in _until_idle(engine):
        pass
    assert bench.ends == {1: "length"} and len(heard) == bench.scheduler.n_tick
    assert caplog.text.count("a reader of events failed at tick 1") == 1


def _until_idle(engine: Engine) -> Iterator[None]:
    while not engine.idle:
        engine.step()
        yield
