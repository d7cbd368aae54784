"""System calls on address spaces: munmap, madvise, mlock, fork, exit.

Each gives 0 or an error number, as the kernel does. MADV_COLLAPSE is the machine's own
(:meth:`mthp.sim.machine.Machine.madvise_collapse`).
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from mthp.sim.memory import Fl
from mthp.sim.mm import (
    DROPPABLE,
    HUGEPAGE,
    LOCKED,
    NOHUGEPAGE,
    UFFD_MISSING,
    UFFD_WP,
    Mm,
    P,
    Pmd,
    Ptes,
    SimVma,
)
from mthp.sim.parts import Parts
from mthp.sim.zap import drop_swap, split_at, unmap_entries, zap

NOT_INHERITED = {LOCKED, UFFD_WP, UFFD_MISSING}
"""Flags of a mapping that a child does not get (dup_mmap)."""


def munmap(parts: Parts, mm: Mm, start: int, end: int) -> int:
    """Unmap a range, whatever of it is mapped."""
    if not _whole_pages(parts, start, end):
        return errno.EINVAL
    _split_vmas(mm, start, end)
    for vma in mm.vmas_in(start, end):
        zap(parts, mm, vma.start, vma.end)
    mm.remove_vmas(start, end)
    return 0


def _whole_pages(parts: Parts, start: int, end: int) -> bool:
    page = parts.geometry.page_size
    return start % page == 0 and end % page == 0 and start < end


def _split_vmas(mm: Mm, start: int, end: int) -> None:
    mm.split_vma(start)
    mm.split_vma(end)


def change_flags(parts: Parts, mm: Mm, start: int, end: int, add: set[str], remove: set[str]) -> int:
    """Change the flags of the mappings in a range: MADV_HUGEPAGE, mlock, userfaultfd registration, and their like.

    Returns:
        ENOMEM if some of the range is not mapped; what is mapped was changed.
    """
    if not _whole_pages(parts, start, end):
        return errno.EINVAL
    _split_vmas(mm, start, end)
    vmas = mm.vmas_in(start, end)
    for vma in vmas:
        vma.flags = (vma.flags - remove) | add
    covered = sum(vma.size for vma in vmas)
    mm.merge_vmas()
    return 0 if covered == end - start else errno.ENOMEM


def madvise(parts: Parts, mm: Mm, start: int, end: int, advice: str) -> int:
    """madvise with one of HUGEPAGE, NOHUGEPAGE, DONTNEED, FREE, COLD, PAGEOUT.

    Returns:
        EINVAL for anything else; ENOMEM if some of the range is not mapped.
    """
    if advice == "HUGEPAGE":
        return change_flags(parts, mm, start, end, {HUGEPAGE}, {NOHUGEPAGE})
    if advice == "NOHUGEPAGE":
        return change_flags(parts, mm, start, end, {NOHUGEPAGE}, {HUGEPAGE})
    if advice not in _ON_PAGES or not _whole_pages(parts, start, end):
        return errno.EINVAL
    covered = 0
    for vma in mm.vmas_in(start, end):
        first, last = max(start, vma.start), min(end, vma.end)
        covered += last - first
        if vma.locked:
            return errno.EINVAL
        _ON_PAGES[advice](parts, mm, vma, first, last)
    return 0 if covered == end - start else errno.ENOMEM


def _dontneed(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    zap(parts, mm, start, end)


def _whole_folios(parts: Parts, ptes: Ptes) -> NDArray[np.intp]:
    """Entries that map small folios, or large ones of which these entries map every page."""
    offsets = np.flatnonzero(ptes.pages())
    pfns = ptes.value[offsets].astype(np.int64)
    heads, inverse, counts = np.unique(parts.memory.heads(pfns), return_inverse=True, return_counts=True)
    whole = counts == np.left_shift(1, parts.memory.order[heads].astype(np.int64))
    chosen: NDArray[np.intp] = offsets[whole[inverse]]
    return chosen


def _free(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_FREE: pages become lazyfree, clean and old; slots are dropped (madvise_free_pte_range).

    A page that another address space maps, or a part of a large folio, is left alone.
    """
    split_at(parts, mm, start, end)
    for _, _, ptes in mm.ranges(start, end):
        offsets = _whole_folios(parts, ptes)
        pfns = ptes.value[offsets].astype(np.int64)
        heads = parts.memory.heads(pfns)
        alone = ~parts.rmap.maybe_shared(pfns, heads)
        offsets, heads = offsets[alone], np.unique(heads[alone])
        for head in heads[(parts.memory.flags[heads] & Fl.SWAPCACHE) != 0].tolist():
            parts.swap.free_cache(head)
        ptes.bits[offsets] &= ~(P.YOUNG | P.DIRTY)
        parts.memory.flags[heads[(parts.memory.flags[heads] & Fl.SWAPCACHE) == 0]] &= ~Fl.SWAPBACKED
        drop_swap(parts, mm, ptes)
        swapped = (ptes.bits & P.SWAP) != 0
        ptes.bits[swapped] = 0
        ptes.value[swapped] = 0


