"""The record of the PMD ranges of one target, so that finished ones are not scanned again.

A range is due when its layout (:class:`~mthp.outline.Outline`) has changed since its last scan, or when its time has
come: soon after a failure that may pass, late after a scan that changed nothing, because a folio that was split or
exchanged for base pages leaves the layout as it is. Waiting times double while nothing changes. No soft-dirty bit is
cleared and no write tracking is set up, because checkpointers, garbage collectors and virtual machine managers may use
them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mthp.metrics import ORDERS
from mthp.outline import Outline
from mthp.results import ScanResult

PASSING = (
    ScanResult.FAIL,
    ScanResult.PTE_NON_PRESENT,
    ScanResult.LACK_REFERENCED_PAGE,
    ScanResult.SCAN_ABORT,
    ScanResult.PAGE_COUNT,
    ScanResult.PAGE_LRU,
    ScanResult.PAGE_LOCK,
    ScanResult.DEL_PAGE_LRU,
    ScanResult.ALLOC_HUGE_PAGE_FAIL,
    ScanResult.CGROUP_CHARGE_FAIL,
    ScanResult.PAGE_LAZYFREE,
)
"""Results that may differ a moment later, without any change of the layout."""

FIRST_AGE, LAST_AGE = 60.0, 3600.0
"""Seconds after which a finished range is scanned again, at first and in the end."""

FIRST_RETRY, LAST_RETRY = 0.5, 600.0
"""Seconds after which a range that failed for a passing reason is tried again, at first and in the end."""

_PMD_MAPPED = np.int8(ScanResult.PMD_MAPPED)

_IS_PASSING = np.zeros(len(ScanResult), np.bool_)
_IS_PASSING[list(PASSING)] = True


class Ledger:
    """One row per PMD range of the target that is not empty.

    Attributes:
        address: uint64, shape (ranges,), ascending.
        was_large: bool, shape (ranges,): ranges that were huge, or had folios made in them, at their last scan before
            the last call of :meth:`due`.
    """

    def __init__(self) -> None:
        self.address = np.empty(0, np.uint64)
        self.was_large = np.empty(0, np.bool_)
        self._layout = np.empty(0, np.uint64)
        self._due = np.empty(0, np.float64)
        self._wait = np.empty(0, np.float64)
        self._result = np.empty(0, np.int8)
        self._pages = np.empty((0, ORDERS), np.int32)
        self._huge = np.empty(0, np.bool_)

    def due(self, outline: Outline, now: float, *, touched: bool = True) -> NDArray[np.bool_]:
        """Return which ranges of `outline` are due, bool, shape (ranges,); ranges outside of it are forgotten.

        Args:
            touched: whether the target can have changed anything since the last call; if not, age does not count.
        """
        row = np.searchsorted(self.address, outline.address)
        known = row < len(self.address)
        known[known] = self.address[row[known]] == outline.address[known]
        row = row[known]
        layout = np.zeros(len(outline), np.uint64)
        due, wait = np.full(len(outline), -np.inf), np.zeros(len(outline))
        result = np.full(len(outline), ScanResult.NO_PTE_TABLE, np.int8)
        layout[known], due[known], wait[known] = self._layout[row], self._due[row], self._wait[row]
        result[known] = self._result[row]
        pages = np.zeros((len(outline), ORDERS), np.int32)
        pages[known] = self._pages[row]
        self._pages, self._huge = pages, outline.pmd_mapped
        passing = _IS_PASSING[result]
        # A range that waits for another try keeps waiting in spite of a change, because its turn comes soon.
        changed = (layout != outline.layout) & ~passing
        due[changed], wait[changed] = -np.inf, 0
        self.address, self._layout = outline.address, layout
        # By the results of the last scans, which do not yet have what `outline` shows to be huge.
        self.was_large = (result == ScanResult.SUCCEED) | (result == ScanResult.PMD_MAPPED)
        self._due, self._wait, self._result = due, wait, np.where(outline.pmd_mapped, _PMD_MAPPED, result)
        chosen: NDArray[np.bool_] = due <= now
        if not touched:
            chosen &= passing | (due == -np.inf)
        return chosen

    def next_retry(self) -> float:
        """Return when the first range that failed for a passing reason may be tried again; infinity if none."""
        if not len(self._due):  # most targets are empty, and are checked often
            return math.inf
        return float(self._due[_IS_PASSING[self._result]].min(initial=np.inf))

    def scanned(
        self,
        addresses: NDArray[np.uint64],
        results: NDArray[np.int8],
        after: Outline,
        now: float,
        retry: float,
        pages: NDArray[np.int32] | None = None,
    ) -> None:
        """Record the results of some ranges.

        Args:
            addresses: uint64, shape (ranges,).
            results: int8, shape (ranges,): :class:`~mthp.results.ScanResult`.
            after: their outline now.
            retry: seconds, the shortest time after which a passing failure may be tried again.
            pages: int32, shape (ranges, ORDERS): present pages by the order of their folio.
        """
        row = np.searchsorted(self.address, addresses)
        there = (row < len(self.address)) & np.isin(addresses, self.address)
        row, results, addresses = row[there], results[there], addresses[there]
        if pages is not None:
            self._pages[row], self._huge[row] = pages[there], False
        passing = _IS_PASSING[results]
        # A wait grows only while the outcome is of the same kind.
        again = passing == _IS_PASSING[self._result[row]]
        first = np.where(passing, min(FIRST_RETRY, retry), FIRST_AGE)
        last = np.where(passing, LAST_RETRY, LAST_AGE)
        wait = np.where(again & (self._wait[row] > 0), np.minimum(2 * self._wait[row], last), first)
        # Not doubled, because something has changed.
        wait[results == ScanResult.SUCCEED] = FIRST_AGE
        self._wait[row], self._result[row] = wait, results
        self._due[row] = now + wait
        # What the collapse itself changed in the layout must not make the range due.
        at = np.searchsorted(after.address, addresses)
        seen = (at < len(after)) & np.isin(addresses, after.address)
        self._layout[row[seen]] = after.layout[at[seen]]

    def folio_pages(self, pmd_order: int) -> list[int]:
        """Return the present pages by the order of their folio, as each range was last scanned."""
        pages = self._pages[~self._huge].sum(axis=0, dtype=np.int64)
        pages[pmd_order] += np.count_nonzero(self._huge) << pmd_order
        counted: list[int] = pages.tolist()
        return counted

    def forget(self) -> None:
        """Make every range due, because the rules under which it was finished have changed."""
        self._due[:] = -np.inf
        self._wait[:] = 0
        self._result[_IS_PASSING[self._result]] = ScanResult.NO_PTE_TABLE
