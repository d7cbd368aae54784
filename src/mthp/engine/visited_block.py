"""Some PMD ranges of an address space that is visited, read at one moment, and collapsed as one batch.

The kernel looks at a range, lets go of its locks and tries to collapse; then it looks at the next. Here looking is
cheap by the block and dear by the call, and so is collapsing: the mover stops a target for each batch. So the ranges of
a block are read at once, and those that have nothing to be collapsed are passed over together
(:class:`~mthp.engine.walk.Walk`). Each of the others goes through the same
:func:`~mthp.engine.single_pmd.collapse_single_pmd` as in the simulated machine; its attempts are judged by the
columns, as a plan judges them, and taken for granted where these show no hindrance. That is sound because the attempts
of a range are disjoint, and none depends on the success of an earlier one. At the end of the block all are carried out
as one batch (:meth:`~mthp.addrspace.AddressSpace.collapse_blocks`).
What the columns do not show (a page that is locked, or waits for its LRU list) shows as an outcome; the smaller orders
that the kernel would try in its place are tried in the next pass, if the range still looks the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.engine.checks import first_hindrances
from mthp.engine.fullness import Fullness
from mthp.engine.machine_seam import Passage, RangeScan
from mthp.engine.occupancy import Bits, planes_of
from mthp.engine.policy import Rules
from mthp.engine.single_pmd import DONE_THERE, collapse_single_pmd
from mthp.engine.walk import Walk
from mthp.results import BlockOutcome, ScanResult

if TYPE_CHECKING:
    from mthp.engine.visit import SpaceVisit

_LISTING_IS_STALE = frozenset({ScanResult.VMA_NULL, ScanResult.VMA_CHECK, ScanResult.ADDRESS_RANGE})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run that is about to be tried.

    Attributes:
        space: where.
        address: of the run.
        order: of the folio that it would become.
        copied, filled: pages with contents, and PTEs without.
    """

    space: AddressSpace
    address: int
    order: int
    copied: int
    filled: int


Admit = Callable[[Candidate], ScanResult]
"""Asked before each attempt: SUCCEED to go on, or what to take as its result instead. ALLOC_HUGE_PAGE_FAIL lets smaller
orders be tried at the same place, PTE_MAPPED_HUGEPAGE goes on behind the run, CGROUP_CHARGE_FAIL ends the PMD range."""


