from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrai.inference.cache.bitmask import BitMask


@pytest.mark.parametrize("size", [1, 8, 63, 64, 65, 4096, 4097, 300_000])
def test_takes_every_member_once_lowest_first(size: int) -> None:
    mask = BitMask(size)
    assert [mask.take() for _ in range(size)] == list(range(size))
    assert mask.take() == -1
    assert len(mask) == 0


@given(st.integers(1, 5000), st.lists(st.tuples(st.booleans(), st.integers(0, 4999)), max_size=300))
def test_behaves_like_a_sorted_set(size: int, script: list[tuple[bool, int]]) -> None:
    mask, model = BitMask(size), set(range(size))
    for take, index in script:
        if take:
            expected = min(model) if model else -1
            assert mask.take() == expected
            model.discard(expected)
        elif index >= size or index in model:
            with pytest.raises(ValueError, match=str(index)):
                mask.put(index)
        else:
            mask.put(index)
            model.add(index)
        assert len(mask) == len(model)
    assert set(mask) == model
    assert mask.to_int() == sum(1 << index for index in model)
    assert all((index in mask) == (index in model) for index in range(size))


def test_finds_a_distant_member_after_the_front_ran_empty() -> None:
    size = 64 * 64 * 64 + 5
    mask = BitMask(size)
    for _ in range(size):
        mask.take()
    for index in (size - 1, 70_000, 64):
        mask.put(index)
    assert [mask.take(), mask.take(), mask.take(), mask.take()] == [64, 70_000, size - 1, -1]


def test_refuses_an_empty_set() -> None:
    with pytest.raises(ValueError, match="size = 0"):
        BitMask(0)
