"""The interface that khugepaged needs of an address space that it visits, and of the time.

The simulated machine's address spaces are :class:`VisitedSpace`, and so is a :class:`~mthp.engine.visit.Visit` of any
:class:`~mthp.addrspace.AddressSpace`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.metrics import ORDERS
from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult


@dataclass(frozen=True, slots=True)
class NextRanges:
    """The next PMD ranges of an address space that may be collapsed.

    Attributes:
        passed: mappings and empty stretches that were skipped on the way.
        stretch: adjoining PMD ranges of one mapping; None if nothing is left behind the cursor.
    """

    passed: int
    stretch: Segment | None


@dataclass(frozen=True, slots=True)
class Passage:
    """The results of some PMD ranges that were scanned, one after another.

    Attributes:
        end: the address behind the last of them.
        progress: entries scanned; a range without a page table, or mapped by one PMD entry, counts as one.
        addresses: uint64, shape (ranges,): start address of each.
        results: int8, shape (ranges,): :class:`~mthp.results.ScanResult` of each.
        result: the result that decides how the pass goes on: ALLOC_HUGE_PAGE_FAIL if memory could not be allocated,
            else that of the last range.
        released: collapses were tried, so the address space may have changed behind the cursor.
        attempts: the attempts, in order.
        folio_pages: int32, shape (ranges, ORDERS): present pages by the order of their folio, after the attempts; None
            if they were not counted.
    """

    end: int
    progress: int
    addresses: NDArray[np.uint64]
    results: NDArray[np.int8]
    result: ScanResult
    released: bool = False
    attempts: tuple[BlockOutcome, ...] = ()
    folio_pages: NDArray[np.int32] | None = None


def folio_pages(
    columns: PteColumns, addresses: NDArray[np.uint64], attempts: Sequence[BlockOutcome], geometry: Geometry
) -> NDArray[np.int32]:
    """Return the present pages of some PMD ranges by the order of their folio: int32, shape (ranges, ORDERS).

    Args:
        columns: the entries of these ranges, and maybe of others behind them, before the attempts.
        addresses: uint64, shape (ranges,), ascending.
        attempts: of the folios that were made since.
    """
    n, count = geometry.ptes_per_pmd, len(addresses)
    # The zero page is present but belongs to no folio of the process.
    there = columns.state[: count * n] & _MAPPED == _PRESENT
    order = np.where(there, columns.folio_order[: count * n], np.int8(ORDER_NONE))
    for attempt in attempts:
        if attempt.result is ScanResult.SUCCEED:
            row = int(np.searchsorted(addresses, attempt.address, side="right")) - 1
            first = row * n + (attempt.address - int(addresses[row])) // geometry.page_size
            order[first : first + (1 << attempt.order)] = attempt.order
    # By runs of one order, because pages are many and runs are few.
    begins = np.ones(count * n, np.bool_)
    begins[1:] = order[1:] != order[:-1]
    begins[::n] = True
    at = np.flatnonzero(begins)
    pages = np.diff(at, append=count * n)
    known = order[at] >= 0
    at, pages = at[known], pages[known]
    cells = np.bincount(at // n * ORDERS + order[at], pages, minlength=count * ORDERS)
    return cells.reshape(count, ORDERS).astype(np.int32)


_PRESENT, _MAPPED = np.uint16(Pte.PRESENT), np.uint16(Pte.PRESENT | Pte.ZERO)


class VisitedSpace(Protocol):
    """An address space as khugepaged visits it.

    Any of these may raise :class:`~mthp.errors.TargetVanishedError`, which ends the visits.
    """

    @property
    def exiting(self) -> bool:
        """Whether its last user is gone (hpage_collapse_test_exit(), mm/khugepaged.c)."""

    @property
    def thp_disabled(self) -> bool:
        """Whether the process switched THP off for itself."""

    def find(self, address: int) -> NextRanges:
        """Return the next PMD ranges at or behind `address` that may be collapsed."""

    def scan(self, stretch: Segment, budget: int) -> Passage:
        """Scan ranges of `stretch` from its start on, and collapse runs in them.

        At least one range, and no further one once `budget` entries were scanned.
        """

    def close(self) -> None:
        """Called when khugepaged drops this space."""


class RestClock(Protocol):
    """The time of a machine."""

    def now(self) -> float:
        """Return the seconds since a fixed moment, which never decrease."""

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        """Let `seconds` pass, or less if `wake` is set."""


class WallClock:
    """The time of this machine, which does not jump when the calendar is set."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        wake.wait(seconds)
