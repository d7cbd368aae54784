"""khugepaged of the simulated machine: the address spaces that it visits, and how far it got.

Follows khugepaged_do_scan() and collapse_scan_mm_slot() (mm/khugepaged.c). A pass looks at ``pages_to_scan`` entries
and then rests; the cursor (address space, address) stays between passes. It goes over all address spaces in the order
in which they came, and counts a full scan when it is behind the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mthp.results import ScanResult
from mthp.sim.mm import Mm, Pmd, SimVma
from mthp.sim.scan import CollapseControl
from mthp.sim.trace import ScanPmd

if TYPE_CHECKING:
    from mthp.sim.machine import Machine


class Khugepaged:
    """The daemon's state.

    Attributes:
        mms: the address spaces that are visited (mm_slots), in order.
        current: the one that the cursor is in, None between full scans.
        address: the cursor's address in it.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.mms: list[Mm] = []
        self.current: Mm | None = None
        self.address = 0

    def enter(self, mm: Mm, vma: SimVma) -> None:
        """Visit `mm` from now on, if `vma` may have huge pages (khugepaged_enter_vma)."""
        parts = self._machine.parts
        if mm not in self.mms and parts.fault_orders(mm, vma):
            self.mms.append(mm)

    def exit(self, mm: Mm) -> None:
        """Visit `mm` no more (khugepaged_exit)."""
        if mm is self.current:
            self._leave(mm)
        elif mm in self.mms:
            self.mms.remove(mm)

    def full_scan(self) -> None:
        """Pass after pass until every address space was visited once, from the cursor to the last."""
        before = self._machine.counters["full_scans"]
        while self.mms and self._machine.counters["full_scans"] == before:
            self.do_scan()

    def do_scan(self) -> bool:
        """One pass.

        Returns:
            Whether it ended because memory could not be allocated, twice.
        """
        machine = self._machine
        machine.parts.lru.drain()
        control = machine.control("khugepaged")
        budget = machine.parts.tunables.pages_to_scan
        started, waited = 0, False
        while control.progress < budget and self.mms:
            if self.current is None:
                started += 1
            if started >= 2:
                break
            result = self._scan_mm(control, budget)
            if result is ScanResult.ALLOC_HUGE_PAGE_FAIL and control.progress < budget:
                if waited:
                    return True
                waited = True
        return False

    def _scan_mm(self, control: CollapseControl, budget: int) -> ScanResult:
        """Go on in the current address space until a collapse was tried, the budget is spent, or its end."""
        if self.current is None:
            self.current, self.address = self.mms[0], 0
        mm = self.current
        control.progress += 1
        result = ScanResult.FAIL
        while not (mm.exiting or mm.thp_disabled):
            found = self._next_range(mm, control)
            if found is None:
                break
            vma, address = found
            if passed := self._pass_over(mm, vma, address, control, budget):
                result = passed
                if control.progress >= budget:
                    return result
                continue
            control.lock_dropped = False
            result = self._machine.collapse_range(mm, vma, address, control)
            self.address = address + self._machine.geometry.pmd_size
            if control.lock_dropped or control.progress >= budget:
                return result
        self._leave(mm)
        return result

    def _pass_over(self, mm: Mm, vma: SimVma, address: int, control: CollapseControl, budget: int) -> ScanResult | None:
        """Pass over adjoining PMD ranges that have no page table to look at, all at once.

        Returns:
            What the scan of the last of them would say; None if the range at `address` has a page table.
        """
        found = mm.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        table, row = found
        size = self._machine.geometry.pmd_size
        ahead = min((vma.end - address) // size, budget - control.progress)
        pmds = table.pmd[row : row + ahead]
        tables = pmds == Pmd.TABLE
        count = int(tables.argmax()) if tables.any() else len(pmds)
        if not count:
            return None
        if self._machine.trace.enabled:
            for number, pmd in enumerate(pmds[:count].tolist()):
                self._machine.trace.emit(ScanPmd(mm.id, address + number * size, _without_table(pmd), 0, 0, 0))
        control.progress += count
        self.address = address + count * size
        return _without_table(int(pmds[count - 1]))

    def _next_range(self, mm: Mm, control: CollapseControl) -> tuple[SimVma, int] | None:
        """The next PMD range at or behind the cursor that may be collapsed."""
        size = self._machine.geometry.pmd_size
        vma = mm.find_vma(self.address)
        while vma is not None:
            if self._machine.parts.collapse_orders(mm, vma, "khugepaged"):
                start = max(self.address, -(-vma.start // size) * size)
                if start + size <= vma.end:
                    return vma, start
            control.progress += 1
            self.address = max(self.address, vma.end)
            vma = mm.find_vma(self.address)
        return None

    def _leave(self, mm: Mm) -> None:
        """Move the cursor on to the next address space."""
        at = self.mms.index(mm)
        if mm.exiting:
            del self.mms[at]
        else:
            at += 1
        if at < len(self.mms):
            self.current, self.address = self.mms[at], 0
        else:
            self.current = None
            self._machine.counters.count("full_scans")


def _without_table(pmd: int) -> ScanResult:
    """What the scan says of a PMD range without a page table (check_pmd_state)."""
    return ScanResult.PMD_MAPPED if pmd == Pmd.HUGE else ScanResult.NO_PTE_TABLE
