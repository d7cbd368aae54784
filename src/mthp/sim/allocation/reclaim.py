"""Reclaim: which pages go to swap or are dropped, and in which order.

The kernel's multi-generational LRU finds the pages in use by walking page tables (walk_mm, mm/vmscan.c), and so does
this. A sweep goes over the entries of all address spaces, from where the last one stopped. The order of eviction is not
exactly the kernel's. It depends on the same causes: use, pins, locked mappings, limits of memory cgroups, room on the
swap device.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memcg import ROOT
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, PageTables, Pmd
from mthp.sim.page_tables.mappings import TableEntries, mappings_of
from mthp.sim.page_tables.split import shrink_deferred, split_folio, unexplained_references
from mthp.sim.page_tables.zap import unmap_entries
from mthp.sim.parts import Parts

CLUSTER = 32
"""Pages that are reclaimed at a time (SWAP_CLUSTER_MAX, include/linux/swap.h)."""

_SWEEPS = 5
"""Sweeps after which even an active page that was not used meanwhile is evicted, and one more."""

_ENTRIES = 512
"""Least number of entries scanned together."""


def reclaim(parts: Parts, wanted: int, cgroup: int = ROOT, *, by: str = "direct") -> int:
    """Reclaim about `wanted` frames.

    Args:
        cgroup: only pages charged to it or its descendants.
        by: ``"direct"`` or ``"kswapd"``, for the counters.

    Returns:
        Frames that became free, or uncharged from the cgroup; 0 if nothing can be reclaimed.
    """
    # Never a page alone: the kernel reclaims in clusters, too, so that the next allocations need no reclaim.
    return _Reclaim(parts, max(wanted, CLUSTER), cgroup, by).run()


def balance(parts: Parts) -> None:
    """Reclaim in the background until every zone is at its high watermark or nothing can be reclaimed (kswapd)."""
    for zone in parts.memory.zones:
        while zone.free_frames < zone.watermarks.high:
            before = zone.free_frames
            # What was freed may lie in another zone: give up, like kswapd after some tries (kswapd_failures).
            if not reclaim(parts, zone.watermarks.high - before, by="kswapd") or zone.free_frames <= before:
                break


class _Reclaim:
    """One call of :func:`reclaim`."""

    def __init__(self, parts: Parts, wanted: int, cgroup: int, by: str) -> None:
        self.parts = parts
        self.wanted = wanted
        self.cgroup = cgroup
        self.by = by
        self.groups = parts.memory.cgroups.below(cgroup)
        self.swappable = False
        self.before = self._level()

    def _level(self) -> int:
        """Return a count that rises with each frame reclaimed."""
        memory = self.parts.memory
        return memory.free_frames if self.cgroup == ROOT else -int(memory.cgroups.usage[self.cgroup])

    @property
    def freed(self) -> int:
        return self._level() - self.before

    def run(self) -> int:
        parts = self.parts
        parts.lru.drain()
        # Cheaper memory goes first: page cache, then pages of large folios that are unmapped or zero.
        if self.cgroup == ROOT:
            drop_cache(parts, self.wanted)
        if self.freed < self.wanted:
            shrink_deferred(parts)
        # A used page becomes old only from sweep to sweep.
        for _ in range(_SWEEPS):
            if self.freed >= self.wanted or not self._sweep():
                break
        return self.freed

    def _sweep(self) -> bool:
        """Sweep all address spaces once, or until enough is freed; return False if no page was a candidate."""
        self.swappable = self.parts.swap.has_room()
        if not self.swappable and not self.parts.memory.has_lazyfree():
            return False
        # From where the last call stopped: otherwise the first address space would always lose its pages first.
        start_mm, start_address = self.parts.reclaim_at
        numbers = sorted(self.parts.mms)
        at = next((i for i, number in enumerate(numbers) if number >= start_mm), 0)
        # The address space at which the last sweep stopped is gone.
        if at < len(numbers) and numbers[at] != start_mm:
            start_address = 0
        rounds = [(number, 0, None) for number in numbers[at + 1 :] + numbers[:at]]
        looked = False
        for number, first, last in (
            # The rest of the first address space, all others, and then its beginning.
            [(n, start_address, None) for n in numbers[at : at + 1]]
            + rounds
            + [(n, 0, start_address) for n in numbers[at : at + 1]]
        ):
            for table, rows, address in self._chunks(self.parts.mms[number], first, last):
                looked |= self._look(self.parts.mms[number], table, rows)
                self.parts.reclaim_at = (number, address)
                if self.freed >= self.wanted:
                    return True
        return looked

    def _chunks(self, mm: Mm, first: int, last: int | None) -> list[tuple[PageTables, slice, int]]:
        """Return (table, rows, address behind them) in steps, from address `first` up to `last`."""
        size = self.parts.geometry.pmd_size
        # Whole rows, so that a sweep can go on at a row; few of them, so that little more is aged than is wanted.
        step = max(self.wanted, _ENTRIES) // self.parts.geometry.ptes_per_pmd or 1
        chunks = []
        for table in mm.tables:
            begin = max(first // size - table.first, 0)
            end = len(table.pmd) if last is None else min(last // size - table.first, len(table.pmd))
            for row in range(begin, end, step):
                stop = min(row + step, end)
                if table.pmd[row:stop].any():
                    chunks.append((table, slice(row, stop), (table.first + stop) * size))
        return chunks

    def _look(self, mm: Mm, table: PageTables, rows: slice) -> bool:
        """Age the pages of some rows, and evict those at the bottom; return False if none is a candidate."""
        memory, n = self.parts.memory, table.bits.shape[1]
        bits = table.bits[rows].ravel()
        entries = np.flatnonzero((bits & (P.PRESENT | P.ZERO | P.SPECIAL)) == P.PRESENT)
        self.parts.clock.spend("reclaim_pte", len(bits))
        self.parts.counters.count(f"pgscan_{self.by}", len(entries))
        young = (bits[entries] & P.YOUNG) != 0
        entries += rows.start * n
        frames = table.value.ravel()[entries].astype(np.int64)
        heads, inverse = np.unique(memory.heads(frames), return_inverse=True)
        ours = (memory.flags[heads] & (Fl.LRU | Fl.ANON | Fl.LOCKED | Fl.MLOCKED)) == Fl.LRU | Fl.ANON
        ours &= self.groups[memory.cgroup[heads]]
        # Without room on a swap device, pages that would have to be written there are not scanned (get_swappiness).
        if not self.swappable:
            ours &= (memory.flags[heads] & Fl.SWAPBACKED) == 0
        if not ours.any():
            return False
        used = np.bincount(inverse, weights=young, minlength=len(heads)) > 0
        table.bits.ravel()[entries[ours[inverse] & young]] &= ~P.YOUNG
        # A PMD entry has one young bit for all its pages.
        table.bits[rows][table.pmd[rows] == Pmd.HUGE] &= ~P.YOUNG
        flags = memory.flags[heads]
        # Two grades up for use, the same two down without it; an unused page at the bottom is evicted.
        raised = np.where(flags & Fl.REFERENCED, flags | Fl.ACTIVE, flags | Fl.REFERENCED)
        lowered = np.where(flags & Fl.ACTIVE, flags & ~Fl.ACTIVE, flags & ~Fl.REFERENCED)
        memory.flags[heads] = np.where(ours, np.where(used, raised, lowered), flags)
        bottom = ours & ~used & ((flags & (Fl.ACTIVE | Fl.REFERENCED)) == 0)
        before = self.freed
        sizes = np.where(bottom, np.left_shift(1, memory.order[heads].astype(np.int64)), 0)
        # No more than is wanted, rounded up to the end of a folio.
        bottom &= np.cumsum(sizes) - sizes < max(self.wanted - before, CLUSTER)
        which = bottom[inverse]
        evict(self.parts, mm, table, entries[which], frames[which])
        self.parts.counters.count(f"pgsteal_{self.by}", max(self.freed - before, 0))
        return True


def drop_cache(parts: Parts, count: int) -> None:
    """Drop up to `count` pages of the page cache, the oldest first."""
    memory = parts.memory
    frames = list(memory.cache)[:count]
    for frame in frames:
        del memory.cache[frame]
    memory.put_small(np.array(frames, np.int64))


def evict(parts: Parts, mm: Mm, table: PageTables, entries: NDArray[np.intp], frames: Frames) -> None:
    """Evict the folios that some entries of one table map, if nothing else holds them.

    Args:
        entries: intp, shape (entries,): numbers of the entries, counted through the table.
        frames: int64, same shape: frames that they map.
    """
    memory = parts.memory
    # Small folios with one mapping, which are nearly all, are evicted together; the others one by one.
    plain = (memory.order[frames] == 0) & (memory.refcount[frames] == 1)
    plain &= (memory.flags[frames] & (Fl.LRU | Fl.LOCKED | Fl.SWAPCACHE | Fl.POISONED)) == Fl.LRU
    plain &= ~TableEntries(mm, table, entries).in_locked(parts.geometry)
    alone = TableEntries(mm, table, entries[plain])
    _evict_plain(parts, alone)
    for head in np.unique(memory.heads(frames[~plain])).tolist():
        evict_folio(parts, head)


def _evict_plain(parts: Parts, mapped: TableEntries) -> None:
    """Evict small folios, each mapped by one entry and held by nothing else."""
    memory, bits, frames = parts.memory, mapped.bits(), mapped.frames()
    lazyfree = (memory.flags[frames] & Fl.SWAPBACKED) == 0
    clean = (bits & P.DIRTY) == 0
    # Written since MADV_FREE: no longer lazyfree (folio_set_swapbacked() in try_to_unmap_one(), mm/rmap.c).
    memory.flags[frames[lazyfree & ~clean]] |= Fl.SWAPBACKED
    _unmap(parts, TableEntries(mapped.mm, mapped.table, mapped.entries[lazyfree & clean]), None)
    entries = mapped.entries[~lazyfree]
    # As many as have room; the others stay mapped.
    slots = parts.swap.free_slots()[: len(entries)].astype(np.int64)
    going = TableEntries(mapped.mm, mapped.table, entries[: len(slots)])
    parts.swap.take_many(slots, memory.content[going.frames()])
    _unmap(parts, going, slots)
    _count_out(parts, len(slots))


def _unmap(parts: Parts, mapped: TableEntries, slots: Frames | None) -> None:
    """Unmap entries; from then on they refer to `slots`, or are none."""
    if not len(mapped.entries):
        return
    mm, table = mapped.mm, mapped.table
    bits = mapped.bits()
    n = table.bits.shape[1]
    for row in np.unique(mapped.entries // n).tolist():
        inside = mapped.entries[mapped.entries // n == row] - row * n
        unmap_entries(parts, mm, mm.ptes((table.first + row) * parts.geometry.pmd_size, n), inside)
    if slots is None:
        mapped.set(np.uint16(0), 0)
    else:
        mapped.set(P.SWAP | (bits & P.UFFD_WP), slots)
        mm.swap_entries += len(slots)


def _count_out(parts: Parts, pages: int) -> None:
    parts.counters.count("pswpout", pages)
    parts.clock.spend("swap_out", pages)


def evict_folio(parts: Parts, head: int) -> bool:
    """Evict one folio from all address spaces, or split it and evict its pages.

    Returns:
        Whether any of it was evicted.
    """
    memory, order, size = parts.memory, int(parts.memory.order[head]), parts.memory.size(head)
    mapped = mappings_of(parts, head, size)
    if not memory.has(head, Fl.LRU) or memory.has(head, Fl.LOCKED) or unexplained_references(parts, head):
        return False
    if (memory.flags[head : head + size] & Fl.POISONED).any():
        return False
    # One locked mapping keeps the folio for all of them (try_to_unmap_one(), mm/rmap.c).
    if not mapped or any(mapping.in_locked(parts.geometry).any() for mapping in mapped):
        return False
    if not memory.has(head, Fl.SWAPBACKED):
        # Written since MADV_FREE through one of its mappings.
        if any((m.bits() & P.DIRTY).any() for m in mapped):
            memory.set(head, Fl.SWAPBACKED)
            return False
        _unmap_all(parts, mapped, head, None)
        return True
    if memory.has(head, Fl.SWAPCACHE):
        # Its slots still have its contents: a write would have taken it out of the cache first.
        slot: int | None = parts.swap.slot_of(head)
    else:
        partial = memory.has(head, Fl.PARTIALLY_MAPPED)
        # A partially mapped folio is split first, because its unmapped pages need no slot (shrink_folio_list(),
        # mm/vmscan.c).
        slot = None if partial else parts.swap.free_cluster(order)
        if slot is None and order:
            return _evict_split(parts, head, size, partial=partial)
        if slot is None:
            return False
        parts.swap.write(head, slot)
        _count_out(parts, size)
        if order:
            parts.counters.count_mthp(order, "swpout")
        if order == parts.geometry.pmd_order:
            parts.counters.count("thp_swpout")
    _unmap_all(parts, mapped, head, slot)
    return True


def _unmap_all(parts: Parts, mapped: list[TableEntries], head: int, slot: int | None) -> None:
    """Unmap a folio everywhere; its pages are at `slot` and behind, or dropped."""
    parts.memory.refcount[head] += 1
    for mapping in mapped:
        parts.counters.count("thp_split_pmd", mapping.split_pmd())
        slots = None if slot is None else mapping.frames() - head + slot
        if slots is not None:
            np.add.at(parts.swap.count, slots, np.uint16(1))
        _unmap(parts, mapping, slots)
    parts.swap.leave_cache(head)
    parts.memory.put(head)


def _evict_split(parts: Parts, head: int, size: int, *, partial: bool) -> bool:
    order = int(parts.memory.order[head])
    if not split_folio(parts, head):
        return False
    if not partial:
        parts.counters.count_mthp(order, "swpout_fallback")
        if order == parts.geometry.pmd_order:
            parts.counters.count("thp_swpout_fallback")
    # The split has freed the unmapped ones.
    pages = [page for page in range(head, head + size) if parts.memory.flags[page] & Fl.ANON]
    return sum(evict_folio(parts, page) for page in pages) > 0
