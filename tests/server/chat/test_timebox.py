from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from astrai.models.tokenizer import MAX_RENDERED, ByteTokenizer, Tokenizer
from astrai.server.chat import prompts, timebox
from astrai.server.chat.format import ChatFormat, Conversation
from astrai.server.chat.timebox import OutOfTime, timeboxed
from astrai.server.http.errors import ApiError


def boxed(work: Callable[[], Any], seconds: float) -> Any:
    return asyncio.run(timeboxed(work, seconds))


def test_work_gives_its_result_or_its_error() -> None:
    assert boxed(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        boxed(lambda: 1 // 0, 5)


def forever() -> None:
    while True:
        sum(range(100))


def test_endless_work_is_interrupted_and_its_thread_serves_again() -> None:
    for _ in range(6):  # more often than the pool has threads
        with pytest.raises(OutOfTime):
            boxed(forever, 0.05)
    assert boxed(lambda: "well", 5) == "well"


def test_work_that_waits_for_a_thread_until_its_time_is_over_never_begins() -> None:
    async def crowd() -> None:
        hanging = [asyncio.ensure_future(timeboxed(forever, 0.1)) for _ in range(12)]
        for work in hanging:
            with pytest.raises(OutOfTime):
                await work
        assert await timeboxed(lambda: "well", 5) == "well"

    asyncio.run(crowd())


def test_the_loop_turns_while_the_work_hangs() -> None:
    async def turns() -> int:
        working = asyncio.ensure_future(timeboxed(forever, 0.2))
        n = 0
        while not working.done():
            await asyncio.sleep(0.005)
            n += 1
        with pytest.raises(OutOfTime):
            working.result()
        return n

    assert asyncio.run(turns()) > 5


def test_work_that_ends_at_its_deadline_never_hurts_what_its_thread_does_next() -> None:
    async def race() -> None:
        for i in range(60):
            with contextlib.suppress(OutOfTime):
                assert await timeboxed(lambda: time.sleep(0.002) or "done", 0.0015 + i % 5 / 2000)
            assert await timeboxed(lambda: "next", 5) == "next"

    asyncio.run(race())


def test_a_call_that_cannot_be_interrupted_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timebox, "_GRACE_SECONDS", 0.05)
    with pytest.raises(OutOfTime):
        boxed(lambda: time.sleep(0.4), 0.05)


# ── templates ───────────────────────────────────────────────────────────────────────────────────


def templated(template: str) -> Tokenizer:
    backend = ByteTokenizer()._backend
    return Tokenizer(backend, bos_token_id=256, eos_token_ids=(257,), chat_template=template)


HANGS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def test_a_template_that_hangs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.1)
    chat_format = ChatFormat(templated(HANGS), "none", "none")
    asked = Conversation(messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(ApiError, match=r"took more than 0\.1 s") as caught:
        asyncio.run(prompts.chat_prompt(chat_format, asked))
    assert caught.value.status == 400 and caught.value.code == "chat_template_error"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'x' * 99999999 }}", "would make 99999999 items"),
        ("{{ 99999999 * [1] }}", "would make 99999999 items"),
        ("{{ 9 ** 99999999 }}", "items"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
            "{% set n.x = n.x + n.x %}{% endfor %}",
            "items",
        ),
        ("{% for i in range(90000) %}{{ 'x' * 999 }}{% endfor %}", "characters, expected at most"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion|RecursionError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_what_a_template_may_not_do_is_a_value_error(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        templated(template).render_chat([{"role": "user", "content": "Hi"}])


def test_ordinary_arithmetic_of_templates_is_left_alone() -> None:
    text = templated("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 2 * 1.5 }}")
    assert text.render_chat([]) == "ababab1024[1, 2]ab3.0"
    assert MAX_RENDERED == 16777216
