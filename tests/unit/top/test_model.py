"""Rows of `mthp top`: sorting, filtering, bars."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mthp.geometry import X86_64
from mthp.top.model import BLOCKS, SORTS, UNKNOWN, Row, arranged, bar, described, totals

ROWS = [
    Row(30, "redis-server", 500, 400, huge=100, gain=300, bloat=7, planned=True),
    Row(4, "Postgres", 900, 100, huge=100, gain=0, bloat=0, planned=True),
    Row(17, "java", 700, 600),
    Row(5, "java", 100, 90, huge=0, gain=90),
]


def keys(sort: str, **options: object) -> list[int]:
    return [row.key for row in arranged(ROWS, sort, **options)]  # type: ignore[arg-type]


def test_figures_begin_with_the_largest_and_names_with_the_smallest() -> None:
    assert keys("gain") == [30, 5, 4, 17]
    assert keys("resident") == [4, 17, 30, 5]
    assert keys("huge") == [4, 30, 5, 17]
    assert keys("bloat") == [30, 4, 5, 17]
    assert keys("name") == [5, 17, 4, 30]
    assert keys("id") == [4, 5, 17, 30]
    assert keys("id", reverse=True) == [30, 17, 5, 4]


def test_equal_rows_keep_their_places() -> None:
    rows = [Row(key, "same", 1, 1, gain=1) for key in (3, 1, 2)]
    for sort in SORTS:
        assert [row.key for row in arranged(rows, sort)] == [1, 2, 3]


def test_a_filter_is_part_of_a_name_or_a_number() -> None:
    assert keys("id", wanted="JAVA") == [5, 17]
    assert keys("id", wanted="3") == [30]
    assert keys("id", wanted="nobody") == []


@given(st.dictionaries(st.integers(UNKNOWN, 12), st.integers(0, 1 << 40), max_size=8), st.integers(1, 60))
def test_a_bar_is_full_and_shares_are_fair(by_order: dict[int, int], width: int) -> None:
    parts = bar(by_order, X86_64, width)
    total = sum(by_order.values())
    assert sum(len(characters) for _, characters in parts) == (width if total else 0)
    assert [order for order, _ in parts] == sorted((order for order, _ in parts), reverse=True)
    for order, characters in parts:
        assert abs(len(characters) - by_order[order] * width / total) < 1.01
        assert len(set(characters)) == 1


def test_orders_are_told_apart_without_colour() -> None:
    drawn = "".join(characters for _, characters in bar({9: 1, 7: 1, 3: 1, 0: 1, UNKNOWN: 1}, X86_64, 5))
    assert drawn == BLOCKS[3] + BLOCKS[2] + BLOCKS[1] + BLOCKS[0] + "?"


def test_sizes_are_said_in_words() -> None:
    assert described({9: 3 << 20, 0: 4096, 4: 0, UNKNOWN: 1 << 20}, X86_64) == "2M 3M, 4K 4K, size not visible 1M"
    assert described({}, X86_64) == "nothing"
    assert totals(ROWS) == (2200, 390)
