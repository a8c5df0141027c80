"""The film itself: drawn, encoded, and long enough to have told the story (make test-animate)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("manim")

from astrai.cli.app import run

pytestmark = pytest.mark.animate


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import asyncio

    from astrai.observe.animate.render import small_run

    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    asyncio.run(small_run("smollm2", path))
    return path


@pytest.mark.parametrize("scene", ["batching", "cache"])
def test_a_scene_becomes_a_film(recording: Path, tmp_path: Path, scene: str) -> None:
    import av

    result = tmp_path / "batching.json"
    result.write_text('{"bench": "batching", "time_ratio": 1.71, "slots": 64}')
    film = tmp_path / "film.mp4"
    flags = ["--quality", "low", "--scene", scene, "--batching", str(result)]
    assert run(["animate", str(recording), "-o", str(film), *flags]) == 0
    with av.open(str(film)) as opened:
        frames = [frame.to_ndarray(format="gray") for frame in opened.decode(video=0)]
    assert frames[0].shape == (480, 854)
    assert len(frames) > 15 * 15, "seconds at 15 frames a second"
    # Something bright is drawn in most frames; an empty stage is nearly black.
    drawn = sum(int(frame.max()) > 150 for frame in frames)
    assert drawn > 0.8 * len(frames)


def test_gif(recording: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.gif"
    flags = ["--quality", "low", "--scene", "cache", "--gif"]
    assert run(["animate", str(recording), "-o", str(film), *flags]) == 0
    assert film.read_bytes()[:6] in (b"GIF87a", b"GIF89a")


def test_what_is_no_recording_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "run.jsonl"
    wrong.write_text("{}\n")
    assert run(["animate", str(wrong), "-o", str(tmp_path / "film.mp4")]) == 1
    assert "not a recording" in capsys.readouterr().err
