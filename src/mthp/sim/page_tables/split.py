"""Splitting of large folios, and the shrinker that splits them when memory is short.

Follows split_folio(), split_huge_pages_pid() and deferred_split_scan() (mm/huge_memory.c). Splitting frees a folio's
unmapped pages and, down to base pages, its zero pages.
"""

from __future__ import annotations

import errno
import re

import numpy as np

from mthp.sim.frames.memory import ZERO_CONTENT, Fl
from mthp.sim.mm import Mm, P, Ptes
from mthp.sim.page_tables.mappings import TableEntries, mappings_of
from mthp.sim.page_tables.zap import munlock_folio
from mthp.sim.parts import Parts

_INHERITED = (
    Fl.ALLOCATED
    | Fl.LRU
    | Fl.REFERENCED
    | Fl.ACTIVE
    | Fl.ANON
    | Fl.SWAPBACKED
    | Fl.SWAPCACHE
    | Fl.DIRTY
    | Fl.UPTODATE
    | Fl.MLOCKED
    | Fl.YOUNG
)
"""Flags that the new folios inherit from the folio that is split."""


def unexplained_references(parts: Parts, head: int) -> int:
    """Return the number of references of pins and other users, beyond mappings and the swap cache."""
    memory = parts.memory
    of_mappings = int(parts.rmap.mapcounts(np.array([head]), np.array([head]))[0])
    of_cache = memory.size(head) if memory.has(head, Fl.SWAPCACHE) else 0
    return int(memory.refcount[head]) - of_mappings - of_cache


def split_folio(parts: Parts, head: int, order: int = 0, at: int | None = None) -> bool:
    """Split a large folio; return whether it was split.

    Unmapped pages are freed, and base pages of zeroes become the zero page. Follows __folio_split()
    (mm/huge_memory.c). A folio that another path has locked is left alone and not counted.

    Args:
        order: order of the new folios.
        at: page around which to split: into halves, and on with the half that holds the page, down to `order`.

    Returns:
        Whether it was split. It is not if it has other users, to order 1, and to large folios while it is in the swap
        cache.
    """
    memory, counters = parts.memory, parts.counters
    old_order, size = int(memory.order[head]), memory.size(head)
    if memory.has(head, Fl.LOCKED):
        return False
    refused = order == 1 or (memory.has(head, Fl.SWAPCACHE) and (order or at is not None))
    if refused and not parts.kernel.counts_refused_splits:
        return False
    # A reference that nothing explains is a pin, or a batch in which the folio waits (folio_expected_ref_count()).
    busy = not memory.has(head, Fl.LRU) or unexplained_references(parts, head)
    # Unmapped only after the checks: a split that fails later has split PMD entries already (unmap_folio()).
    if refused or busy or not _unmap(parts, mapped := mappings_of(parts, head, size), head):
        counters.count_mthp(old_order, "split_failed")
        if old_order == parts.geometry.pmd_order:
            counters.count("thp_split_page_failed")
        return False
    counters.count_mthp(old_order, "split")
    counters.count_mthp(old_order, "nr_anon", -1)
    if memory.has(head, Fl.PARTIALLY_MAPPED):
        counters.count_mthp(old_order, "nr_anon_partially_mapped", -1)
    if old_order == parts.geometry.pmd_order:
        counters.count("thp_split_page")
    parts.clock.spend("split_folio")
    parts.clock.spend("split_page", size)
    _scatter(parts, head, size, _pieces(old_order, order, at), mapped)
    for mapping in mapped:
        _map_zero(parts, mapping)
    _free_unmapped(parts, np.arange(head, head + size))
    return True


