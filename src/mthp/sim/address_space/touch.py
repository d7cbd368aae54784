"""Many accesses of a program at once, with the same result as one after another.

Accesses are taken a block at a time. Those that need no fault cost only reading their columns. The faults of the others
are resolved first, for many pages at a time: new folios of the order that a single fault would allocate, or the zero
page; swap-in, copying and the like go page by page (:mod:`~mthp.sim.address_space.access`). Then all accesses happen.

Only the frame numbers, and which of the pages wait in the LRU batch, may differ from accesses one by one; where memory
is short also the number of faults, because the shrinker may split a folio of zeroes before the accesses happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.sim.address_space.access import Fault, access, make_present
from mthp.sim.allocation.alloc import take_folios
from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import UFFD_MISSING, Mm, P, PageTables, Pmd, SimVma
from mthp.sim.parts import Parts

BLOCK = 1 << 15
"""Most accesses done together."""

_TRIES = 3
_SINGLE_FAULTS = 64


@dataclass(frozen=True, slots=True)
class Touched:
    """Result of many accesses.

    Attributes:
        done: number of accesses that happened, from the first on.
        outcome: DONE if all happened, else the outcome of the next one.
    """

    done: int
    outcome: Fault


def touch(parts: Parts, mm: Mm, addresses: NDArray[np.int64], contents: NDArray[np.uint32] | None) -> Touched:
    """Read or write pages, up to the first access that ends with a signal.

    Args:
        addresses: int64, shape (accesses,), in the order in which they happen.
        contents: uint32, same shape: new contents; None to read.
    """
    pages = addresses // parts.geometry.page_size
    done = 0
    while done < len(pages):
        run = slice(done, done + _block_size(parts, mm))
        block = _Accesses(parts, mm, pages[run], None if contents is None else contents[run])
        happened, outcome = block.run()
        done += happened
        if outcome is not Fault.DONE:
            return Touched(done, outcome)
    return Touched(done, Fault.DONE)


def fault_in(parts: Parts, mm: Mm, start: int, end: int, *, write: bool) -> Fault:
    """Make all pages of a range present, without accessing them (populate_vma_page_range).

    Returns:
        DONE, or why it ended early.
    """
    page = parts.geometry.page_size
    while start < end:
        stop = min(end, start + _block_size(parts, mm) * page)
        pages = np.arange(start // page, stop // page)
        block = _Accesses(parts, mm, pages, np.zeros(len(pages), np.uint32) if write else None)
        strange = block.strange()
        # The others first, as far as the range goes; then the error.
        block.pages = pages[~strange]
        if not block.all_present():
            return Fault.OOM
        if strange.any():
            return Fault.SIGSEGV
        start = stop
    return Fault.DONE


def _block_size(parts: Parts, mm: Mm) -> int:
    """Return how many accesses memory suffices for, even if each allocates a large folio."""
    # So that no reclaim is needed in the middle of a block: it could take away pages that the block needs.
    room = min(parts.memory.free_frames, parts.memory.cgroups.room(mm.charge))
    largest = max((order for vma in mm.vmas for order in parts.fault_orders(mm, vma)), default=0)
    return min(max(room >> largest, _SINGLE_FAULTS), BLOCK)


class _Accesses:
    """Some adjoining accesses."""

    def __init__(self, parts: Parts, mm: Mm, pages: Frames, contents: NDArray[np.uint32] | None) -> None:
        self.parts = parts
        self.mm = mm
        self.pages = pages
        self.contents = contents
        self.write = contents is not None
        self.page_size = parts.geometry.page_size

    def run(self) -> tuple[int, Fault]:
        """Run accesses through the first that may end with a signal; return the number done and the outcome."""
        strange = np.flatnonzero(self.strange())
        together = int(strange[0]) if len(strange) else len(self.pages)
        # The one that may end with a signal comes alone, behind all before it.
        rest = self.pages[together : together + 1]
        last = self.contents[together : together + 1] if self.contents is not None else None
        self.pages = self.pages[:together]
        if self.contents is not None:
            self.contents = self.contents[:together]
        if self.all_present():
            self.happen()
        else:
            # Memory is so short that pages made present are reclaimed before the accesses happen.
            happened, outcome = self.one_by_one()
            if outcome is not Fault.DONE:
                return happened, outcome
        self.pages, self.contents = rest, last
        happened, outcome = self.one_by_one()
        return together + happened, outcome

    def one_by_one(self) -> tuple[int, Fault]:
        """Run the accesses one by one, until one ends with a signal."""
        contents = [None] * len(self.pages) if self.contents is None else self.contents.tolist()
        for at, (page, content) in enumerate(zip(self.pages.tolist(), contents, strict=True)):
            outcome, _ = access(self.parts, self.mm, page * self.page_size, content)
            if outcome is not Fault.DONE:
                return at, outcome
        return len(self.pages), Fault.DONE

    def vmas(self) -> list[tuple[SimVma, NDArray[np.intp]]]:
        """Return the mappings that the accesses fall into, and the indices of the accesses to each."""
        ends = np.array([vma.end for vma in self.mm.vmas], np.int64) // self.page_size
        at = np.searchsorted(ends, self.pages, side="right")
        starts = np.array([vma.start for vma in self.mm.vmas] + [1 << 62], np.int64) // self.page_size
        at[self.pages < starts[at]] = len(ends)
        return [
            (self.mm.vmas[number], np.flatnonzero(at == number))
            for number in np.unique(at).tolist()
            if number < len(ends)
        ]

    def strange(self) -> NDArray[np.bool_]:
        """Return which accesses may end with a signal or in userfaultfd: bool, shape (accesses,)."""
        strange = np.ones(len(self.pages), np.bool_)
        bits = self.bits()
        marks = P.GUARD | P.UFFD_MARKER | P.MIGRATION | P.SPECIAL
        if self.write:
            marks |= P.UFFD_WP
        for vma, which in self.vmas():
            if vma.permits(write=self.write):
                missing = UFFD_MISSING in vma.flags
                strange[which] = ((bits[which] & marks) != 0) | (missing & (bits[which] == 0))
        for table, which, entries in self.mm.locate(self.pages):
            page = (bits[which] & (P.PRESENT | P.ZERO)) == P.PRESENT
            frames = table.value.ravel()[entries]
            strange[which] |= page & ((self.parts.memory.flags[np.where(page, frames, 0)] & Fl.POISONED) != 0)
        return strange

    def bits(self) -> NDArray[np.uint16]:
        """Return the entries' bits: uint16, shape (accesses,); 0 without a page table."""
        bits = np.zeros(len(self.pages), np.uint16)
        for table, which, entries in self.mm.locate(self.pages):
            bits[which] = table.bits.ravel()[entries]
        return bits

    def lacking(self) -> NDArray[np.intp]:
        """Return which accesses would fault: intp, shape (faults,)."""
        wanted = P.PRESENT | P.WRITE if self.write else P.PRESENT
        return np.flatnonzero((self.bits() & wanted) != wanted)

    def all_present(self) -> bool:
        """Resolve the faults of all accesses; return False if memory ran out or a page was reclaimed again."""
        least, tries = len(self.pages) + 1, _TRIES
        while lacking := len(self.lacking()):
            # Reclaim may take pages away as fast as they come: give up only if the number of missing ones does not
            # fall.
            tries = _TRIES if lacking < least else tries - 1
            least = min(least, lacking)
            if not tries or not all(self.fault_in(vma, which) for vma, which in self.vmas()):
                return False
        return True

    def fault_in(self, vma: SimVma, which: NDArray[np.intp]) -> bool:
        """Resolve the faults of the accesses to one mapping; return False if a page cannot be allocated."""
        if self.write:
            self.parts.anon_vma_prepare(self.mm, vma)
        orders = self.parts.fault_orders(self.mm, vma)
        short = 0
        if self.write:
            short = self.fill(vma, (*reversed(orders), 0), which)
        # Otherwise a read may map the huge zero page, which is done fault by fault.
        elif self.parts.geometry.pmd_order not in orders:
            self.map_zero(self.none_among(which))
        lacking = np.intersect1d(self.lacking(), which)
        # Folios that were not available are tried one by one, each by the first page of its block. The rest of the
        # block gets smaller ones. After some of these, memory may suffice for all the others together.
        _, first = np.unique(self.pages[lacking] >> short, return_index=True)
        for at in np.sort(first)[:_SINGLE_FAULTS].tolist():
            page = int(self.pages[lacking[at]])
            outcome = make_present(self.parts, self.mm, vma, page * self.page_size, write=self.write)
            if outcome is not Fault.DONE:
                return False
            if short:
                smaller = [order for order in reversed(orders) if order < short]
                self.fill(vma, (*smaller, 0), lacking[self.pages[lacking] >> short == page >> short])
        return True

    def fill(self, vma: SimVma, orders: Sequence[int], which: NDArray[np.intp]) -> int:
        """Map new folios at none entries, the largest first; return the order that ran out, or 0."""
        for order in orders:
            if not _NewFolios(self, vma, order).fill(self.none_among(which)):
                return order
        return 0

    def none_among(self, which: NDArray[np.intp]) -> Frames:
        """Return the pages with none entries among some accesses, without duplicates, in order of access."""
        return _first_seen(self.pages[which[self.bits()[which] == 0]])

    def map_zero(self, pages: Frames) -> None:
        """Map the zero page at `pages`."""
        for table, _, entries in self.mm.locate(pages):
            table.bits.ravel()[entries] = P.PRESENT | P.ZERO | P.YOUNG
            rows = np.unique(entries >> self.parts.geometry.pmd_order)
            table.pmd[rows[table.pmd[rows] == Pmd.NONE]] = Pmd.TABLE
        self.parts.counters.count("pgfault", len(pages))
        self.parts.clock.spend("fault", len(pages))

    def happen(self) -> None:
        """Run all accesses, none of which faults."""
        used = P.YOUNG | P.DIRTY if self.write else P.YOUNG
        for table, which, entries in self.mm.locate(self.pages):
            table.bits.ravel()[entries] |= used
            rows = np.unique(entries >> self.parts.geometry.pmd_order)
            # A PMD entry has one young bit and one dirty bit for all its pages.
            table.bits[rows[table.pmd[rows] == Pmd.HUGE]] |= used
            if self.contents is not None:
                self.parts.memory.content[table.value.ravel()[entries]] = self.contents[which]


