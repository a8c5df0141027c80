"""The paged KV cache: the books (bitmask, pool, prefix, books; no torch) and the storage.

`PagedCache` and `CacheView` load torch when they are first asked for: the books need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astrai.inference.cache.storage import CacheView, PagedCache

__all__ = ["CacheView", "PagedCache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from astrai.inference.cache import storage

    return getattr(storage, name)
