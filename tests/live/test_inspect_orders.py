"""Compare :class:`~mthp.linux.live.LiveAddressSpace` with the layout of a process that is known page by page.

Also compare it with smaps, which other code of the kernel counts.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from mthp.linux import procfs
from mthp.linux.live import LiveAddressSpace
from mthp.ptes import ORDER_NONE, Pte, PteColumns
from mthp.vma import VmaKind
from targets import (
    MADV_FREE,
    MADV_GUARD_INSTALL,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    PMD_ORDER,
    PMD_SIZE,
    PROT_NONE,
    Puppet,
)
from thp_switches import ThpSwitches, size_name

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("pfns", "thp"),
    pytest.mark.usefixtures("thp_switches"),
]

PAGE = mmap.PAGESIZE
N = PMD_SIZE // PAGE


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        puppet.stay_on_one_cpu()
        yield puppet


def size_at(space: LiveAddressSpace, address: int, name: str) -> int:
    """Return a counter of the mapping at `address` in smaps, in bytes."""
    found = (block for vma, block in procfs.read_smaps(space.process) if vma.start <= address < vma.end)
    return size_in(next(found), name)


def size_in(block: bytes, name: str) -> int:
    return (procfs.number_in(block, f"\n{name}:".encode()) or 0) << 10


def expect(columns: PteColumns, state: Pte, order: int, pages: slice = slice(None)) -> None:
    assert set(columns.state[pages].tolist()) == {int(state)}
    assert set(columns.folio_order[pages].tolist()) == {order}


@pytest.mark.requires("mthp", "pagemap_scan")
def test_every_order_that_was_faulted_in_is_seen(
    puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches
) -> None:
    layout = {}
    # The PMD size first: while it is enabled, khugepaged collapses whatever has been advised by then.
    for order in (PMD_ORDER, 7, 4, 2):
        thp_switches.only(size_name(order))
        address = layout[order] = puppet.map(2 * PMD_SIZE, advice=MADV_HUGEPAGE)
        puppet.write(address, 2 * N >> order, 1 << order)
    layout[0] = puppet.map(2 * PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(layout[0], 2 * N)

    for order, address in layout.items():
        columns = space.read([(address, address + 2 * PMD_SIZE)])
        expect(columns, Pte.PRESENT | (Pte.PMD_MAPPED if order == PMD_ORDER else Pte(0)), order)
        assert size_at(space, address, "Rss") == size_at(space, address, "Anonymous") == 2 * PMD_SIZE
        assert size_at(space, address, "AnonHugePages") == (2 * PMD_SIZE if order == PMD_ORDER else 0)

    # The same in one read, in another order, cut inside PMD ranges: orders do not depend on how reads are combined.
    cuts = [(address + 5 * PAGE, address + PMD_SIZE + 300 * PAGE) for address in reversed(layout.values())]
    together = space.read(cuts)
    each = (cuts[0][1] - cuts[0][0]) // PAGE
    assert together.folio_order.tolist() == [order for order in reversed(layout) for _ in range(each)]
    mapped = together.has(Pte.PMD_MAPPED).reshape(len(layout), each).all(axis=1)
    assert mapped.tolist() == [order == PMD_ORDER for order in reversed(layout)]


def test_a_split_huge_page_is_of_pmd_order_but_not_pmd_mapped(
    puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches
) -> None:
    address = puppet.map(2 * PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(address, 2, N)
    puppet.tell("mprotect", address + PMD_SIZE, PAGE, PROT_NONE)
    columns = space.read([(address, address + 2 * PMD_SIZE)])
    expect(columns, Pte.PRESENT | Pte.PMD_MAPPED, PMD_ORDER, slice(0, N))
    expect(columns, Pte.PRESENT, PMD_ORDER, slice(N, 2 * N))
    whole = sum(
        procfs.pmd_mapped(block)
        for vma, block in procfs.read_smaps(space.process)
        if address <= vma.start < address + 2 * PMD_SIZE
    )
    assert whole == columns.has(Pte.PMD_MAPPED).sum() * PAGE == PMD_SIZE


def test_holes_and_zero_pages(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 100, 2)
    puppet.tell("read", address + 300 * PAGE, 20, 1)
    columns = space.read([(address, address + PMD_SIZE)])
    expect(columns, Pte.PRESENT, 0, slice(0, 200, 2))
    expect(columns, Pte(0), ORDER_NONE, slice(1, 200, 2))
    expect(columns, Pte(0), ORDER_NONE, slice(200, 300))
    expect(columns, Pte.PRESENT | Pte.ZERO, 0, slice(300, 320))
    assert columns.pfn is not None
    assert ((columns.pfn != 0) == columns.has(Pte.PRESENT)).all()


@pytest.mark.requires("pagemap_scan")
def test_the_huge_zero_page(puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.tell("read", address, 1, 1)
    expect(space.read([(address, address + PMD_SIZE)]), Pte.PRESENT | Pte.ZERO | Pte.PMD_MAPPED, PMD_ORDER)


def test_lazily_freed_pages(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, N)
    puppet.drain_lru_batches()
    puppet.tell("madvise", address + 64 * PAGE, 128 * PAGE, MADV_FREE)
    puppet.drain_lru_batches()
    columns = space.read([(address, address + PMD_SIZE)])
    lazy = np.flatnonzero(columns.has(Pte.LAZYFREE))
    assert lazy.tolist() == list(range(64, 192))
    assert size_at(space, address, "LazyFree") == 128 * PAGE


@pytest.mark.requires("mthp")
def test_a_lazily_freed_large_folio(puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches) -> None:
    thp_switches.only(size_name(4))
    address = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(address, 2, 16)
    puppet.drain_lru_batches()
    puppet.tell("madvise", address + 16 * PAGE, 16 * PAGE, MADV_FREE)
    puppet.drain_lru_batches()
    columns = space.read([(address, address + PMD_SIZE)])
    expect(columns, Pte.PRESENT, 4, slice(0, 16))
    expect(columns, Pte.PRESENT | Pte.LAZYFREE, 4, slice(16, 32))


@pytest.mark.requires("mthp")
def test_pages_that_a_child_maps_too(puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches) -> None:
    thp_switches.only(size_name(4))
    large = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(large, 2, 16)
    small = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(small, 32)
    puppet.tell("fork")
    # Written again, so copied: half of the small pages, and one page of a large folio.
    puppet.write(small, 16, 2)
    puppet.write(large + 5 * PAGE)
    columns = space.read([(small, small + 32 * PAGE), (large, large + 32 * PAGE)])
    expect(columns, Pte.PRESENT, 0, slice(0, 32, 2))
    expect(columns, Pte.PRESENT | Pte.SHARED, 0, slice(1, 32, 2))
    expect(columns, Pte.PRESENT, 0, slice(37, 38))
    expect(columns, Pte.PRESENT | Pte.SHARED, 4, slice(38, 64))
    counts = space.mapcounts(columns)
    assert counts[:32].tolist() == [1, 2] * 16


def test_a_large_folio_is_shared_as_a_whole(puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(address)
    # The child maps the second half only; this process keeps both, by PTEs.
    keep_out_of_child = 10
    puppet.tell("madvise", address, PMD_SIZE // 2, keep_out_of_child)
    puppet.tell("fork")
    columns = space.read([(address, address + PMD_SIZE)])
    expect(columns, Pte.PRESENT | Pte.SHARED, PMD_ORDER)


@pytest.mark.requires("guard")
def test_guard_markers(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, N)
    puppet.tell("madvise", address + 10 * PAGE, 3 * PAGE, MADV_GUARD_INSTALL)
    columns = space.read([(address, address + PMD_SIZE)])
    expect(columns, Pte.SWAP | Pte.GUARD, ORDER_NONE, slice(10, 13))
    expect(columns, Pte.PRESENT, 0, slice(13, N))


def test_unreadable_memory_is_read(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 8)
    puppet.tell("mprotect", address, PMD_SIZE, PROT_NONE)
    columns = space.read([(address, address + PMD_SIZE)])
    expect(columns, Pte.PRESENT, 0, slice(0, 8))
    expect(columns, Pte(0), ORDER_NONE, slice(8, N))


@pytest.mark.usefixtures("swap_space")
def test_swapped_pages(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, N)
    puppet.drain_lru_batches()
    puppet.tell("madvise", address, PMD_SIZE, MADV_PAGEOUT)
    columns = space.read([(address, address + PMD_SIZE)])
    swapped = columns.has(Pte.SWAP)
    assert swapped.any()
    assert swapped.sum() * PAGE == size_at(space, address, "Swap")
    assert not (swapped & columns.has(Pte.PRESENT)).any()


def test_shared_anonymous_memory_is_shared_memory(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = puppet.map(PMD_SIZE, shared=True)
    puppet.write(address, 4)
    vma = next(vma for vma in space.vmas() if vma.start <= address < vma.end)
    assert vma.kind is VmaKind.SHMEM
    columns = space.read([(address, address + 4 * PAGE)])
    expect(columns, Pte.PRESENT | Pte.FILE, 0)


def test_the_pages_of_every_mapping_add_up_to_what_smaps_counts(
    puppet: Puppet, space: LiveAddressSpace, thp_switches: ThpSwitches
) -> None:
    address = puppet.map(8 * PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(address, 3, 2 * N)
    for vma, block in list(procfs.read_smaps(space.process)):
        columns = space.read([(vma.start, vma.end)])
        if vma.kind is VmaKind.SPECIAL:
            continue
        resident = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
        assert resident.sum() * PAGE == size_in(block, "Rss"), vma
        huge = columns.has(Pte.PMD_MAPPED) & ~columns.has(Pte.ZERO) & ~columns.has(Pte.FILE)
        assert huge.sum() * PAGE == size_in(block, "AnonHugePages"), vma
        assert (columns.folio_order[columns.has(Pte.PRESENT)] >= 0).all(), vma
        assert (columns.folio_order[~columns.has(Pte.PRESENT)] == ORDER_NONE).all(), vma
