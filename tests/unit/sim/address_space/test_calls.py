"""System calls: error numbers as the kernel's, mappings split and merged as its, and what becomes of pages."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.address_space.calls import ADDRESS_LIMIT
from mthp.sim.address_space.mremap import Remap
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import HUGEPAGE, LOCKED, NOHUGEPAGE, UFFD_MISSING, UFFD_WP, Mm, P, Pmd
from mthp.tunables import Switches
from simcheck import check

SMALL = Geometry("16-ptes", 4096, 4)
START, SIZE, PAGE = SMALL.pmd_size, SMALL.pmd_size, SMALL.page_size
END = START + 4 * SIZE


@pytest.fixture
def machine() -> Machine:
    return Machine(SMALL, swap_slots=64, switches=Switches("madvise", {4: "madvise"}))


@pytest.fixture
def mm(machine: Machine) -> Mm:
    """Four PMD ranges: the first two huge and written, the others empty."""
    mm = machine.create_mm()
    machine.map(mm, START, END, flags={HUGEPAGE})
    assert machine.populate(mm, START, START + 2 * SIZE).outcome is Fault.DONE
    assert mm.pmd(START) is mm.pmd(START + SIZE) is Pmd.HUGE
    return mm


@pytest.fixture(autouse=True)
def everything_adds_up(machine: Machine) -> object:
    yield
    assert check(machine) == []


def spans(mm: Mm) -> list[tuple[int, int]]:
    """Return the mappings, in pages from START."""
    return [((vma.start - START) // PAGE, (vma.end - START) // PAGE) for vma in mm.vmas]


def held(machine: Machine, mm: Mm, first: int, last: int) -> list[int]:
    return [machine.read(mm, START + page * PAGE)[1] for page in range(first, last)]


def test_outside_a_mapping_is_sigsegv(machine: Machine, mm: Mm) -> None:
    for address in (0, START - PAGE, END, ADDRESS_LIMIT - PAGE):
        assert machine.read(mm, address)[0] is Fault.SIGSEGV
        assert machine.write(mm, address, 1) is Fault.SIGSEGV


@pytest.mark.parametrize("start", [START + 1, START + PAGE + 512])
def test_what_is_no_whole_page_is_einval(machine: Machine, mm: Mm, start: int) -> None:
    assert machine.munmap(mm, start, END) == errno.EINVAL
    assert machine.mprotect(mm, start, END, "r--") == errno.EINVAL
    assert machine.mlock(mm, start, END) == errno.EINVAL
    assert machine.madvise(mm, start, END, "DONTNEED") == errno.EINVAL
    assert machine.mremap(mm, start, END, SIZE) == -errno.EINVAL
    assert machine.uffd_register(mm, start, END, ["wp"]) == errno.EINVAL
    with pytest.raises(UsageError):
        machine.map(mm, start + END, 2 * END)


def test_holes_are_enomem_and_what_is_mapped_is_done(machine: Machine, mm: Mm) -> None:
    assert machine.munmap(mm, START + 16 * PAGE, START + 20 * PAGE) == 0
    assert machine.madvise(mm, START, END, "NOHUGEPAGE") == errno.ENOMEM
    assert all(NOHUGEPAGE in vma.flags for vma in mm.vmas)
    assert machine.mprotect(mm, START, END, "r--") == errno.ENOMEM
    assert [vma.permissions for vma in mm.vmas] == ["r--p", "rw-p"]
    assert machine.mlock(mm, START, END) == errno.ENOMEM
    assert [LOCKED in vma.flags for vma in mm.vmas] == [True, False]
    assert machine.munmap(mm, START + 16 * PAGE, START + 20 * PAGE) == 0


def test_advice_that_does_not_exist(machine: Machine, mm: Mm) -> None:
    assert machine.madvise(mm, START, END, "WILLNEED?") == errno.EINVAL
    assert machine.madvise(mm, START, START, "DONTNEED") == 0


def test_mprotect_splits_and_merges(machine: Machine, mm: Mm) -> None:
    assert machine.mprotect(mm, START + 4 * PAGE, START + 8 * PAGE, "r--") == 0
    assert spans(mm) == [(0, 4), (4, 8), (8, 64)]
    assert [mm.pmd(START), mm.pmd(START + SIZE)] == [Pmd.TABLE, Pmd.HUGE]
    assert machine.write(mm, START + 5 * PAGE, 1) is Fault.SIGSEGV
    assert machine.read(mm, START + 5 * PAGE) == (Fault.DONE, START // PAGE + 5)
    assert machine.mprotect(mm, START + 4 * PAGE, START + 8 * PAGE, "---") == 0
    assert machine.read(mm, START + 5 * PAGE)[0] is Fault.SIGSEGV
    assert machine.mprotect(mm, START + 4 * PAGE, START + 8 * PAGE, "rw-") == 0
    assert spans(mm) == [(0, 64)]
    faults = machine.counters["pgfault"]
    assert machine.write(mm, START + 5 * PAGE, 7) is Fault.DONE
    assert machine.counters["pgfault"] == faults + 1
    assert machine.mprotect(mm, START, END, "rwz") == errno.EINVAL


def test_what_changes_nothing_splits_nothing(machine: Machine, mm: Mm) -> None:
    assert machine.madvise(mm, START + PAGE, START + 2 * PAGE, "HUGEPAGE") == 0
    assert machine.mprotect(mm, START + PAGE, START + 2 * PAGE, "rw-") == 0
    assert spans(mm) == [(0, 64)]
    assert mm.pmd(START) is Pmd.HUGE


def test_neighbours_merge_unless_each_was_written_on_its_own(machine: Machine) -> None:
    mm = machine.create_mm()
    machine.map(mm, START, START + SIZE)
    machine.write(mm, START, 1)
    machine.map(mm, START + SIZE, START + 2 * SIZE)
    assert spans(mm) == [(0, 32)]
    assert mm.vmas[0].anon_vma
    machine.map(mm, START + 3 * SIZE, START + 4 * SIZE)
    machine.write(mm, START + 3 * SIZE, 1)
    machine.map(mm, START + 2 * SIZE, START + 3 * SIZE)
    assert spans(mm) == [(0, 48), (48, 64)]
    machine.map(mm, START + 4 * SIZE, START + 5 * SIZE, flags={HUGEPAGE})
    assert spans(mm) == [(0, 48), (48, 64), (64, 80)]


def test_mmap_finds_room_from_the_top_aligned_for_huge_folios(machine: Machine, mm: Mm) -> None:
    address = machine.mmap(mm, 3 * SIZE)
    assert address == ADDRESS_LIMIT - 3 * SIZE
    below = machine.mmap(mm, PAGE)
    assert below == address - PAGE
    assert machine.mmap(mm, SIZE) == below // SIZE * SIZE - SIZE
    assert machine.mmap(mm, 0) == -errno.EINVAL
    assert machine.mmap(mm, 1 << 48) == -errno.ENOMEM


def test_mlock_brings_in_and_keeps(machine: Machine, mm: Mm) -> None:
    assert machine.mlock(mm, START + SIZE, START + 3 * SIZE) == 0
    assert spans(mm) == [(0, 16), (16, 48), (48, 64)]
    assert mm.anon_pages == 48
    assert machine.counters["unevictable_pgs_mlocked"] == 32
    for advice in ("DONTNEED", "FREE", "COLD", "PAGEOUT", "GUARD_INSTALL"):
        assert machine.madvise(mm, START + SIZE, START + 2 * SIZE, advice) == errno.EINVAL
    assert held(machine, mm, 16, 32) == [START // PAGE + page for page in range(16, 32)]
    assert machine.munlock(mm, START + SIZE, START + 3 * SIZE) == 0
    assert spans(mm) == [(0, 64)]
    assert machine.counters["unevictable_pgs_munlocked"] == 32
    assert not (machine.parts.memory.flags & Fl.MLOCKED).any()


def test_mlock_without_memory_is_eagain(machine: Machine, mm: Mm) -> None:
    memory = machine.parts.memory
    machine.sysfs.write("enabled", "never")
    memory.own(memory.alloc_small(memory.free_frames - 5))
    assert machine.mlock(mm, START, END) == errno.EAGAIN
    assert all(LOCKED in vma.flags for vma in mm.vmas)


def test_mremap_moves_pages_and_pmd_entries(machine: Machine, mm: Mm) -> None:
    to = END + 4 * SIZE
    fixed = Remap.MAYMOVE | Remap.FIXED
    assert machine.mremap(mm, START, START + 2 * SIZE, 2 * SIZE, fixed, to) == to
    assert [mm.pmd(to), mm.pmd(to + SIZE), mm.pmd(START)] == [Pmd.HUGE, Pmd.HUGE, Pmd.NONE]
    assert machine.read(mm, START)[0] is Fault.SIGSEGV
    assert machine.read(mm, to + 17 * PAGE) == (Fault.DONE, START // PAGE + 17)
    assert machine.mremap(mm, to, to + SIZE, SIZE, fixed, END + SIZE + PAGE) == END + SIZE + PAGE
    assert mm.pmd(END + SIZE) is mm.pmd(END + 2 * SIZE) is Pmd.TABLE
    assert machine.read(mm, END + SIZE + 4 * PAGE) == (Fault.DONE, START // PAGE + 3)


def test_what_is_moved_is_write_protected_no_more(machine: Machine, mm: Mm) -> None:
    assert machine.uffd_register(mm, START, END, ["wp"]) == 0
    assert machine.uffd_writeprotect(mm, START, START + SIZE, on=True) == 0
    to = machine.mremap(mm, START, START + SIZE, SIZE, Remap.MAYMOVE | Remap.DONTUNMAP)
    assert not mm.vmas[-1].userfaultfd_armed
    assert machine.write(mm, to, 5) is Fault.DONE


def test_mremap_takes_pages_away_and_leaves_the_mapping(machine: Machine, mm: Mm) -> None:
    to = machine.mremap(mm, START, START + SIZE, SIZE, Remap.MAYMOVE | Remap.DONTUNMAP)
    assert to > 0
    assert [vma.covers(START, START + SIZE) for vma in mm.vmas].count(True) == 1
    assert mm.pmd(START) is Pmd.NONE
    assert machine.read(mm, START) == (Fault.DONE, 0)
    assert machine.read(mm, to) == (Fault.DONE, START // PAGE)


def test_mremap_grows_and_shrinks(machine: Machine, mm: Mm) -> None:
    assert machine.mremap(mm, START, END, 8 * SIZE, Remap.NONE) == START
    assert spans(mm) == [(0, 128)]
    assert machine.mremap(mm, START, START + 8 * SIZE, 20 * PAGE, Remap.NONE) == START
    assert spans(mm) == [(0, 20)]
    machine.map(mm, START + 21 * PAGE, START + 22 * PAGE)
    assert machine.mremap(mm, START, START + 20 * PAGE, 22 * PAGE, Remap.NONE) == -errno.ENOMEM
    to = machine.mremap(mm, START, START + 20 * PAGE, 22 * PAGE)
    assert to > START
    assert machine.read(mm, to + 19 * PAGE) == (Fault.DONE, START // PAGE + 19)


@pytest.mark.parametrize(
    ("size", "flags", "to", "error"),
    [
        (0, Remap.MAYMOVE, None, errno.EINVAL),
        (SIZE, Remap.FIXED, END, errno.EINVAL),
        (SIZE, Remap.DONTUNMAP, None, errno.EINVAL),
        (SIZE, Remap.MAYMOVE | Remap.DONTUNMAP, None, errno.EINVAL),
        (4 * SIZE, Remap.MAYMOVE | Remap.FIXED, END - SIZE, errno.EINVAL),
        (4 * SIZE, Remap.MAYMOVE | Remap.FIXED, END + 7, errno.EINVAL),
        (4 * SIZE, Remap.MAYMOVE | Remap.FIXED, None, errno.EINVAL),
    ],
)
def test_mremap_refuses(machine: Machine, mm: Mm, size: int, flags: Remap, to: int | None, error: int) -> None:
    assert machine.mremap(mm, START, END, size, flags, to) == -error
    assert spans(mm) == [(0, 64)]


def test_mremap_of_what_is_not_one_mapping_is_efault(machine: Machine, mm: Mm) -> None:
    assert machine.mremap(mm, START, END + SIZE, SIZE) == -errno.EFAULT
    assert machine.mremap(mm, END, END + SIZE, SIZE) == -errno.EFAULT


def test_guards(machine: Machine, mm: Mm) -> None:
    assert machine.madvise(mm, START + 4 * PAGE, START + 6 * PAGE, "GUARD_INSTALL") == 0
    assert mm.pmd(START) is Pmd.TABLE
    assert mm.anon_pages == 30
    assert machine.read(mm, START + 4 * PAGE)[0] is Fault.SIGSEGV
    assert machine.madvise(mm, START, START + SIZE, "DONTNEED") == 0
    assert machine.write(mm, START + 5 * PAGE, 1) is Fault.SIGSEGV
    child = machine.fork(mm)
    assert machine.read(child, START + 5 * PAGE)[0] is Fault.SIGSEGV
    assert machine.madvise(mm, START, END, "GUARD_REMOVE") == 0
    assert machine.read(mm, START + 5 * PAGE) == (Fault.DONE, 0)


def test_prctl_stops_huge_folios(machine: Machine, mm: Mm) -> None:
    assert machine.thp_disable(mm, True) == 0
    assert machine.madvise(mm, START, END, "COLLAPSE") == errno.EINVAL
    assert machine.write(mm, START + 2 * SIZE, 1) is Fault.DONE
    assert mm.anon_pages == 33
    assert machine.fork(mm).thp_disabled
    machine.thp_disable(mm, False)
    assert machine.write(mm, START + 3 * SIZE, 1) is Fault.DONE
    assert mm.anon_pages == 49


def test_userfaultfd_missing(machine: Machine, mm: Mm) -> None:
    at = START + 2 * SIZE
    assert machine.uffd_register(mm, at, END, ["missing"]) == 0
    assert spans(mm) == [(0, 32), (32, 64)]
    assert mm.vmas[1].flags == {HUGEPAGE, UFFD_MISSING}
    assert machine.write(mm, at, 1) is Fault.USERFAULT
    assert machine.touch(mm, [at], write=False).outcome is Fault.USERFAULT
    assert machine.uffd_copy(mm, at, 9) == 0
    assert machine.read(mm, at) == (Fault.DONE, 9)
    assert machine.uffd_copy(mm, at, 9) == errno.EEXIST
    assert machine.uffd_zeropage(mm, at + PAGE) == 0
    assert machine.read(mm, at + PAGE) == (Fault.DONE, 0)
    assert machine.uffd_copy(mm, START, 9) == errno.ENOENT
    assert machine.uffd_unregister(mm, START, END) == 0
    assert spans(mm) == [(0, 64)]
    assert machine.uffd_register(mm, END, END + SIZE, ["wp"]) == errno.EINVAL
    assert machine.uffd_register(mm, START, END, ["wx"]) == errno.EINVAL


def test_userfaultfd_write_protection(machine: Machine, mm: Mm) -> None:
    assert machine.uffd_writeprotect(mm, START, START + PAGE, on=True) == errno.ENOENT
    assert machine.uffd_register(mm, START, END, ["wp"]) == 0
    assert UFFD_WP in mm.vmas[0].flags
    assert machine.uffd_writeprotect(mm, START, START + PAGE, on=True) == 0
    assert mm.pmd(START) is Pmd.TABLE
    assert machine.write(mm, START, 5) is Fault.USERFAULT
    assert machine.read(mm, START) == (Fault.DONE, START // PAGE)
    assert machine.uffd_writeprotect(mm, START + SIZE, START + 2 * SIZE, on=True) == 0
    assert mm.pmd(START + SIZE) is Pmd.HUGE
    assert machine.uffd_writeprotect(mm, START, START + PAGE, on=False) == 0
    assert machine.write(mm, START, 5) is Fault.DONE
    assert machine.uffd_unregister(mm, START, END) == 0
    assert machine.write(mm, START + SIZE, 5) is Fault.DONE


def test_a_huge_zero_page_is_read_split_and_replaced(machine: Machine, mm: Mm) -> None:
    at = START + 2 * SIZE
    assert machine.read(mm, at + 3 * PAGE) == (Fault.DONE, 0)
    assert machine.counters["thp_zero_page_alloc"] == 1
    assert [mm.pmd(at), mm.anon_pages] == [Pmd.HUGE, 32]
    child = machine.fork(mm)
    assert machine.madvise(mm, at, at + PAGE, "DONTNEED") == 0
    assert mm.pmd(at) is Pmd.TABLE
    assert machine.write(mm, at + 5 * PAGE, 8) is Fault.DONE
    assert mm.anon_pages == 33
    assert machine.write(child, at + 5 * PAGE, 9) is Fault.DONE
    assert [child.pmd(at), child.anon_pages] == [Pmd.HUGE, 48]
    assert machine.read(mm, at + 5 * PAGE) == (Fault.DONE, 8)
    assert machine.read(child, at + 6 * PAGE) == (Fault.DONE, 0)


def test_a_huge_page_is_copied_page_by_page(machine: Machine, mm: Mm) -> None:
    child = machine.fork(mm)
    assert child.pmd(START) is Pmd.HUGE
    assert machine.write(child, START + 3 * PAGE, 7) is Fault.DONE
    assert [child.pmd(START), mm.pmd(START)] == [Pmd.TABLE, Pmd.HUGE]
    assert machine.read(mm, START + 3 * PAGE) == (Fault.DONE, START // PAGE + 3)
    assert machine.read(child, START + 3 * PAGE) == (Fault.DONE, 7)
    machine.exit(child)
    machine.write(mm, START, 1)
    assert mm.pmd(START) is Pmd.HUGE
    assert (mm.ptes(START, 16).bits & P.WRITE).all()


def test_advice_on_a_part_of_a_folio_splits_it(machine: Machine, mm: Mm) -> None:
    for number, advice in enumerate(("FREE", "PAGEOUT")):
        at = START + number * SIZE
        assert machine.madvise(mm, at, at + 4 * PAGE, advice) == 0
        orders = machine.parts.memory.order[mm.ptes(at + 4 * PAGE, 12).value]
        assert not orders.any()
    assert machine.counters["thp_split_page"] == 2
    assert mm.swap_entries == 4
    assert held(machine, mm, 16, 32) == [START // PAGE + page for page in range(16, 32)]


def test_a_pinned_page_stays_with_the_one_who_pinned_it(machine: Machine, mm: Mm) -> None:
    pfn = machine.pin(mm, START + 2 * PAGE)
    child = machine.fork(mm)
    assert machine.write(mm, START + 2 * PAGE, 77) is Fault.DONE
    assert int(mm.ptes(START + 2 * PAGE, 1).value[0]) == pfn
    assert machine.read(child, START + 2 * PAGE) == (Fault.DONE, START // PAGE + 2)
    machine.unpin(pfn)


def test_a_fork_without_memory_for_that_leaves_nothing(machine: Machine, mm: Mm) -> None:
    pfn = machine.pin(mm, START)
    memory = machine.parts.memory
    memory.own(memory.alloc_small(memory.free_frames))
    assert machine.madvise(mm, START + SIZE, START + 2 * SIZE, "HUGEPAGE") == 0
    machine.parts.swap.count[1:] = 1  # Full, so that nothing can be reclaimed.
    with pytest.raises(MemoryError):
        machine.fork(mm)
    machine.parts.swap.count[1:] = 0
    assert list(machine.mms) == [mm.id]
    machine.unpin(pfn)


def test_a_migration_is_waited_for(machine: Machine, mm: Mm) -> None:
    before = int(mm.ptes(START, 1).value[0])
    assert machine.start_migration(mm, START + 3 * PAGE) == 0
    assert mm.pmd(START) is Pmd.TABLE
    assert (mm.ptes(START, 16).bits & P.MIGRATION).all()
    assert check(machine) == []
    assert machine.start_migration(mm, START) == errno.EFAULT
    assert machine.munmap(mm, START, START + PAGE) == 0
    assert machine.read(mm, START + 5 * PAGE) == (Fault.DONE, START // PAGE + 5)
    assert int(mm.ptes(START + PAGE, 1).value[0]) != before + 1
    assert held(machine, mm, 1, 16) == [START // PAGE + page for page in range(1, 16)]
    assert machine.counters["hugepages-64kB/split_deferred"] == 1


def test_what_is_pinned_does_not_migrate(machine: Machine, mm: Mm) -> None:
    pfn = machine.pin(mm, START)
    assert machine.start_migration(mm, START) == errno.EBUSY
    machine.unpin(pfn)
    assert machine.start_migration(mm, END - PAGE) == errno.EFAULT


def test_touching_ends_at_a_signal(machine: Machine, mm: Mm) -> None:
    addresses = np.arange(START, END + 4 * PAGE, PAGE)
    touched = machine.touch(mm, addresses)
    assert (touched.done, touched.outcome) == (64, Fault.SIGSEGV)


def test_giving_memory_back_takes_time() -> None:
    machine = Machine(SMALL, switches=Switches("madvise", {4: "madvise"}))
    mm = machine.create_mm()
    machine.map(mm, START, START + 2 * SMALL.pmd_size, flags={HUGEPAGE})
    machine.write(mm, START, 1)
    machine.parts.switches = Switches("never")
    machine.populate(mm, START + SMALL.pmd_size, START + 2 * SMALL.pmd_size)
    assert machine.clock.spent_ns().get("free_folio", 0) == 0
    machine.madvise(mm, START, START + 2 * SMALL.pmd_size, "DONTNEED")
    assert machine.clock.spent_ns()["free_folio"] == 17 * machine.clock.costs.free_folio // 1000


def test_a_child_has_an_anon_vma_for_each_mapping(machine: Machine, mm: Mm) -> None:
    middle = START + SIZE
    assert machine.mprotect(mm, START, middle, "r--") == 0
    child = machine.fork(mm)
    for each in (mm, child):
        assert machine.mprotect(each, START, middle, "rw-") == 0
    assert spans(mm) == [(0, 64)]
    assert spans(child) == [(0, 16), (16, 64)]


def test_a_child_shares_no_anon_vma_with_a_new_neighbour(machine: Machine, mm: Mm) -> None:
    child = machine.fork(mm)
    for each in (mm, child):
        machine.map(each, END, END + SIZE, flags={HUGEPAGE})
        assert machine.write(each, END, 1) is Fault.DONE
    assert spans(mm) == [(0, 80)]
    assert spans(child) == [(0, 64), (64, 80)]


def test_moved_mappings_merge_in_their_first_order_only(machine: Machine, mm: Mm) -> None:
    fixed, to = Remap.MAYMOVE | Remap.FIXED, END + 4 * SIZE
    assert machine.mremap(mm, START + SIZE, START + 2 * SIZE, SIZE, fixed, to) == to
    assert machine.mremap(mm, START, START + SIZE, SIZE, fixed, to + SIZE) == to + SIZE
    assert spans(mm) == [(32, 64), (128, 144), (144, 160)]
    assert machine.mremap(mm, to, to + SIZE, SIZE, fixed, START + SIZE) == START + SIZE
    assert machine.mremap(mm, to + SIZE, to + 2 * SIZE, SIZE, fixed, START) == START
    assert spans(mm) == [(0, 64)]


def test_mremap_moves_several_mappings_and_the_gaps_between_them(machine: Machine, mm: Mm) -> None:
    fixed, to = Remap.MAYMOVE | Remap.FIXED, END + 4 * SIZE
    assert machine.munmap(mm, START + SIZE, START + 2 * SIZE) == 0
    assert machine.mremap(mm, START, END, END - START, fixed, to) == to
    assert spans(mm) == [(128, 144), (160, 192)]
    assert machine.mremap(mm, to, to + 4 * SIZE, 3 * SIZE, fixed, START) == -errno.EFAULT


def test_mremap_ends_at_a_mapping_with_a_userfaultfd(machine: Machine, mm: Mm) -> None:
    fixed, to = Remap.MAYMOVE | Remap.FIXED, END + 4 * SIZE
    assert machine.uffd_register(mm, START + SIZE, START + 2 * SIZE, ["wp"]) == 0
    assert machine.mremap(mm, START, END, END - START, fixed, to) == -errno.EFAULT
    assert spans(mm) == [(16, 32), (32, 64), (128, 144)]


def test_memory_that_is_read_only_before_its_first_write_is_not_accounted(machine: Machine, mm: Mm) -> None:
    machine.map(mm, 2 * END, 2 * END + SIZE)
    for start, size in ((START, END - START), (2 * END, SIZE)):
        assert machine.mprotect(mm, start, start + size, "r--") == 0
    assert [vma.accounted for vma in mm.vmas] == [True, False]
    assert machine.mprotect(mm, 2 * END, 2 * END + SIZE, "rw-") == 0
    assert [vma.accounted for vma in mm.vmas] == [True, True]


def test_what_dontunmap_leaves_stays_apart_from_what_it_moved(machine: Machine, mm: Mm) -> None:
    flags, new = Remap.MAYMOVE | Remap.FIXED | Remap.DONTUNMAP, 2 * END
    machine.map(mm, new, new + 2 * SIZE)
    assert machine.mremap(mm, new + SIZE, new + 2 * SIZE, SIZE, flags, new - SIZE) == new - SIZE
    assert [(vma.start, vma.end) for vma in mm.vmas][1:] == [(new - SIZE, new), (new, new + 2 * SIZE)]
