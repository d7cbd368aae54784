"""Swap-in by a page fault (do_swap_page, mm/memory.c)."""

from __future__ import annotations

import numpy as np

from mthp.sim.allocation.alloc import charge, take_folio
from mthp.sim.allocation.migrate import wait_for_migration
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, Ptes, SimVma
from mthp.sim.parts import Parts

_MARKERS = P.GUARD | P.UFFD_MARKER


def do_swap_page(parts: Parts, mm: Mm, vma: SimVma, address: int) -> bool:
    """Read and map the swapped page at `address`, perhaps with neighbours.

    Returns:
        False if the entry is a marker, or memory ran out.
    """
    ptes = mm.ptes(address, 1)
    if ptes.bits[0] & _MARKERS:
        return False
    if ptes.bits[0] & P.MIGRATION:
        wait_for_migration(parts, mm, address)
        return True
    slot = int(ptes.value[0])
    pfn = int(parts.swap.cached[slot])
    if pfn:
        _map_cached(parts, mm, ptes, pfn, slot)
        return True
    return _read_and_map(parts, mm, vma, address, slot)


def _map_cached(parts: Parts, mm: Mm, ptes: Ptes, pfn: int, slot: int) -> None:
    """Map one page of a folio that is in the swap cache already."""
    head = parts.memory.head(pfn)
    parts.memory.refcount[head] += 1
    parts.rmap.add(np.array([pfn], np.int64), mm.id)
    _replace_entries(parts, mm, ptes, pfn, slot)
    _try_to_free_swap(parts, head)


def _read_and_map(parts: Parts, mm: Mm, vma: SimVma, address: int, slot: int) -> bool:
    """Read a folio of the largest order that entries and slots allow, and map all of it."""
    memory, swap = parts.memory, parts.swap
    # Falling back order by order, each attempt counted (swpin_fallback).
    for order in (*_swapin_orders(parts, mm, vma, address, slot), 0):
        head = _folio_for(parts, mm, order, slot & -(1 << order))
        if head is not None:
            break
        if order:
            parts.counters.count_mthp(order, "swpin_fallback")
    else:
        return False
    size = 1 << order
    shift = slot % size
    first = address - shift * parts.geometry.page_size
    slots = slice(slot - shift, slot - shift + size)
    memory.content[head : head + size] = swap.content[slots]
    # Even if it leaves the cache again at once: another fault of the same slot must find this folio.
    swap.add_to_cache(head, slots.start)
    memory.set(head, Fl.UPTODATE)
    parts.counters.count("pswpin", size)
    parts.clock.spend("swap_in", size)
    parts.counters.count("pgmajfault")
    if order:
        parts.counters.count_mthp(order, "swpin")
    # Swap-in puts the folio on the LRU lists whatever the mapping, so this does not mlock it.
    parts.lru.add(head)
    # One for each mapped page; the allocation has one already.
    memory.refcount[head] += size - 1
    parts.rmap.add_new_anon(head, mm.id, swapbacked=True)
    _replace_entries(parts, mm, mm.ptes(first, size), head, slots.start)
    _try_to_free_swap(parts, head)
    return True


def _folio_for(parts: Parts, mm: Mm, order: int, slot: int) -> int | None:
    """Allocate a charged folio for the slots from `slot` on (__swap_cache_alloc); None if that fails."""
    # Another fault has read a part of it already, and a slot has one page in the cache.
    if order and parts.swap.cached[slot : slot + (1 << order)].any():
        return None
    # A large folio is only taken where that costs no reclaim: the page alone would do.
    head = take_folio(parts, order, may_wait=not order)
    if head is None or charge(parts, head, mm.charge, may_wait=not order):
        return head
    if order:
        parts.counters.count_mthp(order, "swpin_fallback_charge")
    parts.memory.put(head)
    return None


def _swapin_orders(parts: Parts, mm: Mm, vma: SimVma, address: int, slot: int) -> list[int]:
    """Return the orders for a swap-in at `address`, the largest first, without 0.

    Follows thp_swapin_suitable_orders: the device is synchronous, userfaultfd is not armed, the mapping has all of the
    aligned block, and its entries refer to adjoining slots, aligned alike.
    """
    # Other devices read ahead by single pages instead; and userfaultfd wants to know of each page.
    if not parts.swap.synchronous or vma.userfaultfd_armed:
        return []
    if parts.kernel.swaps_in_shared_singly and parts.swap.count[slot] > 1:
        return []
    geometry = parts.geometry
    page = address // geometry.page_size
    for order in reversed(parts.fault_orders(mm, vma)):
        size = 1 << order
        first = (page & -size) * geometry.page_size
        if (
            order >= geometry.pmd_order
            or (page - slot) % size
            or not vma.covers(first, first + geometry.size_of(order))
        ):
            continue
        ptes = mm.ptes(first, size)
        slots = np.arange(slot - slot % size, slot - slot % size + size)
        # As can_swapin_thp() compares them (mm/memory.c): one entry that differs, and the folio would map a wrong page.
        alike = (ptes.bits == ptes.bits[(page % size)]).all() and np.array_equal(ptes.value, slots)
        if alike:
            # What is alike throughout a block is so in its halves.
            return [smaller for smaller in reversed(parts.fault_orders(mm, vma)) if smaller <= order]
    return []


def _replace_entries(parts: Parts, mm: Mm, ptes: Ptes, pfn: int, slot: int) -> None:
    """Make entries that refer to slots from `slot` on map frames from `pfn` on."""
    size = len(ptes.bits)
    # A writable swap entry belongs to an exclusive page (pte_swp_exclusive); only golden cases have any.
    ptes.bits[:] = (P.PRESENT | P.YOUNG) | (ptes.bits & (P.UFFD_WP | P.WRITE))
    ptes.value[:] = np.arange(pfn, pfn + size)
    parts.swap.count[slot : slot + size] -= np.uint16(1)
    mm.swap_entries -= size
    mm.anon_pages += size


def _try_to_free_swap(parts: Parts, head: int) -> None:
    """Free the slots at once if the device is synchronous (should_try_to_free_swap)."""
    if parts.swap.synchronous:
        parts.swap.free_cache(head)
