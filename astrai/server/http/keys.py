"""What opens the door: API keys, and the certificate. Imports nothing heavy: it is read first."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from astrai.config import DoorConfig

ENV_KEYS = "ASTRAI_API_KEYS"
MIN_KEY_LENGTH = 8
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept: never the key itself."""

    name: str  # of the tenant; several keys may have one
    digest: bytes

    @classmethod
    def of(cls, text: str, where: str) -> ApiKey:
        """From `KEY` or `NAME KEY`; without a name the tenant is called by a hash of the key.

        Raises ValueError, which says where and never what.
        """
        words = text.split()
        if len(words) not in (1, 2):
            raise ValueError(f"{where}: {len(words)} words, expected KEY or NAME KEY")
        key = words[-1]
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(
                f"{where}: a key of {len(key)} characters, expected at least {MIN_KEY_LENGTH}"
            )
        digest = hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
        name = words[0] if len(words) == 2 else f"key-{digest.hex()[:16]}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: name {name!r}, expected {_NAME.pattern}")
        return cls(name, digest)


class KeyRing:
    """The keys that open the door; without any it stands open."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def gather(
        cls,
        given: Sequence[str] = (),
        file: str | Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> KeyRing:
        """Keys of the command line, of a file (one a line, # comments) and of ASTRAI_API_KEYS
        (separated by commas), all as `KEY` or `NAME KEY`.

        Raises ValueError if one cannot be meant, OSError if the file cannot be read.
        """
        keys = [ApiKey.of(text, f"--api-key {i}") for i, text in enumerate(given, 1)]
        if file is not None:
            lines = Path(file).read_text("utf-8").splitlines()
            found = [
                ApiKey.of(line, f"{file}:{i}")
                for i, line in enumerate(lines, 1)
                if line.strip() and not line.lstrip().startswith("#")
            ]
            if not found:
                raise ValueError(f"{file}: no key in {len(lines)} lines")
            keys += found
        if ENV_KEYS in environment:
            texts = environment[ENV_KEYS].split(",")
            keys += [ApiKey.of(text, f"{ENV_KEYS} {i}") for i, text in enumerate(texts, 1)]
        return cls(keys)

    def tenant(self, key: bytes) -> str | None:
        """The name under which `key` is known. Takes the same time whichever it is, or none."""
        digest = hashlib.sha256(key).digest()
        found: str | None = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known.name
        return found


def check_tls(config: DoorConfig) -> None:
    """Raise ValueError, naming the files, unless they are a certificate and its key."""
    if config.tls_cert is None or config.tls_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:
        raise ValueError(
            f"--tls-cert {config.tls_cert}, --tls-key {config.tls_key}: {error.strerror or error}"
        ) from None
