"""Visit an address space of any kind: read PMD ranges, walk over them, admit, collapse, report.

Behind the seam a call costs much, and one more range in it little: the mover stops a target for each batch. So a visit
reads a block of PMD ranges at once, and walks over all of them (:class:`~mthp.engine.walk.Walk`), as a plan does. It
tries the runs that the walk would collapse as one batch: they are disjoint, and none depends on another's success.

Obstacles that page tables do not show (a page that is locked, or waits for its LRU list) show as an outcome: the
smaller orders that the kernel would try in its place are tried in the next pass, if the range still looks the same.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.engine.admission import Admit, Candidate, collapse_batch
from mthp.engine.bits import Bits
from mthp.engine.checks import PolicyChecks
from mthp.engine.filled import FilledPages
from mthp.engine.listing import Area, Listing, list_areas
from mthp.engine.policy import Policy
from mthp.engine.policy_lookup import policy_named
from mthp.engine.select import PORTION_PMD_RANGES, Job, PlanOptions, base_rules, read_planes
from mthp.engine.visited import NextRanges, Passage, RestClock, WallClock, folio_pages
from mthp.engine.walk import Walk
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.means import Means
from mthp.ptes import Segment
from mthp.results import DONE_THERE, LOWER_ORDERS_MAY_SUCCEED, BlockOutcome, ScanResult
from mthp.vma import VmaKind

FRESH = 1.0
"""Seconds for which a listing of the mappings is used; a failure that contradicts it ends that at once."""

FILLING = Means(fill=True)
"""The default means of a visit: the policy decides what is filled."""

_LISTING_IS_STALE = frozenset({ScanResult.VMA_NULL, ScanResult.VMA_CHECK, ScanResult.ADDRESS_RANGE})

Choose = Callable[[AddressSpace, NDArray[np.uint64]], Bits]
"""Takes the addresses of some PMD ranges (uint64, shape (ranges,)), and returns which of them to read: bool, same
shape. The others are skipped, and count as one entry each."""


class Visit:
    """One address space, as :class:`~mthp.engine.scanner.Scanner` goes over it.

    Args:
        space: the address space, which :meth:`close` does not close.
        choice: which folios to make of which memory.
        means: the mechanism, and the bounds on its cost for the target.
        admit: called before each attempt; None to admit all.
        choose: called before ranges are read; None to read all.
        clock: the time that ages a listing of the mappings.
        count_folios: whether passages say how many pages lie in folios of each order.

    Raises:
        UsageError: an unknown policy, or an order or a limit that does not exist on this geometry; `small`.

    Attributes:
        space, means, admit, choose: the arguments.
        choice: may be replaced between passes, except for the policy; call :meth:`forget` then.
        policy: the policy of `choice`.
        filled: pages that collapses filled, for policies that remember them.
        touching: whether a collapse works on the memory of the space at this moment.
    """

    def __init__(
        self,
        space: AddressSpace,
        choice: PlanOptions | None = None,
        means: Means = FILLING,
        *,
        admit: Admit | None = None,
        choose: Choose | None = None,
        clock: RestClock | None = None,
        count_folios: bool = False,
    ) -> None:
        self.space, self.means, self.admit, self.choose = space, means, admit, choose
        self.choice = choice or PlanOptions()
        self.touching = False
        self._count_folios = count_folios
        if self.choice.small:
            raise UsageError("a visit goes over whole PMD ranges only", help="leave small out, or use mthp.collapse")
        self.policy: Policy = policy_named(self.choice.policy)
        self.filled = FilledPages(space.geometry)
        self._clock = clock or WallClock()
        self._listed: Listing | None = None
        self._served = False
        self._ahead = 0
        base_rules(space, self.choice)

    @property
    def geometry(self) -> Geometry:
        """Geometry of the machine."""
        return self.space.geometry

    @property
    def exiting(self) -> bool:
        """Always False: a space without its process raises TargetVanishedError at its next use instead."""
        return False

    @property
    def thp_disabled(self) -> bool:
        return self._listing().thp_disabled

    @property
    def refused(self) -> dict[tuple[VmaKind, str], tuple[int, int]]:
        """Mappings, and their bytes, that may not be collapsed, by kind and reason."""
        return self._listing().refused

    @property
    def has_room(self) -> bool:
        """Whether an anonymous mapping is at least as large as a PMD range."""
        return self._listing().has_room

    @property
    def wanted(self) -> bool:
        """Whether anything in the space may be collapsed (khugepaged_enter_vma(), mm/khugepaged.c)."""
        listing = self._listing()
        return bool(listing.areas) and not listing.thp_disabled

    def forget(self) -> None:
        """Discard the listing of the mappings, so that the next use lists them again."""
        self._listed = None

    def close(self) -> None:
        """Do nothing, because the owner of the address space closes it."""

    # The mappings.

    def _listing(self) -> Listing:
        now = self._clock.now()
        if self._listed is None or not 0 <= now - self._listed.at <= FRESH:
            self._listed = list_areas(self.space, self.choice, self.policy, now)
            self._served = False
        return self._listed

    def find(self, address: int) -> NextRanges:
        if address == 0 and self._served:
            # A new round must see mappings that are newer than the last one.
            self.forget()
        listing, self._served = self._listing(), address > 0
        at = bisect_right(listing.areas, address, key=lambda area: area.end)
        if at == len(listing.areas):
            return NextRanges(listing.passed_behind, None)
        area = listing.areas[at]
        return NextRanges(area.passed if address <= area.start else 0, (max(address, area.start), area.end))

    def _area(self, address: int) -> Area | None:
        areas = self._listing().areas
        at = bisect_right(areas, address, key=lambda area: area.end)
        return areas[at] if at < len(areas) and areas[at].start <= address else None

    # The ranges.

    def scan(self, stretch: Segment, budget: int) -> Passage:
        size, n = self.geometry.pmd_size, self.geometry.ptes_per_pmd
        area = self._area(stretch[0])
        if area is None:
            # Unmapped since it was found: a new listing does not have it.
            return Passage(stretch[0] + size, 1, np.zeros(0, np.uint64), np.zeros(0, np.int8), ScanResult.VMA_NULL)
        # Enough ranges to spend the budget if each costs all its entries.
        needed = -(-budget // n)
        end = min(stretch[1], area.end, stretch[0] + min(PORTION_PMD_RANGES, max(needed, self._ahead)) * size)
        addresses = np.arange(stretch[0], end, size, dtype=np.uint64)
        chosen = addresses if self.choose is None else addresses[self.choose(self.space, addresses)]
        progress = np.ones(len(addresses), np.int64)
        block = _RangesRead(self, area.job, chosen) if len(chosen) else None
        if block is not None:
            progress[np.searchsorted(addresses, chosen)] = block.progress
        # khugepaged checks its budget after each range, so the last one may exceed it.
        through = int(np.searchsorted(np.cumsum(progress), budget)) + 1
        end = int(addresses[min(through, len(addresses)) - 1]) + size
        # Ranges that cost next to nothing are read in larger and larger blocks until the budget is near.
        self._ahead = min(PORTION_PMD_RANGES, 2 * len(addresses)) if progress.sum() < budget else 0
        scanned, count = int(progress[:through].sum()), int(np.searchsorted(chosen, end))
        if block is None or not count:
            return Passage(end, scanned, chosen[:0], np.zeros(0, np.int8), ScanResult.FAIL)
        results, attempts, released = block.carry_out(count)
        result = ScanResult(int(results[-1]))
        if any(attempt.result is ScanResult.ALLOC_HUGE_PAGE_FAIL for attempt in attempts):
            result = ScanResult.ALLOC_HUGE_PAGE_FAIL
        pages = folio_pages(block.columns, chosen[:count], attempts, self.geometry) if self._count_folios else None
        return Passage(end, scanned, chosen[:count], results, result, released, tuple(attempts), pages)


class _RangesRead:
    """Some PMD ranges under one set of rules, read at one moment, with the runs to try in each and their results.

    Args:
        addresses: uint64, shape (ranges,), ascending; at least one.

    Attributes:
        progress: int64, shape (ranges,): the entries that each range counts for.
    """

    def __init__(self, visit: Visit, job: Job, addresses: NDArray[np.uint64]) -> None:
        self._visit = visit
        self._addresses = addresses
        self._checks = PolicyChecks(visit.policy, job.rules)
        self.columns, planes = read_planes(visit.space, job, addresses)
        if visit.policy.remembers_filled and (filled := visit.filled.of(addresses)) is not None:
            # A page that was unmapped since is not filled any more.
            planes = dataclasses.replace(planes, filled=filled & planes.present)
        self._planes = planes
        self._bars: dict[int, NDArray[np.int8]] = {}
        self._walk = Walk(planes, self._checks)
        self._results = self._walk.scan_result()
        without_table = (self._results == ScanResult.NO_PTE_TABLE) | (self._results == ScanResult.PMD_MAPPED)
        self.progress: NDArray[np.int64] = np.where(without_table, 1, visit.geometry.ptes_per_pmd)

    def carry_out(self, count: int) -> tuple[NDArray[np.int8], list[BlockOutcome], bool]:
        """Try the admitted runs of the first `count` ranges.

        Returns:
            The scan result of each range (int8, shape (count,)), the attempts in the kernel's order, and whether any
            run was tried.
        """
        results = self._results[:count].copy()
        rows: list[int] = []
        candidates: list[Candidate] = []
        for row, candidate in self._admitted(count, results):
            rows.append(row)
            candidates.append(candidate)
        attempts = self._foreseen(count)
        if candidates:
            attempts += self._collapse(rows, candidates, results)
            attempts.sort(key=lambda attempt: (attempt.address, -attempt.order))
        return results, attempts, bool(candidates)

    def _admitted(self, count: int, results: NDArray[np.int8]) -> list[tuple[int, Candidate]]:
        """Return the runs to try, each with its row; set `results` of ranges that are left without one.

        A run that is not admitted is barred, and the walk repeated, so that smaller orders are tried in its place.
        """
        admit, policy = self._visit.admit, self._visit.policy
        admitted: list[tuple[int, Candidate]] = []
        decided: set[tuple[int, int, int]] = set()
        left: dict[int, ScanResult] = {}
        ended: set[int] = set()
        barred = True
        while barred:
            barred, waiting = False, set(ended)
            for row, candidate in self._candidates(count):
                # The walk is repeated after each bar, and offers runs again that were admitted before.
                key = row, *candidate.block
                if row in waiting or key in decided:
                    continue
                decided.add(key)
                result = ScanResult.SUCCEED if admit is None else admit(candidate)
                if result is ScanResult.SUCCEED:
                    admitted.append((row, candidate))
                    continue
                if result in DONE_THERE:
                    continue
                # As in the kernel, a range without a collapse reports a failed allocation before other results.
                if left.get(row) is not ScanResult.ALLOC_HUGE_PAGE_FAIL:
                    left[row] = result
                if result in LOWER_ORDERS_MAY_SUCCEED:
                    self._bar(row, candidate, result)
                    barred = True
                    if policy.scans_each_run:
                        # An order that failed is not tried again in the range, so the next runs of the walk change.
                        waiting.add(row)
                else:
                    ended.add(row)
                    waiting.add(row)
            if barred:
                self._walk = Walk(self._planes, self._checks, barred=self._bars)
        with_any = {row for row, _ in admitted}
        for row in np.flatnonzero(results == ScanResult.SUCCEED).tolist():
            # The walk would have collapsed something here, but nothing was admitted.
            if row not in with_any:
                results[row] = left.get(row, ScanResult.FAIL)
        return admitted

    def _candidates(self, count: int) -> list[tuple[int, Candidate]]:
        """Return the runs that the walk would collapse in the first `count` ranges, each with its row."""
        runs = self._walk.attempts.succeeded
        last = int(np.searchsorted(runs.range, count))
        swap = self._planes.swap
        found = []
        columns = (runs.range, runs.offset, runs.order, runs.filled)
        for row, offset, order, filled in zip(*(column[:last].tolist() for column in columns), strict=True):
            size = 1 << order
            swapped = 0 if swap is None else int(np.count_nonzero(swap[row, offset : offset + size]))
            address = int(self._addresses[row]) + offset * self._visit.geometry.page_size
            found.append((row, Candidate(self._visit.space, address, order, size - filled, filled, swapped)))
        return found

    def _bar(self, row: int, candidate: Candidate, result: ScanResult) -> None:
        order, geometry, bars = candidate.order, self._visit.geometry, self._bars
        if order not in bars:
            bars[order] = np.full((len(self._addresses), geometry.ptes_per_pmd >> order), ScanResult.SUCCEED, np.int8)
        bars[order][row, (candidate.address - int(self._addresses[row])) // geometry.size_of(order)] = result

    def _foreseen(self, count: int) -> list[BlockOutcome]:
        """Return the attempts that must fail by the columns, in ranges in which others succeed."""
        tried, page_size = self._walk.attempts, self._visit.geometry.page_size
        made = self._results[tried.range] == ScanResult.SUCCEED
        failing = tried[made & (tried.range < count) & (tried.result != ScanResult.SUCCEED)]
        columns = (failing.range, failing.offset, failing.order, failing.result)
        return [
            BlockOutcome(int(self._addresses[row]) + offset * page_size, order, ScanResult(result))
            for row, offset, order, result in zip(*(column.tolist() for column in columns), strict=True)
            # Barred runs failed by admission, not by their PTEs, and are not attempts.
            if order not in self._bars or self._bars[order][row, offset >> order] == ScanResult.SUCCEED
        ]

    def _collapse(
        self, rows: Sequence[int], candidates: Sequence[Candidate], results: NDArray[np.int8]
    ) -> list[BlockOutcome]:
        """Collapse the admitted runs as one batch, and set `results` from the outcomes."""
        visit = self._visit
        visit.touching = True
        try:
            outcomes = collapse_batch(visit.space, [each.block for each in candidates], visit.means, self.columns)
        finally:
            visit.touching = False
        done: set[int] = set()
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.result is ScanResult.SUCCEED:
                done.add(row)
            # One success makes a success of the range, whatever its later attempts end in.
            results[row] = ScanResult.SUCCEED if row in done else outcome.result
            if outcome.result in _LISTING_IS_STALE:
                visit.forget()
        if visit.policy.remembers_filled:
            self._remember(rows, outcomes)
        return outcomes

    def _remember(self, rows: Sequence[int], outcomes: Sequence[BlockOutcome]) -> None:
        """Remember which pages the collapses filled."""
        planes, page_size = self._planes, self._visit.geometry.page_size
        before = planes.occupied if planes.swap is None else planes.occupied | planes.swap
        made: Bits = np.zeros_like(before)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.result is ScanResult.SUCCEED:
                first = (outcome.address - int(self._addresses[row])) // page_size
                made[row, first : first + (1 << outcome.order)] = True
        self._visit.filled.add(self._addresses, before, before | made, made)
