"""The collapse path of the simulated machine: each scan result comes from its cause, and leaves nothing behind."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest

from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.frames.memory import Fl
from mthp.sim.kernel import kernel_of
from mthp.sim.mm import DROPPABLE, HUGEPAGE, UFFD_WP, P, Pmd
from mthp.sim.parts import CollapseStep
from mthp.sim.trace import Collapse
from mthp.tunables import Switches
from simcheck import check
from simworld import PAGE, SMALL, START, World


def uffd(world: World) -> None:
    assert world.machine.uffd_register(world.mm, *world.range(), ["wp"]) == 0
    assert world.machine.uffd_writeprotect(world.mm, START, START + PAGE, on=True) == 0


def off_the_lists(world: World) -> None:
    world.machine.parts.lru.drain()
    world.machine.parts.memory.clear(world.pfn(0), Fl.LRU)


def with_a_page_of_a_driver(world: World, managed: bool) -> None:
    assert world.machine.madvise(world.mm, START + PAGE, START + 2 * PAGE, "DONTNEED") == 0
    assert world.machine.insert_page(world.mm, START + PAGE, managed=managed) == 0


def on_two_nodes_far_apart(world: World) -> None:
    """Half of the pages are written again when the first node is full."""
    memory = world.machine.parts.memory
    assert world.machine.madvise(world.mm, START + 8 * PAGE, START + 16 * PAGE, "DONTNEED") == 0
    memory.own(memory.alloc_small(memory.zones[0].free_frames, nodes=[0]))
    assert world.machine.populate(world.mm, START + 8 * PAGE, START + 16 * PAGE).outcome is Fault.DONE
    assert len(np.unique(memory.nodes_of(world.mm.ptes(START, 16).value.astype(np.int64)))) == 2
    world.machine.sysfs.write("/proc/sys/vm/zone_reclaim_mode", "1")


def with_large_folios_everywhere(world: World) -> None:
    world.switches = Switches("madvise", {2: "madvise"})
    assert world.scan(world.switches) is ScanResult.SUCCEED


def with_more_holes_than_allowed(world: World) -> None:
    world.machine.sysfs.write("khugepaged/max_ptes_none", "3")
    assert world.machine.madvise(world.mm, START, START + 4 * PAGE, "DONTNEED") == 0


def read_only_since_a_fork(world: World) -> None:
    """On a kernel before 6.18. The child is gone, and nothing was written since."""
    world.machine.parts.kernel = kernel_of((6, 12))
    world.machine.exit(world.machine.fork(world.mm))


def take_all_memory(world: World) -> None:
    memory = world.machine.parts.memory
    memory.own(memory.alloc_small(memory.free_frames))


CAUSES: dict[ScanResult, Callable[[World], object]] = {
    ScanResult.SUCCEED: lambda world: None,
    ScanResult.FAIL: lambda world: world.machine.madvise(world.mm, START, START + PAGE, "GUARD_INSTALL"),
    ScanResult.PMD_MAPPED: lambda world: world.scan(),
    ScanResult.NO_PTE_TABLE: lambda world: world.machine.madvise(world.mm, *world.range(), "DONTNEED"),
    ScanResult.EXCEED_NONE_PTE: with_more_holes_than_allowed,
    ScanResult.EXCEED_SWAP_PTE: lambda world: world.swap_out(5),
    ScanResult.EXCEED_SHARED_PTE: lambda world: world.machine.fork(world.mm),
    ScanResult.PTE_UFFD: uffd,
    ScanResult.PTE_MAPPED_HUGEPAGE: with_large_folios_everywhere,
    ScanResult.LACK_REFERENCED_PAGE: lambda world: world.machine.madvise(world.mm, *world.range(), "COLD"),
    ScanResult.PAGE_NULL: lambda world: with_a_page_of_a_driver(world, managed=False),
    ScanResult.PAGE_ANON: lambda world: with_a_page_of_a_driver(world, managed=True),
    ScanResult.SCAN_ABORT: on_two_nodes_far_apart,
    ScanResult.PAGE_COUNT: lambda world: world.machine.pin(world.mm, START),
    ScanResult.PAGE_LAZYFREE: lambda world: world.machine.madvise(world.mm, START, START + PAGE, "FREE"),
    ScanResult.PAGE_LRU: off_the_lists,
    ScanResult.PAGE_RO: read_only_since_a_fork,
    ScanResult.PAGE_LOCK: lambda world: world.machine.parts.memory.set(world.pfn(0), Fl.LOCKED),
    ScanResult.COPY_MC: lambda world: world.machine.parts.memory.set(world.pfn(3), Fl.POISONED),
    ScanResult.CGROUP_CHARGE_FAIL: lambda world: world.machine.parts.memory.cgroups.set_limit(1, 20),
    ScanResult.ALLOC_HUGE_PAGE_FAIL: take_all_memory,
    ScanResult.VMA_NULL: lambda world: world.before(
        CollapseStep.REVALIDATE, lambda: world.machine.munmap(world.mm, *world.range())
    ),
    ScanResult.ADDRESS_RANGE: lambda world: world.before(
        CollapseStep.REVALIDATE_AGAIN, lambda: world.machine.munmap(world.mm, START, START + PAGE)
    ),
    ScanResult.VMA_CHECK: lambda world: world.before(
        CollapseStep.REVALIDATE, lambda: world.machine.madvise(world.mm, *world.range(), "NOHUGEPAGE")
    ),
    ScanResult.ANY_PROCESS: lambda world: world.before(
        CollapseStep.REVALIDATE, lambda: world.machine.thp_disable(world.mm, True)
    ),
    ScanResult.PTE_NON_PRESENT: lambda world: world.before(CollapseStep.ISOLATE, lambda: world.swap_out(1)),
    ScanResult.DEL_PAGE_LRU: lambda world: world.before(
        CollapseStep.ISOLATE, lambda: world.machine.parts.memory.clear(world.pfn(2), Fl.LRU)
    ),
}
"""What brings about each result: there is none that nothing here brings about."""


def test_every_result_has_a_cause() -> None:
    assert set(CAUSES) == set(ScanResult)


@pytest.mark.parametrize("result", CAUSES, ids=lambda result: result.name)
def test_each_result_comes_from_its_cause(result: ScanResult) -> None:
    world = World()
    CAUSES[result](world)
    of_range, of_attempts = world.results(world.switches)
    if result is ScanResult.PTE_MAPPED_HUGEPAGE:
        # Only attempts have this result; a range in which all attempts have it was not collapsed.
        assert (of_range, set(of_attempts)) == (ScanResult.FAIL, {result})
    else:
        assert of_range is result
    collapsed = world.mm.vmas and world.mm.pmd(START) is Pmd.HUGE
    assert bool(collapsed) is (result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED))


def test_nodes_that_are_near_do_not_end_a_scan() -> None:
    for mode, distance in (("0", 40), ("1", 30)):
        world = World()
        on_two_nodes_far_apart(world)
        world.machine.parts.memory.distances[:] = [[10, distance], [distance, 10]]
        world.machine.sysfs.write("/proc/sys/vm/zone_reclaim_mode", mode)
        assert world.scan() is ScanResult.SUCCEED


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
    assert check(world.machine) == []


@pytest.mark.parametrize(
    "step", [step for step in CollapseStep if step not in (CollapseStep.COPY, CollapseStep.INSTALL)]
)
def test_a_page_pinned_at_any_moment_is_not_moved_from_under_its_user(step: CollapseStep) -> None:
    """Up to isolation, because afterwards the entries are cleared, and no caller can pin by them."""
    world = World()
    if step is CollapseStep.SWAPIN:
        world.swap_out(2)
    held: list[int] = []
    world.before(step, lambda: held.append(world.machine.pin(world.mm, START + 9 * PAGE)))
    assert world.scan() is ScanResult.PAGE_COUNT
    assert world.pfn(9) == held[0]
    world.machine.unpin(held[0])
    assert world.scan() is ScanResult.SUCCEED
    assert [world.machine.read(world.mm, START + page * PAGE)[1] for page in range(16)] == list(range(1, 17))
    assert check(world.machine) == []


def test_only_nodes_that_most_pages_are_on_give_the_folio() -> None:
    world = World()
    memory = world.machine.parts.memory
    held = memory.alloc_small(memory.zones[0].free_frames, nodes=[0])
    memory.own(held)
    assert world.scan() is ScanResult.ALLOC_HUGE_PAGE_FAIL
    assert world.machine.counters["thp_collapse_alloc_failed"] == 1
    memory.put_small(held)
    assert world.scan() is ScanResult.SUCCEED
    assert memory.nodes_of(np.array([world.pfn(0)])).tolist() == [0]


def test_what_is_wrong_with_one_page_ends_madvise_with_the_kernels_errno() -> None:
    world = World()
    pfn = world.machine.pin(world.mm, START)
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == errno.EAGAIN
    world.machine.unpin(pfn)
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == 0
    assert world.machine.madvise(world.mm, *world.range(), "COLLAPSE") == 0
    assert world.machine.madvise(world.mm, START, START + 2 * SMALL.pmd_size, "COLLAPSE") == errno.ENOMEM
    assert world.machine.madvise(world.mm, *world.range(), "WILLNEED?") == errno.EINVAL


def test_a_folio_that_idle_tracking_found_young_counts_as_referenced() -> None:
    """Idle tracking takes the accessed bits out of the entries, and notes them there (folio_test_young)."""
    world = World()
    world.mm.ptes(START, 16).bits[:] &= ~P.YOUNG
    frames = world.mm.ptes(START, 16).value
    world.machine.parts.memory.flags[frames] &= ~Fl.REFERENCED
    assert world.scan() is ScanResult.LACK_REFERENCED_PAGE
    world.machine.parts.memory.set(int(frames[3]), Fl.YOUNG)
    assert world.scan() is ScanResult.SUCCEED


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
    assert check(machine) == []


def test_the_same_calls_give_the_same_machine() -> None:
    def lived() -> tuple[dict[str, int], list[int]]:
        world = World()
        world.swap_out(3)
        world.scan()
        return world.machine.counters.values(), world.mm.ptes(START, 16).value.tolist()

    assert lived() == lived()


def test_mappings_count_as_progress_only_where_khugepaged_may_not_look_or_is_past_them() -> None:
    machine = Machine(SMALL, switches=Switches("madvise", {4: "madvise"}))
    mm = machine.create_mm()
    size = SMALL.pmd_size
    # Whole ranges and a tail; without a whole range; the same, before the cursor by then; not advised; whole again.
    mappings = [
        (START, START + 2 * size + 3 * PAGE, HUGEPAGE),
        (START + 3 * size + PAGE, START + 3 * size + 2 * PAGE, HUGEPAGE),
        (START + 3 * size + 4 * PAGE, START + 3 * size + 5 * PAGE, HUGEPAGE),
        (START + 5 * size, START + 6 * size, ""),
        (START + 7 * size, START + 8 * size, HUGEPAGE),
    ]
    for start, end, word in mappings:
        machine.map(mm, start, end, flags={word} - {""}, anon_vma=True)
    machine.khugepaged.full_scan()
    ranges_without_tables = 3
    assert machine.khugepaged.statistics.progress == 1 + ranges_without_tables + 2


def test_folios_of_a_read_only_mapping_are_mapped_read_only() -> None:
    machine = Machine(X86_64, switches=Switches("always", {9: "inherit", 4: "always"}))
    mm = machine.create_mm()
    machine.map(mm, X86_64.pmd_size, 3 * X86_64.pmd_size, flags={"nh"})
    assert machine.populate(mm, X86_64.pmd_size, 3 * X86_64.pmd_size).outcome is Fault.DONE
    assert machine.mprotect(mm, X86_64.pmd_size, 2 * X86_64.pmd_size, "r--") == 0
    assert machine.madvise(mm, X86_64.pmd_size, 3 * X86_64.pmd_size, "HUGEPAGE") == 0
    for start, writable in ((X86_64.pmd_size, False), (2 * X86_64.pmd_size, True)):
        assert machine.madvise_collapse(mm, start, start + X86_64.pmd_size) == 0
        bits = mm.ptes(start, X86_64.ptes_per_pmd).bits
        assert ((bits & P.WRITE) != 0).all() == writable
        assert ((bits & P.DIRTY) != 0).all()
