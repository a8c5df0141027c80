from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from astrai.front.async_engine import AsyncEngine
from astrai.server.playback import create_playback_app
from tests.browser.mock_engine import mock_engine
from tests.observe.test_live import recorded
from tests.server.live import serving, serving_app, wait_for


@pytest.fixture
def engine() -> AsyncEngine:
    return mock_engine(n_pages=60, page_size=16, tick_seconds=0.001)


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line[6:])


def test_the_page_is_one_document_that_loads_nothing_else(engine: AsyncEngine) -> None:
    with serving(engine) as url:
        answer = httpx.get(f"{url}/live")
    assert answer.status_code == 200
    html = answer.text
    assert "/*{" not in html, "a part of the page was not put in"
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", html)
    assert not re.search(r"@import|url\((?!data:)", html)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_stream_tells_a_request_from_arrival_to_end(engine: AsyncEngine) -> None:
    body = {"prompt": "a" * 40, "max_tokens": 30}
    with serving(engine) as url:
        others = len(engine.events._readers)
        with httpx.stream("GET", f"{url}/live/events", timeout=10) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            told = frames(answer.iter_lines())
            while not next(told)["known"]:
                pass
            assert len(engine.events._readers) == others + 1
            done = httpx.post(f"{url}/v1/completions", json=body)
            assert done.status_code == 200
            states, pages = [], set()
            for frame in told:
                states += [row[5] for row in frame["tasks"]]
                pages.update(frame["pages"][::2])
                if states and states[-1] == "ended":
                    break
            assert frame["counts"][0] + frame["counts"][1] == 60, "nothing is held any more"
            assert pages == set(range(5)), (
                "70 positions in pages of 16, the last token not fed back"
            )
        wait_for(lambda: len(engine.events._readers) == others)  # the viewer left


def test_a_recording_is_shown_with_its_player_and_its_whys() -> None:
    events, _ = recorded()
    with serving_app(create_playback_app(events, "run.jsonl")) as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "run.jsonl"
        assert httpx.get(f"{url}/live").status_code == 200
        with httpx.stream("GET", f"{url}/live/events", timeout=10) as answer:
            told = frames(answer.iter_lines())
            last = next(told)["player"]["last"]
            at = httpx.post(f"{url}/live/player", json={"at": 7, "playing": False}).json()
            assert (at["at"], at["playing"]) == (7, False)
            while (frame := next(told))["player"]["at"] != 7:
                pass
            assert frame["tick"] == at["tick"] and last > 7
        for asked, said in [
            ({"speed": 0}, "speed = 0"),
            ({"speed": "fast"}, "speed = 'fast'"),
            ({"at": True}, "at = True"),
            ({"volume": 3}, "unknown field 'volume'"),
        ]:
            refused = httpx.post(f"{url}/live/player", json=asked)
            assert refused.status_code == 400 and said in refused.json()["error"]["message"]
        why = httpx.get(f"{url}/v1/requests/r3/why").json()
        assert why["text"] and why["prompts"][0]["request_id"] == "r3"
        assert httpx.get(f"{url}/v1/requests/nobody/why").status_code == 404
