"""Scans and collapses of a PMD range on the simulated machine, for khugepaged and MADV_COLLAPSE."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mthp.eligibility import Trigger
from mthp.engine.occupancy import Occupancy
from mthp.engine.planes import Planes, planes_of
from mthp.engine.policy import BUILT_IN, Policy, Rules
from mthp.results import BlockOutcome, ScanResult
from mthp.sim.collapse.fullness import Fullness
from mthp.sim.collapse.huge_page import collapse_huge_page
from mthp.sim.collapse.look import Look, run_look, scan_look
from mthp.sim.collapse.single_pmd import RangeScan, collapse_single_pmd
from mthp.sim.mm import Mm, P, Pmd, Ptes, SimVma
from mthp.sim.page_tables.entries import columns_of
from mthp.sim.parts import Parts
from mthp.sim.trace import ScanPmd

_EXCEEDED = {
    ScanResult.EXCEED_NONE_PTE: ("thp_scan_exceed_none_pte", "collapse_exceed_none_pte"),
    ScanResult.EXCEED_SWAP_PTE: ("thp_scan_exceed_swap_pte", "collapse_exceed_swap_pte"),
    ScanResult.EXCEED_SHARED_PTE: ("thp_scan_exceed_share_pte", "collapse_exceed_shared_pte"),
}
"""By scan result for an exceeded limit: counter of the machine, and counter of the size."""


@dataclass
class CollapseControl:
    """Policy, rules and progress of a collapse (struct collapse_control).

    Attributes:
        rules: trigger and limits, with the orders enabled for the current mapping.
        progress: entries scanned, plus ranges and mappings skipped.
        node_load: int64, shape (nodes,): pages of the current PMD range on each node.
        lock_dropped: whether the current range passed its scan, so that mmap_lock was dropped for the attempts.
        attempts: all attempts.
    """

    policy: Policy
    rules: Rules
    progress: int = 0
    node_load: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    lock_dropped: bool = False
    attempts: list[BlockOutcome] = field(default_factory=list)

    @classmethod
    def begun(cls, parts: Parts, trigger: Trigger, orders: tuple[int, ...] = ()) -> Self:
        """Return the control of a collapse that begins now, under the current limits."""
        return cls(parts.policy, Rules(parts.geometry, orders, trigger, parts.tunables, parts.mthp_min_order))


class SimRange:
    """The :class:`~mthp.engine.visited.RangeTarget` of the simulated machine."""

    # The bugs of a series belong to what its golden cases recorded.
    as_it_was = True

    def __init__(self, parts: Parts, mm: Mm, vma: SimVma, control: CollapseControl) -> None:
        self._parts = parts
        self._mm = mm
        self._vma = vma
        self._control = control
        self._writable = False

    def scan_pmd(self, address: int) -> RangeScan:
        parts, control = self._parts, self._control
        pmd = self._mm.pmd(address)
        if pmd is not Pmd.TABLE:
            # A range without entries counts as one (cc->progress++ in collapse_scan_pmd()).
            control.progress += 1
            return RangeScan(ScanResult.PMD_MAPPED if pmd is Pmd.HUGE else ScanResult.NO_PTE_TABLE)
        ptes = self._mm.ptes(address, parts.geometry.ptes_per_pmd)
        limits = control.policy.scan_limits(control.rules)
        if limits is None or control.policy.scans_each_run:
            # Each run is scanned on its own, and counted there.
            control.lock_dropped = True
            return RangeScan(ScanResult.SUCCEED, self._fullness(address, ptes))
        # The program's handler must see every fault, so no none entry may be filled.
        if self._vma.userfaultfd_armed and control.policy.scan_honours_uffd(control.rules):
            limits = limits._replace(none=0)
        look = scan_look(parts, self._vma, ptes, limits, forced=control.rules.forced)
        scan = self._counted(look, parts.geometry.pmd_order)
        if scan.result is not ScanResult.SUCCEED:
            return scan
        control.lock_dropped = True
        return dataclasses.replace(scan, fullness=self._fullness(address, ptes))

    def scan_run(self, address: int, order: int) -> RangeScan:
        parts, control = self._parts, self._control
        if self._mm.pmd(address) is not Pmd.TABLE:
            # An attempt in this range may have changed the PMD entry, or the walk has gone beyond the range.
            return RangeScan(ScanResult.PMD_MAPPED if self._mm.pmd(address) is Pmd.HUGE else ScanResult.NO_PTE_TABLE)
        limits = control.policy.attempt_limits(order, control.rules)
        if self._vma.userfaultfd_armed:
            limits = limits._replace(none=0)
        large = order if order < parts.geometry.pmd_order else None
        page, size = parts.geometry.page_size, parts.geometry.pmd_size
        ptes = self._mm.ptes(address, min(1 << order, (size - address % size) // page))
        look = run_look(parts, self._vma, ptes, limits, forced=control.rules.forced, large=large)
        if look.result is ScanResult.SUCCEED and len(ptes.bits) < 1 << order:
            # An unaligned run may extend beyond the page table, and nothing there is a PTE.
            parts.beyond_table = address
            look = dataclasses.replace(look, result=ScanResult.PAGE_NULL)
        scan = self._counted(look, order)
        if scan.result is ScanResult.PTE_MAPPED_HUGEPAGE:
            # From the entry that was hit, not from the folio's first page: the series has this bug, and so unaligned
            # runs.
            large_pages = 1 << int(parts.memory.order[ptes.value[look.at]])
            return dataclasses.replace(scan, behind=address + (look.at + large_pages) * page)
        return scan

    def _counted(self, look: Look, order: int) -> RangeScan:
        """Count the scan of a run, check that enough of it was referenced, and return the result."""
        parts, control = self._parts, self._control
        entries = min(look.at + 1, 1 << order)
        control.progress += entries
        parts.clock.spend("scan_range")
        parts.clock.spend("scan_pte", entries)
        referenced = 0 if control.rules.forced else look.referenced
        result = look.result
        if result in _EXCEEDED:
            parts.count_order(order, *_EXCEEDED[result])
        may_be_written = self._may_be_written(look)
        if result is ScanResult.SUCCEED and not may_be_written:
            result = ScanResult.PAGE_RO
        elif result is ScanResult.SUCCEED and not control.rules.forced:
            # Reading pages back is worth it only where half of the range is in use (collapse_scan_pmd()).
            wanted = (1 << order) // 2 if look.unmapped else 1
            if referenced < wanted:
                result = ScanResult.LACK_REFERENCED_PAGE
        if result is ScanResult.SUCCEED:
            nodes = parts.memory.nodes_of(look.heads)
            # Kept for the allocation of all runs of the range: it takes the node that has most pages.
            control.node_load = np.bincount(nodes, minlength=parts.memory.nodes).astype(np.int64)
        return RangeScan(result, None, 0, referenced, look.none_or_zero, look.unmapped)

    def _may_be_written(self, look: Look) -> bool:
        """Return whether a run may be collapsed, considering whether any of its pages is writable."""
        parts, control = self._parts, self._control
        # A page of an earlier run of the PMD range counts, too: the series never resets the flag.
        self._writable |= look.writable
        if parts.kernel.wants_writable:
            return self._writable
        leaves = parts.kernel.leaves_empty_runs and control.policy.leaves_empty_runs and control.rules.forced
        return not leaves or bool(len(look.offsets)) or look.unmapped > 0

    def _fullness(self, address: int, ptes: Ptes) -> Fullness:
        """Return which runs are full enough, from only the columns that the policy may read."""
        parts, control = self._parts, self._control
        if type(control.policy) in BUILT_IN.values():
            # The built-in policies read only pages and swap entries.
            pages = ptes.pages()
            unmapped = (ptes.bits != 0) & ((ptes.bits & P.PRESENT) == 0)
            planes = Planes(present=pages[None], swap=unmapped[None] if unmapped.any() else None)
        else:
            end = address + parts.geometry.pmd_size
            planes = planes_of(columns_of(parts, self._mm, [(address, end)]), parts.geometry)
            filled = self._mm.filled.of(np.array([address], np.uint64)) if control.policy.remembers_filled else None
            if filled is not None:
                planes = dataclasses.replace(planes, filled=filled & planes.present).without_filled()
        return Fullness(Occupancy(planes, parts.geometry), control.policy, control.rules)

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        parts, control = self._parts, self._control
        pages = self._mm.anon_pages
        before = self._contents(address) if control.policy.remembers_filled else None
        result = collapse_huge_page(
            parts, self._mm, address, order, scan, control.policy, control.rules, control.node_load
        )
        # A collapse raises MM_ANONPAGES by its none entries and zero pages alone.
        filled = self._mm.anon_pages - pages if result is ScanResult.SUCCEED else 0
        copied = (1 << order) - filled if result is ScanResult.SUCCEED else 0
        control.attempts.append(BlockOutcome(address, order, result, copied=copied, filled=filled))
        if before is not None and result is ScanResult.SUCCEED:
            after = self._contents(address)
            start = address // parts.geometry.pmd_size * parts.geometry.pmd_size
            self._mm.filled.add(np.array([start], np.uint64), before, after, after & ~before)
        return result

    def _contents(self, address: int) -> NDArray[np.bool_]:
        """Return which pages of the PMD range around `address` have contents: bool, shape (1, ptes_per_pmd)."""
        geometry = self._parts.geometry
        start = address // geometry.pmd_size * geometry.pmd_size
        bits = self._mm.ptes(start, geometry.ptes_per_pmd).bits
        contents: NDArray[np.bool_] = (bits != 0) & ((bits & P.ZERO) == 0)
        return contents[None]

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        event = ScanPmd(self._mm.id, address, result, scan.referenced, scan.none_or_zero, scan.unmapped)
        self._parts.trace.emit(event)


def collapse_range(parts: Parts, mm: Mm, vma: SimVma, address: int, control: CollapseControl) -> ScanResult:
    """Collapse one PMD range as the policy wants, for khugepaged and MADV_COLLAPSE alike."""
    control.rules = dataclasses.replace(
        control.rules,
        # For MADV_COLLAPSE, too: policies that go below the PMD order take the sizes that sysfs has on.
        orders=parts.collapse_orders(mm, vma, "khugepaged"),
        always=tuple(sorted(order for order, word in parts.switches.sizes.items() if word == "always")),
        tunables=parts.tunables,
    )
    return collapse_single_pmd(SimRange(parts, mm, vma, control), address, control.policy, control.rules)
