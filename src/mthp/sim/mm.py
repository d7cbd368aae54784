"""Address spaces: mappings, and page tables as columns.

A page table page is one row of a :class:`Table`: N entries as two columns, what they are (bits of :class:`P`) and
what they name (a frame, or a swap slot). The entry above it, the PMD, is one of three things. While it maps the whole
range as one folio, the row below holds what the PTEs would be, so that splitting it changes the PMD alone; the
kernel keeps ("deposits") an empty page table for the same purpose.

An entry costs 6 bytes here.
"""

from __future__ import annotations

import dataclasses
import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mthp.engine.filled import FilledPages
from mthp.geometry import Geometry
from mthp.vma import Vma

HUGEPAGE, NOHUGEPAGE, LOCKED, DROPPABLE, UFFD_WP, UFFD_MISSING = "hg", "nh", "lo", "dp", "uw", "um"
"""Words of smaps' VmFlags line (fs/proc/task_mmu.c) that matter here."""


_LETTERS = {"rd": "r", "wr": "w", "ex": "x"}


class P:
    """Bits of an entry, a uint16 per PTE. A none PTE is 0."""

    PRESENT = np.uint16(1 << 0)
    ZERO = np.uint16(1 << 1)
    """Present: the shared zero page."""
    SWAP = np.uint16(1 << 2)
    GUARD = np.uint16(1 << 3)
    """A marker that guards the page (MADV_GUARD_INSTALL)."""
    UFFD_MARKER = np.uint16(1 << 4)
    """A marker that only remembers the write-protection of a page that is not there."""
    MIGRATION = np.uint16(1 << 5)
    YOUNG = np.uint16(1 << 6)
    DIRTY = np.uint16(1 << 7)
    WRITE = np.uint16(1 << 8)
    UFFD_WP = np.uint16(1 << 9)
    SPECIAL = np.uint16(1 << 10)
    """Present: memory of a device, for which there is no frame (pte_special)."""


class Pmd(enum.IntEnum):
    """What a PMD entry is."""

    NONE = 0
    TABLE = 1
    """Points to a page table page."""
    HUGE = 2
    """Maps one folio of the PMD order."""


@dataclass(slots=True)
class SimVma:
    """One anonymous private mapping.

    Attributes:
        start, end: half-open range of addresses in bytes.
        flags: two-letter words of VmFlags.
        anon_vma: 0 until something is written here, or was about to be; from then on a number that mappings have in
            common whose pages may be looked for together.
        permissions: as in ``/proc/PID/maps``.
    """

    start: int
    end: int
    flags: set[str] = field(default_factory=set)
    anon_vma: int = 0
    permissions: str = "rw-p"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def userfaultfd_armed(self) -> bool:
        """Whether userfaultfd wants to hear of missing or of write-protected pages (userfaultfd_armed)."""
        return not self.flags.isdisjoint((UFFD_WP, UFFD_MISSING))

    @property
    def locked(self) -> bool:
        """VM_LOCKED."""
        return LOCKED in self.flags

    @property
    def droppable(self) -> bool:
        """VM_DROPPABLE."""
        return DROPPABLE in self.flags

    def permits(self, *, write: bool) -> bool:
        """Whether its permissions allow an access."""
        return ("w" if write else "r") in self.permissions

    def covers(self, start: int, end: int) -> bool:
        """Whether the mapping has all of this range."""
        return self.start <= start and end <= self.end

    def alike(self, other: SimVma) -> bool:
        """Whether the two may become one if they are neighbours (can_vma_merge_before, mm/vma.c)."""
        if (self.flags, self.permissions) != (other.flags, other.permissions):
            return False
        return self.anon_vma == other.anon_vma or not (self.anon_vma and other.anon_vma)

    def described(self) -> Vma:
        """The mapping as the seam has it, with the words that smaps has for permissions."""
        words = {"mr", "mw", "me", "ac"} | {word for word in ("rd", "wr", "ex") if _LETTERS[word] in self.permissions}
        flags = frozenset(self.flags | words)
        return Vma(self.start, self.end, self.permissions, flags=flags, has_anon_vma=bool(self.anon_vma))


class Table:
    """Page tables of adjoining PMD ranges.

    Attributes:
        first: number of the first PMD range: its address divided by the PMD size.
        pmd: uint8, shape (ranges,): :class:`Pmd`.
        bits: uint16, shape (ranges, ptes_per_pmd): :class:`P`.
        value: uint32, same shape: frame of a present entry, slot of a swap entry, else 0.
    """

    def __init__(self, first: int, ranges: int, ptes_per_pmd: int) -> None:
        self.first = first
        self.pmd: NDArray[np.uint8] = np.zeros(ranges, np.uint8)
        self.bits: NDArray[np.uint16] = np.zeros((ranges, ptes_per_pmd), np.uint16)
        self.value: NDArray[np.uint32] = np.zeros((ranges, ptes_per_pmd), np.uint32)

    @property
    def last(self) -> int:
        """Number of the last PMD range."""
        return self.first + len(self.pmd) - 1


