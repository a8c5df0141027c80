from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from astrai.cli import app as cli
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[3]
# A certificate of "localhost" with its key, made for this test and good for nothing else.
PEM = str(Path(__file__).with_name("localhost.pem"))
FAKE_MAIN = """
import astrai.front.async_engine as home
from tests.server.fake_engine import FakeEngine
home.AsyncEngine = FakeEngine
from astrai.cli.app import main
main()
"""
HI = {"messages": [{"role": "user", "content": "my secret prompt"}]}


def test_flags_of_serve_make_a_door(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("team file-secret\n")
    flags = ["--tls-cert", PEM, "--tls-key", PEM, "--api-key-file", str(keys)]
    flags += ["--cors-origin", "https://app.example", "--open-metrics", "--log-format", "json"]
    command = [sys.executable, "-c", FAKE_MAIN, "serve", "--port", "0", "--in-process", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ASTRAI_API_KEYS": "env env-secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            ready = next(line for line in process.stdout if "ready in" in line)
            found = re.search(r"https://127\.0\.0\.1:\d+", ready)
            assert found is not None
            verify = ssl.create_default_context(cafile=PEM)
            with httpx.Client(base_url=found[0], verify=verify, trust_env=False) as client:
                chat = "/v1/chat/completions"
                for key in ("file-secret", "env-secret"):
                    assert client.post(chat, json=HI, headers={"x-api-key": key}).is_success
                assert client.post(chat, json=HI).status_code == 401
                assert client.get("/metrics").status_code == 200
                origin = {"origin": "https://app.example"}
                response = client.get("/health", headers=origin)
                assert response.headers["access-control-allow-origin"] == origin["origin"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 0
            *lines, account = process.stderr.read().splitlines()
        finally:
            process.kill()
    assert account.startswith("served ")
    told = [json.loads(line) for line in lines]
    assert [line.get("key") for line in told if line["route"] == chat] == ["team", "env"]
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key", "short"], "--api-key 1: a key of 5 characters"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys: No such file"),
        (["--tls-cert", PEM], "expected both or none"),
        (["--tls-cert", "/nowhere", "--tls-key", PEM], "--tls-cert /nowhere"),
        (["--tls-cert", __file__, "--tls-key", PEM], "--tls-cert"),
        (["--cors-origin", "app.example"], "expected * or https://host"),
        (["--otlp-endpoint", "localhost:4318"], "--otlp-endpoint"),
        (["--log-level", "loud"], "log-level"),
    ],
)
def test_a_door_that_cannot_be_had_is_named_before_the_model_is_loaded(
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> FakeEngine:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("astrai.front.async_engine.AsyncEngine", never)
    assert cli.run(["serve", "--port", "0", "--in-process", *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_several_door_flags_and_help_name_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--api-key", "--cors-origin", "--tls-cert", "--log-format", "--otlp-endpoint"):
        assert flag in text
