"""What the collapse of one PMD range needs of the machine that it happens on.

:class:`RangeTarget` is the narrow waist between the walk over a PMD range (:mod:`mthp.collapse.single_pmd`), which is
the same everywhere, and what looks at page tables and moves pages: the simulated machine, or a live process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.results import ScanResult


@dataclass(frozen=True, slots=True)
class RangeScan:
    """What the scan of one PMD range saw.

    Attributes:
        result: SUCCEED if a collapse may be tried, or why not.
        occupied: bool, shape (ptes_per_pmd,): entries that map a page other than the zero page; None unless `result`
            is SUCCEED.
        referenced, none_or_zero, unmapped: entries counted until the scan ended.
    """

    result: ScanResult
    occupied: NDArray[np.bool_] | None = None
    referenced: int = 0
    none_or_zero: int = 0
    unmapped: int = 0


class RangeTarget(Protocol):
    """A mapping of an address space, as the collapse of one of its PMD ranges sees it."""

    def scan_pmd(self, address: int) -> RangeScan:
        """Look at the PMD range at `address` (collapse_scan_pmd up to its walk)."""

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        """Try to collapse the aligned run at `address` to one folio of `order` (collapse_huge_page)."""

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        """Take note of what came of the range in the end (mm_khugepaged_scan_pmd)."""
