"""Splitting large folios, and the shrinker that does it when memory is short.

Follows split_folio() and deferred_split_scan() (mm/huge_memory.c). A folio waits to be split for one of two reasons:
some of its pages are mapped no more while others are; or it has the PMD order and is new, and may turn out to be mostly
zero. Splitting frees what is not mapped, and in the second case what is zero.
"""

from __future__ import annotations

import numpy as np

from mthp.sim.mappings import Mapped, mappings_of
from mthp.sim.memory import ZERO_CONTENT, Fl
from mthp.sim.mm import P
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
"""Flags of a folio that each of its pages has when it is split."""


def unexplained_references(parts: Parts, head: int) -> int:
    """References of a folio that neither its mappings nor the swap cache explain: pins, and who else works on it."""
    memory = parts.memory
    of_mappings = int(parts.rmap.mapcounts(np.array([head]), np.array([head]))[0])
    of_cache = memory.size(head) if memory.has(head, Fl.SWAPCACHE) else 0
    return int(memory.refcount[head]) - of_mappings - of_cache


def split_folio(parts: Parts, head: int, *, drop_zero: bool = False) -> bool:
    """Make folios of order 0 of a large one; pages that nobody maps are freed.

    Args:
        drop_zero: map the zero page in place of pages that hold nothing else.

    Returns:
        False if somebody else has it in use.
    """
    memory, counters = parts.memory, parts.counters
    order, size = int(memory.order[head]), memory.size(head)
    if memory.has(head, Fl.LOCKED) or not memory.has(head, Fl.LRU) or unexplained_references(parts, head):
        counters.count_mthp(order, "split_failed")
        if order == parts.geometry.pmd_order:
            counters.count("thp_split_page_failed")
        return False
    mapped = mappings_of(parts, head, size)
    counters.count("thp_split_pmd", sum(mapping.split_pmd() for mapping in mapped))
    counters.count_mthp(order, "split")
    counters.count_mthp(order, "nr_anon", -1)
    if memory.has(head, Fl.PARTIALLY_MAPPED):
        counters.count_mthp(order, "nr_anon_partially_mapped", -1)
    if order == parts.geometry.pmd_order:
        counters.count("thp_split_page")
    parts.clock.spend("split_folio")
    parts.clock.spend("split_page", size)
    _scatter(parts, head, size)
    if drop_zero:
        for mapping in mapped:
            _map_zero(parts, mapping)
    _free_unmapped(parts, np.arange(head, head + size))
    return True


def _scatter(parts: Parts, head: int, size: int) -> None:
    """Give each page what the folio had."""
    memory = parts.memory
    run = slice(head, head + size)
    flags = memory.flags[head] & _INHERITED
    in_cache = bool(flags & Fl.SWAPCACHE)
    memory.deferred.pop(head, None)
    memory.order[run] = 0
    memory.flags[run] = flags | (memory.flags[run] & Fl.POISONED)
    memory.refcount[run] = memory.mapcount[run] + in_cache
    memory.cgroup[run] = memory.cgroup[head]
    if in_cache:
        parts.swap.split_cache(head, size)


def _map_zero(parts: Parts, mapping: Mapped) -> None:
    """Map the zero page where pages hold nothing else (try_to_map_unused_to_zeropage)."""
    memory, frames = parts.memory, mapping.frames()
    zero = (memory.content[frames] == ZERO_CONTENT) & ((memory.flags[frames] & (Fl.MLOCKED | Fl.SWAPCACHE)) == 0)
    emptied = Mapped(mapping.mm, mapping.table, mapping.entries[zero])
    memory.mapcount[frames[zero]] -= 1
    memory.refcount[frames[zero]] -= 1
    emptied.set(P.PRESENT | P.ZERO | (emptied.bits() & P.UFFD_WP), 0)
    mapping.mm.anon_pages -= int(zero.sum())


def _free_unmapped(parts: Parts, pages: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    memory = parts.memory
    unmapped = pages[memory.mapcount[pages] == 0]
    in_cache = (memory.flags[unmapped] & Fl.SWAPCACHE) != 0
    memory.refcount[unmapped] += 1
    for head in unmapped[in_cache].tolist():
        parts.swap.free_cache(head)
    memory.put_small(unmapped)


def shrink_deferred(parts: Parts) -> int:
    """Go over the folios that wait to be split, once: how many were split (deferred_split_scan).

    One that turns out not to be worth it is forgotten; one that somebody uses at the moment waits on.
    """
    memory, split = parts.memory, 0
    for head in list(memory.deferred):
        if head not in memory.deferred:
            continue
        partial = memory.has(head, Fl.PARTIALLY_MAPPED)
        if not partial and not _underused(parts, head):
            del memory.deferred[head]
        elif split_folio(parts, head, drop_zero=not partial):
            parts.counters.count("thp_underused_split_page", int(not partial))
            split += 1
        elif not partial:
            del memory.deferred[head]
    return split


def _underused(parts: Parts, head: int) -> bool:
    """Whether more pages of a folio are zero than khugepaged would fill (thp_underused)."""
    memory, allowed = parts.memory, parts.tunables.max_ptes_none
    run = slice(head, head + memory.size(head))
    if not parts.knobs.shrink_underused or allowed == parts.geometry.ptes_per_pmd - 1:
        return False
    if memory.has(head, Fl.MLOCKED) or (memory.flags[run] & Fl.POISONED).any():
        return False
    return int(np.count_nonzero(memory.content[run] == ZERO_CONTENT)) > allowed
