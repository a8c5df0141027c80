"""The load generator against a server whose answers are known."""

from __future__ import annotations

import json

import pytest

from astrai.bench import serve
from astrai.bench.serve import Answer, Objective, summary
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving


def run(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> dict[str, object]:
    fixed = ["--requests", "6", "--output-tokens", "8", "--spread", "0"]
    serve.main(["--url", f"{url}/v1", *fixed, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("load", [("--concurrency", "2"), ("--rate", "200")])
@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_request_is_answered_and_counted(
    capsys: pytest.CaptureFixture[str], load: tuple[str, str], route: str
) -> None:
    with serving(FakeEngine()) as url:
        result = run(capsys, url, *load, "--route", route)
    assert (result["answered"], result["errors"]) == (6, 0)
    assert result["tokens_out"] == 6 * 8
    assert result["ttft_ms"]["p50"] <= result["e2e_ms"]["p50"]  # type: ignore[index]


def test_refusals_are_errors_with_their_text(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeEngine()) as url, pytest.raises(RuntimeError, match=r"HTTP 404.*not served"):
        run(capsys, url, "--model", "absent")


def test_goodput_counts_answers_that_keep_every_limit() -> None:
    answers = [
        Answer(0.1, 1.1, [0.1] * 10, 5, 11, None),
        Answer(0.5, 1.5, [0.1] * 10, 5, 11, None),  # first token late
        Answer(0.1, 3.1, [0.3] * 10, 5, 11, None),  # tokens slow
        Answer(0.1, 0.2, [], 0, 0, "HTTP 500"),
    ]
    result = summary(answers, 2.0, Objective(ttft=0.2, itl=0.15, e2e=None))
    assert result["goodput_requests_per_second"] == 0.5
    assert (result["answered"], result["errors"], result["tokens_out"]) == (3, 1, 33)
    assert result["first_errors"] == ["1 x HTTP 500"]
