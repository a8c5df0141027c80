from __future__ import annotations

import json

import pytest

from astrai.bench import edge


def test_the_bench_counts_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    edge.main(["--json", "--streams", "4", "--tokens", "20", "--tick-ms", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 4 * 20 and 0 < result["deltas"] <= 80
    assert 0 < result["tokens_per_s"] <= result["offered_tokens_per_s"] == 2000
