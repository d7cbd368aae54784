"""What PMD entries map, seen without PAGEMAP_SCAN, as on Linux before 6.7: from frames and smaps, or smaps alone."""

from __future__ import annotations

import numpy as np
import pytest

import targets
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.ptes import ORDER_UNKNOWN, Pte, PteColumns
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("thp", "pagemap_scan")]


@pytest.fixture(autouse=True)
def only_on_demand(thp_switches: ThpSwitches) -> None:
    """Keep faults and the kernel's khugepaged from making huge pages; MADV_COLLAPSE reads no switch."""
    thp_switches.set("enabled", "never")


PAGES = targets.PMD_SIZE // targets.PAGE_SIZE


def _ranges(*huge: bool) -> int:
    """Adjoining PMD ranges: each mapped by a PMD entry, or by PTEs to base pages."""
    start = targets.map_aligned(len(huge) * targets.PMD_SIZE, 0)
    targets.madvise(start, len(huge) * targets.PMD_SIZE, targets.MADV_NOHUGEPAGE)
    targets.write_pages(start, len(huge) * PAGES, 1)
    targets.madvise(start, len(huge) * targets.PMD_SIZE, targets.MADV_HUGEPAGE)
    for index, wanted in enumerate(huge):
        if wanted:
            targets.madvise(start + index * targets.PMD_SIZE, targets.PMD_SIZE, targets.MADV_COLLAPSE)
    return start


def _read(space: LiveAddressSpace, start: int, ranges: int, *, scan: bool) -> PteColumns:
    space._pagemap.can_scan = scan
    return space.read([(start, start + ranges * targets.PMD_SIZE)])


def _mapped(columns: PteColumns) -> list[bool]:
    """Return for every PMD range whether all of it counts as mapped by a PMD entry."""
    mapped: list[bool] = np.all(columns.has(Pte.PMD_MAPPED).reshape(-1, PAGES), axis=1).tolist()
    return mapped


@pytest.mark.requires("pfns")
def test_with_frame_numbers_it_is_the_same() -> None:
    huge = (True, False, True, False)
    start = _ranges(*huge)
    with open_live("self") as space:
        seen, told = (_read(space, start, len(huge), scan=scan) for scan in (True, False))
    assert _mapped(seen) == list(huge)
    assert np.array_equal(seen.state, told.state)
    assert np.array_equal(seen.folio_order, told.folio_order)


@pytest.mark.requires("pfns")
def test_a_large_folio_that_ptes_map_is_none_of_them() -> None:
    start = _ranges(True)
    # For a moment the range is two mappings; then page tables stay in the place of the PMD entry.
    for protection in (targets.PROT_READ, targets.PROT_READ | targets.PROT_WRITE):
        targets.mprotect(start, targets.PAGE_SIZE, protection)
    with open_live("self") as space:
        columns = _read(space, start, 1, scan=False)
    assert not columns.has(Pte.PMD_MAPPED).any()
    assert (columns.folio_order == space.geometry.pmd_order).all()


def test_without_frame_numbers_smaps_tells_of_whole_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = _ranges(True, True), _ranges(True, False)
    monkeypatch.setattr("mthp.linux.live.can_see_pfns", lambda: False)
    with open_live("self") as space:
        assert _mapped(_read(space, whole, 2, scan=False)) == [True, True]
        columns = _read(space, part, 2, scan=False)
    assert _mapped(columns) == [False, False]
    assert (columns.folio_order == ORDER_UNKNOWN).all()
