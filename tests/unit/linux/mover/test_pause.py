"""Filling windows, and reporting pauses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.linux.mover.pause import MARGIN, UNAVOIDABLE, Pause, PauseBudget, rest_seconds
from mthp.linux.mover.refuse.block import touches


def pause(*, fixed: int = 0, work: int = 0, size: int = 0, blocks: int = 1, waiting: int = 0) -> Pause:
    return Pause(blocks, size, 1, fixed, 0, waiting + work, 0, 0, work)


def test_the_first_window_has_one_block() -> None:
    assert PauseBudget(10**9, 100).blocks([1] * 50) == 1


def test_windows_fill_what_the_limit_leaves() -> None:
    budget = PauseBudget(1_000_000, 100)
    budget.observe(pause(fixed=300_000, work=50_000, size=65536))
    left = MARGIN * 1_000_000 - 300_000
    assert budget.blocks([65536] * 100) == left // 50_000
    assert budget.blocks([65536 * 4] * 100) == left // 200_000
    assert budget.blocks([1] * 1000) == 100


def test_waiting_for_the_worker_is_no_cost_of_a_byte() -> None:
    budget = PauseBudget(1_000_000, 100)
    budget.observe(pause(fixed=300_000, work=50_000, size=65536, waiting=150_000))
    assert budget.blocks([65536] * 100) == (MARGIN * 1_000_000 - 450_000) // 50_000


def test_a_slower_target_is_believed_at_once_and_a_faster_one_by_and_by() -> None:
    budget = PauseBudget(1_000_000, 1000)
    for _ in range(5):
        budget.observe(pause(work=10_000, size=65536))
    quick = budget.blocks([65536] * 1000)
    budget.observe(pause(work=100_000, size=65536))
    assert budget.blocks([65536] * 1000) == int(MARGIN * 1_000_000 // 100_000)
    budget.observe(pause(work=10_000, size=65536))
    assert budget.blocks([65536] * 1000) < quick
    for _ in range(30):
        budget.observe(pause(work=10_000, size=65536))
    assert budget.blocks([65536] * 1000) == pytest.approx(quick, abs=1)


def test_a_window_in_which_nothing_was_moved_teaches_nothing_of_moving() -> None:
    budget = PauseBudget(1_000_000, 1000)
    budget.observe(pause(fixed=100, blocks=0))
    assert budget.blocks([65536] * 10) == 1


@given(fixed=st.integers(0, 10**8), work=st.integers(1, 10**8), limit=st.integers(1, 10**8))
def test_there_is_always_progress_and_never_more_than_fits(fixed: int, work: int, limit: int) -> None:
    budget = PauseBudget(limit, 512)
    budget.observe(pause(fixed=fixed, work=work, size=65536))
    count = budget.blocks([65536] * 1000)
    assert 1 <= count <= 512
    if fixed + work <= MARGIN * limit:
        assert fixed + count * work <= MARGIN * limit + 1
    else:
        assert count == 1 or count * work <= UNAVOIDABLE * fixed + 1


def test_pauses_that_are_too_long_anyway_have_many_blocks() -> None:
    budget = PauseBudget(1_000_000, 512)
    budget.observe(pause(fixed=1_200_000, work=20_000, size=65536))
    assert budget.blocks([65536] * 1000) == 30
    assert budget.blocks([65536] * 10) == 10
    assert budget.blocks([16 << 20] * 10) == 1


def test_rests_keep_to_the_duty() -> None:
    stood = pause(fixed=1_000_000)
    assert rest_seconds(stood, 1) == 0
    assert rest_seconds(stood, 0.25) == pytest.approx(0.003)


BLOCK = st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 18))


@given(ranges=st.lists(BLOCK, max_size=20), blocks=st.lists(BLOCK, min_size=1, max_size=20))
def test_touching_is_overlapping(ranges: list[tuple[int, int]], blocks: list[tuple[int, int]]) -> None:
    pairs = [(low, low + length) for low, length in ranges]
    starts, lengths = np.array(blocks, np.int64).T
    wanted = [any(low < start + size and high > start for low, high in pairs) for start, size in blocks]
    assert touches(starts, starts + lengths, pairs).tolist() == wanted
