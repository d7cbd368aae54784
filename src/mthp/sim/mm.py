"""Address spaces: mappings, and page tables as columns.

A page table page is one row of :class:`PageTables`: N entries as two columns, their state (bits of :class:`P`) and
their value (a frame, or a swap slot). An entry costs 6 bytes.
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
"""The words of smaps' VmFlags line (fs/proc/task_mmu.c) that are used here."""


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
    """A marker that only notes the write-protection of a page that is not present."""
    MIGRATION = np.uint16(1 << 5)
    YOUNG = np.uint16(1 << 6)
    DIRTY = np.uint16(1 << 7)
    WRITE = np.uint16(1 << 8)
    UFFD_WP = np.uint16(1 << 9)
    SPECIAL = np.uint16(1 << 10)
    """Present: device memory, which has no frame (pte_special)."""


class Pmd(enum.IntEnum):
    """State of a PMD entry."""

    NONE = 0
    TABLE = 1
    """Points to a page table page."""
    # The row below holds the PTEs that a split would make, so that splitting changes only the PMD entry: the kernel
    # keeps ("deposits") an empty page table for that (pgtable_trans_huge_deposit()).
    HUGE = 2
    """Maps one folio of the PMD order."""


@dataclass(slots=True)
class SimVma:
    """One anonymous private mapping.

    Attributes:
        start, end: half-open range of addresses in bytes.
        flags: two-letter words of VmFlags.
        anon_vma: 0 until the first write, or preparation for one; then the number of the anon_vma, which mappings may
            share.
        permissions: as in ``/proc/PID/maps``.
        forked: its anon_vma came by fork, so that it may have pages of the parent (vma_is_fork_child(), mm/vma.c).
        moved: bytes by which mremap moved its pages since they were mapped: its start less vm_pgoff.
        accounted: whether it counts against the overcommit limit (VM_ACCOUNT).
    """

    start: int
    end: int
    flags: set[str] = field(default_factory=set)
    anon_vma: int = 0
    permissions: str = "rw-p"
    forked: bool = False
    moved: int = 0
    accounted: bool = True

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def userfaultfd_armed(self) -> bool:
        """Whether userfaultfd handles missing or write-protected pages (userfaultfd_armed)."""
        return not self.flags.isdisjoint((UFFD_WP, UFFD_MISSING))

    @property
    def locked(self) -> bool:
        """Whether VM_LOCKED is set."""
        return LOCKED in self.flags

    @property
    def droppable(self) -> bool:
        """Whether VM_DROPPABLE is set."""
        return DROPPABLE in self.flags

    def permits(self, *, write: bool) -> bool:
        """Return whether its permissions allow an access."""
        return ("w" if write else "r") in self.permissions

    def covers(self, start: int, end: int) -> bool:
        """Return whether the mapping covers all of this range."""
        return self.start <= start and end <= self.end

    def alike(self, other: SimVma) -> bool:
        """Return whether two neighbours may be merged (can_vma_merge_before, mm/vma.c)."""
        if self._kind != other._kind:
            return False
        if self.anon_vma == other.anon_vma:
            return True
        # One without an anon_vma takes that of the other, except from a fork child: its anon_vma has the locks of all
        # ancestors (is_mergeable_anon_vma(), mm/vma.c).
        return not (self.anon_vma and other.anon_vma) and not (self.forked or other.forked)

    @property
    def _kind(self) -> tuple[object, ...]:
        """The properties that neighbours to be merged have in common (is_mergeable_vma(), mm/vma.c)."""
        return self.flags, self.permissions, self.moved, self.accounted

    def described(self) -> Vma:
        """Return the mapping in the form of the seam, with smaps' words for permissions."""
        # VM_MAYREAD and so on, which every ordinary anonymous mapping has.
        words = {"mr", "mw", "me"} | {word for word in ("rd", "wr", "ex") if _LETTERS[word] in self.permissions}
        words |= {"ac"} if self.accounted else set()
        flags = frozenset(self.flags | words)
        return Vma(self.start, self.end, self.permissions, flags=flags, has_anon_vma=bool(self.anon_vma))


