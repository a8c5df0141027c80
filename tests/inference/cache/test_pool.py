from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from astrai.inference.cache.pool import PagePool, n_pages_for


def bits(pool: PagePool) -> str:
    """The free mask, frame 0 on the right."""
    return format(pool.free_mask.to_int(), f"0{pool.n_pages}b")


def test_the_worked_example() -> None:
    """DESIGN §4, number for number."""
    assert (n_pages_for(120, 64), n_pages_for(180, 64), n_pages_for(90, 64)) == (2, 3, 2)
    pool = PagePool(8)
    a = pool.alloc_n(n_pages_for(120, 64))
    assert a == [0, 1] and bits(pool) == "11111100"
    b = pool.alloc_n(n_pages_for(90, 64))
    assert b == [2, 3] and bits(pool) == "11110000"
    assert n_pages_for(181, 64) == 3
    a.append(pool.alloc())
    assert a == [0, 1, 4] and bits(pool) == "11100000"
    assert pool.refs == [1, 1, 1, 1, 1, 0, 0, 0]
    for frame in a:
        pool.free(frame)
    assert pool.refs == [0, 0, 1, 1, 0, 0, 0, 0]
    assert bits(pool) == "11110011"
    assert pool.counts == (6, 0, 2, 8)


def test_errors_name_the_frame() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="frame = 1"):
        pool.free(1)
    with pytest.raises(ValueError, match="frame = 1"):
        pool.share(1)
    with pytest.raises(ValueError, match="frame = 0"):
        pool.evict(0)
    assert pool.alloc_n(3) == [] and pool.counts == (2, 0, 0, 2)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(70)
        self.refs: dict[int, int] = {}
        self.cached: set[int] = set()

    @rule(n=st.integers(1, 20))
    def alloc_n(self, n: int) -> None:
        free = sorted(set(range(70)) - set(self.refs) - self.cached)
        expected = free[:n] if len(free) >= n else []
        assert self.pool.alloc_n(n) == expected
        self.refs.update(dict.fromkeys(expected, 1))

    @precondition(lambda self: self.refs or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        frame = data.draw(st.sampled_from(sorted(set(self.refs) | self.cached)))
        self.pool.share(frame)
        self.cached.discard(frame)
        self.refs[frame] = self.refs.get(frame, 0) + 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), keep=st.booleans())
    def free(self, data: st.DataObject, keep: bool) -> None:
        frame = data.draw(st.sampled_from(sorted(self.refs)))
        self.pool.free(frame, keep)
        self.refs[frame] -= 1
        if not self.refs[frame]:
            del self.refs[frame]
            if keep:
                self.cached.add(frame)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        frame = data.draw(st.sampled_from(sorted(self.cached)))
        self.pool.evict(frame)
        self.cached.remove(frame)

    @invariant()
    def balance(self) -> None:
        counts = self.pool.counts
        assert counts.free + counts.cached + counts.held == counts.total == 70
        assert (counts.cached, counts.held) == (len(self.cached), len(self.refs))
        assert set(self.pool.free_mask) == set(range(70)) - set(self.refs) - self.cached
        assert {f: n for f, n in enumerate(self.pool.refs) if n} == self.refs


TestPool = PoolMachine.TestCase
