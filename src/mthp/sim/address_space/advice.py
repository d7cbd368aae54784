"""madvise(2), without MADV_COLLAPSE: the effect of each advice on pages (mm/madvise.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mthp.sim.address_space.syscalls import change_flags, whole_pages
from mthp.sim.allocation.reclaim import evict
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import HUGEPAGE, NOHUGEPAGE, Mm, P, Pmd, Ptes, SimVma
from mthp.sim.page_tables.split import split_folio
from mthp.sim.page_tables.zap import drop_swap, zap
from mthp.sim.parts import Parts


def madvise(parts: Parts, mm: Mm, start: int, end: int, advice: str) -> int:
    """Call madvise with one of the words of ADVICE.

    Returns:
        0; EINVAL for other words, and for locked memory that would lose pages; ENOMEM if some of the range is not
        mapped. The mapped part was advised; an EINVAL ends the call where it occurs.
    """
    if advice not in ADVICE or start % parts.geometry.page_size or end < start:
        return errno.EINVAL
    if start == end:
        return 0
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    if advice == "HUGEPAGE":
        return change_flags(parts, mm, start, end, {HUGEPAGE}, {NOHUGEPAGE})
    if advice == "NOHUGEPAGE":
        return change_flags(parts, mm, start, end, {NOHUGEPAGE}, {HUGEPAGE})
    covered = 0
    for vma in mm.vmas_in(start, end):
        first, last = max(start, vma.start), min(end, vma.end)
        covered += last - first
        # Locked memory stays as it is: every advice that takes pages away or ages them fails (VM_LOCKED, mm/madvise.c).
        if vma.locked and advice != "GUARD_REMOVE":
            return errno.EINVAL
        _ON_PAGES[advice](parts, mm, vma, first, last)
    return 0 if covered == end - start else errno.ENOMEM


def _dontneed(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_DONTNEED: unmap everything but guards."""
    zap(parts, mm, start, end, keep_guards=True)


def _pages_of_whole_folios(parts: Parts, mm: Mm, start: int, end: int, ptes: Ptes) -> NDArray[np.intp]:
    """Return the entries of unshared folios that lie in the range as a whole.

    A large folio that lies there only partly is split, unless it is shared or has other users.
    Entries are intp, shape (pages,).
    """
    offsets = np.flatnonzero(ptes.pages())
    pfns = ptes.value[offsets].astype(np.int64)
    heads = parts.memory.heads(pfns)
    # Another process may still want its pages (folio_maybe_mapped_shared()).
    alone = ~parts.rmap.maybe_shared(pfns, heads)
    offsets, heads = offsets[alone], heads[alone]
    folios, inverse, counts = np.unique(heads, return_inverse=True, return_counts=True)
    cut = counts < np.left_shift(1, parts.memory.order[folios].astype(np.int64))
    usable = ~cut
    for at in np.flatnonzero(cut).tolist():
        usable[at] = split_folio(parts, int(folios[at]))
    # A split may have replaced pages of zeroes by the zero page.
    chosen: NDArray[np.intp] = offsets[usable[inverse] & ptes.pages()[offsets]]
    return chosen


def _free(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_FREE: make pages lazyfree, clean and old; drop swap slots (madvise_free_pte_range)."""
    parts.lru.drain()
    for address, _, ptes in mm.ranges(start, end):
        offsets = _pages_of_whole_folios(parts, mm, start, end, ptes)
        heads = np.unique(parts.memory.heads(ptes.value[offsets].astype(np.int64)))
        # A lazyfree page has no copy in swap, from which it could be read back.
        for head in heads[(parts.memory.flags[heads] & Fl.SWAPCACHE) != 0].tolist():
            parts.swap.free_cache(head)
        ptes.bits[offsets] &= ~(P.YOUNG | P.DIRTY)
        parts.memory.flags[heads[(parts.memory.flags[heads] & Fl.SWAPCACHE) == 0]] &= ~Fl.SWAPBACKED
        drop_swap(parts, mm, ptes)
        swapped = (ptes.bits & P.SWAP) != 0
        ptes.bits[swapped] = 0
        ptes.value[swapped] = 0
        assert mm.pmd(address) is not Pmd.NONE


def _cold(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_COLD: make pages old (madvise_cold_or_pageout_pte_range)."""
    parts.lru.drain()
    for _, _, ptes in mm.ranges(start, end):
        offsets = _pages_of_whole_folios(parts, mm, start, end, ptes)
        heads = parts.memory.heads(ptes.value[offsets].astype(np.int64))
        ptes.bits[offsets] &= ~P.YOUNG
        parts.memory.flags[heads] &= ~(Fl.REFERENCED | Fl.YOUNG | Fl.ACTIVE)


def _pageout(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_PAGEOUT: reclaim pages, whether they were used lately or not."""
    parts.lru.drain()
    for address, _, ptes in mm.ranges(start, end):
        offsets = _pages_of_whole_folios(parts, mm, start, end, ptes)
        found = mm.row(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        table, row = found
        n, page = parts.geometry.ptes_per_pmd, parts.geometry.page_size
        first = row * n + address % parts.geometry.pmd_size // page
        frames = ptes.value[offsets].astype(np.int64)
        ptes.bits[offsets] &= ~P.YOUNG
        parts.memory.flags[parts.memory.heads(frames)] &= ~(Fl.REFERENCED | Fl.ACTIVE)
        evict(parts, mm, table, first + offsets, frames)


def _guard_install(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_GUARD_INSTALL: unmap everything; from then on an access ends with SIGSEGV."""
    parts.anon_vma_prepare(mm, vma)
    zap(parts, mm, start, end)
    for address, _, ptes in mm.all_ranges(start, end):
        ptes.bits[:] = P.GUARD
        mm.have_table(address)


def _guard_remove(parts: Parts, mm: Mm, vma: SimVma, start: int, end: int) -> None:
    """MADV_GUARD_REMOVE: remove guards; everything else stays."""
    for _, _, ptes in mm.ranges(start, end):
        ptes.bits[(ptes.bits & P.GUARD) != 0] = 0


_ON_PAGES: dict[str, Callable[[Parts, Mm, SimVma, int, int], None]] = {
    "DONTNEED": _dontneed,
    "FREE": _free,
    "COLD": _cold,
    "PAGEOUT": _pageout,
    "GUARD_INSTALL": _guard_install,
    "GUARD_REMOVE": _guard_remove,
}

ADVICE = frozenset({"HUGEPAGE", "NOHUGEPAGE", *_ON_PAGES})
"""The words that :func:`madvise` accepts."""