class PageTables:
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
    """Views of adjoining entries of one page table page: writes reach the table.

    Attributes:
        bits: uint16, shape (pages,): :class:`P`.
        value: uint32, same shape.
    """

    bits: NDArray[np.uint16]
    value: NDArray[np.uint32]

    def pages(self) -> NDArray[np.bool_]:
        """Return which entries map a page other than the zero page: bool, shape (pages,)."""
        mask: NDArray[np.bool_] = (self.bits & (P.PRESENT | P.ZERO | P.SPECIAL)) == P.PRESENT
        return mask


class Mm:
    """One address space.

    Attributes:
        id: number of the address space, from 1.
        charge: number of the memory cgroup that its pages are charged to.
        anon_pages, swap_entries: RSS of anonymous pages, in pages, and number of swap entries.
        exiting: whether its last user exited.
        thp_disabled: whether PR_SET_THP_DISABLE is set.
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
        self._tables: list[PageTables] = []

    @property
    def vmas(self) -> list[SimVma]:
        """The mappings, by ascending address."""
        return self._vmas

    @property
    def tables(self) -> list[PageTables]:
        """The page tables, by ascending address."""
        return self._tables

    def find_vma(self, address: int) -> SimVma | None:
        """Return the first mapping that ends behind `address` (find_vma)."""
        at = bisect_right(self._vmas, address, key=lambda vma: vma.end)
        return self._vmas[at] if at < len(self._vmas) else None

    def insert_vma(self, vma: SimVma) -> None:
        """Add a mapping that does not overlap another, and its page tables."""
        at = bisect_right(self._vmas, vma.start, key=lambda other: other.start)
        self._vmas.insert(at, vma)
        size = self._geometry.pmd_size
        self._cover(vma.start // size, (vma.end - 1) // size)

    def is_free(self, start: int, end: int) -> bool:
        """Return whether no mapping overlaps a range."""
        vma = self.find_vma(start)
        return vma is None or vma.start >= end

    def free_range(self, size: int, limit: int) -> int | None:
        """Return the highest free range of `size` bytes below `limit`: its address, or None.

        Follows thp_get_unmapped_area(): aligned to the PMD size if `size` is a multiple of it.
        """
        geometry = self._geometry
        align = geometry.page_size if size % geometry.pmd_size else geometry.pmd_size
        end = limit
        # The first PMD range stays free, as vm.mmap_min_addr keeps the first pages.
        for start, below in [(vma.start, vma.end) for vma in reversed(self._vmas)] + [(0, geometry.pmd_size)]:
            # From the top down, as mmap() does (arch_get_unmapped_area_topdown()).
            at = (end - size) // align * align
            if at >= below:
                return at
            end = start
        return None

    def grow_vma(self, vma: SimVma, end: int) -> None:
        """Move the end of a mapping up, over a free range."""
        size = self._geometry.pmd_size
        self._cover(vma.end // size, (end - 1) // size)
        vma.end = end
        self.merge_vmas(vma.start, end)

    def split_vma(self, address: int) -> bool:
        """Split the mapping that `address` lies inside of (split_vma); return False if there is none."""
        vma = self.find_vma(address)
        # Also at its very start, where there is nothing to split.
        if vma is None or vma.start >= address:
            return False
        after = dataclasses.replace(vma, start=address, flags=set(vma.flags))
        vma.end = address
        self._vmas.insert(bisect_right(self._vmas, vma.start, key=lambda other: other.start), after)
        return True

    def merge_vmas(self, start: int, end: int, apart: SimVma | None = None) -> None:
        """Merge neighbours in a range, and at its edges, that do not differ (vma_merge), except with `apart`."""
        # From the mapping before the range: it may merge with the first one inside.
        at = max(bisect_right(self._vmas, start, key=lambda vma: vma.end) - 1, 0)
        while at + 1 < len(self._vmas) and self._vmas[at].end <= end:
            here, after = self._vmas[at], self._vmas[at + 1]
            if here.end == after.start and here.alike(after) and apart not in (here, after):
                here.end = after.end
                here.anon_vma = here.anon_vma or after.anon_vma
                del self._vmas[at + 1]
            else:
                at += 1

    def remove_vmas(self, start: int, end: int) -> None:
        """Remove the mappings of a range; the caller has unmapped its pages, and split mappings at its ends."""
        first, last = self._span(start, end)
        del self._vmas[first:last]

    def vmas_in(self, start: int, end: int) -> list[SimVma]:
        """Return the mappings that overlap a range."""
        first, last = self._span(start, end)
        return self._vmas[first:last]

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Return the begin and the end, in the list, of the mappings that overlap a range."""
        first = bisect_right(self._vmas, start, key=lambda vma: vma.end)
        return first, bisect_left(self._vmas, end, lo=first, key=lambda vma: vma.start)

    def _cover(self, first: int, last: int) -> None:
        """Ensure that every PMD range from `first` to `last` has a row."""
        # A row is never removed, although its mapping may be: the address may be mapped again.
        for start, stop in self._gaps(first, last):
            table = PageTables(start, stop - start, self._geometry.ptes_per_pmd)
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

    def row(self, address: int) -> tuple[PageTables, int] | None:
        """Return the table and the row of the PMD range at `address`; None if it was never mapped."""
        number = address // self._geometry.pmd_size
        at = bisect_right(self._tables, number, key=lambda table: table.first) - 1
        if at < 0 or self._tables[at].last < number:
            return None
        return self._tables[at], number - self._tables[at].first

    def locate(self, pages: NDArray[np.int64]) -> list[tuple[PageTables, NDArray[np.intp], NDArray[np.int64]]]:
        """Find the entries of many pages.

        Args:
            pages: int64, shape (pages,): page numbers (addresses divided by the page size).

        Returns:
            By table: the table, the indices of its `pages`, and the number of the entry of each of those, counted
            through the table. Pages without a table are left out.
        """
        order, found = self._geometry.pmd_order, []
        firsts = np.array([table.first for table in self._tables], np.int64)
        at = np.searchsorted(firsts, pages >> order, side="right") - 1
        # -1 for pages below all tables: shifted by one for bincount(), and left out.
        for number in np.flatnonzero(np.bincount(at + 1)[1:]).tolist():
            table = self._tables[number]
            which = np.flatnonzero((at == number) & (pages >> order <= table.last))
            found.append((table, which, pages[which] - (table.first << order)))
        return found

    def pmd(self, address: int) -> Pmd:
        """Return the PMD entry at `address`."""
        found = self.row(address)
        return Pmd(found[0].pmd[found[1]]) if found else Pmd.NONE

    def set_pmd(self, address: int, pmd: Pmd) -> None:
        """Replace the PMD entry of a mapped address."""
        found = self.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        found[0].pmd[found[1]] = pmd

    def have_table(self, address: int) -> None:
        """Ensure that `address` has a page table page, after its entry was filled."""
        if self.pmd(address) is Pmd.NONE:
            self.set_pmd(address, Pmd.TABLE)

    def ptes(self, address: int, pages: int) -> Ptes:
        """Return `pages` entries from `address` on, which must lie in one PMD range of a mapping."""
        found = self.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        table, row = found
        start = address % self._geometry.pmd_size // self._geometry.page_size
        run = slice(start, start + pages)
        assert run.stop <= self._geometry.ptes_per_pmd, f"{pages} pages from {address:#x} cross a PMD range"
        return Ptes(table.bits[row, run], table.value[row, run])

    def entry(self, address: int) -> Ptes:
        """Return the entry that maps `address`: one PTE, or all the PTEs that stand for a PMD entry."""
        geometry = self._geometry
        if self.pmd(address) is Pmd.HUGE:
            return self.ptes(address // geometry.pmd_size * geometry.pmd_size, geometry.ptes_per_pmd)
        return self.ptes(address, 1)

    def ranges(self, start: int, end: int) -> Iterator[tuple[int, int, Ptes]]:
        """Iterate over the entries of a range of addresses, PMD range by PMD range.

        Yields:
            (address, pages, entries) of every PMD range that has a page table.
        """
        page, size = self._geometry.page_size, self._geometry.pmd_size
        while start < end:
            stop = min(end, start // size * size + size)
            # Without a page table there is no entry to visit; a PMD entry is visited as the PTEs that stand for it.
            if self.pmd(start) is not Pmd.NONE:
                yield start, (stop - start) // page, self.ptes(start, (stop - start) // page)
            start = stop

    def all_ranges(self, start: int, end: int) -> Iterator[tuple[int, int, Ptes]]:
        """Iterate as :meth:`ranges`, also over ranges without page tables; all of it must be mapped."""
        page, size = self._geometry.page_size, self._geometry.pmd_size
        while start < end:
            stop = min(end, start // size * size + size)
            yield start, (stop - start) // page, self.ptes(start, (stop - start) // page)
            start = stop
