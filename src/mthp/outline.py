"""The outline of an address space: the amount of memory in each PMD range, without its single pages.

A live kernel reports runs of pages of one kind (PAGEMAP_SCAN) in a small part of the time of reading all entries and
the orders of their folios. That is enough to find the ranges worth a scan: a range that had nothing left to do, and
has not changed its layout since, most likely has nothing to do now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.ptes import ColumnTable

_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Outline(ColumnTable):
    """The PMD ranges that have contents, as columns, by ascending address.

    Attributes:
        address: uint64, start address.
        present: int32, pages that are present and not zero.
        pmd_mapped: bool, one PMD entry maps it.
        layout: uint64, a hash of which of its pages are present, zero, swapped out.
    """

    DTYPES = (np.uint64, np.int32, np.bool_, np.uint64)

    address: NDArray[np.uint64]
    present: NDArray[np.int32]
    pmd_mapped: NDArray[np.bool_]
    layout: NDArray[np.uint64]


PRESENT, HUGE, ZERO, SWAP = 1, 2, 4, 8
"""Bits of `kinds` in :func:`outline_of`."""


def outline_of(
    starts: NDArray[np.uint64], ends: NDArray[np.uint64], kinds: NDArray[np.uint8], geometry: Geometry
) -> Outline:
    """Return the outline made up of runs of pages of one kind.

    Args:
        starts, ends: uint64, shape (runs,): address ranges of disjoint runs, ascending.
        kinds: uint8, shape (runs,): kind of their pages; never 0.
    """
    if not len(starts):
        return Outline.joined([])
    size = np.uint64(geometry.pmd_size)
    first, last = starts // size, (ends - np.uint64(1)) // size
    pieces = (last - first).astype(np.int64) + 1
    # A run across the end of a PMD range is cut there.
    row = np.repeat(np.arange(len(starts)), pieces)
    begin = np.cumsum(pieces) - pieces
    number = first[row] + (np.arange(len(row)) - begin[row]).astype(np.uint64)
    low, high = np.maximum(starts[row], number * size), np.minimum(ends[row], (number + np.uint64(1)) * size)
    pages = (high - low) // np.uint64(geometry.page_size)
    kind = kinds[row]
    heads = np.flatnonzero(np.r_[True, number[1:] != number[:-1]])
    counted = np.where((kind & PRESENT != 0) & (kind & ZERO == 0), pages, np.uint64(0))
    hashed = (low ^ (pages << np.uint64(44)) ^ (kind.astype(np.uint64) << np.uint64(60))) * _MIX_1
    hashed = (hashed ^ (hashed >> np.uint64(31))) * _MIX_2
    return Outline(
        number[heads] * size,
        np.add.reduceat(counted, heads).astype(np.int32),
        np.logical_and.reduceat(kind & HUGE != 0, heads),
        np.add.reduceat(hashed, heads),
    )
