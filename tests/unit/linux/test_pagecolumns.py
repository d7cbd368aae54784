"""Cutting segments at PMD ranges, and pagemap words as states."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.geometry import GEOMETRIES, Geometry
from mthp.linux import abi, pagecolumns
from mthp.linux.kpageflags import FolioReader
from mthp.linux.pagecolumns import range_pieces
from mthp.linux.pagemap import states
from mthp.ptes import Pte, spread


@given(
    geometry=st.sampled_from(sorted(GEOMETRIES.values(), key=lambda geometry: geometry.name)),
    lengths=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=8),
)
def test_windows_are_the_pages_of_each_pmd_range(geometry: Geometry, lengths: list[tuple[int, int]]) -> None:
    segments, at = [], 0
    for gap, size in lengths:
        segments.append(((at + gap) * geometry.page_size, (at + gap + size) * geometry.page_size))
        at += gap + size + 1
    pieces = range_pieces(segments, geometry)

    expected, index = [], 0
    for start, end in segments:
        first: dict[int, list[int]] = {}
        for page in range(start // geometry.page_size, end // geometry.page_size):
            first.setdefault(page >> geometry.pmd_order, [page, index, 0])[2] += 1
            index += 1
        expected += list(first.values())
    found = np.stack([pieces.page, pieces.index, pieces.count], axis=1).tolist()
    assert found == expected
    assert pieces.indices().tolist() == list(range(index))


def test_a_segment_beyond_what_a_signed_number_holds() -> None:
    geometry = GEOMETRIES["x86-64"]
    pieces = range_pieces([(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)], geometry)
    assert pieces.page.tolist() == [0xFFFFFFFFFF600]
    assert pieces.count.tolist() == [1]


def test_spread() -> None:
    assert spread(np.array([5, 1, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert spread(np.array([], np.int64), np.array([], np.int64)).tolist() == []


def test_what_pagemap_words_say() -> None:
    present, exclusive = abi.PM_PRESENT, abi.PM_MMAP_EXCLUSIVE
    cases = {
        0: Pte(0),
        1 << 55: Pte(0),
        present | exclusive | 77: Pte.PRESENT,
        present | 77: Pte.PRESENT | Pte.SHARED,
        present | exclusive | abi.PM_FILE: Pte.PRESENT | Pte.FILE,
        present | exclusive | abi.PM_UFFD_WP: Pte.PRESENT | Pte.UFFD_WP,
        abi.PM_SWAP | 123: Pte.SWAP,
        abi.PM_SWAP | abi.PM_UFFD_WP: Pte.SWAP | Pte.UFFD_WP,
        abi.PM_SWAP | abi.PM_GUARD_REGION: Pte.SWAP | Pte.GUARD,
        abi.PM_UFFD_WP: Pte.SWAP | Pte.UFFD_WP,
    }
    assert states(np.array(list(cases), np.uint64)).tolist() == list(cases.values())


# Kernels that show every anonymous page as merged (KPF_KSM): the flag is not believed there.

ANON = abi.KPF_ANON | abi.KPF_SWAPBACKED


class Folios:
    """kpageflags of a machine on which this process's own page has some flags."""

    def __init__(self, flags: int) -> None:
        self._flags = flags

    def words_at(self, pfns: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
        assert pfns.tolist() == [77]
        return np.array([self._flags], np.uint64)


@pytest.mark.parametrize(("flags", "believed"), [(ANON, True), (ANON | abi.KPF_KSM, False)])
def test_a_page_that_nobody_merged_tells(flags: int, believed: bool) -> None:
    mask = int(pagecolumns._believed(cast("FolioReader", Folios(flags)), lambda: 77))
    assert bool(mask & abi.KPF_KSM) == believed
    assert mask | abi.KPF_KSM == 2**64 - 1


def test_without_frames_nothing_is_known_against_it() -> None:
    assert int(pagecolumns._believed(cast("FolioReader", Folios(abi.KPF_KSM)), lambda: 0)) == 2**64 - 1
    assert int(pagecolumns._believed(None)) == 2**64 - 1
