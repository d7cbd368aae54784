"""From frames back to the entries that name them.

The kernel keeps a reverse map for this (anon_vma). A simulated machine that kept one would need more memory for it than
for anything else; it looks through the page tables instead, a column at a time, for all the frames of a block at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.sim.mm import Mm, P, Pmd, Table
from mthp.sim.parts import Parts


@dataclass(frozen=True, slots=True)
class Mapped:
    """Entries of one table.

    Attributes:
        entries: intp, shape (entries,): their numbers, counted through the table.
    """

    mm: Mm
    table: Table
    entries: NDArray[np.intp]

    def bits(self) -> NDArray[np.uint16]:
        """Their bits: uint16, shape (entries,)."""
        return self.table.bits.ravel()[self.entries]

    def frames(self) -> NDArray[np.int64]:
        """The frames that they name: int64, shape (entries,)."""
        return self.table.value.ravel()[self.entries].astype(np.int64)

    def set(self, bits: NDArray[np.uint16] | np.uint16, values: NDArray[np.int64] | int) -> None:
        """Replace them."""
        self.table.bits.ravel()[self.entries] = bits
        self.table.value.ravel()[self.entries] = values

    def in_locked(self, geometry: Geometry) -> NDArray[np.bool_]:
        """Which of them lie in locked mappings: bool, shape (entries,)."""
        locked = np.zeros(len(self.entries), np.bool_)
        pages = self.entries + (self.table.first << geometry.pmd_order)
        for vma in self.mm.vmas:
            if vma.locked:
                locked |= (pages >= vma.start // geometry.page_size) & (pages < vma.end // geometry.page_size)
        return locked

    def split_pmd(self) -> int:
        """Make PTEs of the PMD entries above them: how many there were."""
        rows = np.unique(self.entries // self.table.bits.shape[1])
        rows = rows[self.table.pmd[rows] == Pmd.HUGE]
        self.table.pmd[rows] = Pmd.TABLE
        return len(rows)


def mappings_of(parts: Parts, first: int, count: int, state: np.uint16 = P.PRESENT) -> list[Mapped]:
    """All entries of all address spaces that name any of `count` frames from `first` on.

    Args:
        state: PRESENT, or MIGRATION for the entries of pages on their way.
    """
    found = []
    for mm in parts.mms.values():
        for table in mm.tables:
            values, bits = table.value.ravel(), table.bits.ravel()
            near = np.flatnonzero((values - np.uint32(first)) < np.uint32(count))
            entries = near[(bits[near] & (state | P.SPECIAL | P.ZERO)) == state]
            if len(entries):
                found.append(Mapped(mm, table, entries))
    return found
