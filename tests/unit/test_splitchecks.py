"""Reasons against collapsing and splitting a PMD range, and its target layout."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.geometry import X86_64
from mthp.ptes import ORDER_UNKNOWN, Block, Pte, PteColumns
from mthp.results import ScanResult
from mthp.splitchecks import RangeLayout, layout_of, refusal_of_mapping, refusal_of_pages
from mthp.vma import Vma, VmaKind

START, SIZE, PAGES = 4 << 20, 2 << 20, 512
BLOCK: Block = (START, 4)
PLAIN = Pte.PRESENT


def columns(at: dict[int, Pte] | None = None) -> PteColumns:
    """Base pages, but for those `at` which something else is."""
    state = np.full(PAGES, PLAIN, np.uint16)
    for page, bits in (at or {}).items():
        state[page] = bits
    order = np.where(state & PLAIN, 0, -1).astype(np.int8)
    return PteColumns(((START, START + SIZE),), state, order, np.arange(100, 100 + PAGES, dtype=np.uint64) * 2)


def layout(read: PteColumns, *blocks: Block) -> RangeLayout:
    return layout_of(START, list(blocks or [BLOCK]), read, X86_64)


@pytest.mark.parametrize(
    ("bits", "inside", "outside"),
    [
        (Pte.SWAP, None, ScanResult.EXCEED_SWAP_PTE),
        (PLAIN | Pte.SHARED, None, ScanResult.EXCEED_SHARED_PTE),
        (PLAIN | Pte.LAZYFREE, None, ScanResult.PAGE_LAZYFREE),
        (Pte.SWAP | Pte.GUARD, ScanResult.FAIL, ScanResult.FAIL),
        (PLAIN | Pte.UFFD_WP, ScanResult.PTE_UFFD, ScanResult.PTE_UFFD),
        (PLAIN | Pte.FILE, ScanResult.PAGE_ANON, ScanResult.PAGE_ANON),
        (PLAIN | Pte.HUGETLB, ScanResult.PAGE_ANON, ScanResult.PAGE_ANON),
        (Pte(0), None, None),
        (PLAIN | Pte.ZERO, None, None),
    ],
)
def test_what_a_page_may_be_inside_and_outside_of_the_blocks(
    bits: Pte, inside: ScanResult | None, outside: ScanResult | None
) -> None:
    for page, expected in ((3, inside), (100, outside)):
        read = columns({page: bits})
        refusal = refusal_of_pages(layout(read), read, locked=False)
        assert (refusal and refusal[0]) == expected


def test_locked_memory_is_left_alone_where_it_would_keep_zeroes() -> None:
    hole_outside, hole_inside = columns({100: Pte(0)}), columns({3: Pte(0)})
    refusal = refusal_of_pages(layout(hole_outside), hole_outside, locked=True)
    assert refusal is not None
    assert "mlocked" in refusal[1]
    assert refusal_of_pages(layout(hole_inside), hole_inside, locked=True) is None
    assert refusal_of_pages(layout(columns()), columns(), locked=True) is None


def test_a_range_with_nothing_in_it_and_one_whose_folios_are_unknown() -> None:
    empty = columns(dict.fromkeys(range(PAGES), Pte(0)))
    assert refusal_of_pages(layout(empty), empty, locked=False) == (ScanResult.NO_PTE_TABLE, "")
    read = columns()
    read.folio_order[7] = ORDER_UNKNOWN
    refusal = refusal_of_pages(layout(read), read, locked=False)
    assert refusal is not None
    assert refusal[0] is ScanResult.FAIL


def test_blocks_and_folios_that_are_there_make_up_the_layout() -> None:
    read = columns({1: Pte(0), 70: Pte(0), 71: Pte.SWAP})
    assert read.pfn is not None
    read.folio_order[32:64] = 4
    read.pfn[32:64] = np.arange(1 << 10, (1 << 10) + 32)
    # One that lies askew to its frames, and one of which a page is missing.
    read.folio_order[128:144] = 4
    read.pfn[128:144] = np.arange(1 << 11, (1 << 11) + 16) + 1
    read.folio_order[160:175] = 4
    read.pfn[160:175] = np.arange(1 << 12, (1 << 12) + 15)
    made = layout(read, (START, 3), (START + (16 << 12), 2))
    expected = np.zeros(PAGES, np.int8)
    expected[:8], expected[16:20], expected[32:64] = 3, 2, 4
    assert (made.orders == expected).all()
    assert made.fill == 1
    assert np.flatnonzero(made.spare).tolist() == [70]
    assert made.swapped == 1


@pytest.mark.parametrize(
    ("vma", "result", "word"),
    [
        (None, ScanResult.VMA_NULL, ""),
        (Vma(START, START + SIZE, "rw-p", flags=frozenset({"nh"})), ScanResult.VMA_CHECK, "NOHUGEPAGE"),
        (Vma(START, START + SIZE, "rw-p", flags=frozenset({"um"})), ScanResult.VMA_CHECK, "userfaultfd"),
        (Vma(START, START + SIZE, "rw-p", flags=frozenset({"io"})), ScanResult.VMA_CHECK, "device"),
        (Vma(START, START + SIZE, "rw-s", kind=VmaKind.SHMEM), ScanResult.VMA_CHECK, ""),
        (Vma(START, START + SIZE, "rw-p", kind=VmaKind.SPECIAL), ScanResult.VMA_CHECK, ""),
        (Vma(START, START + SIZE // 2, "rw-p"), ScanResult.VMA_CHECK, "smaller"),
        (Vma(START + SIZE // 2, START + 4 * SIZE, "rw-p"), ScanResult.ADDRESS_RANGE, ""),
    ],
)
def test_mappings_that_are_left_alone(vma: Vma | None, result: ScanResult, word: str) -> None:
    refusal = refusal_of_mapping(vma, START, X86_64, thp_disabled=False)
    assert refusal is not None
    assert refusal[0] is result
    assert word in refusal[1]


def test_a_plain_mapping_may_be_made_unless_its_process_switched_thp_off() -> None:
    vma = Vma(START - SIZE, START + SIZE, "rw-p", has_anon_vma=True)
    assert refusal_of_mapping(vma, START, X86_64, thp_disabled=False) is None
    refusal = refusal_of_mapping(vma, START, X86_64, thp_disabled=True)
    assert refusal is not None
    assert "PR_SET_THP_DISABLE" in refusal[1]
