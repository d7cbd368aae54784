"""Finding the entries that refer to a frame.

The kernel keeps a reverse map for this (anon_vma). In the simulator it would need more memory than all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.sim.mm import Mm, P, PageTables, Pmd
from mthp.sim.parts import Parts


@dataclass(frozen=True, slots=True)
class TableEntries:
    """Entries of one page table.

    Attributes:
        entries: intp, shape (entries,): numbers of the entries, counted through the table.
    """

    mm: Mm
    table: PageTables
    entries: NDArray[np.intp]

    def bits(self) -> NDArray[np.uint16]:
        """Return their bits: uint16, shape (entries,)."""
        return self.table.bits.ravel()[self.entries]

    def frames(self) -> NDArray[np.int64]:
        """Return the frames that they refer to: int64, shape (entries,)."""
        return self.table.value.ravel()[self.entries].astype(np.int64)

    def set(self, bits: NDArray[np.uint16] | np.uint16, values: NDArray[np.int64] | int) -> None:
        """Replace the entries."""
        self.table.bits.ravel()[self.entries] = bits
        self.table.value.ravel()[self.entries] = values

    def in_locked(self, geometry: Geometry) -> NDArray[np.bool_]:
        """Return which of them lie in locked mappings: bool, shape (entries,)."""
        locked = np.zeros(len(self.entries), np.bool_)
        pages = self.entries + (self.table.first << geometry.pmd_order)
        for vma in self.mm.vmas:
            if vma.locked:
                locked |= (pages >= vma.start // geometry.page_size) & (pages < vma.end // geometry.page_size)
        return locked

    def split_pmd(self) -> int:
        """Split the PMD entries that hold them into PTEs; return the number of PMD entries split."""
        rows = np.unique(self.entries // self.table.bits.shape[1])
        rows = rows[self.table.pmd[rows] == Pmd.HUGE]
        self.table.pmd[rows] = Pmd.TABLE
        return len(rows)


def mappings_of(parts: Parts, first: int, count: int, state: np.uint16 = P.PRESENT) -> list[TableEntries]:
    """Return all entries of all address spaces that refer to any of `count` frames from `first` on.

    Args:
        state: PRESENT, or MIGRATION for the entries of pages under migration.
    """
    found = []
    # All page tables, a column at a time: for all the frames of a block together that is cheap enough.
    for mm in parts.mms.values():
        for table in mm.tables:
            values, bits = table.value.ravel(), table.bits.ravel()
            # One comparison for both ends: smaller numbers wrap around to large ones.
            near = np.flatnonzero((values - np.uint32(first)) < np.uint32(count))
            # The value of another entry may be a slot, and happen to be one of these numbers.
            entries = near[(bits[near] & (state | P.SPECIAL | P.ZERO)) == state]
            if len(entries):
                found.append(TableEntries(mm, table, entries))
    return found
