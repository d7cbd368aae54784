"""The simulated machine's split_huge_pages and MADV_COLD of a part: what recordings do not reach."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from mthp.sim import Machine
from mthp.sim.kernel import kernel_of
from mthp.sim.mm import Mm, Pmd
from simcheck import check

FILE = "/sys/kernel/debug/split_huge_pages"


def collapsed(release: tuple[int, int] = (7, 3), every: int = 1) -> tuple[Machine, Mm, int]:
    """Return a machine with one PMD folio, of which one page in `every` was written, and the address of the folio."""
    machine = Machine(kernel=kernel_of(release))
    mm, size = machine.create_mm(), machine.geometry.pmd_size
    machine.map(mm, size, 2 * size)
    machine.touch(mm, np.arange(size, 2 * size, every * machine.geometry.page_size))
    assert machine.madvise(mm, size, 2 * size, "COLLAPSE") == 0
    return machine, mm, size


def split(machine: Machine, mm: Mm, start: int, *numbers: int, pages: int = 1) -> None:
    words = (mm.id, f"{start:#x}", f"{start + pages * machine.geometry.page_size:#x}", *numbers)
    machine.sysfs.write(FILE, ",".join(map(str, words)))
    assert check(machine) == []


def orders(machine: Machine, mm: Mm, start: int) -> list[int]:
    """Return the orders of the folios of a PMD range, in turn; -1 for a page that maps no folio."""
    found, page = [], 0
    ptes = mm.ptes(start, machine.geometry.ptes_per_pmd)
    while page < len(ptes.bits):
        order = int(machine.parts.memory.order[ptes.value[page]]) if ptes.pages()[page] else -1
        found.append(order)
        page += 1 << max(order, 0)
    return found


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", errno.EINVAL),
        ("1", errno.EINVAL),
        ("1,0x1000", errno.EINVAL),
        ("1,4096,8192,0", errno.EINVAL),
        ("/tmp/file,0x0,0x1,0", errno.EINVAL),
        ("77,0x200000,0x201000,0", errno.ESRCH),
        ("-1,0x200000,0x201000,0", errno.ESRCH),
        ("1,0x200000,0x201000", None),
        ("1,0x0,0x1000,4", None),
        ("1,0x200000,0x200000,4", None),
        ("1,0x200000,0x201000,-4", None),
        ("1,0xffffffffffff0000,0xffffffffffffffff,4\n", None),
    ],
)
def test_only_a_wrong_text_and_a_missing_process_are_errors(text: str, error: int | None) -> None:
    machine, _, _ = collapsed()
    found = None
    try:
        machine.sysfs.write(FILE, text)
    except OSError as problem:
        found = problem.errno
    assert found == error
    assert check(machine) == []


def test_a_range_ends_with_its_mapping() -> None:
    machine, mm, start = collapsed()
    size = machine.geometry.pmd_size
    machine.map(mm, 3 * size, 4 * size)
    machine.populate(mm, 3 * size, 4 * size)
    assert machine.madvise(mm, 3 * size, 4 * size, "COLLAPSE") == 0
    split(machine, mm, start, 0, pages=3 * machine.geometry.ptes_per_pmd)
    assert orders(machine, mm, start) == [0] * 512
    assert mm.pmd(3 * size) is Pmd.HUGE


def test_without_an_order_zeroes_go_back_and_contents_stay() -> None:
    machine, mm, start = collapsed(every=4)
    assert mm.anon_pages == 512
    free = machine.parts.memory.free_frames
    split(machine, mm, start)
    assert mm.anon_pages == 128
    assert machine.parts.memory.free_frames == free + 384
    page = machine.geometry.page_size
    contents = [machine.read(mm, start + i * page)[1] for i in range(8)]
    assert contents == [start // page, 0, 0, 0, start // page + 4, 0, 0, 0]


def test_large_folios_keep_their_zeroes() -> None:
    machine, mm, start = collapsed(every=4)
    split(machine, mm, start, 4)
    assert orders(machine, mm, start) == [4] * 32
    assert mm.anon_pages == 512


def test_around_a_page_the_rest_stays_as_large_as_it_can() -> None:
    machine, mm, start = collapsed()
    split(machine, mm, start, 4, 200)
    assert orders(machine, mm, start) == [7, 6, 4, 4, 5, 8]
    split(machine, mm, start, 0, 5)
    assert orders(machine, mm, start)[:11] == [2, 0, 0, 0, 0, 3, 4, 5, 6, 6, 4]


def test_linux_6_12_reads_no_fifth_word() -> None:
    machine, mm, start = collapsed((6, 12))
    split(machine, mm, start, 4, 200)
    assert orders(machine, mm, start) == [4] * 32


@pytest.mark.parametrize(("release", "writes"), [((6, 12), 1), ((6, 18), 3), ((7, 0), 1)])
def test_in_6_18_a_shared_folio_takes_a_write_for_each_mapping(release: tuple[int, int], writes: int) -> None:
    machine, mm, start = collapsed(release)
    children = [machine.fork(mm), machine.fork(mm)]
    for _ in range(writes - 1):
        split(machine, mm, start, 3)
        assert orders(machine, mm, start) == [9]
    split(machine, mm, start, 3)
    for space in (mm, *children):
        assert orders(machine, space, start) == [3] * 64


def test_a_pinned_folio_stays_and_nothing_is_counted() -> None:
    machine, mm, start = collapsed()
    pfn = machine.pin(mm, start)
    before = machine.counters.values()
    split(machine, mm, start, 0)
    assert machine.counters.since(before) == {}
    assert machine.madvise(mm, start, start + machine.geometry.page_size, "COLD") == 0
    assert machine.counters.since(before) == {"hugepages-2048kB/split_failed": 1, "thp_split_page_failed": 1}
    assert orders(machine, mm, start) == [9]
    machine.unpin(pfn)
    split(machine, mm, start, 0)
    assert orders(machine, mm, start) == [0] * 512


def test_cold_ages_a_whole_folio_and_splits_for_a_part() -> None:
    machine, mm, start = collapsed(every=2)
    size = machine.geometry.pmd_size
    assert machine.madvise(mm, start, start + size, "COLD") == 0
    assert orders(machine, mm, start) == [9]
    assert machine.madvise(mm, start + machine.geometry.page_size, start + 2 * machine.geometry.page_size, "COLD") == 0
    assert orders(machine, mm, start) == [0, -1] * 256
    assert mm.anon_pages == 256


def test_in_6_12_a_write_copies_what_a_child_maps_though_not_its_first_page() -> None:
    machine, mm, start = collapsed((6, 12))
    child, page = machine.fork(mm), machine.geometry.page_size
    assert machine.madvise(child, start, start + page, "DONTNEED") == 0
    # Mapped fewer times than it has pages, the folio looks like one that one process alone maps.
    for space in (mm, child):
        assert machine.madvise(space, start + 2 * page, start + 512 * page, "DONTNEED") == 0
    machine.write(mm, start + page, 77)
    assert machine.read(mm, start + page)[1] == 77
    assert machine.read(child, start + page)[1] == start // page + 1