class VisitedBlock:
    """Some PMD ranges under one set of rules, read at one moment: what is to be done in each, and what came of it.

    Args:
        addresses: uint64, shape (ranges,), ascending.
        uffd_armed, droppable: of the mapping that all of them lie in.

    Attributes:
        progress: int64, shape (ranges,): the entries that each counts for.
    """

    def __init__(
        self, visit: SpaceVisit, rules: Rules, addresses: NDArray[np.uint64], *, uffd_armed: bool, droppable: bool
    ) -> None:
        self._visit = visit
        self._policy, self._rules = visit.policy, rules
        self.page_size = visit.geometry.page_size
        self._addresses = addresses
        self._queue: list[tuple[int, Candidate]] = []
        self._attempts: list[BlockOutcome] = []
        self.progress: NDArray[np.int64] = np.zeros(0, np.int64)
        if not len(addresses):
            return
        count = len(addresses)
        self._columns = visit.read(addresses)
        planes = planes_of(
            self._columns,
            visit.geometry,
            uffd_armed=np.full(count, uffd_armed),
            droppable=np.full(count, droppable),
        )
        if self._policy.remembers_filled and (filled := visit.filled.of(addresses)) is not None:
            # What was unmapped since is no page any more.
            planes = dataclasses.replace(planes, filled=filled & planes.present)
        self._planes = planes
        self._walk = Walk(planes, self._policy, self._rules)
        self._fullness = Fullness(self._walk.occupancy, self._policy, self._rules)
        self._results = self._walk.scan_result()
        self._foretold = self._walk.attempts
        without_table = (self._results == ScanResult.NO_PTE_TABLE) | (self._results == ScanResult.PMD_MAPPED)
        self.progress = np.where(without_table, 1, visit.geometry.ptes_per_pmd)

    def carry_out(self, end: int, progress: int) -> Passage:
        """Walk over the ranges in front of `end` in which there is something to do, and do it."""
        count = int(np.searchsorted(self._addresses, end))
        if not count:
            return Passage(end, progress, self._addresses[:0], np.zeros(0, np.int8), ScanResult.FAIL)
        results = self._results[:count].copy()
        rows = np.flatnonzero(results == ScanResult.SUCCEED)
        for row in rows.tolist():
            target = _Target(self, row, int(self._addresses[row]))
            results[row] = collapse_single_pmd(target, int(self._addresses[row]), self._policy, self._rules)
        released = bool(self._queue)
        if released:
            self._collapse_queued(results)
        failed = any(attempt.result is ScanResult.ALLOC_HUGE_PAGE_FAIL for attempt in self._attempts)
        result = ScanResult.ALLOC_HUGE_PAGE_FAIL if failed else ScanResult(int(results[-1]))
        return Passage(end, progress, self._addresses[:count], results, result, released, tuple(self._attempts))

    def _collapse_queued(self, results: NDArray[np.int8]) -> None:
        """Collapse what the walks have queued, and put what came of it into `results`."""
        blocks = [(candidate.address, candidate.order) for _, candidate in self._queue]
        outcomes = self._visit.space.collapse_blocks(blocks, self._visit.options.means, self._columns)
        self._attempts += outcomes
        done: dict[int, bool] = {}
        for (row, _), outcome in zip(self._queue, outcomes, strict=True):
            succeeded = outcome.result is ScanResult.SUCCEED
            done[row] = done.get(row, False) or succeeded
            results[row] = ScanResult.SUCCEED if done[row] else outcome.result
            if outcome.result in _LISTING_IS_STALE:
                self._visit.forget()
        self._attempts.sort(key=lambda attempt: (attempt.address, -attempt.order))
        if self._policy.remembers_filled:
            self._remember(outcomes)

    def _remember(self, outcomes: Sequence[BlockOutcome]) -> None:
        """Note which pages the collapses filled."""
        before = self._planes.occupied if self._planes.swap is None else self._planes.occupied | self._planes.swap
        made: Bits = np.zeros_like(before)
        for (row, candidate), outcome in zip(self._queue, outcomes, strict=True):
            if outcome.result is ScanResult.SUCCEED:
                first = (candidate.address - int(self._addresses[row])) // self.page_size
                made[row, first : first + (1 << candidate.order)] = True
        self._visit.filled.add(self._addresses, before, before | made, made)

    # As one range of it sees the block.

    def scan_of(self, row: int) -> RangeScan:
        """What the scan of the range in `row` says; the walk has looked already."""
        return RangeScan(ScanResult.SUCCEED, self._fullness, row)

    def foretold(self, row: int) -> dict[tuple[int, int], tuple[ScanResult, int]]:
        """The results that the columns foretell of the range's attempts, and the PTEs they fill, by (offset, order)."""
        first, last = np.searchsorted(self._foretold.range, [row, row + 1]).tolist()
        attempts = self._foretold
        columns = (attempts.offset, attempts.order, attempts.result, attempts.filled)
        rows = zip(*(column[first:last].tolist() for column in columns), strict=True)
        return {(offset, order): (ScanResult(result), filled) for offset, order, result, filled in rows}

    def judged(self, row: int, offset: int, order: int) -> tuple[ScanResult, int]:
        """The same for one attempt that a plan does not make, since a larger one was not admitted."""
        checks = self._walk.attempt_checks(order)
        here = np.array([row]), np.array([offset])
        result = first_hindrances(self._walk.planes, order, *here, checks)
        none = self._walk.there.runs(order).none_or_zero
        # One row stands for all where none of them has a page.
        return ScanResult(int(result[0])), int(none[row if len(none) > 1 else 0, offset >> order])

    def tried(self, row: int, address: int, order: int, result: ScanResult, filled: int) -> ScanResult:
        """Queue an attempt that nothing hinders, if it is admitted."""
        if result is not ScanResult.SUCCEED:
            self._attempts.append(BlockOutcome(address, order, result))
            return result
        candidate = Candidate(self._visit.space, address, order, (1 << order) - filled, filled)
        admit = self._visit.options.admit
        admitted = ScanResult.SUCCEED if admit is None else admit(candidate)
        if admitted is ScanResult.SUCCEED:
            self._queue.append((row, candidate))
        return admitted


_NOT_FORETOLD = ScanResult.EXCEED_NONE_PTE
"""Stands for whatever stops a run that the plan does not try: smaller orders are tried after it."""


class _Target:
    """The :class:`~mthp.engine.machine_seam.RangeTarget` of one range of a block."""

    as_it_was = False

    def __init__(self, block: VisitedBlock, row: int, start: int) -> None:
        self._block = block
        self._row = row
        self._start = start
        self._foretold = block.foretold(row)
        self._withheld = False

    def scan_pmd(self, address: int) -> RangeScan:
        return self._block.scan_of(self._row)

    def scan_run(self, address: int, order: int) -> RangeScan:
        result, _ = self._expected(address, order)
        # A large folio in a run is found by its scan here, and reported as the attempt that it stands for. FAIL is what
        # an attempt comes to at a guard marker, which a scan lets pass.
        passed = result in DONE_THERE or result is ScanResult.FAIL
        return self._block.scan_of(self._row) if passed else RangeScan(result)

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        result, filled = self._expected(address, order)
        admitted = self._block.tried(self._row, address, order, result, filled)
        self._withheld |= admitted is not result
        return admitted

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        """The block tells of all its ranges together."""

    def _expected(self, address: int, order: int) -> tuple[ScanResult, int]:
        """What comes of an attempt as far as the columns tell, and how many PTEs it fills."""
        offset = (address - self._start) // self._block.page_size
        if (known := self._foretold.get((offset, order))) is not None:
            return known
        # The plan takes every attempt that it makes for granted; where one was withheld, it did not look further.
        return self._block.judged(self._row, offset, order) if self._withheld else (_NOT_FORETOLD, 0)