def _unmap(parts: Parts, mapped: list[TableEntries], head: int) -> bool:
    """Remove all mappings of a folio (unmap_folio); return whether that succeeded."""
    memory, by_pmd = parts.memory, False
    for number, mapping in enumerate(mapped, 1):
        by_pmd = bool(split := mapping.split_pmd())
        parts.counters.count("thp_split_pmd", split)
        # The mapping takes the folio's mlock with it; restored, it locks base pages only (folio_add_anon_rmap_ptes,
        # mm/rmap.c).
        if mapping.in_locked(parts.geometry).any():
            munlock_folio(parts, head)
        # try_to_migrate_one() then ends the walk over the mappings, and the folio is still mapped.
        if by_pmd and number < len(mapped) and parts.kernel.unmaps_up_to_pmd:
            return False
    # PTEs are removed one after another, so the folio is partially mapped for a moment (deferred_split_folio()).
    if not by_pmd and np.count_nonzero(memory.mapcount[head : head + memory.size(head)]) > 1:
        parts.rmap.partially_mapped(head)
    return True


def _pieces(old_order: int, order: int, at: int | None) -> list[tuple[int, int]]:
    """Return (first page, order) of each folio that a folio is split into, ascending."""
    if at is None:
        return [(first, order) for first in range(0, 1 << old_order, 1 << order)]
    pieces, first, left = [], 0, old_order
    while left > order:
        # Anonymous folios of order 1 do not exist.
        smaller = left - 1 if left != 2 else 0
        parts_of_it = range(first, first + (1 << left), 1 << smaller)
        first, left = at >> smaller << smaller, smaller
        pieces += [(other, smaller) for other in parts_of_it if other != first]
    return sorted([*pieces, (first, left)])


def _scatter(parts: Parts, head: int, size: int, pieces: list[tuple[int, int]], mapped: list[TableEntries]) -> None:
    """Make folios of the pieces, with the state of the folio."""
    memory = parts.memory
    run = slice(head, head + size)
    flags = memory.flags[head] & _INHERITED
    in_cache = bool(flags & Fl.SWAPCACHE)
    memory.deferred.pop(head, None)
    memory.flags[run] = flags | (memory.flags[run] & Fl.POISONED)
    memory.cgroup[run] = memory.cgroup[head]
    # Counted again from the mappings, and from the cache for each of the new folios.
    memory.refcount[run] = 0
    memory.mapcount[run] = 0
    for first, order in pieces:
        memory.order[head + first : head + first + (1 << order)] = order
        parts.counters.count_mthp(order, "nr_anon", int(order > 0))
    for mapping in mapped:
        frames = mapping.frames()
        parts.rmap.add(frames, mapping.mm.id)
        unlocked = (memory.order[frames] == 0) & ((memory.flags[frames] & Fl.MLOCKED) == 0)
        locked = frames[unlocked & mapping.in_locked(parts.geometry)]
        memory.flags[locked] |= Fl.MLOCKED
        parts.counters.count("unevictable_pgs_mlocked", len(locked))
    heads = head + np.array([first for first, _ in pieces])
    memory.refcount[heads] = np.add.reduceat(memory.mapcount[run], heads - head) + in_cache
    if in_cache:
        parts.swap.split_cache(head, size)


def _map_zero(parts: Parts, mapping: TableEntries) -> None:
    """Map the zero page in place of base pages of zeroes (try_to_map_unused_to_zeropage)."""
    memory, frames = parts.memory, mapping.frames()
    zero = (memory.content[frames] == ZERO_CONTENT) & (memory.order[frames] == 0)
    # The program has asked for its locked pages to stay.
    zero &= ((memory.flags[frames] & (Fl.MLOCKED | Fl.POISONED)) == 0) & ~mapping.in_locked(parts.geometry)
    emptied = TableEntries(mapping.mm, mapping.table, mapping.entries[zero])
    memory.mapcount[frames[zero]] -= 1
    memory.refcount[frames[zero]] -= 1
    emptied.set(P.PRESENT | P.ZERO | P.YOUNG | (emptied.bits() & P.UFFD_WP), 0)
    mapping.mm.anon_pages -= int(zero.sum())


