"""The live page in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from astrai.front.async_engine import AsyncEngine
from astrai.server.app import create_app
from astrai.server.http.guard import Guard
from astrai.server.http.keys import ApiKey, KeyRing
from astrai.server.playback import create_playback_app
from tests.browser.mock_engine import mock_engine
from tests.observe.test_live import recorded
from tests.server.live import serving, serving_app

pytestmark = pytest.mark.browser

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(mock_engine(n_pages=64, slots=4, tick_seconds=0.01)) as url:
        yield url


# The parts of the page's script are in one object, for whoever has the console open.
SCOPE = "const { engine, rates, pool, loop, timeline, talk } = globalThis.live || {};"


def ask(page: Any, expression: str) -> Any:
    """The value of an expression in the page's own terms."""
    return page.evaluate(f"(() => {{ {SCOPE} return {expression}; }})()")


def until(page: Any, condition: str, seconds: float = 15.0) -> None:
    """Wait for the page (whose policy allows no evaluation from within)."""
    deadline = time.monotonic() + seconds
    while not ask(page, condition):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        page.wait_for_timeout(20)


def live(page: Any) -> Any:
    page.wait_for_selector("#link[data-state=on]")
    until(page, "engine.known")
    return page


def pixels(page: Any, canvas: str) -> str:
    return ask(page, f"document.getElementById('{canvas}').toDataURL()")


def number(page: Any, id: str) -> int:
    return int(page.inner_text(f"#{id}").replace(" ", "") or 0)


def test_a_burst_is_seen_from_arrival_to_its_why(open_page: Open, url: str) -> None:
    page = live(open_page(f"{url}/live"))
    until(page, "document.getElementById('n-total').textContent === '64'")
    pool, loop = pixels(page, "pool"), pixels(page, "loop")
    page.click("#burst")
    until(page, "Number(document.getElementById('n-held').textContent) > 8")
    assert pixels(page, "pool") != pool and pixels(page, "loop") != loop
    page.wait_for_selector("#queue li .chip")  # twelve tasks, four slots
    until(page, "document.getElementById('queue-why').textContent.includes('every slot is taken')")
    until(page, "document.querySelectorAll('#slots button.chip').length === 4")
    until(page, "document.querySelector('#groups button.chip')")
    page.wait_for_selector("#story li")
    counts = ask(page, "engine.counts")
    assert sum(counts) == 64 and page.inner_text("#balance") == "✓"
    until(page, "engine.pages.some((refs) => refs > 1)")  # equal beginnings are shared

    page.locator("#rows button").first.click()
    until(page, "document.getElementById('why').textContent.length > 10")
    until(page, "document.querySelector('#rows [aria-pressed=true]')")
    name = ask(
        page,
        """engine.tasks.get(Number(document.querySelector(
        "#rows [aria-pressed=true]").dataset.task)).request""",
    )
    until(page, "[...engine.tasks.values()].every((task) => task.state === 'ended')")
    until(page, "engine.counts[2] === 0")
    page.wait_for_timeout(400)
    why = httpx.get(f"{url}/v1/requests/{name.split('/')[0]}/why").json()
    assert len(why["prompts"]) > 1
    assert page.inner_text("#why") and page.inner_text("#why") in why["text"]
    assert ask(page, "document.activeElement.id") == "detail-h"
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    assert "Request" in ask(page, "document.activeElement.getAttribute('aria-label')")


def test_what_one_says_is_answered_in_the_colour_of_its_request(open_page: Open, url: str) -> None:
    page = live(open_page(f"{url}/live"))
    until(page, "talk.model !== null")
    page.fill("#ask-text", "Hello there")
    page.press("#ask-text", "Enter")
    until(page, "document.querySelector('.talk .it')?.style.borderLeftColor")
    until(page, "document.getElementById('say').textContent.startsWith('Answer')")
    assert len(page.inner_text(".talk .it")) > 100
    assert page.locator("#ask .main").is_enabled()


def test_pages_are_told_to_the_keyboard_and_the_screen_reader(open_page: Open, url: str) -> None:
    page = live(open_page(f"{url}/live"))
    page.focus("#pool")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#cell").startswith("Page 0")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#cell").startswith(f"Page {ask(page, 'pool.layout().columns')}")
    page.keyboard.press("End")
    assert page.inner_text("#cell").startswith("Page 63")
    unnamed = ask(
        page,
        """[...document.querySelectorAll("button, input, textarea, select, canvas[tabindex]")]
        .filter((el) => !(el.getAttribute("aria-label") || el.labels?.length
            || el.textContent.trim())).map((el) => el.outerHTML)""",
    )
    assert unnamed == []
    live_regions = ask(
        page, "[...document.querySelectorAll('[aria-live=polite]')].map((el) => el.id)"
    )
    assert live_regions == ["say", "cell"], "nothing that changes with every tick is read aloud"


