"""Pages of nothing but zeroes, counted in a process that knows which of its pages are."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import pytest

import mthp
from mthp.engine.census import Census
from mthp.errors import TargetVanishedError
from mthp.linux.contents import Contents
from mthp.linux.live import LiveAddressSpace, open_live
from targets import MADV_GUARD_INSTALL, MADV_HUGEPAGE, MADV_NOHUGEPAGE, PMD_ORDER, PMD_SIZE, PROT_NONE, Puppet
from thp_switches import ThpSwitches, size_name

pytestmark = [pytest.mark.live, pytest.mark.requires("pfns", "thp")]

PAGE = mmap.PAGESIZE
N = PMD_SIZE // PAGE


def zero_pages(
    space: LiveAddressSpace, address: int, pages: int, reader: Contents | LiveAddressSpace | None = None
) -> list[int]:
    return np.flatnonzero((reader or space).zero_filled(space.read([(address, address + pages * PAGE)]))).tolist()


def in_pieces(space: LiveAddressSpace) -> contextlib.closing[Contents]:
    """Return a reader of the contents of `space` that reads a few pages at a time."""
    return contextlib.closing(Contents(space.process, PAGE, piece=8 * PAGE))


def orders_at(census: Census, address: int) -> dict[int, int]:
    """Zero-filled pages by folio order in the mapping at `address`."""
    [pages] = [each.pages for each in census.vmas if each.vma.start <= address < each.vma.end]
    assert pages.zero_filled is not None
    return {order: int(count) for order, count in enumerate(pages.zero_filled) if count}


def test_what_a_huge_fault_filled_is_counted(puppet: Puppet, thp_switches: ThpSwitches) -> None:
    thp_switches.only(size_name(PMD_ORDER))
    huge = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    small = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(huge, 10, 7)
    puppet.write(small, 10, 7)
    census = mthp.inspect(puppet.pid, zero_filled=True)
    assert orders_at(census, huge) == {PMD_ORDER: N - 10}
    assert orders_at(census, small) == {}
    assert mthp.inspect(puppet.pid).total.zero_filled is None


@pytest.fixture
def sparse(puppet: Puppet, thp_switches: ThpSwitches) -> int:
    """A huge page of which every third page was written to, but the last two."""
    thp_switches.only(size_name(PMD_ORDER))
    address = puppet.map(PMD_SIZE, advice=MADV_HUGEPAGE)
    puppet.write(address, N // 3, 3)
    return address


EMPTY = [page for page in range(N) if page % 3 or page >= N // 3 * 3]


@pytest.mark.requires("guard")
def test_page_by_page_and_over_guards(puppet: Puppet, sparse: int) -> None:
    with open_live(puppet.pid) as space, in_pieces(space) as reader:
        assert zero_pages(space, sparse, N, reader) == EMPTY
        # The entries are old, and their pages are gone.
        columns = space.read([(sparse, sparse + PMD_SIZE)])
        puppet.tell("madvise", sparse + 4 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL)
        assert np.flatnonzero(reader.zero_filled(columns)).tolist() == [page for page in EMPTY if page not in (4, 5)]


def test_through_protections(puppet: Puppet, sparse: int) -> None:
    puppet.tell("mprotect", sparse, PMD_SIZE, PROT_NONE)
    with open_live(puppet.pid) as space, in_pieces(space) as reader:
        found = zero_pages(space, sparse, N, reader)
        if not found:
            pytest.skip("this kernel lets only tracers read through protections (proc_mem.force_override)")
        assert found == EMPTY


def test_one_byte_anywhere_in_a_page_is_no_zero(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    for page, offset in ((0, 0), (1, 63), (2, 64), (3, PAGE - 1)):
        puppet.tell("write", address + page * PAGE + offset, 1, 1)
    puppet.tell("read", address + 4 * PAGE, 1, 1)
    with open_live(puppet.pid) as space:
        assert zero_pages(space, address, 16) == [4]  # the zero page


def test_a_target_that_is_gone(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    puppet.write(address, 3)
    with open_live(puppet.pid) as space:
        columns = space.read([(address, address + PMD_SIZE)])
        space.zero_filled(columns)
        puppet.kill()
        with pytest.raises(TargetVanishedError):
            space.zero_filled(columns)
