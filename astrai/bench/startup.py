"""From the start of a process to the first token of a 32-token prompt, in processes of their own.

Once without any compiled kernel and once with the kernels of the run before. The floor is a process
that imports torch and wakes the device, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from astrai.bench._common import finish, load, parser, with_model
from astrai.bench._floor import reached

_FLOOR = (
    "import torch\n"
    "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
    "torch.zeros(1, device=device).item()"
)


def main(argv: Sequence[str]) -> None:
    options = with_model(parser("startup", __doc__))
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.child:
        print(json.dumps(_first_token(args)))
        return
    run = [sys.executable, "-m", "astrai.cli.app", "bench", "startup", "--child", *argv]
    with tempfile.TemporaryDirectory() as cache:
        _seconds([sys.executable, "-c", _FLOOR], cache)  # the files are in memory from here on
        floor, _ = _seconds([sys.executable, "-c", _FLOOR], cache)
        cold, marks = _seconds(run, cache)
        warm, warm_marks = _seconds(run, cache)
    lines = [
        "seconds from the start of the process to its end just after the first token",
        f"first start {cold:.2f} s  {marks}",
        f"next start  {warm:.2f} s  {warm_marks}",
        f"floor {floor:.2f} s (torch alone): {reached(floor, cold)}, {reached(floor, warm)}",
    ]
    result = {
        "first_seconds": round(cold, 2),
        "next_seconds": round(warm, 2),
        "floor_seconds": round(floor, 2),
        "first": marks,
        "next": warm_marks,
    }
    finish(args, "startup", lines, result)


def _seconds(command: list[str], cache: str) -> tuple[float, Any]:
    """Of one process, and the JSON it ends in."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_CACHE_DIR": cache, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    return seconds, json.loads(lines[-1]) if lines else None


def _first_token(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from here to the model's readiness and to the token."""
    from astrai.front.sampling_params import SamplingParams

    started = time.perf_counter()
    llm = load(args)
    loaded = time.perf_counter() - started
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    llm.generate([list(range(32))], params, use_tqdm=False)
    return {
        "load": round(loaded, 2),
        "load_and_first_token": round(time.perf_counter() - started, 2),
    }
