"""Mapcounts of pages and folios, and the effects of mapping and unmapping.

Follows mm/rmap.c and include/linux/rmap.h. Each page counts its own mappings. A large folio also counts all of them
together and notes up to two address spaces, from which folio_maybe_mapped_shared() concludes whether only one maps it
(:mod:`mthp.sim.frames.memory` shows where the counts are kept).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.sim.counters import Counters
from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import MANY_MMS, Fl, Memory

_ALL, _OF_FIRST, _IDS = 1, 2, 3
"""Offsets from the head of a large folio: all mappings, those of the first address space, numbers of both."""


class Rmap:
    """The reverse map of a machine's memory.

    Args:
        by_first_page: guess from its first page whether a large folio is shared (:class:`mthp.sim.kernel.Kernel`).
    """

    def __init__(self, memory: Memory, counters: Counters, *, by_first_page: bool = False) -> None:
        self._memory = memory
        self._counters = counters
        self._by_first_page = by_first_page

    def add_new_anon(self, head: int, mm: int, *, swapbacked: bool) -> None:
        """Map all of a new folio into one address space (folio_add_new_anon_rmap)."""
        memory = self._memory
        order = int(memory.order[head])
        size = 1 << order
        memory.set(head, Fl.ANON | Fl.SWAPBACKED if swapbacked else Fl.ANON)
        memory.mapcount[head : head + size] = 1
        if order:
            memory.refcount[head + _ALL] = size
            memory.refcount[head + _OF_FIRST] = size
            memory.refcount[head + _IDS] = mm
            self._counters.count_mthp(order, "nr_anon")
        if order == memory.geometry.pmd_order:
            memory.deferred[head] = None  # It may turn out to be mostly zero (deferred_split_folio).

    def add_new_anon_many(self, heads: Frames, order: int, mm: int, *, swapbacked: bool) -> None:
        """Map all of many new folios of one order into one address space.

        Args:
            heads: int64, shape (folios,).
        """
        memory, size = self._memory, 1 << order
        memory.flags[heads] |= Fl.ANON | Fl.SWAPBACKED if swapbacked else Fl.ANON
        memory.mapcount[heads[:, None] + np.arange(size)] = 1
        memory.refcount[heads] = size
        if order:
            memory.refcount[heads + _ALL] = size
            memory.refcount[heads + _OF_FIRST] = size
            memory.refcount[heads + _IDS] = mm
            self._counters.count_mthp(order, "nr_anon", len(heads))
        if order == memory.geometry.pmd_order:
            memory.deferred.update(dict.fromkeys(heads.tolist()))

    def add_new_anon_small(self, pfns: Frames, *, swapbacked: bool) -> None:
        """Map new folios of order 0, each by one PTE."""
        self._memory.flags[pfns] |= Fl.ANON | Fl.SWAPBACKED if swapbacked else Fl.ANON
        self._memory.mapcount[pfns] = 1

    def add(self, pfns: Frames, mm: int) -> None:
        """Add one PTE mapping to each of some pages of anonymous folios (folio_add_anon_rmap_ptes).

        The caller takes the references.

        Args:
            pfns: int64, shape (pages,), without duplicates.
        """
        memory = self._memory
        memory.mapcount[pfns] += 1
        heads, counts = np.unique(memory.heads(pfns[memory.order[pfns] > 0]), return_counts=True)
        for head, count in zip(heads.tolist(), counts.tolist(), strict=True):
            self._add_large(head, count, mm)

    def _add_large(self, head: int, count: int, mm: int) -> None:
        refcount = self._memory.refcount
        ids = int(refcount[head + _IDS])
        first, second = ids & 0xFFFF, ids >> 16
        # folio_add_return_large_mapcount() (include/linux/rmap.h): a free place, or the address space's own.
        if first in (0, mm):
            refcount[head + _OF_FIRST] += count
            first = mm
        elif second in (0, mm):
            second = mm
        else:
            # There are two places only: from the third address space on the folio counts as shared for good.
            second = MANY_MMS
        refcount[head + _IDS] = first | second << 16
        refcount[head + _ALL] += count

    def remove_small(self, pfns: Frames) -> None:
        """Unmap folios of order 0, each by one PTE."""
        self._memory.mapcount[pfns] -= 1

    def remove_large(self, pfn: int, count: int, mm: int) -> None:
        """Unmap `count` adjoining pages of one large folio from one address space (folio_remove_rmap_ptes).

        If only some pages of the folio are still mapped, it is put on the deferred split list.
        """
        memory = self._memory
        head = memory.head(pfn)
        run = slice(pfn, pfn + count)
        memory.mapcount[run] -= 1
        self._remove_mm(head, count, mm)
        lost = not memory.mapcount[run].all()
        # A folio without any mapping is freed as a whole, and needs no split.
        if lost and memory.refcount[head + _ALL]:
            self.partially_mapped(head)

    def _remove_mm(self, head: int, count: int, mm: int) -> None:
        refcount = self._memory.refcount
        refcount[head + _ALL] -= count
        left = int(refcount[head + _ALL])
        ids = int(refcount[head + _IDS])
        first, second = ids & 0xFFFF, ids >> 16
        if first == mm:
            refcount[head + _OF_FIRST] -= count
        of_first = int(refcount[head + _OF_FIRST])
        if of_first == 0 and second != MANY_MMS:
            # Only the second one is left, if there is one.
            first, second = second, 0
            refcount[head + _OF_FIRST] = left
        # The second has no mappings left, and its place is free.
        elif of_first == left:
            second = 0
        refcount[head + _IDS] = first | second << 16

    def forget(self, head: int) -> None:
        """Clear the counts of a folio that is not mapped any more; the caller clears those of its pages."""
        if self._memory.order[head]:
            self._memory.refcount[head + _ALL] = 0
            self._memory.refcount[head + _OF_FIRST] = 0
            self._memory.refcount[head + _IDS] = 0

    def partially_mapped(self, head: int) -> None:
        """Put a folio with unmapped pages on the deferred split list (deferred_split_folio).

        Folios in the swap cache are left alone.
        """
        memory = self._memory
        # As deferred_split_folio(): reclaim is handling a folio in the swap cache already.
        if memory.flags[head] & (Fl.PARTIALLY_MAPPED | Fl.SWAPCACHE) or not memory.flags[head] & Fl.ANON:
            return
        order = int(memory.order[head])
        memory.set(head, Fl.PARTIALLY_MAPPED)
        memory.deferred[head] = None
        if order == memory.geometry.pmd_order:
            self._counters.count("thp_deferred_split_page")
        self._counters.count_mthp(order, "split_deferred")
        self._counters.count_mthp(order, "nr_anon_partially_mapped")

    def batches(self, offsets: NDArray[np.intp], pfns: Frames) -> list[tuple[int, int]]:
        """Group adjoining entries that map adjoining pages of one large folio (folio_pte_batch).

        Args:
            offsets: intp, shape (pages,): numbers of the entries, ascending.
            pfns: int64, same shape: the frames that they map.

        Returns:
            (first frame, pages) for each group.
        """
        if not len(pfns):
            return []
        heads = self._memory.heads(pfns)
        # Each batch is unmapped in one step, so that its folio is partially mapped once and not after every page.
        follows = (np.diff(offsets) == 1) & (np.diff(pfns) == 1) & (np.diff(heads) == 0)
        starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
        counts = np.diff(np.concatenate((starts, [len(pfns)])))
        return list(zip(pfns[starts].tolist(), counts.tolist(), strict=True))

    def mapcounts(self, pfns: Frames, heads: Frames) -> NDArray[np.int32]:
        """Return the number of PTEs that map the folios that pages lie in: int32, shape (pages,) (folio_mapcount)."""
        memory = self._memory
        large = memory.order[pfns] > 0
        # `large` is 0 or 1: the first tail frame of a large folio, the frame itself otherwise.
        counts: NDArray[np.int32] = np.where(large, memory.refcount[heads + large], memory.mapcount[pfns])
        return counts

    def maybe_shared(self, pfns: Frames, heads: Frames) -> NDArray[np.bool_]:
        """Return whether several address spaces may map the folios that pages lie in: bool, shape (pages,).

        A folio of order 0 counts as shared when it is mapped more than once (folio_maybe_mapped_shared).
        """
        memory = self._memory
        large = memory.order[pfns] > 0
        if self._by_first_page:
            counts, sizes = self.mapcounts(pfns, heads), np.left_shift(1, memory.order[pfns].astype(np.int32))
            # folio_likely_mapped_shared() of 6.12: more mappings than pages, or a first page that is mapped twice.
            guessed: NDArray[np.bool_] = (counts > 1) & ((counts > sizes) | (memory.mapcount[heads] > 1))
            return guessed
        of_first = np.where(large, memory.refcount[heads + 2 * large], 1)
        shared: NDArray[np.bool_] = self.mapcounts(pfns, heads) > of_first
        return shared
