"""MADV_COLLAPSE: collapse a range of addresses now, and return one errno for all of it.

Follows madvise_walk_vmas() (mm/madvise.c) and madvise_collapse() (mm/khugepaged.c). It ignores switches and limits.
Each PMD range goes through the same function as khugepaged's. The errno is that of the last range that could not be
collapsed, and 0 only if all were.
"""

from __future__ import annotations

import errno
from typing import Protocol

from mthp.geometry import Geometry
from mthp.ptes import Segment
from mthp.results import ScanResult


class AdvisedSpace(Protocol):
    """An address space, as MADV_COLLAPSE processes it."""

    @property
    def geometry(self) -> Geometry:
        """Geometry of its machine."""

    def find_vma(self, address: int) -> Segment | None:
        """Return the range of the first mapping that ends behind `address` (find_vma)."""

    def possible(self, address: int) -> bool:
        """Return whether the mapping at `address` may be collapsed at all (collapse_possible)."""

    def drain(self) -> None:
        """Drain the batches of the LRU lists (lru_add_drain_all), if the backend has any."""

    def revalidate(self, address: int) -> ScanResult:
        """Return SUCCEED if the PMD range at `address` may still be collapsed (hugepage_vma_revalidate), or why not."""

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        """Collapse the PMD range at `address`; return the result, and whether mmap_lock was dropped."""


_GOES_ON_AFTER = frozenset(
    {
        ScanResult.NO_PTE_TABLE,
        ScanResult.PTE_NON_PRESENT,
        ScanResult.PTE_UFFD,
        ScanResult.LACK_REFERENCED_PAGE,
        ScanResult.PAGE_NULL,
        ScanResult.PAGE_COUNT,
        ScanResult.PAGE_LOCK,
        ScanResult.PAGE_LRU,
        ScanResult.DEL_PAGE_LRU,
    }
)
"""Failures of one PMD range after which MADV_COLLAPSE continues with the next."""

_ERRNO = {
    ScanResult.ALLOC_HUGE_PAGE_FAIL: errno.ENOMEM,
    ScanResult.CGROUP_CHARGE_FAIL: errno.EBUSY,
    ScanResult.EXCEED_NONE_PTE: errno.EBUSY,
    ScanResult.PAGE_COUNT: errno.EAGAIN,
    ScanResult.PAGE_LOCK: errno.EAGAIN,
    ScanResult.PAGE_LRU: errno.EAGAIN,
    ScanResult.DEL_PAGE_LRU: errno.EAGAIN,
}
"""Error number by scan result, EINVAL for the rest (madvise_collapse_errno, mm/khugepaged.c)."""


def madvise_collapse(space: AdvisedSpace, start: int, end: int) -> int:
    """Run madvise(start, end - start, MADV_COLLAPSE); return 0 or the error number.

    Returns:
        EINVAL if `start` is not page-aligned, `end` lies before it, or a mapping may not be collapsed; ENOMEM if some
        of the range is not mapped (the mapped part was collapsed) or an allocation failed; EBUSY if the memory cgroup
        is at its limit or none PTEs must not be filled; EAGAIN if a page is busy, so that a retry may succeed.
    """
    page = space.geometry.page_size
    end = -(-end // page) * page
    if start % page or end < start:
        return errno.EINVAL
    unmapped = 0
    while start < end:
        vma = space.find_vma(start)
        # madvise_walk_vmas() remembers a hole, and goes on behind it.
        if vma is None or vma[0] > start:
            unmapped = errno.ENOMEM
        if vma is None or vma[0] >= end:
            break
        start, stop = max(start, vma[0]), min(end, vma[1])
        # An error ends the call, also where later mappings could be collapsed.
        if error := _collapse_mapping(space, (start, stop)):
            return error
        start = stop
    return unmapped


def _collapse_mapping(space: AdvisedSpace, part: Segment) -> int:
    """Collapse the whole PMD ranges of a part of one mapping (madvise_collapse)."""
    size = space.geometry.pmd_size
    if not space.possible(part[0]):
        return errno.EINVAL
    # Parts of PMD ranges at the ends are skipped silently: a range without a whole one succeeds.
    first, stop = -(-part[0] // size) * size, part[1] // size * size
    if first >= stop:
        return 0
    # Pages in a batch have an extra reference, and would end in PAGE_COUNT.
    space.drain()
    last_fail, done, released = ScanResult.FAIL, 0, False
    address = first
    while address < stop:
        # Each attempt drops mmap_lock, so the mapping may be another one by now.
        if released:
            if (found := space.revalidate(address)) is not ScanResult.SUCCEED:
                last_fail = found
                break
            # The mapping may have shrunk while mmap_lock was dropped.
            vma = space.find_vma(address)
            assert vma is not None, "revalidation found the mapping"
            stop = min(stop, vma[1] // size * size)
        result, released = space.collapse_pmd(address)
        address += size
        if result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED):
            done += 1
            continue
        last_fail = result
        if result not in _GOES_ON_AFTER:
            break
    # Compared with what is left of the mapping, as in the kernel: one that shrank may succeed by fewer ranges.
    return 0 if done * size == stop - first else _ERRNO.get(last_fail, errno.EINVAL)
