"""Invariants of a simulated machine between any two calls.

Each check below counts from page tables and free lists what the machine counts as it goes, and reports differences. Its
cost grows with the number of frames and entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.sim.frames.memory import Fl, Memory
from mthp.sim.machine import Machine
from mthp.sim.mm import Mm, P, Pmd
from mthp.sim.parts import Parts

_NO_BITS = np.uint16(0)


def check(machine: Machine) -> list[str]:
    """Everything that does not add up, as sentences; empty if all does."""
    parts = machine.parts
    return [
        *_frames(parts.memory),
        *_mappings(parts),
        *_references(parts),
        *_swap(parts),
        *_levels(parts),
        *(line for mm in parts.mms.values() for line in _page_tables(parts, mm)),
    ]


def _heads(memory: Memory) -> NDArray[np.intp]:
    """Return the heads of all folios, ascending: intp, shape (folios,)."""
    used = np.flatnonzero(memory.flags & Fl.ALLOCATED)
    heads: NDArray[np.intp] = used[memory.heads(used) == used]
    return heads


def _sizes(memory: Memory, heads: NDArray[np.intp]) -> NDArray[np.int64]:
    return np.left_shift(np.int64(1), memory.order[heads].astype(np.int64))


def _frames(memory: Memory) -> list[str]:
    """Every frame is free once, or in one folio; free blocks are aligned, and no two free buddies are apart."""
    wrong = []
    seen = np.zeros(len(memory.flags), np.int16)
    for number, zone in enumerate(memory.zones):
        blocks = dict.fromkeys(zone.free_blocks())
        for head, order in blocks:
            seen[head : head + (1 << order)] += 1
            if head & ((1 << order) - 1):
                wrong.append(f"free block {head} of order {order} is not aligned")
            if order < zone.max_order and (head ^ (1 << order), order) in blocks:
                wrong.append(f"free block {head} of order {order} was not merged with its buddy")
        free = sum(1 << order for _, order in blocks)
        if free != zone.free_frames:
            wrong.append(f"zone {number} counts {zone.free_frames} free frames and has {free}")
    heads = _heads(memory)
    for order in np.unique(memory.order[heads]).tolist():
        of_order = heads[memory.order[heads] == order]
        for page in range(1 << order):
            seen[of_order + page] += 1
            if (memory.order[of_order + page] != order).any():
                wrong.append(f"pages of a folio of order {order} disagree about it")
    first = memory.zones[0].start
    if lost := np.flatnonzero(seen[first:] != 1).tolist():
        wrong.append(f"{len(lost)} frames are in no place or in several, the first is {first + lost[0]}")
    return wrong


def _mapped_pages(parts: Parts) -> dict[int, NDArray[np.int64]]:
    """Return the frames that each address space maps, one per entry."""
    found = {}
    for number, mm in parts.mms.items():
        pages = [table.value[(table.bits & (P.PRESENT | P.ZERO | P.SPECIAL)) == P.PRESENT] for table in mm.tables]
        found[number] = np.concatenate([np.zeros(0, np.uint32), *pages]).astype(np.int64)
    return found


def _mappings(parts: Parts) -> list[str]:
    """Check mapcounts, of pages and of large folios, and RSS against the page tables."""
    memory, wrong = parts.memory, []
    frames = len(memory.flags)
    mapped = _mapped_pages(parts)
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *mapped.values()]), minlength=frames)
    used = (memory.flags & Fl.ALLOCATED) != 0
    if (counts[~used] > 0).any():
        wrong.append(f"frame {np.flatnonzero(counts * ~used)[0]} is mapped and free")
    differ = np.flatnonzero(used & (memory.mapcount != counts))
    if len(differ):
        frame = differ[0]
        wrong.append(f"frame {frame} has mapcount {memory.mapcount[frame]} and is mapped {counts[frame]} times")
    for head in _heads(memory).tolist():
        size = memory.size(head)
        if size == 1:
            continue
        total = int(counts[head : head + size].sum())
        if memory.refcount[head + 1] != total:
            wrong.append(f"folio {head} counts {memory.refcount[head + 1]} mappings and has {total}")
        first = int(memory.refcount[head + 3]) & 0xFFFF
        own = np.count_nonzero((mapped.get(first, counts[:0]) >> int(memory.order[head])) == head // size)
        if total and memory.refcount[head + 2] != own:
            wrong.append(f"folio {head} counts {memory.refcount[head + 2]} mappings of its first mm and has {own}")
    for number, pages in mapped.items():
        mm = parts.mms[number]
        count = len(pages) + sum(int(np.count_nonzero(table.bits & P.MIGRATION)) for table in mm.tables)
        if mm.anon_pages != count:
            wrong.append(f"mm {number} counts {mm.anon_pages} pages and maps {count}")
    return wrong


def _references(parts: Parts) -> list[str]:
    """References are explained; nothing is locked; every folio is on an LRU list or waits in the batch."""
    memory, wrong = parts.memory, []
    heads = _heads(memory)
    sizes = _sizes(memory, heads)
    expected = np.zeros(len(memory.flags), np.int64)
    expected[heads] = parts.rmap.mapcounts(heads, heads) + sizes * ((memory.flags[heads] & Fl.SWAPCACHE) != 0)
    expected[heads] += (memory.flags[heads] & Fl.OWNED) != 0
    waiting = np.array(parts.lru.waiting, np.int64)
    np.add.at(expected, waiting, 1)
    for head, references in parts.pins.items():
        expected[head] += references
    migrating = list(parts.migrating)
    expected[migrating] += 1
    differ = heads[memory.refcount[heads] != expected[heads]]
    if len(differ):
        head = differ[0]
        wrong.append(f"folio {head} has {memory.refcount[head]} references, {expected[head]} are explained")
    if set(np.flatnonzero(memory.flags & Fl.LOCKED).tolist()) != set(migrating):
        wrong.append("a folio is still locked")
    heads = heads[((memory.flags[heads] & Fl.OWNED) == 0) & ~np.isin(heads, migrating)]
    on_list = (memory.flags[heads] & Fl.LRU) != 0
    waits = np.isin(heads, waiting)
    if (on_list == waits).any():
        wrong.append(f"folio {heads[on_list == waits][0]} is on a list and in the batch, or in neither")
    return wrong


def _swap(parts: Parts) -> list[str]:
    """Check that slots are counted once for each entry, and that folios of the swap cache have their slots."""
    swap, memory, wrong = parts.swap, parts.memory, []
    named = np.zeros(len(swap.count), np.int64)
    for number, mm in parts.mms.items():
        entries = 0
        for table in mm.tables:
            slots = table.value[(table.bits & P.SWAP) != _NO_BITS]
            named += np.bincount(slots, minlength=len(named))
            entries += len(slots)
        if mm.swap_entries != entries:
            wrong.append(f"mm {number} counts {mm.swap_entries} swap entries and has {entries}")
    differ = np.flatnonzero(named != swap.count)
    if len(differ):
        wrong.append(f"slot {differ[0]} is counted {swap.count[differ[0]]} times and named {named[differ[0]]} times")
    in_cache = set(memory.heads(swap.cached[swap.cached > 0]).tolist())
    flagged = set(np.flatnonzero(memory.flags & Fl.SWAPCACHE).tolist())
    if in_cache != flagged:
        wrong.append(f"folios {sorted(in_cache ^ flagged)[:4]} are in the swap cache for one side only")
    return wrong


def _levels(parts: Parts) -> list[str]:
    """Counters that are levels, and the charges of memory cgroups, are what memory holds."""
    memory, wrong = parts.memory, []
    heads = _heads(memory)
    anon = heads[(memory.flags[heads] & Fl.ANON) != 0]
    for order in parts.geometry.anon_orders:
        of_order = anon[memory.order[anon] == order]
        partial = np.count_nonzero(memory.flags[of_order] & Fl.PARTIALLY_MAPPED)
        for name, level in (("nr_anon", len(of_order)), ("nr_anon_partially_mapped", partial)):
            counter = f"{parts.geometry.sysfs_name(order)}/{name}"
            if parts.counters[counter] != level:
                wrong.append(f"{counter} is {parts.counters[counter]}, there are {level}")
    usage = np.bincount(memory.cgroup[heads], weights=_sizes(memory, heads), minlength=len(memory.cgroups.usage))
    for number in range(1, len(usage)):
        held = int(usage[memory.cgroups.below(number)].sum())
        if held != memory.cgroups.usage[number]:
            wrong.append(f"cgroup {number} is charged {memory.cgroups.usage[number]} frames and has {held}")
    partly = set(anon[(memory.flags[anon] & Fl.PARTIALLY_MAPPED) != 0].tolist())
    if strays := (partly - memory.deferred.keys()) | (memory.deferred.keys() - set(anon.tolist())):
        wrong.append(f"folios {sorted(strays)[:4]} are to be split for one side only")
    cache = set(np.flatnonzero((memory.flags & (Fl.OWNED | Fl.LRU)) == Fl.OWNED | Fl.LRU).tolist())
    if cache != memory.cache.keys():
        wrong.append(f"frames {sorted(cache ^ memory.cache.keys())[:4]} are page cache for one side only")
    return wrong


def _page_tables(parts: Parts, mm: Mm) -> list[str]:
    """Check that entries are in mappings only, and that a PMD entry agrees with the PTEs below it."""
    geometry, memory, wrong = parts.geometry, parts.memory, []
    for table in mm.tables:
        for row in np.flatnonzero((table.pmd != Pmd.NONE) | table.bits.any(axis=1)).tolist():
            address = (table.first + row) * geometry.pmd_size
            value = table.value[row].astype(np.int64)
            offsets = np.flatnonzero(table.bits[row])
            if table.pmd[row] == Pmd.NONE and len(offsets):
                wrong.append(f"mm {mm.id} has entries below an empty PMD entry at {address:#x}")
            elif table.pmd[row] == Pmd.HUGE:
                head = int(value[0])
                zero = table.bits[row, 0] & P.ZERO
                whole = np.array_equal(value, np.arange(head, head + geometry.ptes_per_pmd))
                whole = whole and memory.order[head] == geometry.pmd_order and memory.head(head) == head
                if not (whole or (zero and not value.any())):
                    wrong.append(f"mm {mm.id} maps no whole folio by the PMD entry at {address:#x}")
                if (table.bits[row] != table.bits[row, 0]).any():
                    wrong.append(f"mm {mm.id} has differing entries below the PMD entry at {address:#x}")
            for offset in offsets[[0, -1]].tolist() if len(offsets) else []:
                at = address + offset * geometry.page_size
                vma = mm.find_vma(at)
                if vma is None or not vma.start <= at < vma.end:
                    wrong.append(f"mm {mm.id} has an entry at {at:#x}, where nothing is mapped")
    return wrong
