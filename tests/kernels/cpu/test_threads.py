"""Threads by operation: the count within, and the count that is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from astrai.kernels.cpu.threads import alone, together


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_alone_and_together() -> None:
    with alone(True):
        assert torch.get_num_threads() == 1
        with together():
            assert torch.get_num_threads() == 3
        with together(False):
            assert torch.get_num_threads() == 1
        with alone(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1, "the inner one changes nothing"
    assert torch.get_num_threads() == 3


def test_together_without_alone_leaves_the_count() -> None:
    with alone(False), together():
        assert torch.get_num_threads() == 3


def test_an_error_within_leaves_the_count_as_it_was() -> None:
    with pytest.raises(ValueError, match="within"), alone(True), together():
        raise ValueError("within")
    assert torch.get_num_threads() == 3
