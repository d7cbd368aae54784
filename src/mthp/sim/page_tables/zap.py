"""Removing entries: splitting a PMD entry, and unmapping a range of addresses."""

from __future__ import annotations

import numpy as np

from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, Pmd, Ptes
from mthp.sim.parts import Parts


def split_pmd(parts: Parts, mm: Mm, address: int) -> None:
    """Map the folio of the PMD range at `address` by PTEs instead of its PMD entry (__split_huge_pmd)."""
    if mm.pmd(address) is Pmd.HUGE:
        mm.set_pmd(address, Pmd.TABLE)
        parts.counters.count("thp_split_pmd")


def munlock_folio(parts: Parts, head: int) -> None:
    """Unlock a folio that lost an entry in a locked mapping (munlock_vma_folio, mm/internal.h)."""
    if parts.memory.has(head, Fl.MLOCKED):
        parts.memory.clear(head, Fl.MLOCKED)
        parts.counters.count("unevictable_pgs_munlocked", parts.memory.size(head))


def split_at(parts: Parts, mm: Mm, start: int, end: int) -> None:
    """Split the PMD entries that a range of addresses covers only partly."""
    for edge in (start, end):
        if edge % parts.geometry.pmd_size:
            split_pmd(parts, mm, edge)


def zap(parts: Parts, mm: Mm, start: int, end: int, *, keep_guards: bool = False) -> None:
    """Unmap a range, and free unused pages and slots (zap_page_range_single).

    Args:
        keep_guards: leave guard markers, as MADV_DONTNEED does.
    """
    split_at(parts, mm, start, end)
    for address, pages, ptes in mm.ranges(start, end):
        mapped = np.flatnonzero(ptes.pages())
        parts.clock.spend("free_folio", len(np.unique(parts.memory.heads(ptes.value[mapped].astype(np.int64)))))
        unmap_entries(parts, mm, ptes, mapped)
        drop_swap(parts, mm, ptes)
        # A page under migration still counts as resident, and is mapped by no entry that unmap_entries() would find.
        mm.anon_pages -= int(np.count_nonzero(ptes.bits & P.MIGRATION))
        guards = (ptes.bits & P.GUARD) != 0
        ptes.bits[:] = 0
        ptes.value[:] = 0
        if keep_guards and guards.any():
            ptes.bits[guards] = P.GUARD
        # A page table of which only a part is unmapped stays, even when it is empty.
        elif mm.pmd(address) is Pmd.HUGE or pages == parts.geometry.ptes_per_pmd:
            mm.set_pmd(address, Pmd.NONE)


def unmap_entries(parts: Parts, mm: Mm, ptes: Ptes, offsets: np.ndarray[tuple[int], np.dtype[np.intp]]) -> None:
    """Drop the mappings of some entries that map pages; the caller changes the entries themselves."""
    memory, rmap = parts.memory, parts.rmap
    pfns = ptes.value[offsets].astype(np.int64)
    is_large = memory.order[pfns] > 0
    small = pfns[~is_large]
    rmap.remove_small(small)
    # With its last mapping a page leaves the cache, unless entries elsewhere still use its slot.
    in_cache = small[((memory.flags[small] & Fl.SWAPCACHE) != 0) & (memory.mapcount[small] == 0)]
    for head in in_cache.tolist():
        parts.swap.free_cache(head)
    memory.put_small(small)
    for pfn, count in rmap.batches(offsets[is_large], pfns[is_large]):
        head = memory.head(pfn)
        rmap.remove_large(pfn, count, mm.id)
        if not memory.mapcount[head : head + memory.size(head)].any():
            parts.swap.free_cache(head)
        memory.put(head, count)
    mm.anon_pages -= len(pfns)


def drop_swap(parts: Parts, mm: Mm, ptes: Ptes) -> None:
    """Release the slots that entries refer to; the caller changes the entries themselves."""
    slots = ptes.value[(ptes.bits & P.SWAP) != 0].tolist()
    for slot in slots:
        parts.swap.drop(slot)
    mm.swap_entries -= len(slots)
