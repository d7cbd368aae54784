"""An address space of any kind, as khugepaged visits it: the backend reads and collapses, the engine judges.

The kernel looks at a range, lets go of its locks and tries to collapse; then it looks at the next. Here looking is
cheap by the block and dear by the call, and so is collapsing: the mover stops a target for each batch. So the ranges of
a block are read at once, and those that have nothing to be collapsed are passed over together
(:class:`~mthp.collapse.walk.Walk`). Each of the others goes through the same
:func:`~mthp.collapse.single_pmd.collapse_single_pmd` as in the simulated machine; its attempts are judged by the
columns, as a plan judges them, and taken for granted where these show no hindrance. That is sound because the attempts
of a range are disjoint, and none depends on the success of an earlier one. At the end of the block all are carried out
as one batch, and what was made of PMD ranges is counted by their entries afterwards, not by what the call returned.
What the columns do not show (a page that is locked, or waits for its LRU list) shows as an outcome; the smaller orders
that the kernel would try in its place are tried in the next pass, if the range still looks the same.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace, CollapseOutcome, Means, PteColumns, Segment
from mthp.collapse.filled import FilledPages
from mthp.collapse.fullness import Fullness
from mthp.collapse.hindrance import first_hindrances
from mthp.collapse.machine_seam import Attempted, Clock, Found, Passage, RangeScan, WallClock
from mthp.collapse.occupancy import Bits, planes_of
from mthp.collapse.policy import Policy, Rules, policy_named
from mthp.collapse.single_pmd import DONE_THERE, collapse_single_pmd
from mthp.collapse.walk import Walk
from mthp.eligibility import Trigger, eligibility
from mthp.geometry import Geometry
from mthp.planning import BLOCK_PMD_RANGES, ORDERS_ENABLED, base_rules
from mthp.results import ScanResult

FRESH = 1.0
"""Seconds for which a listing of the mappings is taken to hold; a failure that says otherwise ends that at once."""

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

Choose = Callable[[AddressSpace, NDArray[np.uint64]], Bits]
"""Given the addresses of some PMD ranges (uint64, shape (ranges,)), says which of them are worth a look: bool, same
shape. The others are passed over without being read, as one entry each."""


@dataclass(frozen=True, slots=True)
class VisitOptions:
    """How an address space is visited.

    Attributes:
        policy: a policy, or its name.
        orders: the enabled orders; ``"enabled"`` for what the machine's switches allow each mapping, at each moment;
            None for all.
        trigger: ``khugepaged``, which respects the limits, or ``madvise``.
        max_ptes_none, max_ptes_swap, max_ptes_shared: limits per PMD range; the machine's own of the moment if None.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``.
        means: by what means blocks are collapsed, and what that may cost the target. What may be filled is the
            policy's matter here, so these may fill by default.
        admit: asked before each attempt; None for no.
        choose: asked before ranges are read; None for no.
        within: visit this range of addresses only.
    """

    policy: str | Policy = "mainline"
    orders: Iterable[int] | str | None = ORDERS_ENABLED
    trigger: Trigger = "khugepaged"
    max_ptes_none: int | None = None
    max_ptes_swap: int | None = None
    max_ptes_shared: int | None = None
    mthp_min_order: int | None = None
    means: Means = dataclasses.field(default_factory=lambda: Means(fill=True))
    admit: Admit | None = None
    choose: Choose | None = None
    within: Segment | None = None


@dataclass(frozen=True, slots=True)
class _Area:
    """Whole PMD ranges of one mapping that may be collapsed, and that may hold something."""

    start: int
    end: int
    rules: Rules
    uffd_armed: bool
    droppable: bool
    passed: int
    """Mappings, and stretches without anything, between the area before and this one."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """The mappings at one moment."""

    at: float
    thp_disabled: bool
    areas: list[_Area]
    passed_behind: int


class SpaceVisit:
    """One address space, as :class:`~mthp.collapse.khugepaged.Scanner` and MADV_COLLAPSE go over it.

    Args:
        space: not closed with this.
        options: how it is visited.
        clock: the time by which a listing of the mappings grows old.

    Raises:
        UsageError: an unknown policy, or an order or a limit that does not exist on this geometry.

    Attributes:
        space: as given.
        options: may be replaced between passes, but for the policy.
        filled: pages that collapses filled, for policies that remember them.
    """

    def __init__(self, space: AddressSpace, options: VisitOptions | None = None, clock: Clock | None = None) -> None:
        self.space = space
        self.options = options or VisitOptions()
        self._clock = clock or WallClock()
        self._policy = policy_named(self.options.policy)
        self._listed: _Listing | None = None
        self._served = False
        self._ahead = 0
        self.filled = FilledPages(space.geometry)
        base_rules(self.space, self.options)

    @property
    def geometry(self) -> Geometry:
        """Of the machine."""
        return self.space.geometry

    @property
    def exiting(self) -> bool:
        """Never known beforehand: an address space whose process is gone says so when it is next asked."""
        return False

    @property
    def thp_disabled(self) -> bool:
        return self._listing().thp_disabled

    @property
    def wanted(self) -> bool:
        """Whether anything in it may be collapsed, so that a visit is worth it (khugepaged_enter_vma).

        Raises:
            TargetVanishedError: the process is gone.
        """
        listing = self._listing()
        return bool(listing.areas) and not listing.thp_disabled

    def forget(self) -> None:
        """List the mappings anew when they are next needed."""
        self._listed = None

    def close(self) -> None:
        """Nothing is held; the address space stays open, since whoever opened it closes it."""

    # The mappings.

    def _listing(self) -> _Listing:
        now = self._clock.now()
        if self._listed is None or not 0 <= now - self._listed.at <= FRESH:
            self._listed = self._list(now)
            self._served = False
        return self._listed

    def _list(self, now: float) -> _Listing:
        space, geometry, base = self.space, self.geometry, base_rules(self.space, self.options)
        switches, thp_disabled = space.switches, space.thp_disabled
        areas: list[_Area] = []
        passed = 0
        follow_switches = self.options.orders == ORDERS_ENABLED
        for vma in space.vmas():
            allowed = eligibility(
                vma,
                geometry,
                switches,
                trigger="khugepaged" if follow_switches else "madvise",
                thp_disabled=thp_disabled,
            )
            rules = dataclasses.replace(base, orders=allowed.orders) if follow_switches else base
            whole = self._clipped(vma.pmd_ranges(geometry)) if allowed else None
            if whole is None or not self._policy.orders_walked(rules):
                passed += 1
                continue
            behind = whole[0]
            for start, end in space.populated([whole], geometry.pmd_size):
                passed += start > behind
                areas.append(_Area(start, end, rules, vma.uffd_armed, vma.droppable, passed))
                passed, behind = 0, end
            passed += behind < whole[1]
        return _Listing(now, thp_disabled, areas, passed)

    def _clipped(self, segment: Segment) -> Segment | None:
        """The whole PMD ranges of `segment` that are wanted; None if there are none."""
        (start, end), size = segment, self.geometry.pmd_size
        if self.options.within is not None:
            low, high = self.options.within
            start, end = max(start, -(-low // size) * size), min(end, high // size * size)
        return (start, end) if start < end else None

    def find(self, address: int) -> Found:
        if address == 0 and self._served:
            # A new round: what was mapped since the last one is to be seen.
            self.forget()
        listing, self._served = self._listing(), address > 0
        at = bisect_right(listing.areas, address, key=lambda area: area.end)
        if at == len(listing.areas):
            return Found(listing.passed_behind, None)
        area = listing.areas[at]
        return Found(area.passed if address <= area.start else 0, (max(address, area.start), area.end))

    def _area(self, address: int) -> _Area | None:
        areas = self._listing().areas
        at = bisect_right(areas, address, key=lambda area: area.end)
        return areas[at] if at < len(areas) and areas[at].start <= address else None

    # The ranges.

    def scan(self, stretch: Segment, budget: int) -> Passage:
        size, n = self.geometry.pmd_size, self.geometry.ptes_per_pmd
        area = self._area(stretch[0])
        if area is None:
            # Unmapped since it was found, as a new listing says.
            empty = np.zeros(0, np.int8)
            return Passage(stretch[0] + size, 1, empty.astype(np.uint64), empty, ScanResult.VMA_NULL)
        needed = -(-budget // n)
        end = min(stretch[1], area.end, stretch[0] + min(BLOCK_PMD_RANGES, max(needed, self._ahead)) * size)
        addresses = np.arange(stretch[0], end, size, dtype=np.uint64)
        chosen = addresses
        if self.options.choose is not None:
            chosen = addresses[self.options.choose(self.space, addresses)]
        block = _Block(self, area, chosen)
        progress = np.ones(len(addresses), np.int64)
        progress[np.searchsorted(addresses, chosen)] = block.progress
        through = int(np.searchsorted(np.cumsum(progress), budget)) + 1
        last = int(addresses[min(through, len(addresses)) - 1])
        # Ranges that cost next to nothing are read in larger and larger blocks, as long as the budget is far away.
        self._ahead = min(BLOCK_PMD_RANGES, 2 * len(addresses)) if progress.sum() < budget else 0
        return block.carry_out(last + size, int(progress[:through].sum()))

    def read(self, addresses: NDArray[np.uint64]) -> PteColumns:
        """The entries of the PMD ranges at `addresses`, adjoining ones as one segment."""
        size = self.geometry.pmd_size
        breaks = np.flatnonzero(np.diff(addresses) != size) + 1
        starts, ends = addresses[np.r_[0, breaks]], addresses[np.r_[breaks - 1, len(addresses) - 1]]
        return self.space.read([(a, b + size) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])

    # As MADV_COLLAPSE sees it.

    def find_vma(self, address: int) -> Segment | None:
        return next((segment for segment in self.space.mapped() if segment[1] > address), None)

    def possible(self, address: int) -> bool:
        vma = next((vma for vma in self.space.vmas() if vma.start <= address < vma.end), None)
        if vma is None:
            return False
        whole = dataclasses.replace(vma, start=0, end=2 * self.geometry.pmd_size)
        disabled = self.space.thp_disabled
        return bool(eligibility(whole, self.geometry, self.space.switches, trigger="madvise", thp_disabled=disabled))

    def drain(self) -> None:
        """The batches of a machine behind this seam are out of reach."""

    def revalidate(self, address: int) -> ScanResult:
        self.forget()
        area = self._area(address)
        if area is not None and address + self.geometry.pmd_size <= area.end:
            return ScanResult.SUCCEED
        return ScanResult.VMA_CHECK if self.possible(address) else ScanResult.VMA_NULL

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        passage = self.scan((address, address + self.geometry.pmd_size), 1)
        if not len(passage.results):
            return ScanResult.NO_PTE_TABLE, False
        return ScanResult(int(passage.results[-1])), passage.released

    @property
    def policy(self) -> Policy:
        """What is collapsed."""
        return self._policy


class _Block:
    """Some PMD ranges of one area, read at one moment: what is to be done in each, and what came of it."""

    def __init__(self, visit: SpaceVisit, area: _Area, addresses: NDArray[np.uint64]) -> None:
        self._visit = visit
        self._policy, self._rules = visit.policy, area.rules
        self.page_size = visit.geometry.page_size
        self._addresses = addresses
        self._queue: list[tuple[int, Candidate]] = []
        self._attempts: list[Attempted] = []
        self.progress: NDArray[np.int64] = np.zeros(0, np.int64)
        if not len(addresses):
            return
        count = len(addresses)
        planes = planes_of(
            visit.read(addresses),
            visit.geometry,
            uffd_armed=np.full(count, area.uffd_armed),
            droppable=np.full(count, area.droppable),
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
        outcomes = self._seen(self._visit.space.collapse_blocks(blocks, self._visit.options.means))
        done: dict[int, bool] = {}
        for (row, candidate), outcome in zip(self._queue, outcomes, strict=True):
            succeeded = outcome.result is ScanResult.SUCCEED
            done[row] = done.get(row, False) or succeeded
            results[row] = ScanResult.SUCCEED if done[row] else outcome.result
            sizes = (candidate.copied, candidate.filled) if succeeded else (0, 0)
            self._attempts.append(
                Attempted(candidate.address, candidate.order, outcome.result, *sizes, outcome.elapsed_ns)
            )
            if outcome.result in _LISTING_IS_STALE:
                self._visit.forget()
        self._attempts.sort(key=lambda attempt: (attempt.address, -attempt.order))
        if self._policy.remembers_filled:
            self._remember(outcomes)

    def _seen(self, outcomes: list[CollapseOutcome]) -> list[CollapseOutcome]:
        """`outcomes`, less the successes of the PMD order that the page tables do not show.

        Smaller folios were looked at by the mover that made them.
        """
        order, size = self._visit.geometry.pmd_order, self._visit.geometry.pmd_size
        claimed = sorted(
            candidate.address
            for (_, candidate), outcome in zip(self._queue, outcomes, strict=True)
            if candidate.order == order and outcome.result is ScanResult.SUCCEED
        )
        if not claimed:
            return outcomes
        outline = self._visit.space.outline([(address, address + size) for address in claimed])
        missing = set(claimed) - set(outline.address[outline.pmd_mapped].tolist())
        # A call that succeeded on a range that is not huge now: it was split or unmapped again at once.
        return [
            dataclasses.replace(outcome, result=ScanResult.PTE_NON_PRESENT) if candidate.address in missing else outcome
            for (_, candidate), outcome in zip(self._queue, outcomes, strict=True)
        ]

    def _remember(self, outcomes: list[CollapseOutcome]) -> None:
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
            self._attempts.append(Attempted(address, order, result))
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
    """The :class:`~mthp.collapse.machine_seam.RangeTarget` of one range of a block."""

    def __init__(self, block: _Block, row: int, start: int) -> None:
        self._block = block
        self._row = row
        self._start = start
        self._foretold = block.foretold(row)
        self._withheld = False

    def scan_pmd(self, address: int) -> RangeScan:
        return self._block.scan_of(self._row)

    def scan_run(self, address: int, order: int) -> RangeScan:
        result, _ = self._expected(address, order)
        # A large folio in a run is found by its scan here, and reported as the attempt that it stands for.
        return self._block.scan_of(self._row) if result in DONE_THERE else RangeScan(result)

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
