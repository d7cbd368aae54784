"""khugepaged and MADV_COLLAPSE of the simulated machine: its address spaces, as the engine goes over them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from mthp.addrspace import Segment
from mthp.collapse.khugepaged import Scanner
from mthp.collapse.machine_seam import Clock as RestClock
from mthp.collapse.machine_seam import Found, Passage
from mthp.geometry import Geometry
from mthp.results import ScanResult
from mthp.sim.clock import Clock
from mthp.sim.collapse import revalidate
from mthp.sim.idle import MAX_RANGES, pass_over
from mthp.sim.mm import Mm, SimVma
from mthp.sim.scan import CollapseControl, collapse_range

if TYPE_CHECKING:
    from mthp.sim.machine import Machine


class SimTime:
    """The machine's clock, as a khugepaged needs it (:class:`~mthp.collapse.machine_seam.Clock`): rests move it on.

    Args:
        clock: the machine's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self) -> float:
        return self._clock.now_ns / 1e9

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        self._clock.wait_ns(round(seconds * 1e9))


class Visit:
    """One address space, as khugepaged visits it."""

    def __init__(self, machine: Machine, mm: Mm) -> None:
        self._machine = machine
        self.mm = mm
        self._idle = 0

    @property
    def exiting(self) -> bool:
        return self.mm.exiting

    @property
    def thp_disabled(self) -> bool:
        return self.mm.thp_disabled

    def find(self, address: int) -> Found:
        machine, size = self._machine, self._machine.geometry.pmd_size
        passed = 0
        vma = self.mm.find_vma(address)
        while vma is not None:
            start, end = -(-vma.start // size) * size, vma.end // size * size
            if address > end or not machine.may_collapse(self.mm, vma):
                passed += 1
            else:
                # A mapping without a whole range counts for nothing, but moves the cursor, too.
                address = max(address, start)
                if address < end:
                    return Found(passed, (address, end))
            vma = self.mm.find_vma(vma.end)
        return Found(passed, None)

    def scan(self, stretch: Segment, budget: int) -> Passage:
        machine, (address, end) = self._machine, stretch
        vma = self.mm.find_vma(address)
        assert vma is not None, f"nothing is mapped at {address:#x}"
        control = machine.control("khugepaged", machine.parts.collapse_orders(self.mm, vma, "khugepaged"))
        # The more idle ranges came one after another, the more are looked at together; behind a busy one, one alone.
        ahead = min(MAX_RANGES, 8 * self._idle)
        if (passed := pass_over(machine.parts, self.mm, vma, (address, end), control, budget, ahead)) is not None:
            self._idle += len(passed.results)
            return passed
        result = collapse_range(machine.parts, self.mm, vma, address, control)
        in_vain = all(attempt.result is ScanResult.PTE_MAPPED_HUGEPAGE for attempt in control.attempts)
        self._idle = self._idle + 1 if in_vain and not ahead else 0
        return Passage(
            address + machine.geometry.pmd_size,
            control.progress,
            np.array([address], np.uint64),
            np.array([result], np.int8),
            result,
            control.lock_dropped,
            tuple(control.attempts),
        )

    def close(self) -> None:
        """Nothing is held."""


class Khugepaged(Scanner):
    """The daemon of one machine."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(lambda: machine.parts.tunables, machine.time)
        self._machine = machine

    def rest_by(self, clock: RestClock) -> None:
        """Rest by another clock: one that lets others act meanwhile, for example."""
        self._clock = clock

    @property
    def mms(self) -> list[Mm]:
        """The address spaces that are visited, in order."""
        return [slot.mm for slot in self.slots if isinstance(slot, Visit)]

    def enter(self, mm: Mm, vma: SimVma) -> None:
        """Visit `mm` from now on, if `vma` may have huge pages (khugepaged_enter_vma)."""
        if mm not in self.mms and self._machine.parts.fault_orders(mm, vma):
            self.visit(mm)

    def visit(self, mm: Mm) -> None:
        """Visit `mm` from now on."""
        if mm not in self.mms:
            self.add(Visit(self._machine, mm))

    def exit(self, mm: Mm) -> None:
        """Visit `mm` no more (khugepaged_exit)."""
        for slot in self.slots:
            if isinstance(slot, Visit) and slot.mm is mm:
                self.remove(slot)

    def _collapsed(self, passage: Passage) -> int:
        mapped = self._machine.policy.counts_mapped * np.count_nonzero(passage.results == ScanResult.PMD_MAPPED)
        return super()._collapsed(passage) + int(mapped)

    def count_advised(self, result: ScanResult) -> None:
        """Count a PMD range that MADV_COLLAPSE went over, if the policy's series does that."""
        if self._machine.policy.counts_mapped and result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED):
            self._count("pages_collapsed", 1)

    def _begin_pass(self) -> None:
        self._machine.parts.lru.drain()

    def _count(self, name: str, by: int) -> None:
        super()._count(name, by)
        self._machine.counters.count(name, by)


class Advised:
    """One address space, as MADV_COLLAPSE goes over it."""

    def __init__(self, machine: Machine, mm: Mm, control: CollapseControl) -> None:
        self._machine = machine
        self._mm = mm
        self._control = control

    @property
    def geometry(self) -> Geometry:
        return self._machine.geometry

    def find_vma(self, address: int) -> Segment | None:
        vma = self._mm.find_vma(address)
        return None if vma is None else (vma.start, vma.end)

    def possible(self, address: int) -> bool:
        vma = self._mm.find_vma(address)
        return vma is not None and bool(self._machine.parts.collapse_orders(self._mm, vma, "madvise"))

    def drain(self) -> None:
        self._machine.parts.lru.drain()

    def revalidate(self, address: int) -> ScanResult:
        found = revalidate(self._machine.parts, self._mm, address, self.geometry.pmd_order, "madvise")
        return found if isinstance(found, ScanResult) else ScanResult.SUCCEED

    def collapse_pmd(self, address: int) -> tuple[ScanResult, bool]:
        vma = self._mm.find_vma(address)
        assert vma is not None, f"nothing is mapped at {address:#x}"
        self._control.lock_dropped = False
        result = collapse_range(self._machine.parts, self._mm, vma, address, self._control)
        self._machine.khugepaged.count_advised(result)
        return result, self._control.lock_dropped
