"""Chains of full pages, found again by the exact tokens that filled them."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence


class _Node:
    """One full page in a chain: its frame, the tokens that filled it, and what follows."""

    __slots__ = ("children", "frame", "key", "namespace", "parent", "tokens")

    def __init__(
        self, namespace: str, parent: _Node | None, tokens: tuple[int, ...], frame: int
    ) -> None:
        self.namespace = namespace
        self.parent = parent
        self.tokens = tokens
        self.frame = frame
        self.children: dict[tuple[int, ...], _Node] = {}
        self.key: int | None = None  # hash of the chain up to here, once somebody asked


class PrefixCache:
    """An index of full pages by namespace and exact token ids.

        root(namespace) ─► [page 0 tokens] ─► [page 1 tokens] ─► ...
                                         └─► [other page 1] ─► ...

    Eviction takes the least recently used leaf. Whoever holds a page holds all pages before it in
    the chain, and holders let go of a chain from its end, so among cached pages a child always
    became cached before its parent. Hence the order of becoming cached is both least-recently-used
    and children-first: the first entry of `_idle` is always a leaf, and eviction is O(1).

    Owns the chains and their order of use; does not own refs or frames (PagePool does).
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[str, _Node] = {}
        self._node_of: dict[int, _Node] = {}  # frame → node
        self._idle: OrderedDict[int, _Node] = (
            OrderedDict()
        )  # cached frames, least recently used first

    def __contains__(self, frame: int) -> bool:
        return frame in self._node_of

    def __len__(self) -> int:
        return len(self._node_of)

    def frames(self) -> list[int]:
        """Every indexed frame, held or cached."""
        return list(self._node_of)

    def match(self, namespace: str, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """Frames of the longest chain of full pages equal to the start of `tokens[:n_tokens]`."""
        frames: list[int] = []
        node = self._roots.get(namespace)
        size = self.page_size
        for start in range(0, n_tokens - size + 1, size):
            if node is None:
                break
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is not None:
                frames.append(node.frame)
        return frames

    def insert(
        self, namespace: str, before: int | None, tokens: tuple[int, ...], frame: int
    ) -> bool:
        """Index `frame`, filled with `tokens`, behind frame `before` (None: first page of the
        chain).

        Returns False, changing nothing, when an equal page is indexed already or when `before` is
        not indexed: the frame then stays private to its holder.
        """
        if frame in self._node_of:
            raise ValueError(f"{frame = } is indexed already")
        if before is None:
            parent = self._roots.get(namespace)
            if parent is None:
                parent = self._roots[namespace] = _Node(namespace, None, (), -1)
        else:
            parent = self._node_of.get(before)
        if parent is None or tokens in parent.children:
            return False
        node = _Node(namespace, parent, tokens, frame)
        parent.children[tokens] = node
        self._node_of[frame] = node
        return True

    def on_cached(self, frame: int) -> None:
        """The last holder of an indexed frame let go: it is the most recently used cached page."""
        self._idle[frame] = self._node_of[frame]

    def on_shared(self, frame: int) -> None:
        """A cached frame is held again."""
        self._idle.pop(frame, None)

    def pop_oldest(self) -> int:
        """Forget the least recently used cached leaf and return its frame."""
        if not self._idle:
            raise RuntimeError("no page is cached, nothing can be evicted")
        frame, node = self._idle.popitem(last=False)
        if node.children:
            raise RuntimeError(
                f"cached {frame = } was evicted before its {len(node.children)} children"
            )
        self._remove(node)
        return frame

    def forget(self, frame: int) -> bool:
        """Take a frame that ends its chain out of the index; False when other pages follow it."""
        node = self._node_of[frame]
        if node.children:
            return False
        self._idle.pop(frame, None)
        self._remove(node)
        return True

    def key(self, namespace: str, before: int | None, tokens: tuple[int, ...]) -> int:
        """Hash of the chain of the indexed frame `before` (None: its start), then `tokens`."""
        root = zlib.crc32(namespace.encode("utf-8"))
        return hash((root if before is None else _chain_key(self._node_of[before]), tokens))

    def key_of_oldest(self) -> int:
        """The key of the chain that ends in the page `pop_oldest` would take."""
        return _chain_key(next(iter(self._idle.values())))

    def _remove(self, node: _Node) -> None:
        del self._node_of[node.frame]
        parent = node.parent
        if parent is None:
            raise RuntimeError(f"frame {node.frame} has no parent in the index")
        del parent.children[node.tokens]
        if parent.parent is None and not parent.children:
            del self._roots[parent.namespace]


def _chain_key(node: _Node) -> int:
    """Each node is hashed once: O(1) amortised, however long the chain."""
    path: list[_Node] = []
    above: _Node | None = node
    while above is not None and above.key is None:
        path.append(above)
        above = above.parent
    key = 0 if above is None or above.key is None else above.key
    for link in reversed(path):
        root = link.parent is None
        key = zlib.crc32(link.namespace.encode("utf-8")) if root else hash((key, link.tokens))
        link.key = key
    return key
