"""What the engine needs of the machine that it collapses on: a PMD range, an address space, the time.

:class:`RangeTarget` is the narrow waist between the walk over a PMD range (:mod:`mthp.engine.single_pmd`), which is
the same everywhere, and what looks at page tables and moves pages. :class:`VisitedSpace` and :class:`AdvisedSpace` are
an address space as khugepaged (:mod:`mthp.engine.khugepaged`) and MADV_COLLAPSE (:mod:`mthp.engine.madvise`) go
over it. The simulated machine has its own of each; every :class:`~mthp.addrspace.AddressSpace`, a live process above
all, has those of :mod:`mthp.engine.visit`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import Segment
from mthp.engine.fullness import Fullness
from mthp.geometry import Geometry
from mthp.results import BlockOutcome, ScanResult


@dataclass(frozen=True, slots=True)
class RangeScan:
    """What the scan of one PMD range saw, or that of one run where each run is scanned for itself.

    Attributes:
        result: SUCCEED if a collapse may be tried, or why not.
        fullness: which runs are full enough; None unless `result` is SUCCEED.
        row: the row that the range has in `fullness`.
        referenced, none_or_zero, unmapped: entries counted until the scan ended.
        behind: where the walk goes on after a large folio was hit, if not behind the run.
    """

    result: ScanResult
    fullness: Fullness | None = None
    row: int = 0
    referenced: int = 0
    none_or_zero: int = 0
    unmapped: int = 0
    behind: int | None = None


class RangeTarget(Protocol):
    """A mapping of an address space, as the collapse of one of its PMD ranges sees it."""

    @property
    def as_it_was(self) -> bool:
        """Whether what is a bug of a policy's series is kept (:mod:`mthp.engine.single_pmd`)."""

    def scan_pmd(self, address: int) -> RangeScan:
        """Look at the PMD range at `address` (collapse_scan_pmd up to its walk)."""

    def scan_run(self, address: int, order: int) -> RangeScan:
        """Look at one run under the limits of its order, for policies that scan each run for itself."""

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        """Try to collapse the aligned run at `address` to one folio of `order` (collapse_huge_page)."""

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        """Take note of what came of the range in the end (mm_khugepaged_scan_pmd)."""


@dataclass(frozen=True, slots=True)
class Found:
    """The next PMD ranges of an address space that may be collapsed.

    Attributes:
        passed: mappings, and stretches without anything in them, that were passed over on the way.
        stretch: adjoining PMD ranges of one mapping; None if nothing is left behind the cursor.
    """

    passed: int
    stretch: Segment | None


@dataclass(frozen=True, slots=True)
class Passage:
    """What came of some PMD ranges that were looked at, one after another.

    Attributes:
        end: the address behind the last of them.
        progress: entries looked at; a range without a page table, or mapped by one PMD entry, counts as one.
        addresses: uint64, shape (ranges,): where they begin.
        results: int8, shape (ranges,): :class:`~mthp.results.ScanResult` of each.
        result: the one that decides how the pass goes on: that of the last range, or ALLOC_HUGE_PAGE_FAIL if memory
            could not be allocated.
        released: collapses were tried, so the address space may have changed behind the cursor.
        attempts: in order.
    """

    end: int
    progress: int
    addresses: NDArray[np.uint64]
    results: NDArray[np.int8]
    result: ScanResult
    released: bool = False
    attempts: tuple[BlockOutcome, ...] = ()


class VisitedSpace(Protocol):
    """An address space as khugepaged visits it.

    Any of these may raise :class:`~mthp.errors.TargetVanishedError`, which ends the visits.
    """

    @property
    def exiting(self) -> bool:
        """Whether its last user is gone (hpage_collapse_test_exit)."""

    @property
    def thp_disabled(self) -> bool:
        """Whether the process switched THP off for itself."""

    def find(self, address: int) -> Found:
        """The next PMD ranges at or behind `address` that may be collapsed."""

    def scan(self, stretch: Segment, budget: int) -> Passage:
        """Look at ranges of `stretch` from its start on, and collapse what is to be collapsed in them.

        At least one range, and no further one once `budget` entries were looked at.
        """

    def close(self) -> None:
        """Khugepaged comes here no more."""


class AdvisedSpace(Protocol):
    """An address space as MADV_COLLAPSE goes over it."""

    @property
    def geometry(self) -> Geometry:
        """Of its machine."""

    def find_vma(self, address: int) -> Segment | None:
        """The range of the first mapping that ends behind `address` (find_vma)."""

    def possible(self, address: int) -> bool:
        """Whether the mapping at `address` may be collapsed at all (collapse_possible)."""

    def drain(self) -> None:
        """Empty the batches in front of the LRU lists (lru_add_drain_all), where there are such."""

    def revalidate(self, address: int) -> ScanResult:
        """Whether the PMD range at `address` may still be collapsed (hugepage_vma_revalidate)."""

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        """Collapse the PMD range at `address`: the result, and whether the lock was let go of for it."""


class Clock(Protocol):
    """The time of a machine."""

    def now(self) -> float:
        """Seconds since some moment; never goes back."""

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        """Let `seconds` pass, or less: until `wake` is set."""


class WallClock:
    """The time of this machine; it does not jump when the calendar is set."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        wake.wait(seconds)
