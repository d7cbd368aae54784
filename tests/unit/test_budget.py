"""The bloat budget and the reserve: bytes that may be added, and bytes that must stay free."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.budget import (
    MACHINE,
    RESERVE_LEAST,
    RESERVE_MOST,
    Amount,
    MemoryBound,
    Room,
    kept_free,
    parse_amount,
    parse_bloat,
)
from mthp.errors import UsageError

SIZES = st.integers(0, 1 << 50)


def bounds(*lefts: tuple[int, int]) -> Callable[[], list[MemoryBound]]:
    """Cgroups with these limits, and the room in each."""
    return lambda: [MemoryBound(f"/sys/fs/cgroup/{at}", limit, left) for at, (limit, left) in enumerate(lefts)]


def test_an_amount_is_a_share_or_a_size() -> None:
    assert parse_amount("5%") == Amount(share=0.05)
    assert parse_amount("64M") == Amount(size=64 << 20)
    assert parse_amount("0") == Amount(size=0)
    assert parse_bloat("none") is None
    assert parse_bloat("10%") == Amount(share=0.1)


@pytest.mark.parametrize("text", ["", "x%", "64X", "-1", "nan%", "none"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError):
        parse_amount(text)


@pytest.mark.parametrize("amount", [{"size": -1}, {"share": -0.1}, {"share": float("nan")}])
def test_no_amount_is_below_0(amount: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="below 0"):
        Amount(**amount)  # type: ignore[arg-type]


@given(SIZES)
def test_the_reserve_grows_with_the_limit_between_its_bounds(limit: int) -> None:
    kept = kept_free(limit)
    assert RESERVE_LEAST <= kept <= RESERVE_MOST
    assert kept in (RESERVE_LEAST, RESERVE_MOST, int(0.1 * limit))


def test_a_reserve_that_was_chosen_is_kept_to_exactly() -> None:
    assert kept_free(1 << 30, Amount(size=0)) == 0
    assert kept_free(1 << 30, Amount(share=0.5)) == 1 << 29


@given(st.lists(st.tuples(SIZES, SIZES), max_size=4), st.lists(st.tuples(SIZES, SIZES), max_size=8))
def test_what_was_taken_never_leaves_less_than_the_reserve(
    limits: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    room = Room(bounds(*limits))
    taken = 0
    for added, at_once in wanted:
        if room.take(added, at_once):
            assert all(left - taken - max(added, at_once) >= kept_free(limit) for limit, left in limits)
            taken += added
        else:
            assert any(left - taken - max(added, at_once) < kept_free(limit) for limit, left in limits)
            assert room.reason
    assert room.limited == bool(limits)


def test_what_is_needed_for_a_moment_is_not_taken() -> None:
    room = Room(bounds((1 << 30, 110 << 20)), Amount(size=100 << 20))
    assert all(room.take(0, 10 << 20) for _ in range(100))
    assert not room.take(0, 11 << 20)
    assert room.take(10 << 20)
    assert not room.take(1)


def test_limits_are_asked_for_again() -> None:
    lefts = iter([200 << 20, 64 << 20])
    room = Room(lambda: [MemoryBound(MACHINE, 400 << 20, next(lefts))])
    assert room.take(1 << 20)
    room.renew()
    assert not room.take(1 << 20)
    assert room.reason == f"64M of 400M are left in {MACHINE}, and 64M of it must stay free"
    assert not room.limited


def test_without_limits_everything_fits() -> None:
    room = Room(list)
    assert room.take(1 << 60)
    assert room.spare is None
    assert room.reason == ""