class _NewFolios:
    """New folios of one order for many faults at once."""

    def __init__(self, block: _Accesses, vma: SimVma, order: int) -> None:
        self.parts = block.parts
        self.mm = block.mm
        self.vma = vma
        self.order = order
        self.page_size = block.page_size

    def fill(self, pages: Frames) -> bool:
        """Map folios at the aligned blocks of some pages, wherever they fit; return False if there were too few."""
        size = 1 << self.order
        # In the order of access, so that memory that runs out goes to the first ones.
        starts = _first_seen(pages & -size)
        if self.order:
            inside = (starts * self.page_size >= self.vma.start) & ((starts + size) * self.page_size <= self.vma.end)
            starts = starts[inside]
        return all(
            self._fill(table, entries[self._empty(table, entries)]) for table, _, entries in self.mm.locate(starts)
        )

    def _empty(self, table: PageTables, entries: Frames) -> NDArray[np.bool_]:
        """Return which blocks, identified by their first entries, may be filled: bool, shape (blocks,)."""
        if self.order == self.parts.geometry.pmd_order:
            none: NDArray[np.bool_] = table.pmd[entries >> self.order] == Pmd.NONE
            return none
        # userfaultfd wants a fault for each page.
        if self.order and self.vma.userfaultfd_armed:
            return np.zeros(len(entries), np.bool_)
        empty: NDArray[np.bool_] = ~table.bits.reshape(-1, 1 << self.order)[entries >> self.order].any(axis=1)
        return empty

    def _fill(self, table: PageTables, entries: Frames) -> bool:
        parts, order, size = self.parts, self.order, 1 << self.order
        wanted = len(entries)
        heads = take_folios(parts, order, self.mm.charge, wanted)
        count = len(heads)
        entries = entries[:count]
        parts.memory.flags[heads] |= Fl.UPTODATE | Fl.REFERENCED
        parts.rmap.add_new_anon_many(heads, order, self.mm.id, swapbacked=not self.vma.droppable)
        self._put_on_lists(heads)
        rows = entries >> order
        table.bits.reshape(-1, size)[rows] = P.PRESENT | P.YOUNG | P.DIRTY | P.WRITE
        table.value.reshape(-1, size)[rows] = heads[:, None] + np.arange(size)
        pmd_order = parts.geometry.pmd_order
        table.pmd[entries >> pmd_order] = Pmd.HUGE if order == pmd_order else Pmd.TABLE
        self.mm.anon_pages += count * size
        self._count(count)
        return count == wanted

    def _put_on_lists(self, heads: Frames) -> None:
        if self.vma.locked:
            for head in heads.tolist():
                self.parts.add_lru_vma(self.vma, head)
        elif self.order:
            self.parts.lru.add_large(heads)
        else:
            self.parts.lru.add_small(heads)

    def _count(self, count: int) -> None:
        counters, clock = self.parts.counters, self.parts.clock
        counters.count("pgfault", count)
        clock.spend("fault", count)
        clock.spend("zero_byte", count * self.parts.geometry.size_of(self.order))
        if self.order:
            counters.count_mthp(self.order, "anon_fault_alloc", count)
        if self.order == self.parts.geometry.pmd_order:
            counters.count("thp_fault_alloc", count)


def _first_seen(numbers: Frames) -> Frames:
    """Return each number once, in the order of first occurrence."""
    _, first = np.unique(numbers, return_index=True)
    return numbers[np.sort(first)]