def _free_unmapped(parts: Parts, pages: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    """Free the folios of `pages` that no entry maps."""
    memory = parts.memory
    heads = pages[memory.heads(pages) == pages]
    unmapped = heads[parts.rmap.mapcounts(heads, heads) == 0]
    # Held, so that leaving the swap cache does not free it first.
    memory.refcount[unmapped] += 1
    for head in unmapped.tolist():
        parts.swap.free_cache(head)
    small = memory.order[unmapped] == 0
    memory.put_small(unmapped[small])
    for head in unmapped[~small].tolist():
        memory.put(head)


def shrink_deferred(parts: Parts) -> int:
    """Scan the deferred split list once; return the number of folios split (deferred_split_scan).

    A folio that is not worth splitting leaves the list; a partially mapped one that is in use stays.
    """
    memory, split = parts.memory, 0
    # On the list because only some of its pages are mapped; or because it has the PMD order and is new, and may turn
    # out to be mostly zero.
    for head in list(memory.deferred):
        # A split before it may have freed or moved this one.
        if head not in memory.deferred:
            continue
        partial = memory.has(head, Fl.PARTIALLY_MAPPED)
        if not partial and not _underused(parts, head):
            del memory.deferred[head]
        elif split_folio(parts, head):
            parts.counters.count("thp_underused_split_page", int(not partial))
            split += 1
        elif not partial:
            del memory.deferred[head]
    return split


def _underused(parts: Parts, head: int) -> bool:
    """Return whether a folio has more zero pages than khugepaged would fill (thp_underused)."""
    memory, allowed = parts.memory, parts.tunables.max_ptes_none
    run = slice(head, head + memory.size(head))
    # With the default khugepaged would fill the holes again at once.
    if not parts.knobs.shrink_underused or allowed == parts.geometry.ptes_per_pmd - 1:
        return False
    if memory.has(head, Fl.MLOCKED) or (memory.flags[run] & Fl.POISONED).any():
        return False
    return int(np.count_nonzero(memory.content[run] == ZERO_CONTENT)) > allowed


_WRITTEN = re.compile(
    r"\s*([+-]?\d+),0x([0-9a-f]+),0x([0-9a-f]+)(?:,\s*([+-]?\d+)(?:,\s*([+-]?\d+))?)?", re.ASCII | re.IGNORECASE
)
"""Input that the kernel's sscanf() accepts; it ignores the rest of the line."""


def split_huge_pages(parts: Parts, text: str) -> int:
    """Write to ``split_huge_pages`` in debugfs: split the folios of a range (split_huge_pages_pid).

    A folio that cannot be split is skipped, and the write succeeds.

    Args:
        text: ``NUMBER,0xSTART,0xEND[,ORDER[,PAGE]]``: number of an address space, range, and page of the folio.

    Returns:
        0, EINVAL for other input, or ESRCH if the address space does not exist.
    """
    words = _WRITTEN.match(text)
    if words is None:
        return errno.EINVAL
    number, start, end = int(words[1]), int(words[2], 16), int(words[3], 16)
    order = int(words[4] or 0)
    # An older kernel's sscanf() ignores what it does not ask for.
    at = int(words[5]) if words[5] and parts.kernel.splits_at else -1
    mm, page = parts.mms.get(number), parts.geometry.page_size
    if mm is None:
        return errno.ESRCH
    start, end = start // page * page, end // page * page
    # split_huge_pages_pid() stops at the first hole (vma_lookup()).
    for _, _, ptes in mm.ranges(start, min(end, _mapped_up_to(mm, start))):
        _split_mapped(parts, ptes, order, at)
    return 0


def _mapped_up_to(mm: Mm, start: int) -> int:
    """Return the end of the contiguous mappings from `start` on."""
    while (vma := mm.find_vma(start)) is not None and vma.start <= start:
        start = vma.end
    return start


def _split_mapped(parts: Parts, ptes: Ptes, order: int, at: int) -> None:
    """Split the folios of some entries, one entry after another."""
    memory = parts.memory
    for i in np.flatnonzero(ptes.pages()).tolist():
        # A split replaces a page of zeroes by an entry for frame 0, which does not belong to a folio.
        pfn = int(ptes.value[i])
        if not 0 <= order < memory.order[pfn]:
            continue
        head = memory.head(pfn)
        # A folio with other users is left alone before anything is counted.
        if not unexplained_references(parts, head):
            split_folio(parts, head, order, at if 0 <= at < memory.size(head) else None)
