"""khugepaged and MADV_COLLAPSE of the simulated machine: its address spaces, as the engine visits them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from mthp.engine.scanner import Scanner
from mthp.engine.visited import NextRanges, Passage, RestClock
from mthp.geometry import Geometry
from mthp.ptes import Segment
from mthp.results import ScanResult
from mthp.sim.clock import Clock
from mthp.sim.collapse.huge_page import revalidate
from mthp.sim.collapse.idle import MAX_RANGES, pass_over
from mthp.sim.collapse.scan import CollapseControl, collapse_range
from mthp.sim.mm import Mm, SimVma
from mthp.sim.parts import Parts


class SimTime:
    """The machine's clock for khugepaged (:class:`~mthp.engine.visited.RestClock`): rests advance it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self) -> float:
        return self._clock.now_ns / 1e9

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        self._clock.wait_ns(round(seconds * 1e9))


class MmVisit:
    """One address space, as khugepaged visits it."""

    def __init__(self, parts: Parts, mm: Mm) -> None:
        self._parts = parts
        self.mm = mm
        self._idle = 0

    @property
    def exiting(self) -> bool:
        return self.mm.exiting

    @property
    def thp_disabled(self) -> bool:
        return self.mm.thp_disabled

    def find(self, address: int) -> NextRanges:
        size, passed = self._parts.geometry.pmd_size, 0
        vma = self.mm.find_vma(address)
        while vma is not None:
            start, end = -(-vma.start // size) * size, vma.end // size * size
            # Each such mapping is progress, too: cc->progress++ in collapse_scan_mm_slot().
            if address > end or not self._may_collapse(vma):
                passed += 1
            else:
                # A mapping without a whole PMD range is not counted, but it moves the cursor.
                address = max(address, start)
                if address < end:
                    return NextRanges(passed, (address, end))
            vma = self.mm.find_vma(vma.end)
        return NextRanges(passed, None)

    def scan(self, stretch: Segment, budget: int) -> Passage:
        parts, (address, end) = self._parts, stretch
        vma = self.mm.find_vma(address)
        assert vma is not None, f"nothing is mapped at {address:#x}"
        control = CollapseControl.begun(parts, "khugepaged", parts.collapse_orders(self.mm, vma, "khugepaged"))
        # Scan more ranges together, the more idle ones came one after another; after a busy one, scan one.
        ahead = min(MAX_RANGES, 8 * self._idle)
        if (passed := pass_over(parts, self.mm, vma, (address, end), control, budget, ahead)) is not None:
            self._idle += len(passed.results)
            return passed
        result = collapse_range(parts, self.mm, vma, address, control)
        # Such a range would have been idle, had it been scanned with others.
        in_vain = all(attempt.result is ScanResult.PTE_MAPPED_HUGEPAGE for attempt in control.attempts)
        self._idle = self._idle + 1 if in_vain and not ahead else 0
        return Passage(
            address + parts.geometry.pmd_size,
            control.progress,
            np.array([address], np.uint64),
            np.array([result], np.int8),
            result,
            control.lock_dropped,
            tuple(control.attempts),
        )

    def _may_collapse(self, vma: SimVma) -> bool:
        """Return whether the policy walks an order that is enabled for `vma`."""
        orders = self._parts.collapse_orders(self.mm, vma, "khugepaged")
        control = CollapseControl.begun(self._parts, "khugepaged", orders)
        # A policy may walk none of the orders that are on: pmd-only where only smaller ones are.
        return bool(orders) and bool(control.policy.orders_walked(control.rules))

    def close(self) -> None:
        """Do nothing: no resource is held."""


class SimulatedKhugepaged(Scanner):
    """khugepaged of one machine."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(lambda: parts.tunables, SimTime(parts.clock))
        self._parts = parts

    def rest_by(self, clock: RestClock) -> None:
        """Rest by another clock, for example one that runs other actors meanwhile."""
        self._clock = clock

    @property
    def mms(self) -> list[Mm]:
        """The visited address spaces, in order."""
        return [slot.mm for slot in self.slots if isinstance(slot, MmVisit)]

    def enter(self, mm: Mm, vma: SimVma) -> None:
        """Visit `mm` from now on, if `vma` may have huge pages (khugepaged_enter_vma)."""
        if mm not in self.mms and self._parts.fault_orders(mm, vma):
            self.visit(mm)

    def visit(self, mm: Mm) -> None:
        """Visit `mm` from now on."""
        if mm not in self.mms:
            self.add(MmVisit(self._parts, mm))

    def exit(self, mm: Mm) -> None:
        """Stop visiting `mm` (khugepaged_exit)."""
        for slot in self.slots:
            if isinstance(slot, MmVisit) and slot.mm is mm:
                self.remove(slot)

    def _collapsed(self, passage: Passage) -> int:
        # In the seed pages_collapsed rises with every scan of a range that a PMD entry maps already.
        mapped = self._parts.policy.counts_mapped * np.count_nonzero(passage.results == ScanResult.PMD_MAPPED)
        return super()._collapsed(passage) + int(mapped)

    def count_advised(self, result: ScanResult) -> None:
        """Count a PMD range that MADV_COLLAPSE processed, if the policy's series does that."""
        if self._parts.policy.counts_mapped and result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED):
            self._count("pages_collapsed", 1)

    def _begin_pass(self) -> None:
        # khugepaged_do_scan() calls lru_add_drain_all(), which puts the batches of all CPUs on the lists.
        self._parts.lru.drain()

    def _count(self, name: str, by: int) -> None:
        super()._count(name, by)
        self._parts.counters.count(name, by)


class Advised:
    """One address space, as MADV_COLLAPSE processes it.

    Args:
        count: called with the result of each PMD range.
    """

    def __init__(self, parts: Parts, mm: Mm, count: Callable[[ScanResult], None]) -> None:
        self._parts = parts
        self._mm = mm
        self._count = count
        self._control = CollapseControl.begun(parts, "madvise")

    @property
    def geometry(self) -> Geometry:
        return self._parts.geometry

    def find_vma(self, address: int) -> Segment | None:
        vma = self._mm.find_vma(address)
        return None if vma is None else (vma.start, vma.end)

    def possible(self, address: int) -> bool:
        vma = self._mm.find_vma(address)
        return vma is not None and bool(self._parts.collapse_orders(self._mm, vma, "madvise"))

    def drain(self) -> None:
        self._parts.lru.drain()

    def revalidate(self, address: int) -> ScanResult:
        found = revalidate(self._parts, self._mm, address, self.geometry.pmd_order, "madvise")
        return found if isinstance(found, ScanResult) else ScanResult.SUCCEED

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        vma = self._mm.find_vma(address)
        assert vma is not None, f"nothing is mapped at {address:#x}"
        # Set by the scan of a range, and not reset by that of the next one.
        self._control.lock_dropped = False
        result = collapse_range(self._parts, self._mm, vma, address, self._control)
        self._count(result)
        return result, self._control.lock_dropped