@pytest.mark.parametrize("width", [320, 375, 820, 1360])
def test_it_fits_its_window(open_page: Open, url: str, width: int) -> None:
    page = live(open_page(f"{url}/live", viewport={"width": width, "height": 800}))
    page.click("#burst")
    until(page, "engine.running > 3")
    page.wait_for_timeout(300)
    assert ask(page, "document.documentElement.scrollWidth") <= width
    wide = ask(
        page,
        """[...document.querySelectorAll("main *")].filter((el) =>
            el.getBoundingClientRect().right > innerWidth + 1
            && !el.closest("pre, .rows, .stations")).map((el) => el.outerHTML.slice(0, 80))""",
    )
    assert wide == []


def test_dark_and_light_follow_the_system_until_one_chooses(open_page: Open, url: str) -> None:
    page = live(open_page(f"{url}/live", color_scheme="dark"))
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = ask(page, ground)
    page.emulate_media(color_scheme="light")
    light = ask(page, ground)
    assert dark != light
    page.click("#theme")
    assert ask(page, ground) == dark
    page.reload()
    assert ask(page, ground) == dark, "the choice is kept"


def test_who_wants_no_motion_sees_none(open_page: Open, url: str) -> None:
    page = live(open_page(f"{url}/live", reduced_motion="reduce"))
    page.click("#burst")
    until(page, "engine.running === 4 && engine.waiting > 0")
    until(page, "[...engine.tasks.values()].filter((t) => t.state === 'decode').length > 3")
    places = "JSON.stringify([...loop.dots].map(([id, dot]) => [id, dot.x, dot.y]))"
    assert ask(page, "loop.phase") == 0
    before = ask(page, places)
    page.wait_for_timeout(80)
    if ask(page, "engine.running === 4"):
        assert ask(page, places) == before or ask(page, "loop.phase") == 0


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: Open) -> None:
    keys = KeyRing([ApiKey.of("a-key-of-sixteen", "test")])
    app = Guard(create_app(mock_engine()), keys)
    with serving_app(app) as url:
        page = open_page(f"{url}/live", errors=("401",))
        page.wait_for_selector("#key[open]")
        page.fill("#key-text", "another-key")
        page.press("#key-text", "Enter")
        page.wait_for_selector("#key-text[aria-invalid=true]")
        page.fill("#key-text", "a-key-of-sixteen")
        page.press("#key-text", "Enter")
        live(page)
        until(page, "talk.model === 'mock'")
        assert "a-key" not in page.url and ask(page, "localStorage.length") == 0
        page.reload()
        live(page)
        page.context.close()


def test_thousands_of_ticks_a_second_do_not_pile_up(open_page: Open) -> None:
    engine: AsyncEngine = mock_engine(n_pages=6000, slots=64, tick_seconds=0.0)
    with serving(engine) as url:
        first, second = (live(open_page(f"{url}/live")) for _ in range(2))
        for _ in range(10):
            ask(first, "(document.getElementById('burst').disabled = false)")
            first.click("#burst")
        until(first, "engine.tick > 400")
        until(second, "engine.tick > 400")
        for page in (first, second):
            until(page, "Number(document.querySelector('#s-cleanup b').textContent) >= 120", 60)
            until(page, "engine.running === 0")
            assert ask(page, "engine.tasks.size") <= 64 + 10
            assert ask(page, "rates.points.length") <= 400
            assert ask(page, "engine.counts[2]") == 0
            assert page.inner_text("#balance") == "✓"
        assert len(ask(first, "pool.mask()").splitlines()) == -(-6000 // 64)
        first.context.close()
        second.context.close()


def test_it_comes_back_when_the_server_does(open_page: Open, url: str) -> None:
    page = open_page("about:blank", errors=("Failed to load",))
    page.route("**/live/events", lambda route: route.abort())
    page.goto(f"{url}/live")
    page.wait_for_selector("#link[data-state=off]")
    page.unroute("**/live/events")
    live(page)


def test_a_recording_is_played_and_searched(open_page: Open) -> None:
    events, _ = recorded()
    with serving_app(create_playback_app(events, "run.jsonl")) as url:
        page = live(open_page(f"{url}/live"))
        page.wait_for_selector("#player")
        assert page.locator("#burst").is_hidden(), "nothing can be sent to a recording"
        page.click("#play") if page.inner_text("#play") == "Pause" else None
        until(page, "engine.player && !engine.player.playing")
        ask(
            page,
            """(document.getElementById("seek").value = 9,
            document.getElementById("seek").dispatchEvent(new Event("input")))""",
        )
        until(page, "engine.player.at === 9")
        tables = ask(page, "JSON.stringify([...engine.tables])")
        page.click("#next")
        until(page, "engine.player.at === 10")
        page.click("#back")
        until(page, "engine.player.at === 9")
        assert sorted(json.loads(ask(page, "JSON.stringify([...engine.tables])"))) == sorted(
            json.loads(tables)
        )
        page.select_option("#speed", "100")
        page.click("#play")
        until(page, "engine.player.at === engine.player.last")
        page.locator("#rows button").first.click()
        until(page, "document.getElementById('why').textContent.length > 10")
        page.context.close()
