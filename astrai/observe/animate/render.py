"""`astrai animate`: a recording, or a small run of the default model, into a film."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from astrai.config import EngineConfig
from astrai.observe.animate.story import cache_story, moments
from astrai.observe.recording import Recording

Part = Literal["all", "batching", "cache"]
Quality = Literal["low", "medium", "high", "4k"]

_QUALITY = {
    "low": "low_quality",  # 854 x 480, 15 frames/s
    "medium": "medium_quality",  # 1280 x 720, 30
    "high": "high_quality",  # 1920 x 1080, 60
    "4k": "fourk_quality",
}


def animate(
    recording: Path | None,
    output: Path,
    *,
    scene: Part = "all",
    quality: Quality = "medium",
    gif: bool = False,
    batching: Path | None = None,
    model: str = EngineConfig().model,
) -> None:
    """Draw `recording` into `output`; without one, a small run of `model` is recorded and drawn.

    `batching` is a file whose last line is what `astrai bench batching --json` printed: the bars
    have its ratio, and without it there are no bars. Raises ValueError if a file is not what it
    should be or the run has no such story, ImportError without the extra `animate`.
    """
    try:
        from astrai.observe.animate.scenes import Facts, Film
    except ImportError as error:
        raise ImportError(
            f"{error}: make animate-setup, or pip install 'astrai[animate]' with the headers of "
            "cairo and pango"
        ) from None
    ratio, slots = measured(batching) if batching is not None else (None, None)
    with tempfile.TemporaryDirectory(prefix="astrai-animate-") as folder:
        if recording is None:
            recording = Path(folder) / "run.jsonl"
            asyncio.run(small_run(model, recording))
        source = Recording(recording)
        source.require_whole("the film")
        header = source.header
        shape = _shape(recording, header.about)
        events = list(source.events())
        told = moments(events) if scene != "cache" else []
        cache = cache_story(events, header.n_pages) if scene != "batching" else None
        facts = Facts(
            model=str(header.about.get("model", "")),
            n_slots=header.scheduler.max_slots,
            n_pages=header.n_pages,
            page_size=header.page_size,
            n_layers=shape[0],
            n_kv_heads=shape[1],
            head_dim=shape[2],
            grouping=header.scheduler.group_decode,
            ratio=ratio,
            measured_slots=slots,
        )
        _render(Film, (facts, told, cache), Path(folder), output, quality, gif)


def measured(path: Path) -> tuple[float, int]:
    """The ratio in time, and the slots, of a result of `astrai bench batching --json`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        result = json.loads(next(line for line in reversed(lines) if line.strip()))
        if result["bench"] != "batching":
            raise ValueError(f"of {result['bench']!r}")
        return float(result["time_ratio"]), int(result["slots"])
    except (StopIteration, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its last line is not a result of astrai bench batching: {error}"
        ) from None


async def small_run(model: str, recording: Path) -> None:
    """The story of both scenes: A grows, B is beside it, C shares A's first page, others wait."""
    from astrai.bench._common import text_prompt
    from astrai.front.async_engine import AsyncEngine
    from astrai.front.sampling_params import SamplingParams

    config = EngineConfig(
        model=model, max_slots=5, kv_tokens=640, page_size=64, prefill_budget=256,
        group_decode="position", record=str(recording),
    )  # fmt: skip
    engine = AsyncEngine(config)
    rng = random.Random(0)
    a = text_prompt(engine.tokenizer, rng, 120)
    first = [("A", a, 60), ("B", text_prompt(engine.tokenizer, rng, 90), 30)]
    then = [("C", a[:64] + text_prompt(engine.tokenizer, rng, 30), 70)]
    for i, n_output in enumerate((18, 26, 12, 9, 15)):
        then.append((f"{i}", text_prompt(engine.tokenizer, rng, 24), n_output))
    grown = asyncio.Event()

    async def ask(name: str, prompt: Sequence[int], n_output: int) -> None:
        params = SamplingParams(max_tokens=n_output, ignore_eos=True, temperature=0)
        n = 0
        async for delta in engine.stream(list(prompt), params, request_id=name):
            n += len(delta.token_ids)
            if delta.error is not None:
                raise RuntimeError(f"request {name}: {delta.error}")
            if name == "A" and n >= 12:
                grown.set()

    engine.start()
    try:
        async with asyncio.TaskGroup() as group:
            for request in first:
                group.create_task(ask(*request))
            await grown.wait()
            for request in then:
                group.create_task(ask(*request))
    finally:
        await engine.shutdown()


def _shape(path: Path, about: dict[str, Any]) -> tuple[int, int, int]:
    try:
        return int(about["n_layers"]), int(about["n_kv_heads"]), int(about["head_dim"])
    except KeyError as error:
        raise ValueError(f"{path}: its header has no {error}, which the film shows") from None


def _render(
    film: Any, told: tuple[Any, ...], folder: Path, output: Path, quality: Quality, gif: bool
) -> None:
    from manim import tempconfig

    options = {
        "quality": _QUALITY[quality],
        "media_dir": str(folder),
        "output_file": "film",
        "format": "gif" if gif else "mp4",
        "verbosity": "WARNING",
        "progress_bar": "none",
        "disable_caching": True,
    }
    with tempconfig(options):
        scene = film(*told)
        scene.render()
        writer = scene.renderer.file_writer
        made = Path(writer.gif_file_path if gif else writer.movie_file_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made, output)