def _cold(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_COLD: pages that no other address space maps become old (madvise_cold_or_pageout_pte_range)."""
    split_at(parts, mm, start, end)
    for _, _, ptes in mm.ranges(start, end):
        offsets = _whole_folios(parts, ptes)
        pfns = ptes.value[offsets].astype(np.int64)
        heads = parts.memory.heads(pfns)
        alone = ~parts.rmap.maybe_shared(pfns, heads)
        ptes.bits[offsets[alone]] &= ~P.YOUNG
        parts.memory.flags[heads[alone]] &= ~(Fl.REFERENCED | Fl.YOUNG)


def _pageout(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_PAGEOUT: small pages that only this address space maps, and nobody holds, are written to swap.

    Clean lazyfree pages are dropped instead. Large folios are left in memory.
    """
    parts.lru.drain()
    split_at(parts, mm, start, end)
    memory = parts.memory
    for _, _, ptes in mm.ranges(start, end):
        offsets = np.flatnonzero(ptes.pages())
        pfns = ptes.value[offsets].astype(np.int64)
        alone = (memory.order[pfns] == 0) & (memory.refcount[pfns] == 1) & ((memory.flags[pfns] & Fl.LRU) != 0)
        offsets, pfns = offsets[alone], pfns[alone]
        lazyfree = (memory.flags[pfns] & Fl.SWAPBACKED) == 0
        dropped = offsets[lazyfree & ((ptes.bits[offsets] & P.DIRTY) == 0)]
        unmap_entries(parts, mm, ptes, dropped)
        ptes.bits[dropped] = 0
        ptes.value[dropped] = 0
        _swap_out(parts, mm, ptes, offsets[~lazyfree])


def _swap_out(parts: Parts, mm: Mm, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
    """Write small pages to free slots, as far as there are any, and name the slots instead."""
    swap = parts.swap
    free = swap.free_slots()[: len(offsets)]
    offsets = offsets[: len(free)]
    contents = parts.memory.content[ptes.value[offsets]].tolist()
    for slot, content in zip(free.tolist(), contents, strict=True):
        swap.take(slot, content)
    unmap_entries(parts, mm, ptes, offsets)
    ptes.bits[offsets] = P.SWAP | (ptes.bits[offsets] & P.UFFD_WP)
    ptes.value[offsets] = free
    mm.swap_entries += len(offsets)
    parts.counters.count("pswpout", len(offsets))


_ON_PAGES = {"DONTNEED": _dontneed, "FREE": _free, "COLD": _cold, "PAGEOUT": _pageout}


def fork(parts: Parts, parent: Mm, child: Mm) -> None:
    """Fill a new address space with all that `parent` maps, to be copied when either writes (dup_mmap).

    Droppable mappings come without their pages. Pages that are pinned are shared like all others.
    """
    for vma in parent.vmas:
        child.insert_vma(SimVma(vma.start, vma.end, vma.flags - NOT_INHERITED, vma.anon_vma, vma.permissions))
    for vma in parent.vmas:
        if DROPPABLE not in vma.flags:
            _copy_range(parts, parent, child, vma)


def _copy_range(parts: Parts, parent: Mm, child: Mm, vma: SimVma) -> None:
    for address, pages, ours in parent.ranges(vma.start, vma.end):
        theirs = child.ptes(address, pages)
        page = ours.pages()
        pfns = ours.value[page].astype(np.int64)
        parts.rmap.add(pfns, child.id)
        np.add.at(parts.memory.refcount, parts.memory.heads(pfns), 1)
        slots = ours.value[(ours.bits & P.SWAP) != 0]
        parts.swap.count[slots] += np.uint16(1)
        ours.bits[page] &= ~P.WRITE
        marker = (ours.bits & P.UFFD_MARKER) != 0
        theirs.bits[:] = np.where(marker, 0, ours.bits & ~P.UFFD_WP)
        theirs.value[:] = ours.value
        child.anon_pages += len(pfns)
        child.swap_entries += len(slots)
        if child.pmd(address) is Pmd.NONE:
            child.set_pmd(address, parent.pmd(address))


def exit_mm(parts: Parts, mm: Mm) -> None:
    """Unmap everything (exit_mmap)."""
    mm.exiting = True
    for vma in list(mm.vmas):
        zap(parts, mm, vma.start, vma.end)
    mm.remove_vmas(0, 1 << 64)
