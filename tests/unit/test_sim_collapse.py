"""The collapse path of the simulated machine: each scan result comes from its cause, and leaves nothing behind."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from mthp.geometry import GEOMETRIES, Geometry
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.access import Fault
from mthp.sim.memory import Fl
from mthp.sim.mm import DROPPABLE, HUGEPAGE, UFFD_WP, Mm, P, Pmd
from mthp.sim.parts import Step
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
            node_frames=[1024],
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

    def pfn(self, page: int) -> int:
        return int(self.mm.ptes(START + page * PAGE, 1).value[0])

    def before(self, step: Step, action: Callable[[], object]) -> None:
        """Let `action` happen once, just before `step`."""

        def hook(at: Step, mm: Mm, address: int, order: int) -> None:
            if at is step:
                self.machine.parts.hook = None
                action()

        self.machine.parts.hook = hook

    def scan(self, switches: Switches = PMD_ONLY) -> ScanResult:
        self.machine.parts.switches = switches
        self.machine.khugepaged.full_scan()
        scans = [event for event in self.machine.trace.take() if isinstance(event, ScanPmd)]
        (result,) = (scan.result for scan in scans if scan.mm == self.mm.id)
        return result

    def swap_out(self, pages: int) -> None:
        assert self.machine.madvise(self.mm, START, START + pages * PAGE, "PAGEOUT") == 0
        assert self.mm.swap_entries == pages

    def range(self) -> tuple[int, int]:
        return START, START + SMALL.pmd_size


def uffd(world: World) -> None:
    world.mm.ptes(START, 1).bits[0] |= P.UFFD_WP


def off_the_lists(world: World) -> None:
    world.machine.parts.lru.drain()
    world.machine.parts.memory.clear(world.pfn(0), Fl.LRU)


CAUSES: dict[ScanResult, Callable[[World], object]] = {
    ScanResult.SUCCEED: lambda world: None,
    ScanResult.PMD_MAPPED: lambda world: world.scan(),
    ScanResult.NO_PTE_TABLE: lambda world: world.machine.madvise(world.mm, *world.range(), "DONTNEED"),
    ScanResult.EXCEED_SWAP_PTE: lambda world: world.swap_out(5),
    ScanResult.EXCEED_SHARED_PTE: lambda world: world.machine.fork(world.mm),
    ScanResult.PTE_UFFD: uffd,
    ScanResult.LACK_REFERENCED_PAGE: lambda world: world.machine.madvise(world.mm, *world.range(), "COLD"),
    ScanResult.PAGE_COUNT: lambda world: world.machine.pin(world.mm, START),
    ScanResult.PAGE_LAZYFREE: lambda world: world.machine.madvise(world.mm, START, START + PAGE, "FREE"),
    ScanResult.PAGE_LRU: off_the_lists,
    ScanResult.PAGE_LOCK: lambda world: world.machine.parts.memory.set(world.pfn(0), Fl.LOCKED),
    ScanResult.COPY_MC: lambda world: world.machine.parts.memory.set(world.pfn(3), Fl.POISONED),
    ScanResult.CGROUP_CHARGE_FAIL: lambda world: world.machine.parts.memory.cgroups.set_limit(1, 20),
    ScanResult.ALLOC_HUGE_PAGE_FAIL: lambda world: world.machine.parts.memory.alloc_small(2000),
    ScanResult.VMA_NULL: lambda world: world.before(
        Step.REVALIDATE, lambda: world.machine.munmap(world.mm, *world.range())
    ),
    ScanResult.ADDRESS_RANGE: lambda world: world.before(
        Step.REVALIDATE_AGAIN, lambda: world.machine.munmap(world.mm, START, START + PAGE)
    ),
    ScanResult.VMA_CHECK: lambda world: world.before(
        Step.REVALIDATE, lambda: world.machine.madvise(world.mm, *world.range(), "NOHUGEPAGE")
    ),
    ScanResult.ANY_PROCESS: lambda world: world.before(
        Step.REVALIDATE, lambda: setattr(world.mm, "thp_disabled", True)
    ),
    ScanResult.PTE_NON_PRESENT: lambda world: world.before(Step.ISOLATE, lambda: world.swap_out(1)),
    ScanResult.DEL_PAGE_LRU: lambda world: world.before(
        Step.ISOLATE, lambda: world.machine.parts.memory.clear(world.pfn(2), Fl.LRU)
    ),
}


@pytest.mark.parametrize("result", CAUSES, ids=lambda result: result.name)
def test_each_result_comes_from_its_cause(result: ScanResult) -> None:
    world = World()
    CAUSES[result](world)
    assert world.scan() is result
    collapsed = world.mm.vmas and world.mm.pmd(START) is Pmd.HUGE
    assert bool(collapsed) is (result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED))


@pytest.mark.parametrize("none", [3, 4])
def test_more_none_ptes_than_allowed(none: int) -> None:
    world = World(pages=12, none=none)
    assert world.scan() is (ScanResult.SUCCEED if none == 4 else ScanResult.EXCEED_NONE_PTE)


def test_a_folio_that_is_large_enough_is_skipped_and_its_neighbours_stay() -> None:
    world = World(pages=8)
    both = Switches("madvise", {2: "madvise"})
    assert world.scan(both) is ScanResult.SUCCEED
    frames = world.mm.ptes(START, 16).value.tolist()
    assert world.machine.parts.memory.refcount[frames[0]] == 4
    assert world.scan(both) is ScanResult.FAIL
    assert world.mm.ptes(START, 16).value.tolist() == frames
    assert not world.mm.ptes(START + 8 * PAGE, 8).bits.any()
    assert world.machine.check() == []


@pytest.mark.parametrize("step", [step for step in Step if step not in (Step.COPY, Step.INSTALL)])
def test_a_page_pinned_at_any_moment_is_not_moved_from_under_its_user(step: Step) -> None:
    """Up to isolation; from there on the page tables are away, and nobody can pin by them."""
    world = World()
    if step is Step.SWAPIN:
        world.swap_out(2)
    held: list[int] = []
    world.before(step, lambda: held.append(world.machine.pin(world.mm, START + 9 * PAGE)))
    assert world.scan() is ScanResult.PAGE_COUNT
    assert world.pfn(9) == held[0]
    world.machine.unpin(held[0])
    assert world.scan() is ScanResult.SUCCEED
    assert [world.machine.read(world.mm, START + page * PAGE)[1] for page in range(16)] == list(range(1, 17))
    assert world.machine.check() == []


def test_what_is_wrong_with_one_page_ends_madvise_with_the_kernels_errno() -> None:
    world = World()
    pfn = world.machine.pin(world.mm, START)
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == errno.EAGAIN
    world.machine.unpin(pfn)
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == 0
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == 0
    assert world.machine.madvise(world.mm, START, START + 2 * SMALL.pmd_size, "COLLAPSE") == errno.ENOMEM
    assert world.machine.madvise(world.mm, *world.range(), "WILLNEED?") == errno.EINVAL


def test_an_armed_mapping_is_not_filled() -> None:
    world = World(pages=12)
    world.mm.vmas[0].flags.add(UFFD_WP)
    assert world.scan() is ScanResult.EXCEED_NONE_PTE


def test_a_droppable_mapping_stays_lazyfree() -> None:
    world = World()
    world.mm.vmas[0].flags.add(DROPPABLE)
    assert world.machine.madvise(world.mm, *world.range(), "FREE") == 0
    world.machine.read(world.mm, START)
    assert world.scan() is ScanResult.SUCCEED
    assert not world.machine.parts.memory.has(world.pfn(0), Fl.SWAPBACKED)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=lambda geometry: geometry.name)
def test_every_geometry_collapses_to_its_pmd_order(geometry: Geometry) -> None:
    machine = Machine(geometry, node_frames=[4 * geometry.ptes_per_pmd], switches=Switches("never"))
    mm = machine.create_mm()
    size = geometry.pmd_size
    machine.map(mm, size, 2 * size, flags={HUGEPAGE})
    assert machine.write(mm, 2 * size - geometry.page_size, 7) is Fault.DONE
    machine.trace.enabled = True
    assert machine.madvise(mm, size, 2 * size, "COLLAPSE") == 0
    assert [event.order for event in machine.trace.take() if isinstance(event, Collapse)] == [geometry.pmd_order]
    assert machine.read(mm, 2 * size - geometry.page_size) == (Fault.DONE, 7)
    assert machine.read(mm, size) == (Fault.DONE, 0)
    assert machine.check() == []


def test_the_same_calls_give_the_same_machine() -> None:
    def lived() -> tuple[dict[str, int], list[int]]:
        world = World()
        world.swap_out(3)
        world.scan()
        return world.machine.counters.values(), world.mm.ptes(START, 16).value.tolist()

    assert lived() == lived()