@dataclass(frozen=True, slots=True)
class Ptes:
    """Some adjoining entries of one page table page, as views: what is written here is written there.

    Attributes:
        bits: uint16, shape (pages,): :class:`P`.
        value: uint32, same shape.
    """

    bits: NDArray[np.uint16]
    value: NDArray[np.uint32]

    def pages(self) -> NDArray[np.bool_]:
        """Which entries map a page that is not the zero page: bool, shape (pages,)."""
        mask: NDArray[np.bool_] = (self.bits & (P.PRESENT | P.ZERO | P.SPECIAL)) == P.PRESENT
        return mask


class Mm:
    """One address space.

    Attributes:
        id: number of the address space, from 1.
        charge: number of the memory cgroup that its pages are charged to.
        anon_pages, swap_entries: its RSS of anonymous pages, and how many entries name a swap slot.
        exiting: its last user is gone.
        thp_disabled: PR_SET_THP_DISABLE.
        filled: pages that collapses filled, for policies that remember them.
    """

    def __init__(self, id: int, geometry: Geometry, charge: int = 0) -> None:
        self.id = id
        self.charge = charge
        self.anon_pages = 0
        self.swap_entries = 0
        self.exiting = False
        self.thp_disabled = False
        self.filled = FilledPages(geometry)
        self._geometry = geometry
        self._vmas: list[SimVma] = []
        self._tables: list[Table] = []

    @property
    def vmas(self) -> list[SimVma]:
        """The mappings, by ascending address."""
        return self._vmas

    @property
    def tables(self) -> list[Table]:
        """The page tables, by ascending address."""
        return self._tables

    def find_vma(self, address: int) -> SimVma | None:
        """The first mapping that ends behind `address` (find_vma)."""
        at = bisect_right(self._vmas, address, key=lambda vma: vma.end)
        return self._vmas[at] if at < len(self._vmas) else None

    def insert_vma(self, vma: SimVma) -> None:
        """Add a mapping that overlaps no other, and the page tables for it."""
        at = bisect_right(self._vmas, vma.start, key=lambda other: other.start)
        self._vmas.insert(at, vma)
        size = self._geometry.pmd_size
        self._cover(vma.start // size, (vma.end - 1) // size)

    def is_free(self, start: int, end: int) -> bool:
        """Whether nothing is mapped in a range."""
        vma = self.find_vma(start)
        return vma is None or vma.start >= end

    def free_range(self, size: int, limit: int) -> int | None:
        """The highest address below `limit` with `size` free bytes, aligned to the PMD size if `size` is a multiple.

        Follows thp_get_unmapped_area(); None if there is none.
        """
        geometry = self._geometry
        align = geometry.page_size if size % geometry.pmd_size else geometry.pmd_size
        end = limit
        for start, below in [(vma.start, vma.end) for vma in reversed(self._vmas)] + [(0, geometry.pmd_size)]:
            at = (end - size) // align * align
            if at >= below:
                return at
            end = start
        return None

    def grow_vma(self, vma: SimVma, end: int) -> None:
        """Move the end of a mapping up, over nothing."""
        size = self._geometry.pmd_size
        self._cover(vma.end // size, (end - 1) // size)
        vma.end = end
        self.merge_vmas(vma.start, end)

    def split_vma(self, address: int) -> bool:
        """Make two mappings of the one that `address` lies inside of (split_vma); False if there is none."""
        vma = self.find_vma(address)
        if vma is None or vma.start >= address:
            return False
        after = dataclasses.replace(vma, start=address, flags=set(vma.flags))
        vma.end = address
        self._vmas.insert(bisect_right(self._vmas, vma.start, key=lambda other: other.start), after)
        return True

    def merge_vmas(self, start: int, end: int) -> None:
        """Make one mapping of neighbours in a range, and at its edges, that differ in nothing (vma_merge)."""
        at = max(bisect_right(self._vmas, start, key=lambda vma: vma.end) - 1, 0)
        while at + 1 < len(self._vmas) and self._vmas[at].end <= end:
            here, after = self._vmas[at], self._vmas[at + 1]
            if here.end == after.start and here.alike(after):
                here.end = after.end
                here.anon_vma = here.anon_vma or after.anon_vma
                del self._vmas[at + 1]
            else:
                at += 1

    def remove_vmas(self, start: int, end: int) -> None:
        """Take away the mappings of a range; the caller has unmapped its pages, and split what reaches over it."""
        first, last = self._span(start, end)
        del self._vmas[first:last]

    def vmas_in(self, start: int, end: int) -> list[SimVma]:
        """The mappings that have any of a range."""
        first, last = self._span(start, end)
        return self._vmas[first:last]

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Where the mappings that have any of a range begin and end in the list."""
        first = bisect_right(self._vmas, start, key=lambda vma: vma.end)
        return first, bisect_left(self._vmas, end, lo=first, key=lambda vma: vma.start)

    def _cover(self, first: int, last: int) -> None:
        """See to it that every PMD range from `first` to `last` has a row."""
        for start, stop in self._gaps(first, last):
            table = Table(start, stop - start, self._geometry.ptes_per_pmd)
            at = bisect_right(self._tables, start, key=lambda other: other.first)
            self._tables.insert(at, table)

    def _gaps(self, first: int, last: int) -> list[tuple[int, int]]:
        gaps = []
        for table in self._tables:
            if table.first > last:
                break
            if table.last < first:
                continue
            if table.first > first:
                gaps.append((first, table.first))
            first = table.last + 1
        if first <= last:
            gaps.append((first, last + 1))
        return gaps

    def row(self, address: int) -> tuple[Table, int] | None:
        """The table and the row of the PMD range at `address`; None if nothing was ever mapped there."""
        number = address // self._geometry.pmd_size
        at = bisect_right(self._tables, number, key=lambda table: table.first) - 1
        if at < 0 or self._tables[at].last < number:
            return None
        return self._tables[at], number - self._tables[at].first

    def locate(self, pages: NDArray[np.int64]) -> list[tuple[Table, NDArray[np.intp], NDArray[np.int64]]]:
        """Where the entries of many pages are.

        Args:
            pages: int64, shape (pages,): page numbers, which is addresses divided by the page size.

        Returns:
            By table: the table, which of `pages` lie in it, and the number of the entry of each of those, counted
            through the table. Pages for which there is no table are left out.
        """
        order, found = self._geometry.pmd_order, []
        firsts = np.array([table.first for table in self._tables], np.int64)
        at = np.searchsorted(firsts, pages >> order, side="right") - 1
        for number in np.flatnonzero(np.bincount(at + 1)[1:]).tolist():
            table = self._tables[number]
            which = np.flatnonzero((at == number) & (pages >> order <= table.last))
            found.append((table, which, pages[which] - (table.first << order)))
        return found

    def pmd(self, address: int) -> Pmd:
        """The PMD entry at `address`."""
        found = self.row(address)
        return Pmd(found[0].pmd[found[1]]) if found else Pmd.NONE

    def set_pmd(self, address: int, pmd: Pmd) -> None:
        """Replace the PMD entry of a mapped address."""
        found = self.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        found[0].pmd[found[1]] = pmd

    def have_table(self, address: int) -> None:
        """See to it that there is a page table page for `address`, now that an entry there was filled."""
        if self.pmd(address) is Pmd.NONE:
            self.set_pmd(address, Pmd.TABLE)

    def ptes(self, address: int, pages: int) -> Ptes:
        """`pages` entries from `address` on, which must lie in one PMD range of a mapping."""
        found = self.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        table, row = found
        start = address % self._geometry.pmd_size // self._geometry.page_size
        run = slice(start, start + pages)
        assert run.stop <= self._geometry.ptes_per_pmd, f"{pages} pages from {address:#x} cross a PMD range"
        return Ptes(table.bits[row, run], table.value[row, run])

    def entry(self, address: int) -> Ptes:
        """The entry that maps `address`: of the PTE, or, where the PMD entry maps it, all those that stand for that."""
        geometry = self._geometry
        if self.pmd(address) is Pmd.HUGE:
            return self.ptes(address // geometry.pmd_size * geometry.pmd_size, geometry.ptes_per_pmd)
        return self.ptes(address, 1)

    def ranges(self, start: int, end: int) -> Iterator[tuple[int, int, Ptes]]:
        """Go over the entries of a range of addresses, PMD range by PMD range.

        Yields:
            (address, pages, entries) of every PMD range that has a page table.
        """
        page, size = self._geometry.page_size, self._geometry.pmd_size
        while start < end:
            stop = min(end, start // size * size + size)
            if self.pmd(start) is not Pmd.NONE:
                yield start, (stop - start) // page, self.ptes(start, (stop - start) // page)
            start = stop

    def all_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, Ptes]]:
        """:meth:`ranges`, with those that have no page table yet; all of it must be mapped."""
        page, size = self._geometry.page_size, self._geometry.pmd_size
        while start < end:
            stop = min(end, start // size * size + size)
            yield start, (stop - start) // page, self.ptes(start, (stop - start) // page)
            start = stop
