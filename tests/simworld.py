"""A simulated machine with one PMD range of small pages, on which tests of the collapse stage their cases."""

from __future__ import annotations

from collections.abc import Callable

from mthp.geometry import Geometry
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.mm import HUGEPAGE, Mm
from mthp.sim.parts import CollapseStep
from mthp.sim.trace import Collapse, ScanPmd
from mthp.tunables import Switches, Tunables

SMALL = Geometry("16-ptes", 4096, 4)
START = SMALL.pmd_size
PAGE = SMALL.page_size
PMD_ONLY = Switches("madvise", {4: "madvise"})


class World:
    """A machine with one PMD range of small pages, all written."""

    def __init__(self, pages: int = 16, none: int = 15, limit: int | None = None) -> None:
        self.machine = Machine(
            SMALL,
            node_frames=[1024, 1024],
            node_distances=[[10, 40], [40, 10]],
            swap_slots=64,
            switches=Switches("never"),
            tunables=Tunables(none, 4, 4, 64, defrag=False),
        )
        self.mm = self.machine.create_mm(self.machine.parts.memory.cgroups.create(limit))
        self.machine.map(self.mm, START, START + SMALL.pmd_size, flags={HUGEPAGE})
        for page in range(pages):
            assert self.machine.write(self.mm, START + page * PAGE, page + 1) is Fault.DONE
        self.machine.khugepaged.visit(self.mm)
        self.machine.trace.enabled = True
        self.switches = PMD_ONLY

    def pfn(self, page: int) -> int:
        return int(self.mm.ptes(START + page * PAGE, 1).value[0])

    def before(self, step: CollapseStep, action: Callable[[], object]) -> None:
        """Let `action` happen once, just before `step`."""

        def hook(at: CollapseStep, mm: Mm, address: int, order: int) -> None:
            if at is step:
                self.machine.parts.hook = None
                action()

        self.machine.parts.hook = hook

    def results(self, switches: Switches) -> tuple[ScanResult, list[ScanResult]]:
        """Run a full scan, and return its results of the range and of each attempt."""
        self.machine.parts.switches = switches
        self.machine.khugepaged.full_scan()
        events = self.machine.trace.take()
        scans = [event.result for event in events if isinstance(event, ScanPmd) and self.is_here(event)]
        return scans[-1], [event.result for event in events if isinstance(event, Collapse) and event.mm == self.mm.id]

    def is_here(self, event: ScanPmd) -> bool:
        return (event.mm, event.address) == (self.mm.id, START)

    def scan(self, switches: Switches = PMD_ONLY) -> ScanResult:
        return self.results(switches)[0]

    def swap_out(self, pages: int) -> None:
        assert self.machine.madvise(self.mm, START, START + pages * PAGE, "PAGEOUT") == 0
        assert self.mm.swap_entries == pages

    def range(self) -> tuple[int, int]:
        return START, START + SMALL.pmd_size
