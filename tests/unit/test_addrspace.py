"""The seam: PMD ranges of a mapping, columns of PTEs, blocks of segments, and what every backend starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.addrspace import AddressSpace
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.ptes import Pte, PteColumns, Segment, in_portions
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

PAGE = 4096
PMD = 512 * PAGE


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, PMD, (0, PMD)),
        (0, PMD - PAGE, (0, 0)),
        (PAGE, PMD, (PMD, PMD)),
        (PAGE, 3 * PMD - PAGE, (PMD, 2 * PMD)),
        (PMD - PAGE, 2 * PMD + PAGE, (PMD, 2 * PMD)),
        (PMD + PAGE, 2 * PMD - PAGE, (2 * PMD, 2 * PMD)),
        (3 * PMD, 7 * PMD, (3 * PMD, 7 * PMD)),
    ],
)
def test_only_whole_pmd_ranges_of_a_mapping_count(start: int, end: int, expected: Segment) -> None:
    assert Vma(start, end, "rw-p").pmd_ranges(X86_64) == expected


@given(
    geometry=st.sampled_from(list(GEOMETRIES.values())),
    first=st.integers(0, 1 << 20),
    pages=st.integers(1, 1 << 18),
)
def test_pmd_ranges_are_aligned_inside_and_as_many_as_fit(geometry: Geometry, first: int, pages: int) -> None:
    vma = Vma(first * geometry.page_size, (first + pages) * geometry.page_size, "rw-p")
    start, end = vma.pmd_ranges(geometry)
    assert start % geometry.pmd_size == 0
    assert end % geometry.pmd_size == 0
    assert start <= end
    if start < end:
        assert vma.start <= start
        assert end <= vma.end
        assert start - vma.start < geometry.pmd_size
        assert vma.end - end < geometry.pmd_size
    else:
        assert vma.size < 2 * geometry.pmd_size


def test_bits_of_ptes_fit_their_column_and_differ() -> None:
    assert max(Pte) < 1 << 16
    assert len({int(bit) for bit in Pte}) == len(list(Pte))
    assert all(int(bit).bit_count() == 1 for bit in Pte)


def test_columns_tell_which_entries_have_one_of_some_bits() -> None:
    state = np.array([0, Pte.PRESENT, Pte.PRESENT | Pte.ZERO, Pte.SWAP, Pte.SWAP | Pte.UFFD_WP], dtype=np.uint16)
    columns = PteColumns(((0, 5 * PAGE),), state, np.full(5, -1, dtype=np.int8))
    assert columns.has(Pte.PRESENT).tolist() == [False, True, True, False, False]
    assert columns.has(Pte.ZERO | Pte.SWAP).tolist() == [False, False, True, True, True]
    assert columns.has(Pte.HUGETLB).tolist() == [False] * 5
    assert columns.has(Pte.PRESENT).dtype == np.bool_


def test_blocks_of_given_segments() -> None:
    assert list(in_portions([], 4)) == []
    assert list(in_portions([(0, 4)], 4)) == [[(0, 4)]]
    assert list(in_portions([(0, 10)], 4)) == [[(0, 4)], [(4, 8)], [(8, 10)]]
    assert list(in_portions([(0, 1), (5, 7), (9, 10)], 4)) == [[(0, 1), (5, 7), (9, 10)]]
    assert list(in_portions([(0, 3), (5, 7)], 4)) == [[(0, 3)], [(5, 7)]]
    assert list(in_portions([(3, 3), (5, 6)], 4)) == [[(5, 6)]]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=12),
    size=st.integers(1, 16),
)
def test_blocks_hold_all_segments_in_order_and_no_more_than_their_size(
    lengths: list[tuple[int, int]], size: int
) -> None:
    segments, place = [], 0
    for gap, length in lengths:
        segments.append((place + gap, place + gap + length))
        place += gap + length
    blocks = list(in_portions(segments, size))
    addresses = [address for block in blocks for start, end in block for address in range(start, end)]
    assert addresses == [address for start, end in segments for address in range(start, end)]
    for block in blocks:
        assert 0 < sum(end - start for start, end in block) <= size
    starts = {address for start, end in segments for address in range(start, end, size)}
    assert {start for block in blocks for start, _ in block} == starts, "a cut is a multiple of the size away"


class Nothing(AddressSpace):
    """An address space with nothing in it."""

    closed = False

    @property
    def geometry(self) -> Geometry:
        return X86_64

    @property
    def label(self) -> str:
        return "nothing"

    @property
    def kernel(self) -> str:
        return "0"

    @property
    def switches(self) -> Switches:
        return Switches.defaults(X86_64)

    @property
    def tunables(self) -> Tunables:
        return Tunables.defaults(X86_64)

    @property
    def thp_disabled(self) -> bool:
        return False

    @property
    def missing(self) -> tuple[str, ...]:
        return ()

    def vmas(self) -> list[Vma]:
        return []

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        pages = sum(end - start for start, end in segments) // PAGE
        return PteColumns(tuple(segments), np.zeros(pages, np.uint16), np.full(pages, -1, np.int8))

    def attempt(self, address: int, order: int) -> BlockOutcome:
        return BlockOutcome(address, order, ScanResult.VMA_NULL)

    def close(self) -> None:
        self.closed = True


def test_a_backend_that_cannot_tell_gives_all_segments_as_populated() -> None:
    segments = [(0, PMD), (3 * PMD, 4 * PMD)]
    assert Nothing().populated(segments, PMD) == segments


def test_leaving_an_address_space_closes_it() -> None:
    space = Nothing()
    with space as entered:
        assert entered is space
        assert not entered.closed
    assert space.closed


def test_an_error_inside_closes_it_too_and_goes_on() -> None:
    space = Nothing()
    with pytest.raises(ZeroDivisionError), space:
        raise ZeroDivisionError
    assert space.closed


@pytest.mark.parametrize("name", ["geometry", "vmas", "read", "attempt", "missing"])
def test_a_backend_must_have_all_of_the_seam(name: str) -> None:
    half = type("Half", (Nothing,), {name: getattr(AddressSpace, name)})
    with pytest.raises(TypeError, match=name):
        half()
