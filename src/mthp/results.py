"""The scan results: the outcome of a PMD range, of a run in it, or of a PTE, and its meaning in words.

The names are those of ``enum scan_result`` (mm/khugepaged.c) without their prefix; the words of the trace events
(include/trace/events/huge_memory.h) are in :attr:`ScanResult.trace_word`.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass


class ScanResult(enum.IntEnum):
    """Outcome of a scan or of an attempt. The numbers are this project's own; stored data uses the names."""

    FAIL = 0
    SUCCEED = 1
    NO_PTE_TABLE = 2
    PMD_MAPPED = 3
    EXCEED_NONE_PTE = 4
    EXCEED_SWAP_PTE = 5
    EXCEED_SHARED_PTE = 6
    PTE_NON_PRESENT = 7
    PTE_UFFD = 8
    PTE_MAPPED_HUGEPAGE = 9
    LACK_REFERENCED_PAGE = 10
    PAGE_NULL = 11
    SCAN_ABORT = 12
    PAGE_COUNT = 13
    PAGE_LRU = 14
    PAGE_LOCK = 15
    PAGE_ANON = 16
    PAGE_LAZYFREE = 17
    ANY_PROCESS = 18
    VMA_NULL = 19
    VMA_CHECK = 20
    ADDRESS_RANGE = 21
    DEL_PAGE_LRU = 22
    ALLOC_HUGE_PAGE_FAIL = 23
    CGROUP_CHARGE_FAIL = 24
    COPY_MC = 25
    PAGE_RO = 26

    @property
    def meaning(self) -> str:
        """The meaning of the result, as one clause."""
        return _MEANING[self]

    @property
    def trace_word(self) -> str:
        """The word that the kernel's trace events print for the result."""
        return _TRACE_WORDS.get(self, self.name.lower())


LOWER_ORDERS_MAY_SUCCEED = frozenset(
    {
        ScanResult.ALLOC_HUGE_PAGE_FAIL,
        ScanResult.LACK_REFERENCED_PAGE,
        ScanResult.EXCEED_NONE_PTE,
        ScanResult.EXCEED_SWAP_PTE,
        ScanResult.EXCEED_SHARED_PTE,
        ScanResult.PAGE_LOCK,
        ScanResult.PAGE_COUNT,
        ScanResult.PAGE_NULL,
        ScanResult.DEL_PAGE_LRU,
        ScanResult.PTE_NON_PRESENT,
        ScanResult.PTE_UFFD,
        ScanResult.PAGE_LAZYFREE,
    }
)
"""Results of an attempt after which smaller orders are tried at the same place (mthp_collapse(), mm/khugepaged.c).

After any other except SUCCEED and PTE_MAPPED_HUGEPAGE, nothing more is tried in the PMD range."""

DONE_THERE = frozenset({ScanResult.SUCCEED, ScanResult.PTE_MAPPED_HUGEPAGE})
"""Results of an attempt after which the walk goes on behind the run."""


@dataclass(frozen=True, slots=True)
class BlockOutcome:
    """The outcome of an attempt to make one folio of a block.

    Attributes:
        address, order: address and order of the block.
        result: SUCCEED, or why not.
        reason: why not, in words, if there is more to say than the result's meaning.
        copied, filled: pages with contents, swapped-out ones included, and PTEs without, in the new folio; 0 if none
            was made.
        elapsed_ns: duration of the attempt in nanoseconds; 0 if not measured, or not tried.
        errno: error number of the system call; 0 if it did not fail.
        everywhere: whether the result holds for the whole address space at this moment, so that other blocks would have
            it too.
        passing: whether the result may differ a moment later, so that another try is worth it.
        verified: whether its bytes were the same before and after; None if not compared.
        left_filled: pages of zeroes that the attempt added outside of the block and that could not be given back,
            counted for one block of a PMD range; `reason` says why they stay.
    """

    address: int
    order: int
    result: ScanResult
    reason: str = ""
    copied: int = 0
    filled: int = 0
    elapsed_ns: int = 0
    errno: int = 0
    everywhere: bool = False
    passing: bool = False
    verified: bool | None = None
    left_filled: int = 0


