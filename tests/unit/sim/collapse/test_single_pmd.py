"""The walk over one PMD range, attempt by attempt: the next attempts after each result."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.engine.occupancy import Occupancy
from mthp.engine.planes import Planes
from mthp.engine.policy import BUILT_IN, Rules
from mthp.results import ScanResult
from mthp.sim.collapse.fullness import Fullness
from mthp.sim.collapse.single_pmd import RangeScan, collapse_single_pmd
from mthp.tunables import Tunables
from simworld import PAGE, SMALL

Run = tuple[int, int]
"""First page, and order."""

R = ScanResult
TRIES_SMALLER = {
    R.ALLOC_HUGE_PAGE_FAIL, R.LACK_REFERENCED_PAGE, R.EXCEED_NONE_PTE, R.EXCEED_SWAP_PTE, R.EXCEED_SHARED_PTE,
    R.PAGE_LOCK, R.PAGE_COUNT, R.PAGE_NULL, R.DEL_PAGE_LRU, R.PTE_NON_PRESENT, R.PTE_UFFD, R.PAGE_LAZYFREE,
}  # fmt: skip
"""After these smaller orders are tried, after the other failures nothing (mthp_collapse, mm/khugepaged.c of 7.3)."""


ENDINGS = [(result, order) for result in R for order in (4, 3) if (result, order) not in {(R.FAIL, 3), (R.SUCCEED, 4)}]
"""Only swapping in ends in FAIL, and that is not tried below the PMD order."""


class Scripted:
    """A full range with attempts that end as the test sets, and otherwise succeed."""

    as_it_was = False

    def __init__(self, results: dict[Run, ScanResult]) -> None:
        self.results = results
        self.tried: list[Run] = []
        self.rules = Rules(SMALL, (2, 3, 4), "khugepaged", Tunables(0, 0, 0, 64))
        planes = Planes(np.ones((1, SMALL.ptes_per_pmd), np.bool_))
        self.fullness = Fullness(Occupancy(planes, SMALL), BUILT_IN["mainline"](), self.rules)
        self.said: ScanResult | None = None

    def scan_pmd(self, address: int) -> RangeScan:
        return RangeScan(R.SUCCEED, self.fullness)

    def scan_run(self, address: int, order: int) -> RangeScan:
        raise AssertionError("runs are not scanned for themselves")

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        self.tried.append((address // PAGE, order))
        return self.results.get(self.tried[-1], R.SUCCEED)

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        self.said = result

    def collapse(self) -> ScanResult:
        result = collapse_single_pmd(self, 0, BUILT_IN["mainline"](), self.rules)
        assert result is self.said
        return result


@pytest.mark.parametrize(("result", "order"), ENDINGS)
def test_what_an_attempt_leaves_to_be_tried(result: ScanResult, order: int) -> None:
    before: list[Run] = [] if order == 4 else [(0, 4)]
    target = Scripted(dict.fromkeys(before, R.PAGE_COUNT) | {(0, order): result})
    said = target.collapse()
    then = target.tried[len(before) + 1 :]
    if result in (R.PTE_MAPPED_HUGEPAGE, R.SUCCEED):
        assert then == ([] if order == 4 else [(8, 3)])
    elif result in TRIES_SMALLER:
        assert then == ([(0, 3), (8, 3)] if order == 4 else [(0, 2), (4, 2), (8, 3)])
        assert said is R.SUCCEED
    else:
        assert then == []
        assert said is result


def test_a_failed_allocation_is_told_whatever_came_after_it() -> None:
    failing = {(page, order): R.LACK_REFERENCED_PAGE for order in (2, 3, 4) for page in range(0, 16, 1 << order)}
    target = Scripted(failing | {(0, 4): R.ALLOC_HUGE_PAGE_FAIL})
    assert target.collapse() is R.ALLOC_HUGE_PAGE_FAIL
    assert Scripted(failing).collapse() is R.LACK_REFERENCED_PAGE
    assert Scripted(failing | {(12, 2): R.SUCCEED, (0, 4): R.ALLOC_HUGE_PAGE_FAIL}).collapse() is R.SUCCEED
