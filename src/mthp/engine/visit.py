"""An address space of any kind, as khugepaged visits it: the backend reads and collapses, the engine judges.

The mappings are listed now and then, and what in them may be collapsed is remembered as areas: whole PMD ranges that
one set of rules holds for. Their ranges are read and worked on in blocks (:mod:`mthp.engine.visited_block`), which grow
where there is nothing to do.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace, Means, PteColumns, Segment, VmaKind
from mthp.eligibility import Trigger, eligibility
from mthp.engine.filled import FilledPages
from mthp.engine.machine_seam import Clock, Found, Passage, WallClock
from mthp.engine.occupancy import Bits
from mthp.engine.planning import BLOCK_PMD_RANGES, ORDERS_ENABLED, base_rules, switched
from mthp.engine.policy import Policy, Rules
from mthp.engine.policy_lookup import policy_named
from mthp.engine.visited_block import Admit, VisitedBlock
from mthp.geometry import Geometry
from mthp.results import ScanResult

FRESH = 1.0
"""Seconds for which a listing of the mappings is taken to hold; a failure that says otherwise ends that at once."""


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
    refused: dict[tuple[VmaKind, str], tuple[int, int]]


class SpaceVisit:
    """One address space, as :class:`~mthp.engine.khugepaged.Scanner` and MADV_COLLAPSE go over it.

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
    def refused(self) -> dict[tuple[VmaKind, str], tuple[int, int]]:
        """How many mappings, and bytes, may not be collapsed, by what they are made of and the reason.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return self._listing().refused

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
        refused: dict[tuple[VmaKind, str], tuple[int, int]] = {}
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
            if not allowed:
                mappings, size = refused.get((vma.kind, allowed.reason), (0, 0))
                refused[vma.kind, allowed.reason] = mappings + 1, size + vma.size
            rules = switched(base, allowed.orders, switches) if follow_switches else base
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
        return _Listing(now, thp_disabled, areas, passed, refused)

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
        block = VisitedBlock(self, area.rules, chosen, uffd_armed=area.uffd_armed, droppable=area.droppable)
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