_MEANING = {
    ScanResult.FAIL: "nothing was collapsed",
    ScanResult.SUCCEED: "collapsed",
    ScanResult.NO_PTE_TABLE: "nothing is mapped there",
    ScanResult.PMD_MAPPED: "already mapped by one PMD entry",
    ScanResult.EXCEED_NONE_PTE: "more empty or zero pages than max_ptes_none allows",
    ScanResult.EXCEED_SWAP_PTE: "more swapped-out pages than max_ptes_swap allows",
    ScanResult.EXCEED_SHARED_PTE: "more pages shared with another process than max_ptes_shared allows",
    ScanResult.PTE_NON_PRESENT: "a page went away meanwhile",
    ScanResult.PTE_UFFD: "a page is write-protected by userfaultfd",
    ScanResult.PTE_MAPPED_HUGEPAGE: "a page already lies in a folio of this order or larger",
    ScanResult.LACK_REFERENCED_PAGE: "too few pages were used recently",
    ScanResult.PAGE_NULL: "a page that the kernel does not manage",
    ScanResult.SCAN_ABORT: "pages lie on NUMA nodes too far apart",
    ScanResult.PAGE_COUNT: "a page is pinned or otherwise referenced",
    ScanResult.PAGE_LRU: "a page is not on the LRU lists",
    ScanResult.PAGE_LOCK: "a page is locked",
    ScanResult.PAGE_ANON: "a page is not anonymous",
    ScanResult.PAGE_LAZYFREE: "a page was freed lazily (MADV_FREE) and is still clean",
    ScanResult.ANY_PROCESS: "the process is exiting",
    ScanResult.VMA_NULL: "the mapping is gone",
    ScanResult.VMA_CHECK: "the mapping does not allow it",
    ScanResult.ADDRESS_RANGE: "the mapping does not cover the whole PMD range",
    ScanResult.DEL_PAGE_LRU: "a page could not be taken off the LRU lists",
    ScanResult.ALLOC_HUGE_PAGE_FAIL: "no free folio of this order",
    ScanResult.CGROUP_CHARGE_FAIL: "the memory cgroup is at its limit",
    ScanResult.COPY_MC: "a page is poisoned",
    ScanResult.PAGE_RO: "no page there may be written",
}

_TRACE_WORDS = {
    ScanResult.FAIL: "failed",
    ScanResult.SUCCEED: "succeeded",
    ScanResult.PMD_MAPPED: "page_pmd_mapped",
    ScanResult.PTE_NON_PRESENT: "pte_non_present",
    ScanResult.PTE_UFFD: "pte_uffd_wp",
    ScanResult.SCAN_ABORT: "scan_aborted",
    ScanResult.PAGE_COUNT: "not_suitable_page_count",
    ScanResult.PAGE_LRU: "page_not_in_lru",
    ScanResult.PAGE_LOCK: "page_locked",
    ScanResult.PAGE_ANON: "page_not_anon",
    ScanResult.ANY_PROCESS: "no_process_for_page",
    ScanResult.VMA_CHECK: "vma_check_failed",
    ScanResult.ADDRESS_RANGE: "not_suitable_address_range",
    ScanResult.DEL_PAGE_LRU: "could_not_delete_page_from_lru",
    ScanResult.ALLOC_HUGE_PAGE_FAIL: "alloc_huge_page_failed",
    ScanResult.CGROUP_CHARGE_FAIL: "ccgroup_charge_failed",
    ScanResult.COPY_MC: "copy_poisoned_page",
    ScanResult.PAGE_RO: "no_writable_page",
}

_FROM_ERRNO = {
    0: ScanResult.SUCCEED,
    errno.ENOMEM: ScanResult.ALLOC_HUGE_PAGE_FAIL,
    errno.EBUSY: ScanResult.CGROUP_CHARGE_FAIL,
    errno.EAGAIN: ScanResult.PAGE_COUNT,
    errno.EINVAL: ScanResult.VMA_CHECK,
    errno.EFAULT: ScanResult.VMA_NULL,
    errno.ESRCH: ScanResult.ANY_PROCESS,
}


def result_of_madvise(error: int) -> ScanResult:
    """Return the scan result behind the errno of one MADV_COLLAPSE call over one PMD range.

    The kernel maps its results to few errno values (madvise_collapse_errno(), mm/khugepaged.c), so this is the most
    likely member of each class: EAGAIN stands for every passing state of a page (locked, pinned, not on the LRU),
    EINVAL for every property of the mapping or the range.

    Args:
        error: errno, 0 for success.
    """
    return _FROM_ERRNO.get(error, ScanResult.FAIL)
