from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import astrai
from astrai import cli
from astrai.cli import options
from tests.server.fake_engine import SAYS, FakeEngine

# A process of its own whose engine is the fake one.
FAKE_MAIN = """
import sys
import astrai.front.async_engine as home
from tests.server.fake_engine import FakeEngine
home.AsyncEngine = FakeEngine
from astrai.cli.app import main
main()
"""
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astrai.front.async_engine.AsyncEngine", FakeEngine)


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", FAKE_MAIN, *args]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command wrote on stderr, which must be one line that says who speaks."""
    text = capsys.readouterr().err
    assert text.startswith("astrai: error: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    return text.removeprefix("astrai: error: ").rstrip("\n")


@pytest.mark.parametrize("args", ["--help", "serve --help", "generate --help", "--version"])
def test_help_imports_nothing_heavy(args: str) -> None:
    program = (
        f"import sys; sys.argv = ['astrai', *{args.split()!r}]\n"
        "from astrai.cli.app import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'numpy'}\n"
        "    print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_help_is_quick() -> None:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "astrai", "--help"],
            capture_output=True,
            check=True,
            env=environment(),
        )
        return time.perf_counter() - started

    assert min(once() for _ in range(3)) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"astrai {astrai.__version__}\n"


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("serve", "chat", "generate", "pull", "bench"))


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nope"], 2, "nope"),
        (["serve", "--nope"], 2, "--nope"),
        (["serve", "--port", "99999"], 2, "--port"),
        (["serve", "--page-size", "7"], 2, "page_size = 7"),
        (["serve", "--group-decode", "x"], 2, "--group-decode"),
        (["serve", "--tool-parser", "x"], 2, "--tool-parser"),
        (["serve", "--reasoning-parser", "x"], 2, "--reasoning-parser"),
        (["generate"], 2, "INPUT"),
        (["generate", "no-such-file.jsonl"], 1, "no-such-file.jsonl: No such file"),
        (["generate", "x", "--temperature", "-1"], 2, "temperature = -1"),
        (["bench", "no-such-bench"], 2, "no-such-bench"),
        (["pull", "no-such-model"], 1, "no-such-model"),
        (["pull", "./no/such.gguf"], 1, "no/such.gguf"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    assert cli.run(args) == code
    assert says in error_line(capsys)


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError):
        cli.run(["generate", "no-such-file.jsonl", "--debug"])


def test_a_bug_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("astrai.models.pull.resolve", broken)
    assert cli.run(["pull", "x"]) == 1
    assert "internal error: KeyError" in error_line(capsys)


def test_every_engine_option_is_a_flag() -> None:
    """A field of EngineConfig without a flag, or with another default, is an oversight."""
    assert options.engine_config(**cli_defaults()) == astrai.EngineConfig()


def cli_defaults() -> dict[str, Any]:
    import dataclasses
    import inspect

    parameters = inspect.signature(options.engine_config).parameters
    fields = [f.name for f in dataclasses.fields(astrai.EngineConfig)]
    fields.remove("batching")  # the other way of batching is there to be measured, by the bench
    assert list(parameters) == fields
    return {name: parameter.default for name, parameter in parameters.items()}


