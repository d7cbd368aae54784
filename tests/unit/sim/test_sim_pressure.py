"""Memory shortage: reclaim, splitting, compaction, limits, and the failure of them all."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.allocation.reclaim import reclaim
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import HUGEPAGE, LOCKED, Mm, P, Pmd
from mthp.tunables import Switches, Tunables
from simcheck import check

SMALL = Geometry("16-ptes", 4096, 4)
START, SIZE, PAGE = SMALL.pmd_size, SMALL.pmd_size, SMALL.page_size


def machine_with(pages: int, *, swap: int = 0, orders: tuple[int, ...] = (), frames: int = 1024) -> tuple[Machine, Mm]:
    """Return a machine of `frames` frames with a program that wrote `pages` pages."""
    machine = Machine(
        SMALL,
        node_frames=[frames],
        swap_slots=swap,
        switches=Switches("madvise", dict.fromkeys(orders, "madvise")),
        tunables=Tunables(8, 4, 4, 64),
    )
    mm = machine.create_mm(machine.parts.memory.cgroups.create())
    machine.map(mm, START, START + 128 * SIZE, flags={HUGEPAGE})
    assert machine.populate(mm, START, START + pages * PAGE).outcome is Fault.DONE
    return machine, mm


def contents(machine: Machine, mm: Mm, pages: int) -> list[int]:
    return [machine.read(mm, START + page * PAGE)[1] for page in range(pages)]


def wanted(pages: int) -> list[int]:
    return [START // PAGE + page for page in range(pages)]


def test_more_is_written_than_memory_holds() -> None:
    machine, mm = machine_with(1500, swap=1000)
    assert mm.anon_pages <= 1024
    assert mm.anon_pages + mm.swap_entries == 1500
    assert machine.counters["pswpout"] == mm.swap_entries
    assert check(machine) == []
    assert contents(machine, mm, 1500) == wanted(1500)
    assert check(machine) == []


def test_out_of_memory_is_an_outcome() -> None:
    machine, mm = machine_with(1000, swap=100)
    touched = machine.populate(mm, START, START + 1500 * PAGE)
    assert touched.outcome is Fault.OOM
    assert touched.done == mm.anon_pages + mm.swap_entries == 1024 + 100
    assert machine.write(mm, START + 1400 * PAGE, 1) is Fault.OOM
    assert check(machine) == []


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    machine, mm = machine_with(600, swap=1000)
    hot = [START + page * PAGE for page in range(100)]
    assert reclaim(machine.parts, 60) >= 60  # No page is known to be in use yet.
    machine.touch(mm, hot, write=False)
    faults = machine.counters["pgmajfault"]
    for _ in range(4):
        assert reclaim(machine.parts, 60) >= 60
        machine.touch(mm, hot, write=False)
    assert machine.counters["pgmajfault"] == faults
    assert mm.swap_entries >= 200


def test_pinned_and_locked_pages_stay() -> None:
    machine, mm = machine_with(40, swap=1000)
    pfn = machine.pin(mm, START)
    machine.mlock(mm, START + 8 * PAGE, START + 16 * PAGE)
    while reclaim(machine.parts, 32):
        pass
    assert mm.anon_pages == 1 + 8
    assert int(mm.ptes(START, 1).value[0]) == pfn
    assert check(machine) == []


def test_pages_read_back_into_a_locked_mapping_stay() -> None:
    machine, mm = machine_with(8, swap=100)
    assert machine.madvise(mm, START, START + 8 * PAGE, "PAGEOUT") == 0
    assert machine.mlock(mm, START, START + 8 * PAGE) == 0
    while reclaim(machine.parts, 32):
        pass
    assert (mm.anon_pages, mm.swap_entries) == (8, 0)


def test_lazyfree_pages_go_without_swap_unless_they_are_dirty_again() -> None:
    machine, mm = machine_with(32)
    machine.madvise(mm, START, START + 32 * PAGE, "FREE")
    machine.write(mm, START + 5 * PAGE, 77)
    while reclaim(machine.parts, 32):
        pass
    assert mm.anon_pages == 1
    assert machine.read(mm, START + 5 * PAGE) == (Fault.DONE, 77)
    assert machine.read(mm, START + 6 * PAGE) == (Fault.DONE, 0)
    assert check(machine) == []


def test_a_shared_page_goes_from_both() -> None:
    machine, mm = machine_with(32, swap=100)
    child = machine.fork(mm)
    while reclaim(machine.parts, 32):
        pass
    assert (mm.swap_entries, child.swap_entries, mm.anon_pages, child.anon_pages) == (32, 32, 0, 0)
    assert machine.counters["pswpout"] == 32
    assert check(machine) == []
    assert contents(machine, child, 32) == contents(machine, mm, 32) == wanted(32)
    assert check(machine) == []


def test_large_folios_go_as_a_whole_where_swap_has_room_for_that() -> None:
    machine, mm = machine_with(32, swap=63, orders=(4,))
    while reclaim(machine.parts, 32):
        pass
    assert mm.swap_entries == 32
    assert machine.counters["thp_swpout"] == 2
    assert machine.counters["hugepages-64kB/swpout"] == 2
    assert machine.counters["thp_split_page"] == 0
    assert contents(machine, mm, 32) == wanted(32)
    assert check(machine) == []


def test_large_folios_are_split_where_swap_is_in_pieces() -> None:
    machine, mm = machine_with(32, swap=40, orders=(4,))
    while reclaim(machine.parts, 32):
        pass
    assert machine.counters["thp_swpout_fallback"] == machine.counters["thp_split_page"] == 1
    assert mm.swap_entries == 32
    assert contents(machine, mm, 32) == wanted(32)
    assert check(machine) == []


def test_without_swap_large_folios_stay_whole() -> None:
    machine, mm = machine_with(64, orders=(4,))
    assert reclaim(machine.parts, 512) == 0
    assert [mm.pmd(START + at * SIZE) for at in range(4)] == [Pmd.HUGE] * 4
    assert machine.counters["pgscan_direct"] == machine.counters["hugepages-64kB/split"] == 0
    machine.madvise(mm, START, START + 4 * SIZE, "COLD")
    machine.madvise(mm, START, START + SIZE, "FREE")
    assert reclaim(machine.parts, 512) == 16
    assert [mm.pmd(START + at * SIZE) for at in range(1, 4)] == [Pmd.HUGE] * 3
    assert check(machine) == []


def test_a_folio_in_the_swap_cache_is_not_listed_to_be_split() -> None:
    machine, mm = machine_with(16, swap=100)
    machine.parts.switches = Switches("madvise", {2: "madvise"})
    other = machine.create_mm()
    machine.map(other, START, START + 3 * PAGE)
    machine.populate(other, START, START + 3 * PAGE)
    machine.madvise(other, START, START + 3 * PAGE, "PAGEOUT")
    machine.madvise(mm, START, START + SIZE, "PAGEOUT")
    child = machine.fork(mm)
    machine.read(mm, START)
    head = int(mm.ptes(START, 1).value[0])
    assert machine.parts.memory.has(head, Fl.SWAPCACHE), "the child names its slots, too"
    assert machine.madvise(mm, START, START + PAGE, "DONTNEED") == 0
    assert (machine.counters["hugepages-16kB/split_deferred"], machine.parts.memory.deferred) == (0, {})
    machine.exit(child)
    assert check(machine) == []


def test_a_folio_with_unmapped_pages_is_split_when_memory_is_short() -> None:
    machine, mm = machine_with(16, orders=(4,))
    machine.madvise(mm, START, START + 5 * PAGE, "DONTNEED")
    assert machine.counters["hugepages-64kB/split_deferred"] == 1
    free = machine.parts.memory.free_frames
    reclaim(machine.parts, 32)
    assert machine.parts.memory.free_frames == free + 5
    assert machine.counters["thp_split_page"] == 1
    assert machine.counters["hugepages-64kB/nr_anon"] == 0
    assert contents(machine, mm, 16) == [0] * 5 + wanted(16)[5:]
    assert check(machine) == []


@pytest.mark.parametrize(("written", "shrink", "split"), [(6, "1", 1), (7, "1", 1), (8, "1", 0), (6, "0", 0)])
def test_a_huge_folio_that_is_mostly_zero_is_split_when_memory_is_short(written: int, shrink: str, split: int) -> None:
    """With max_ptes_none 8 of 16: more than 8 zero pages."""
    machine, mm = machine_with(0, orders=(4,))
    machine.sysfs.write("shrink_underused", shrink)
    for page in range(written):
        machine.write(mm, START + page * PAGE, page + 1)
    assert mm.pmd(START) is Pmd.HUGE
    reclaim(machine.parts, 32)
    assert machine.counters["thp_underused_split_page"] == split
    assert mm.anon_pages == (written if split else 16)
    assert mm.ptes(START + 15 * PAGE, 1).bits[0] & P.ZERO == (P.ZERO if split else 0)
    assert contents(machine, mm, 16) == [*range(1, written + 1), *[0] * (16 - written)]
    assert check(machine) == []


def test_a_cgroup_reclaims_its_own_and_those_above_it_count() -> None:
    machine = Machine(SMALL, node_frames=[1024], swap_slots=500, switches=Switches("never"))
    groups = machine.parts.memory.cgroups
    parent = groups.create(100)
    inner, sibling = groups.create(parent=parent), groups.create(limit=30, parent=parent)
    outside = machine.create_mm(groups.create())
    spaces = [machine.create_mm(inner), machine.create_mm(sibling)]
    for mm in (outside, *spaces):
        machine.map(mm, START, START + 100 * SIZE)
        assert machine.populate(mm, START, START + 90 * PAGE).outcome is Fault.DONE
    assert outside.anon_pages == 90
    assert spaces[1].anon_pages <= 30
    assert sum(mm.anon_pages for mm in spaces) == groups.usage[parent] <= 100
    assert all(contents(machine, mm, 90) == wanted(90) for mm in spaces)
    assert check(machine) == []


def test_limits_that_cannot_be_are_refused() -> None:
    groups = Machine(SMALL).parts.memory.cgroups
    with pytest.raises(UsageError):
        groups.create(-1)
    with pytest.raises(UsageError):
        groups.create(parent=7)
    with pytest.raises(UsageError):
        groups.set_limit(0, 5)


def fragmented(movable: float, *, frames: int = 1024, order: int = 4) -> Machine:
    machine = Machine(SMALL, node_frames=[frames], switches=Switches("madvise", {order: "madvise"}))
    machine.fragment(1.0, order, movable=movable)
    return machine


def test_compaction_makes_room_where_pages_can_be_moved() -> None:
    machine = fragmented(1.0)
    mm = machine.create_mm()
    machine.map(mm, START, START + 8 * SIZE, flags={HUGEPAGE})
    assert machine.write(mm, START, 5) is Fault.DONE
    assert mm.pmd(START) is Pmd.HUGE
    assert machine.counters["compact_success"] == 1
    assert machine.clock.spent_ns()["migrate_folio"] > 0
    assert check(machine) == []


def test_it_fails_where_they_cannot_and_then_rests() -> None:
    machine = fragmented(0.0)
    mm = machine.create_mm()
    machine.map(mm, START, START + 8 * SIZE, flags={HUGEPAGE})
    for number in range(6):
        assert machine.write(mm, START + number * SIZE, 5) is Fault.DONE
    assert mm.anon_pages == 6
    assert machine.counters["thp_fault_fallback"] == 6
    assert machine.counters["compact_fail"] >= 6
    machine.populate(mm, START, START + 6 * SIZE)
    assert machine.counters["thp_fault_fallback"] == 6, "only the first page of a range asks for a huge folio"
    scanned = machine.clock.spent_ns()["compact_frame"]
    assert scanned < 6 * 1024 * machine.clock.costs.compact_frame // 1000
    assert check(machine) == []


def test_nothing_is_moved_to_page_blocks_with_pages_of_the_kernel() -> None:
    """All but a few free pages lie in such blocks at first, so no other block can be emptied."""
    machine = Machine(SMALL, node_frames=[1024])
    machine.fragment(0.9, seed=1)
    memory, mm = machine.parts.memory, machine.create_mm()
    machine.map(mm, START, START + 128 * SIZE)
    movable = np.flatnonzero(~memory.unmovable[1024 >> 4 :]).size * 16
    machine.populate(mm, START, START + movable * PAGE)
    for page in range(0, 16, 2):
        machine.munmap(mm, START + page * PAGE, START + (page + 1) * PAGE)
    assert memory.free_frames > 512
    machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
    assert not any(zone.has(4) for zone in memory.zones)
    for page in range(16, movable, 2):
        machine.munmap(mm, START + page * PAGE, START + (page + 1) * PAGE)
    machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
    assert any(zone.has(4) for zone in memory.zones)
    assert check(machine) == []


@pytest.mark.parametrize(("word", "waits"), [("never", False), ("defer", False), ("madvise", True), ("always", True)])
def test_defrag_says_who_waits(word: str, waits: bool) -> None:
    machine = fragmented(1.0)
    machine.sysfs.write("defrag", word)
    mm = machine.create_mm()
    machine.map(mm, START, START + SIZE, flags={HUGEPAGE})
    machine.write(mm, START, 5)
    assert (mm.pmd(START) is Pmd.HUGE) is waits
    assert bool(machine.counters["compact_stall"]) is waits


def test_khugepaged_has_a_defrag_of_its_own() -> None:
    machine = fragmented(1.0)
    machine.sysfs.write("defrag", "never")
    mm = machine.create_mm()
    machine.map(mm, START, START + SIZE, flags={HUGEPAGE})
    machine.write(mm, START, 5)
    assert mm.anon_pages == 1
    machine.sysfs.write("khugepaged/defrag", "0")
    machine.khugepaged.full_scan()
    assert mm.pmd(START) is Pmd.TABLE
    machine.sysfs.write("khugepaged/defrag", "1")
    machine.khugepaged.full_scan()
    assert mm.pmd(START) is Pmd.HUGE
    assert check(machine) == []


def test_mapped_pages_are_moved_with_all_that_is_known_of_them() -> None:
    machine, mm = machine_with(500, swap=64, orders=())
    machine.madvise(mm, START, START + 32 * PAGE, "PAGEOUT")
    machine.parts.swap.synchronous = False
    machine.touch(mm, [START + page * PAGE for page in range(32)], write=False)
    assert (machine.parts.swap.cached > 0).sum() == 32
    machine.fork(mm)
    for page in range(0, 500, 2):
        machine.munmap(mm, START + page * PAGE, START + (page + 1) * PAGE)
    before = mm.ptes(START + PAGE, 1).value[0]
    other = machine.create_mm()
    machine.map(other, START, START + 500 * PAGE)
    machine.populate(other, START, START + 400 * PAGE)
    for page in range(0, 400, 3):
        machine.munmap(other, START + page * PAGE, START + (page + 1) * PAGE)
    machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
    assert machine.counters["pgmigrate_success"] > 0
    assert check(machine) == []
    for child in machine.mms.values():
        for page in range(1, 500, 2) if child is not other else ():
            assert machine.read(child, START + page * PAGE)[1] == START // PAGE + page, (before, page)


def test_background_reclaim_starts_at_the_low_watermark_and_ends_at_the_high_one() -> None:
    machine = Machine(SMALL, node_frames=[1024], swap_slots=1000, switches=Switches("never"))
    machine.sysfs.write("/proc/sys/vm/min_free_kbytes", str(64 * 4))
    zone = machine.parts.memory.zones[0]
    assert (zone.watermarks.min, zone.watermarks.low, zone.watermarks.high) == (64, 80, 96)
    mm = machine.create_mm()
    machine.map(mm, START, START + 100 * SIZE)
    machine.populate(mm, START, START + 944 * PAGE)
    assert zone.free_frames == 80
    assert machine.counters["pgscan_kswapd"] == 0
    assert machine.write(mm, START + 944 * PAGE, 1) is Fault.DONE
    assert zone.free_frames >= 95
    assert machine.counters["pgsteal_kswapd"] >= 16
    assert machine.counters["pgscan_direct"] == 0
    assert check(machine) == []


def test_page_cache_goes_first() -> None:
    machine = Machine(SMALL, node_frames=[1024], swap_slots=100, switches=Switches("never"))
    machine.fragment(1.0, 2, movable=1.0)
    assert len(machine.parts.memory.cache) == 256
    mm = machine.create_mm()
    machine.map(mm, START, START + 100 * SIZE)
    assert machine.populate(mm, START, START + 1000 * PAGE).outcome is Fault.DONE
    assert mm.swap_entries == 0
    assert len(machine.parts.memory.cache) <= 24
    assert check(machine) == []


def test_a_page_that_is_copied_is_not_reclaimed_under_the_copy() -> None:
    machine = Machine(SMALL, node_frames=[1024], swap_slots=2000, switches=Switches("never"))
    mm = machine.create_mm()
    machine.map(mm, START, START + 100 * SIZE)
    assert machine.populate(mm, START, START + 1000 * PAGE).outcome is Fault.DONE
    child = machine.fork(mm)
    for page in range(1000):
        assert machine.write(child, START + page * PAGE, page + 1) is Fault.DONE
    assert check(machine) == []
    assert contents(machine, mm, 1000) == wanted(1000)
    assert contents(machine, child, 1000) == list(range(1, 1001))
    assert np.count_nonzero(machine.parts.memory.flags & Fl.LOCKED) == 0
    assert LOCKED not in mm.vmas[0].flags


def test_a_slot_in_the_swap_cache_makes_its_neighbours_come_back_singly() -> None:
    machine, mm = machine_with(16, swap=100, orders=(2,))
    assert machine.madvise(mm, START, START + SIZE, "PAGEOUT") == 0
    assert mm.swap_entries == 16
    child = machine.fork(mm)
    machine.read(child, START + PAGE)
    assert machine.counters["hugepages-16kB/swpin"] == 1, "none of the block was in the cache"
    machine.madvise(child, START, START + 4 * PAGE, "DONTNEED")
    single = machine.fork(mm)
    machine.parts.switches = Switches("never")
    machine.read(single, START + 5 * PAGE)
    machine.parts.switches = Switches("madvise", {2: "madvise"})
    assert machine.read(mm, START + 4 * PAGE)[1] == START // PAGE + 4
    assert machine.counters["hugepages-16kB/swpin_fallback"] == 1
    assert [int(bits) & int(P.SWAP) > 0 for bits in mm.ptes(START + 4 * PAGE, 4).bits] == [False, True, True, True]
    assert check(machine) == []


def test_a_cgroup_without_room_for_a_large_folio_gets_a_small_one_back() -> None:
    machine, mm = machine_with(16, swap=100, orders=(2,))
    assert machine.madvise(mm, START, START + SIZE, "PAGEOUT") == 0
    machine.parts.memory.cgroups.set_limit(mm.charge, 3)
    assert machine.read(mm, START)[1] == START // PAGE
    assert machine.counters["hugepages-16kB/swpin_fallback_charge"] == 1
    assert machine.counters["hugepages-16kB/swpin_fallback"] == 1
    assert mm.anon_pages == 1


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize(("in_front", "aligned"), [(0, False), (3, True)])
def test_large_folios_come_back_from_aligned_slots_and_not_where_userfaultfd_watches(
    in_front: int, aligned: bool, armed: bool
) -> None:
    machine, mm = machine_with(16, swap=100)
    machine.parts.switches = Switches("madvise", {2: "madvise"})
    if in_front:
        other = machine.create_mm()
        machine.map(other, START, START + in_front * PAGE)
        machine.populate(other, START, START + in_front * PAGE)
        assert machine.madvise(other, START, START + in_front * PAGE, "PAGEOUT") == 0
    assert machine.madvise(mm, START, START + SIZE, "PAGEOUT") == 0
    # Slot 0 is the header's.
    assert mm.ptes(START, 16).value.tolist() == list(range(in_front + 1, in_front + 17))
    if armed:
        assert machine.uffd_register(mm, START, START + SIZE, ["wp"]) == 0
    assert machine.read(mm, START + 5 * PAGE)[1] == START // PAGE + 5
    assert machine.counters["hugepages-16kB/swpin"] == int(aligned and not armed)
    assert check(machine) == []
