"""The map of an address space counts every page once, wherever blocks, segments and columns are cut."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeSpace
from mthp.engine.census import take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import Folios
from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE, Pte
from mthp.report.kinds import Kinds
from mthp.report.memorymap import (
    COLUMNS,
    LEVELS,
    MAX_ROWS,
    MAX_STRIPS,
    Stretch,
    column_bytes_for,
    draw,
    make_map,
    shares,
    stretches,
)
from mthp.vma import Vma, VmaKind
from report_spaces import HugeSpace, mixed

PAGE = X86_64.page_size
START = 0x7F00_0000_0000


def space_of(orders: list[int], start: int = START) -> FakeSpace:
    """Return one mapping of pages in folios of `orders`; ORDER_NONE is a hole."""
    order = np.array(orders, np.int8)
    state = np.where(order == ORDER_NONE, 0, int(Pte.PRESENT)).astype(np.uint16)
    return FakeSpace([(Vma(start, start + len(orders) * PAGE, "rw-p", "", VmaKind.ANON), state, order)])


@given(
    orders=st.lists(st.sampled_from([ORDER_NONE, 0, 2, 9]), min_size=1, max_size=2000),
    unaligned=st.integers(0, 511),
    portion_pages=st.integers(50, 700),
    per_column=st.sampled_from([1, 2, 8, 64, 1024]),
)
def test_every_page_is_counted_in_its_column(
    orders: list[int], unaligned: int, portion_pages: int, per_column: int
) -> None:
    space = space_of(orders, START + unaligned * PAGE)
    kinds = Kinds(X86_64)
    vma = space.vmas()[0]
    part = Stretch(vma, ((vma.start, vma.end),))
    (counts,) = shares(space, [part], per_column * PAGE, portion_bytes=portion_pages * PAGE)
    expected = np.zeros((-(-len(orders) // per_column), len(kinds)), np.int64)
    for page, order in enumerate(orders):
        if order != ORDER_NONE:
            expected[page // per_column, kinds.of_order[order]] += 1
    assert (counts == expected).all()


@given(
    runs=st.lists(st.tuples(st.integers(0, 400), st.integers(2, 9)), max_size=20),
    present=st.integers(0, 2**32 - 1),
    unaligned=st.integers(0, 511),
    portion_pages=st.integers(100, 900),
)
def test_folios_are_laid_over_the_pages_wherever_blocks_are_cut(
    runs: list[tuple[int, int]], present: int, unaligned: int, portion_pages: int
) -> None:
    pages = 2000
    there = np.random.default_rng(present).random(pages) < 0.5
    space = space_of(np.where(there, 0, ORDER_NONE).tolist(), START + unaligned * PAGE)
    kinds = Kinds(X86_64)
    expected = np.where(there, kinds.of_order[0], -1)
    address, order, at = [], [], 0
    for gap, folio in runs:
        at += gap
        if at + (1 << folio) > pages:
            break
        address.append(START + (unaligned + at) * PAGE)
        order.append(folio)
        inside = slice(at, at + (1 << folio))
        expected[inside] = np.where(there[inside], kinds.of_order[folio], kinds.added)
        at += 1 << folio
    folios = Folios(np.array(address, np.uint64), np.array(order, np.int8), np.zeros(len(order), np.int32))
    vma = space.vmas()[0]
    part = Stretch(vma, ((vma.start, vma.end),))
    (counts,) = shares(space, [part], PAGE, folios, portion_bytes=portion_pages * PAGE)
    drawn = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    assert (drawn == expected).all()


def test_what_the_plan_fills_is_what_the_map_says_is_added() -> None:
    space = FakeSpace([mixed(START, 40, 0.5)])
    plan = plan_space(space, PlanOptions(max_ptes_none=255))
    census = take_census(space)
    parts = stretches(space, census)
    counts = sum(part.sum(axis=0) for part in shares(space, parts, PAGE, plan.folios))
    kinds = Kinds(X86_64)
    assert plan.filled_bytes > 0
    assert int(counts[kinds.added]) * PAGE == plan.filled_bytes
    resident = int(sum(part.sum() for part in shares(space, parts, PAGE)))
    assert int(counts.sum()) * PAGE == resident * PAGE + plan.filled_bytes


def test_a_half_full_column_is_drawn_half_full() -> None:
    kinds = Kinds(X86_64)
    counts = np.zeros((3, len(kinds)), np.int64)
    counts[0, kinds.of_order[0]] = 32
    counts[1, kinds.of_order[9]] = 48
    counts[1, kinds.swap] = 16
    picture = draw(counts, 64, kinds, X86_64)
    cells = {key: _cells(path) for key, path in picture.paths}
    assert cells["o0"] == {(0, line) for line in range(4, 8)}
    assert cells["o9"] == {(1, line) for line in range(2, 8)}
    assert cells["swap"] == {(1, 0), (1, 1)}
    assert "192K 2M folios" in picture.summary


def _cells(path: str) -> set[tuple[int, int]]:
    """Column and line of every cell that a path draws, for pictures of one row."""
    runs = re.findall(r"M(\d+) (\d+)\.5h(\d+)", path)
    assert "".join(f"M{x} {y}.5h{n}" for x, y, n in runs) == path
    return {(int(x) + at, int(y)) for x, y, n in runs for at in range(int(n))}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=600), st.integers(0, 2**32 - 1))
def test_pictures_draw_no_cell_twice(filled: list[int], seed: int) -> None:
    kinds = Kinds(X86_64)
    counts = np.zeros((len(filled), len(kinds)), np.int64)
    rng = np.random.default_rng(seed)
    for column, pages in enumerate(filled):
        np.add.at(counts[column], rng.integers(0, len(kinds), pages), 1)
    picture = draw(counts, LEVELS, kinds, X86_64)
    assert picture.rows == -(-len(filled) // COLUMNS)
    lengths = [int(n) for _, path in picture.paths for n in re.findall(r"h(\d+)", path)]
    assert sum(lengths) == sum(filled)


@pytest.mark.parametrize("size", [1 << 21, 1 << 30, 64 << 30])
def test_a_map_has_the_same_size_for_every_size_of_process(size: int) -> None:
    part = Stretch(HugeSpace(size).vmas()[0], ((HugeSpace.START, HugeSpace.START + size),))
    column = column_bytes_for([part], X86_64)
    assert column & (column - 1) == 0
    assert column >= PAGE
    assert size <= column * COLUMNS * MAX_ROWS
    assert column == PAGE or size > column // 2 * COLUMNS * MAX_ROWS


def test_of_many_mappings_the_largest_are_drawn_and_the_rest_is_said() -> None:
    space = FakeSpace(
        [
            mixed((at + 1) << 32, 3 if at < MAX_STRIPS else 2, 0.9, f"[anon:{at}]", seed=at)
            for at in range(MAX_STRIPS + 5)
        ]
    )
    census = take_census(space)
    made = make_map(space, census, names=("now", "then"))
    assert len(made.strips) == MAX_STRIPS
    assert made.left_out.startswith("5 smaller mappings")
    assert [strip.address for strip in made.strips] == sorted(
        (s.address for s in made.strips), key=lambda a: int(a.split("-")[0], 16)
    )


def test_what_holds_next_to_nothing_is_not_drawn() -> None:
    space = FakeSpace([mixed(1 << 32, 300, 0.9), mixed(2 << 32, 1, 0.9)])
    made = make_map(space, take_census(space), names=("now", "then"))
    assert [strip.address.split("-")[0] for strip in made.strips] == ["100000000"]
    assert made.left_out.startswith("1 smaller mappings")


def test_empty_ranges_take_no_room() -> None:
    pages = 512 * 1000
    order = np.full(pages, ORDER_NONE, np.int8)
    order[512 * 500] = 0
    space = space_of(order.tolist())
    (part,) = stretches(space, take_census(space))
    assert part.bytes == X86_64.pmd_size


def test_a_later_state_is_drawn_beside_the_first() -> None:
    before, after = space_of([0] * 512), space_of([9] * 512)
    made = make_map(before, take_census(before), names=("before", "afterwards"), later=after)
    (strip,) = made.strips
    assert strip.after is not None
    assert (strip.before.summary, strip.after.summary) == ("2M 4K pages", "2M 2M folios")
    assert {(entry.key, entry.before, entry.after) for entry in made.legend} == {("o0", "2M", "0"), ("o9", "0", "2M")}
