"""Ranges collapsed and divided one after another: what stops at which step, and what is reported."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from mthp.budget import Amount, MemoryBound
from mthp.errors import TargetVanishedError, UnsupportedError
from mthp.geometry import X86_64
from mthp.linux.split import blocks
from mthp.linux.split.blocks import AT_BASE_PAGES, UNDIVIDED, SplitBlocks
from mthp.linux.split.divide import LargeFolio
from mthp.linux.split.file import SplitAbility
from mthp.linux.split.writes import Part
from mthp.means import Means
from mthp.ptes import Block, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma

START, SIZE, PAGES = 4 << 20, 2 << 20, 512
ALL = SplitAbility(0, orders=True, offset=True, zeroes=True, cold=True)
BLOCKS: list[Block] = [(START, 4), (START + SIZE, 4), (START + 2 * SIZE, 4)]


class Space:
    """Three PMD ranges of which the first 20 pages are in use.

    Attributes:
        collapsed: the ranges that were collapsed.
        outcome: the result of a collapse.
        bounds: the limits of memory.
        filled: whether pages of zeroes are still there afterwards.
        moved_order: of folios on other frames that everything lies in afterwards.
        moving: number of readings that find the fill under migration before it has frames again.
    """

    geometry, thp_disabled, process = X86_64, False, None

    def __init__(self) -> None:
        self.collapsed: list[int] = []
        self.outcome = BlockOutcome(0, 9, ScanResult.SUCCEED)
        self.bounds: list[MemoryBound] = []
        self.flags: frozenset[str] = frozenset()
        self.filled = False
        self.listed = 0
        self.moved_order = self.moving = 0

    def vmas(self) -> list[Vma]:
        self.listed += 1
        return [Vma(START, START + 3 * SIZE, "rw-p", flags=self.flags, has_anon_vma=True)]

    def memory_bounds(self) -> list[MemoryBound]:
        return self.bounds

    def collapse_range(self, address: int) -> BlockOutcome:
        self.collapsed.append(address)
        if self.outcome.result is ScanResult.ANY_PROCESS:
            raise TargetVanishedError("gone")
        return dataclasses.replace(self.outcome, address=address)

    def read(self, segments: list[Segment]) -> PteColumns:
        state = np.zeros(PAGES, np.uint16)
        state[: PAGES if self.filled and self.collapsed else 20] = Pte.PRESENT
        if self.collapsed and self.moving:
            self.moving -= 1
            state[20:] = Pte.SWAP
        order = np.where(state, self.moved_order if self.collapsed else 0, -1).astype(np.int8)
        frames = np.arange(PAGES, dtype=np.uint64)
        return PteColumns(tuple(segments), state, order, frames + 2048 if self.moved_order else frames * 3)

    def zero_filled(self, columns: PteColumns) -> Any:
        return columns.has(Pte.PRESENT) & (np.arange(PAGES) >= 20)


class Divider:
    """Divides all folios but those that it must refuse."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.refused: list[Part] = []
        self.releases = True
        self.moved: list[LargeFolio] = []

    def folio_at(self, address: int, order: int) -> LargeFolio:
        return LargeFolio(address, 512, order)

    def divide(self, folio: LargeFolio, layout: Any) -> list[Part]:
        assert len(layout) == 1 << folio.order
        assert layout[:16].tolist() == [4 if not folio.address % SIZE else 0] * 16
        if folio.pfn >= 2048:
            self.moved.append(folio)
            self._space.filled = False
        return self.refused

    def to_base_pages(self, folio: LargeFolio, part: Part, holes: Any) -> bool:
        return self.releases

    def holds(self, address: int, wanted: Any) -> bool:
        return self._space.filled


@pytest.fixture
def space() -> Space:
    return Space()


@pytest.fixture
def divider(space: Space, monkeypatch: pytest.MonkeyPatch) -> Divider:
    divider = Divider(space)
    monkeypatch.setattr(blocks, "divider_of", lambda *_: divider)
    monkeypatch.setattr(blocks, "Madvise", lambda space: space)
    return divider


def collapse(space: Space, means: Means | None = None) -> list[BlockOutcome]:
    blocks = SplitBlocks(cast(Any, space), ALL, cast(Any, object()))
    return blocks.collapse(BLOCKS, means or Means("split"))


def test_every_range_is_collapsed_once(space: Space, divider: Divider) -> None:
    outcomes = collapse(space)
    assert space.collapsed == [START, START + SIZE, START + 2 * SIZE]
    assert [(each.address, each.order) for each in outcomes] == BLOCKS
    assert {each.result for each in outcomes} == {ScanResult.SUCCEED}


