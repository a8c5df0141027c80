"""The books of the cache: which frames a page table names, and what can be found again."""

from __future__ import annotations

from collections.abc import Iterable

from astrai.inference.cache.pool import PagePool, PoolCounts, n_pages_for
from astrai.inference.cache.prefix import PrefixCache
from astrai.inference.events import EventLog
from astrai.inference.task import Task

# Evicted pages whose tick is kept, to tell a later miss when its page was lost.
EVICTIONS_REMEMBERED = 16384


class Books:
    """Gives pages to tasks, shares them by prefix, keeps them cached, evicts them.

    Two invariants carry everything else:
      - free + cached + held == total (PagePool);
      - a page with refs > 1 is full and never written again: only full pages are indexed and
        shared, and a fork copies the partial one. So no launch can write a page that another task
        reads.

    Owns the pool, the prefix index and the page tables of tasks. Does not own the tensors
    (PagedCache).
    """

    def __init__(self, n_pages: int, page_size: int, prefix_cache: bool, events: EventLog) -> None:
        self.page_size = page_size
        self.pool = PagePool(n_pages)
        self.prefix = PrefixCache(page_size)
        self.prefix_cache = prefix_cache
        self._events = events
        self._evicted: dict[int, int] = {}  # content of an evicted page → tick, while listened to

    @property
    def counts(self) -> PoolCounts:
        return self.pool.counts

    def n_pages_for(self, n_tokens: int) -> int:
        return n_pages_for(n_tokens, self.page_size)

    def admit(self, task: Task, reserve: int) -> bool:
        """Give `task` pages for all its known tokens, sharing the longest indexed prefix.

        On success `task.computed` positions need no work. The last known token is always computed,
        so at most `len(tokens) - 1` positions are shared. False, and no change, when fewer than
        `reserve` pages would be left.
        """
        shared: list[int] = []
        asks = self.prefix_cache and not task.params.reads_whole_prompt
        if asks:
            shared = self.prefix.match(task.namespace, task.tokens, len(task.tokens) - 1)
        if not self._open(task, shared, len(shared) * self.page_size, reserve):
            return False
        if asks and self._events:
            self._tell_prefix(task)
        return True

    def fork(self, task: Task, leader: Task, reserve: int) -> tuple[int, int] | None:
        """Give `task` the prompt pages of its sibling: full pages shared, the partial one copied.

        Returns the copy (source, target) that must run before the next writes, (-1, -1) if the
        prompt ends on a page border, or None, and no change, when pages are short.
        """
        n_computed = task.n_prompt - 1
        n_full, rest = divmod(n_computed, self.page_size)
        source = leader.page_table[n_full] if rest else -1
        if not self._open(task, leader.page_table[:n_full], n_computed, reserve):
            return None
        if not rest:
            return (-1, -1)
        target = task.page_table[n_full]
        if self._events:
            self._events.emit("copy", task.id, source, target)
        return (source, target)

    def grow(self, task: Task, n_positions: int) -> bool:
        """Pages for `n_positions` positions in all; False, and no change, when the pool is dry."""
        missing = self.n_pages_for(n_positions) - len(task.page_table)
        if missing <= 0:
            return True
        if missing > self.pool.n_free + self.pool.n_cached:
            return False
        self._take(task, missing)
        return True

    def commit(self, task: Task, n_positions: int) -> None:
        """The first `n_positions` positions are in the pages for good: index the full ones."""
        n_full = n_positions // self.page_size
        if not self.prefix_cache or n_full <= task.n_indexed:
            return
        size = self.page_size
        indexed = []
        for page in range(task.n_indexed, n_full):
            frame = task.page_table[page]
            before = task.page_table[page - 1] if page else None
            tokens = tuple(task.tokens[page * size : (page + 1) * size])
            if frame not in self.prefix and self.prefix.insert(
                task.namespace, before, tokens, frame
            ):
                indexed.append(frame)
        task.n_indexed = n_full
        if indexed and self._events:
            self._events.emit("index", task.id, indexed)

    def release(self, task: Task, keep: bool = True) -> None:
        """Take all pages back from `task`, last page first so that chains are cached from their
        end.

        With `keep` False (the task's content is suspect) pages nobody else holds leave the index as
        well.
        """
        forgotten = []
        for frame in reversed(task.page_table):
            last = self.pool.refs[frame] == 1
            indexed = frame in self.prefix
            if last and indexed and not keep and self.prefix.forget(frame):
                indexed = False
                forgotten.append(frame)
            self.pool.free(frame, keep=indexed)
            if last and indexed:
                self.prefix.on_cached(frame)
        if forgotten and self._events:
            self._events.emit("forget", forgotten)
        if task.page_table and self._events:
            self._events.emit("return", task.id, task.page_table[::-1])
        task.page_table = []
        task.n_indexed = 0
        task.computed = 0

    def drop_cached(self) -> int:
        """Evict every cached page; returns how many there were."""
        n_cached = self.pool.n_cached
        self._evict(n_cached)
        return n_cached

    def check(self, holders: Iterable[Task]) -> None:
        """Raise RuntimeError with the numbers if the books do not balance. O(pages)."""
        refs = [0] * self.pool.n_pages
        for task in holders:
            for frame in task.page_table:
                refs[frame] += 1
        counts = self.counts
        held = sum(1 for n in refs if n)
        if refs != self.pool.refs or held != counts.held:
            wrong = [
                (f, a, b)
                for f, (a, b) in enumerate(zip(refs, self.pool.refs, strict=True))
                if a != b
            ]
            raise RuntimeError(
                f"page refs differ from the holders: (frame, held, refs) = {wrong[:8]}, {counts}"
            )
        cached = [
            f for f in range(self.pool.n_pages) if not refs[f] and f not in self.pool.free_mask
        ]
        if (
            len(cached) != counts.cached
            or counts.free + counts.cached + counts.held != counts.total
        ):
            raise RuntimeError(
                f"free + cached + held != total: {counts}, {len(cached)} frames look cached"
            )
        lost = [f for f in cached if f not in self.prefix]
        if lost:
            raise RuntimeError(f"page frames {lost[:8]} are neither free, nor held, nor indexed")

    def _tell_prefix(self, task: Task) -> None:
        """How far the index matched the task's full pages, and when it lost the next one."""
        n_full = (len(task.tokens) - 1) // self.page_size * self.page_size
        evicted = -1
        if task.computed < n_full:
            after = task.page_table[task.n_indexed - 1] if task.n_indexed else None
            page = tuple(task.tokens[task.computed : task.computed + self.page_size])
            evicted = self._evicted.get(self.prefix.key(task.namespace, after, page), -1)
        self._events.emit("prefix", task.id, task.computed, n_full, evicted)

    def _open(self, task: Task, shared: list[int], n_computed: int, reserve: int) -> bool:
        n_new = self.n_pages_for(len(task.tokens)) - len(shared)
        idle = sum(1 for frame in shared if self.pool.refs[frame] == 0)
        if n_new + reserve > self.pool.n_free + self.pool.n_cached - idle:
            return False
        for frame in shared:
            self.pool.share(frame)
            self.prefix.on_shared(frame)
        task.page_table = list(shared)
        task.n_indexed = len(shared)
        task.computed = n_computed
        if shared and self._events:
            self._events.emit("share", task.id, task.page_table[:])
        self._take(task, n_new)
        return True

    def _take(self, task: Task, n: int) -> None:
        """`n` more pages for `task`; the caller made sure that enough are free or cached."""
        if n > self.pool.n_free:
            self._evict(n - self.pool.n_free)
        frames = self.pool.alloc_n(n)
        task.page_table += frames
        if frames and self._events:
            self._events.emit("take", task.id, frames)

    def _evict(self, n: int) -> None:
        frames = []
        for _ in range(n):
            if self._events:
                self._remember(self.prefix.key_of_oldest())
            frames.append(self.prefix.pop_oldest())
            self.pool.evict(frames[-1])
        if frames and self._events:
            self._events.emit("evict", frames)

    def _remember(self, key: int) -> None:
        self._evicted.pop(key, None)
        self._evicted[key] = self._events.tick
        if len(self._evicted) > EVICTIONS_REMEMBERED:
            del self._evicted[next(iter(self._evicted))]
