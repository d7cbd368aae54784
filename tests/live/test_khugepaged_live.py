"""khugepaged in user space on a live process: it carries out what a plan predicts, and the seam's check passes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

import mthp
from mthp.engine.scanner import PassEnd
from mthp.linux.live import LiveAddressSpace
from mthp.means import Means
from mthp.ptes import Pte
from mthp.results import ScanResult
from mthp.testing import check_address_space
from mthp.tunables import Tunables
from targets import MADV_HUGEPAGE, PMD_SIZE, Puppet
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "pfns", "thp", "mthp", "4k-pages")]

PAGE = mmap.PAGESIZE
N = PMD_SIZE // PAGE


@pytest.fixture
def puppet(thp_switches: ThpSwitches) -> Iterator[Puppet]:
    """A process that gets small pages, while the kernel's own khugepaged has no size to work with."""
    thp_switches.only()
    with Puppet() as puppet:
        yield puppet


def pace(pages_to_scan: int) -> Tunables:
    return Tunables(N - 1, N // 8, N // 2, pages_to_scan)


def written(puppet: Puppet, *pages: int, advice: int = MADV_HUGEPAGE) -> int:
    """Map one PMD range for each number, and write that many of its first pages."""
    address = puppet.map(len(pages) * PMD_SIZE, advice=advice)
    for row, count in enumerate(pages):
        puppet.write(address + row * PMD_SIZE, count)
    return address


def test_the_check_passes_on_a_living_process(puppet: Puppet, space: LiveAddressSpace) -> None:
    written(puppet, N, N // 2, 0, 3)
    check_address_space(space, collapse=True, end=puppet.kill)


def test_it_collapses_what_is_full_enough_and_the_next_round_finds_nothing(
    puppet: Puppet, space: LiveAddressSpace
) -> None:
    address = written(puppet, N, N - 10, 16, 0)
    within = (address, address + 4 * PMD_SIZE)
    daemon = mthp.Khugepaged(orders="2M", max_ptes_none=10, within=within, tunables=pace(1 << 20))
    assert daemon.enter(space)
    assert daemon.do_scan() is PassEnd.ROUND
    assert daemon.pages_collapsed == 2
    assert daemon.statistics.filled == {9: 10}
    assert daemon.statistics.results[ScanResult.EXCEED_NONE_PTE] == 1
    huge = space.read([within]).has(Pte.PMD_MAPPED).reshape(4, N)
    assert huge.all(axis=1).tolist() == [True, True, False, False]
    daemon.do_scan()
    assert daemon.statistics.attempts == {(9, ScanResult.SUCCEED): 2}


def test_smaller_orders_are_moved(puppet: Puppet, space: LiveAddressSpace) -> None:
    address = written(puppet, 48, 16)
    within = (address, address + 2 * PMD_SIZE)
    daemon = mthp.Khugepaged(
        orders="64K,2M",
        max_ptes_none=0,
        within=within,
        tunables=pace(1 << 20),
        means=Means("madvise,move", pause_share=1.0),
    )
    daemon.enter(space)
    daemon.do_scan()
    assert daemon.statistics.attempts == {(4, ScanResult.SUCCEED): 4}
    orders = space.read([within]).folio_order.reshape(2, N)
    assert orders[0, :49].tolist() == [4] * 48 + [-1]
    assert orders[1, :17].tolist() == [4] * 16 + [-1]
    assert space.take_pauses()