def test_without_room_for_one_pmd_folio_nothing_is_begun(space: Space, divider: Divider) -> None:
    space.bounds = [MemoryBound("/small", 100 << 20, (64 << 20) + SIZE - 1)]
    outcomes = collapse(space)
    assert not space.collapsed
    assert {each.result for each in outcomes} == {ScanResult.CGROUP_CHARGE_FAIL}
    assert all("/small" in each.reason and "2M" in each.reason and each.everywhere for each in outcomes)
    assert not SplitBlocks(cast(Any, space), ALL, cast(Any, object())).collapse([], Means("split"))
    assert {each.result for each in collapse(space, Means("split", reserve=Amount(size=0)))} == {ScanResult.SUCCEED}


@pytest.mark.parametrize(
    ("result", "limited", "ranges"),
    [
        (ScanResult.CGROUP_CHARGE_FAIL, False, 1),
        (ScanResult.ALLOC_HUGE_PAGE_FAIL, True, 1),
        (ScanResult.ALLOC_HUGE_PAGE_FAIL, False, 3),
        (ScanResult.PAGE_COUNT, True, 3),
        (ScanResult.ANY_PROCESS, False, 1),
    ],
)
def test_what_holds_for_the_whole_target_ends_it(
    space: Space, divider: Divider, result: ScanResult, limited: bool, ranges: int
) -> None:
    space.outcome = BlockOutcome(0, 9, result)
    space.bounds = [MemoryBound("/wide", 1 << 40, 1 << 40)] if limited else []
    outcomes = collapse(space)
    assert len(space.collapsed) == ranges
    assert [each.result for each in outcomes] == [result] * 3


def test_what_may_not_be_touched_is_not_collapsed(space: Space, divider: Divider) -> None:
    space.flags = frozenset({"lo"})
    assert {each.result for each in collapse(space)} == {ScanResult.VMA_CHECK}
    space.flags = frozenset({"um"})
    assert {each.result for each in collapse(space)} == {ScanResult.VMA_CHECK}
    assert not space.collapsed


def test_mappings_are_listed_again_before_anything_is_refused_for_an_old_listing(
    space: Space, divider: Divider
) -> None:
    now = [100.0]
    blocks = SplitBlocks(cast(Any, space), ALL, cast(Any, object()), lambda: now[0])
    space.flags = frozenset({"nh"})
    assert [each.result for each in blocks.collapse(BLOCKS[:1], Means("split"))] == [ScanResult.VMA_CHECK]
    space.flags = frozenset()
    for _ in range(3):
        assert [each.result for each in blocks.collapse(BLOCKS[:1], Means("split"))] == [ScanResult.SUCCEED]
    assert space.listed == 2
    now[0] += 1
    blocks.collapse(BLOCKS, Means("split"))
    assert space.listed == 3


def test_a_folio_that_cannot_be_divided_goes_back_to_base_pages(space: Space, divider: Divider) -> None:
    divider.refused = [Part(0, 9)]
    assert {(each.result, each.reason) for each in collapse(space)} == {(ScanResult.PAGE_COUNT, AT_BASE_PAGES)}


def test_one_that_stays_is_told_as_bloat(space: Space, divider: Divider) -> None:
    divider.refused, divider.releases, space.filled = [Part(0, 9)], False, True
    blocks = SplitBlocks(cast(Any, space), ALL, cast(Any, object()))
    (outcome, other) = blocks.collapse([(START, 4), (START + (16 << 12), 2)], Means("split"))
    # 32 pages were taken to have been in use by the second look, which sees the zeroes.
    assert outcome.left_filled == PAGES - 20
    assert str(PAGES - 20) in outcome.reason
    assert (other.result, other.reason, other.left_filled) == (ScanResult.PAGE_COUNT, UNDIVIDED, 0)


def test_fill_that_is_being_moved_is_waited_for(space: Space, divider: Divider) -> None:
    """It has migration entries meanwhile, which are not present."""
    divider.refused, divider.releases, space.filled, space.moving = [Part(0, 9)], False, True, 2
    (outcome,) = SplitBlocks(cast(Any, space), ALL, cast(Any, object())).collapse(BLOCKS[:1], Means("split"))
    assert outcome.left_filled == PAGES - 20


@pytest.mark.parametrize("order", [9, 8])
def test_what_compaction_moved_between_two_steps_is_divided_where_it_is(
    space: Space, divider: Divider, order: int
) -> None:
    """Its frames are others, so that a write for them would find nothing to split, and their fill would stay."""
    space.filled, space.moved_order = True, order
    blocks = SplitBlocks(cast(Any, space), ALL, cast(Any, object()))
    (outcome,) = blocks.collapse(BLOCKS[:1], Means("split"))
    first = range(0, PAGES, 1 << order)
    assert divider.moved == [LargeFolio(START + (at << 12), 2048 + at, order) for at in first]
    assert outcome.left_filled == 0


def test_where_folios_cannot_be_split_it_says_why(space: Space) -> None:
    with pytest.raises(UnsupportedError) as raised:
        SplitBlocks(cast(Any, space), SplitAbility(2, mounted=False))
    assert "mount" in raised.value.help
