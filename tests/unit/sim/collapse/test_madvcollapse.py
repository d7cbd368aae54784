"""MADV_COLLAPSE range by range: after which results it continues, and its errno."""

from __future__ import annotations

import errno

import pytest

from mthp.geometry import Geometry
from mthp.ptes import Segment
from mthp.results import ScanResult
from mthp.sim.collapse.madvcollapse import madvise_collapse
from simworld import PAGE, SMALL

R = ScanResult
SIZE = SMALL.pmd_size
GOES_ON = {
    R.NO_PTE_TABLE, R.PTE_NON_PRESENT, R.PTE_UFFD, R.LACK_REFERENCED_PAGE, R.PAGE_NULL, R.PAGE_COUNT, R.PAGE_LOCK,
    R.PAGE_LRU, R.DEL_PAGE_LRU,
}  # fmt: skip
"""madvise_collapse(), mm/khugepaged.c of 7.3."""
ERRNO = {
    R.ALLOC_HUGE_PAGE_FAIL: errno.ENOMEM,
    R.CGROUP_CHARGE_FAIL: errno.EBUSY,
    R.EXCEED_NONE_PTE: errno.EBUSY,
    R.PAGE_COUNT: errno.EAGAIN,
    R.PAGE_LOCK: errno.EAGAIN,
    R.PAGE_LRU: errno.EAGAIN,
    R.DEL_PAGE_LRU: errno.EAGAIN,
}
"""madvise_collapse_errno() there; EINVAL for all others."""


class Scripted:
    """Three PMD ranges in one mapping, with collapses that end as the test sets."""

    def __init__(self, *results: ScanResult) -> None:
        self.results = list(results)
        self.collapsed: list[int] = []
        self.vma: Segment = (SIZE, 4 * SIZE)
        self.revalidated = R.SUCCEED
        self.drained = 0

    @property
    def geometry(self) -> Geometry:
        return SMALL

    def find_vma(self, address: int) -> Segment | None:
        return self.vma if address < self.vma[1] else None

    def possible(self, address: int) -> bool:
        return True

    def drain(self) -> None:
        self.drained += 1

    def revalidate(self, address: int) -> ScanResult:
        return self.revalidated

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        self.collapsed.append(address // SIZE)
        return self.results.pop(0), True


@pytest.mark.parametrize("result", [result for result in R if result not in (R.SUCCEED, R.PMD_MAPPED)])
def test_what_a_failure_leaves_to_be_tried_and_which_errno_it_gives(result: ScanResult) -> None:
    space = Scripted(R.SUCCEED, result, R.SUCCEED)
    assert madvise_collapse(space, SIZE, 4 * SIZE) == ERRNO.get(result, errno.EINVAL)
    assert space.collapsed == ([1, 2, 3] if result in GOES_ON else [1, 2])
    assert space.drained == 1


def test_what_is_huge_already_counts_as_done() -> None:
    assert madvise_collapse(Scripted(R.PMD_MAPPED, R.SUCCEED, R.PMD_MAPPED), SIZE, 4 * SIZE) == 0


def test_the_last_failure_counts() -> None:
    assert madvise_collapse(Scripted(R.PAGE_COUNT, R.PTE_UFFD, R.SUCCEED), SIZE, 4 * SIZE) == errno.EINVAL
    assert madvise_collapse(Scripted(R.PTE_UFFD, R.PAGE_COUNT, R.SUCCEED), SIZE, 4 * SIZE) == errno.EAGAIN


def test_a_mapping_that_changed_meanwhile_ends_it() -> None:
    space = Scripted(R.SUCCEED, R.SUCCEED, R.SUCCEED)
    space.revalidated = R.VMA_CHECK
    assert madvise_collapse(space, SIZE, 4 * SIZE) == errno.EINVAL
    assert space.collapsed == [1]


def test_a_mapping_that_shrank_meanwhile_is_done_when_its_rest_is() -> None:
    space = Scripted(R.SUCCEED, R.SUCCEED)
    collapse = space.collapse_pmd

    def shrinking(address: int) -> tuple[ScanResult, bool]:
        space.vma = (SIZE, 3 * SIZE + PAGE)
        return collapse(address)

    space.collapse_pmd = shrinking  # type: ignore[method-assign]
    assert madvise_collapse(space, SIZE, 4 * SIZE) == 0
    assert space.collapsed == [1, 2]