# ── serve ───────────────────────────────────────────────────────────────────────────────────────


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str], fake: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.run(["serve", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} is in use" in error_line(capsys)


def test_an_unknown_host_is_named(capsys: pytest.CaptureFixture[str], fake: None) -> None:
    assert cli.run(["serve", "--host", "999.1.1.1", "--port", "0"]) == 1
    assert "999.1.1.1" in error_line(capsys)


@pytest.fixture
def served() -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`astrai serve`, and the lines it printed up to the curl."""
    with subprocess.Popen(
        command("serve", "--port", "0", "--in-process"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " -d '" in line:
                break
        try:
            yield process, lines
        finally:
            process.kill()


def test_serve_prints_a_curl_that_works(
    served: tuple[subprocess.Popen[str], list[str]],
) -> None:
    process, lines = served
    assert any(line.startswith("weights") for line in lines)
    text = "".join(lines)
    pasted = shlex.split(text[text.index("  curl") :].replace("\\\n", " "))
    done = subprocess.run(
        [*pasted, "--silent", "--noproxy", "*"], capture_output=True, text=True, timeout=30
    )
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"].startswith(SAYS[:10])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
    assert process.stderr is not None
    request, account = process.stderr.read().splitlines()
    assert "route=/v1/chat/completions status=200 outcome=answered" in request
    assert account == "served 0 requests, 0 errors, pages 8 free of 0"


# ── generate ────────────────────────────────────────────────────────────────────────────────────


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def read_jsonl(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_answers_in_order(tmp_path: Path, fake: None) -> None:
    source = jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "a long one", "max_tokens": 30, "id": "first"},
        "",
        {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "logprobs": 1},
        {"prompt_token_ids": [1, 2, 3], "max_tokens": 2, "logit_bias": {"5": 1.0}},
    )
    target = tmp_path / "out.jsonl"
    args = ["generate", str(source), "-o", str(target), "--max-tokens", "4"]
    assert cli.run(args) == 0
    first, second, third = read_jsonl(target.read_text(encoding="utf-8"))
    assert (first["id"], first["line"]) == ("first", 1)
    assert first["outputs"][0]["text"] == SAYS.encode()[:30].decode(errors="replace")
    assert first["outputs"][0]["finish_reason"] == "length"
    assert (second["id"], second["line"]) == (3, 3)
    assert [output["index"] for output in second["outputs"]] == [0, 1]
    assert second["usage"]["completion_tokens"] == 8
    assert len(second["outputs"][0]["logprobs"]) == 4
    assert third["outputs"][0]["token_ids"] == list(SAYS.encode()[:2])
    assert third["usage"]["prompt_tokens"] == 3


def test_generate_reads_and_writes_the_standard_streams() -> None:
    done = subprocess.run(
        command("generate", "-", "--max-tokens", "1"),
        input='{"prompt": "x"}\n',
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    (result,) = read_jsonl(done.stdout)
    assert result["outputs"][0]["text"] == "G"


BAD_LINES: list[tuple[Any, str | None, str]] = [
    ("{", None, "not JSON"),
    ("[1]", None, "expected an object"),
    ({"prompt": ""}, "prompt", "not empty"),
    ({"prompt": 5}, "prompt", "text"),
    ({}, None, "exactly one"),
    ({"prompt": "x", "messages": []}, None, "exactly one"),
    ({"messages": [{"role": "user"}]}, "messages", "message 0"),
    ({"prompt_token_ids": [1, "x"]}, "prompt_token_ids", "integers"),
    ({"prompt_token_ids": [1, 999]}, "prompt_token_ids", "999"),
    ({"prompt": "x", "temprature": 1}, "temprature", "unknown"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "hot"),
    ({"prompt": "x" * 5000}, "prompt", "5000"),
    ('{"prompt": "\\ud800"}', None, "surrogate"),
]


@pytest.mark.parametrize(("line", "field", "says"), BAD_LINES)
def test_generate_names_the_bad_line(
    tmp_path: Path,
    fake: None,
    capsys: pytest.CaptureFixture[str],
    line: Any,
    field: str | None,
    says: str,
) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "fine"}, line)
    assert cli.run(["generate", str(source), "-o", str(tmp_path / "out")]) == 2
    message = error_line(capsys)
    assert "line 2" in message and says in message
    assert field is None or f"field {field!r}" in message


def test_generate_skips_bad_lines_on_request(tmp_path: Path, fake: None) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "x"}, *(line for line, _, _ in BAD_LINES))
    target = tmp_path / "out.jsonl"
    assert cli.run(["generate", str(source), "-o", str(target), "--skip-bad"]) == 0
    first, *others = read_jsonl(target.read_text())
    assert first["outputs"]
    assert [other["error"]["field"] for other in others] == [field for _, field, _ in BAD_LINES]
    assert [other["line"] for other in others] == list(range(2, len(BAD_LINES) + 2))


def test_generate_says_what_the_engine_failed(
    tmp_path: Path, fake: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "fail-first"}, {"prompt": "x"})
    target = tmp_path / "out.jsonl"
    assert cli.run(["generate", str(source), "-o", str(target)]) == 1
    assert "1 of 2 requests failed" in error_line(capsys)
    failed, fine = read_jsonl(target.read_text())
    assert failed["outputs"][0]["error"] == "NaN in 1 row"
    assert fine["outputs"][0]["finish_reason"] == "stop"


# ── chat ────────────────────────────────────────────────────────────────────────────────────────


def chat(*said: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("chat", "--max-tokens", "9", "--system", "Be brief."),
        input="".join(f"{line}\n" for line in said),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
    )


def test_chat_streams_answers_until_exit() -> None:
    done = chat("Hi", "/nope", "/reset", "again", "/exit", "not read")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(SAYS.encode()[:9].decode(errors="replace")) == 2
    assert "unknown command /nope" in done.stdout
    assert "forgotten" in done.stdout
    assert "9 tokens" in done.stdout and "cut at the limit" in done.stdout


def test_chat_ends_with_its_input_and_survives_a_long_message() -> None:
    done = chat("x" * 5000, "Hi")
    assert done.returncode == 0, done.stderr
    assert "4096" in done.stdout
    assert "9 tokens" in done.stdout


def test_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    with subprocess.Popen(
        command("chat"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write("hang\n")
            process.stdin.flush()
            seen = ""
            while "Gr" not in seen:
                seen += process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            while "stopped" not in seen:
                seen += process.stdout.read(1)
            process.stdin.write("/reset\nHi\n/exit\n")
            process.stdin.flush()
            rest = process.stdout.read()
            assert "tokens" in rest
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
