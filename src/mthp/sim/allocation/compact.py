"""Compaction for an allocation: moving pages out of a block until the block is free.

Follows the outline of compact_zone() (mm/compaction.c). Compaction continues where it stopped last and goes over the
aligned blocks of a zone. It skips blocks with a page that cannot be moved, and moves the pages of the others to free
frames elsewhere, until a block of the wanted order is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.sim.frames.buddy import Zone
from mthp.sim.frames.memory import Fl
from mthp.sim.page_tables.mappings import mappings_of
from mthp.sim.parts import Parts

_COSTLY_ORDER = 3
"""The largest order that the kernel does not call costly (PAGE_ALLOC_COSTLY_ORDER, include/linux/mmzone.h)."""

_MAX_DEFER_SHIFT = 6
_FRAMES = 1 << 15
"""Most frames that are searched together; the search begins with one block and doubles."""


def compact(parts: Parts, order: int, nodes: Sequence[int] = ()) -> bool:
    """Free a block of `order` in the first zone of `nodes` (default: all) that succeeds (try_to_compact_pages)."""
    parts.counters.count("compact_stall")
    # A page in a batch is on no list, and could not be isolated.
    parts.lru.drain()
    done = any(compact_zone(parts, zone, order) for zone in parts.memory.zonelist(nodes))
    parts.counters.count("compact_success" if done else "compact_fail")
    return done


def compact_zone(parts: Parts, zone: Zone, order: int) -> bool:
    """Free a block of `order` in one zone, unless compaction is deferred or the zone has too few free frames."""
    state, size = zone.compaction, 1 << order
    # Twice the block, because pages wait in free frames while others are still moved (compact_gap(),
    # include/linux/compaction.h), and the low watermark for costly orders (__compaction_suitable()).
    mark = zone.watermarks.low if order > _COSTLY_ORDER else zone.watermarks.min
    if order > zone.max_order or zone.free_frames < zone.reserve + mark + 2 * size:
        return False
    # A zone in which it failed is left alone for a number of calls that doubles with each failure (defer_compaction()).
    if order >= state.order_failed and state.considered < (1 << state.defer_shift) - 1:
        state.considered += 1
        return False
    if any(_compact_part(parts, zone, order, start, end) for start, end in _stretches(zone, state.cursor, size)):
        state.considered = state.defer_shift = 0
        state.order_failed = max(state.order_failed, order + 1)
        return True
    state.order_failed = min(state.order_failed, order)
    state.defer_shift = min(state.defer_shift + 1, _MAX_DEFER_SHIFT)
    state.considered = 0
    state.cursor = zone.start
    return False


def _stretches(zone: Zone, cursor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of the zone, (first frame, end), beginning at the cursor.

    They go to the zone's end, then continue from its start. The first range is one block, because that usually
    suffices; the following ones grow.
    """
    begin, step = cursor & -size, size
    for at, end in ((begin, zone.end), (zone.start, begin)):
        while at < end:
            yield at, min(at + step, end)
            at, step = at + step, max(size, min(2 * step, _FRAMES))


def _compact_part(parts: Parts, zone: Zone, order: int, start: int, end: int) -> bool:
    """Free a block among some frames of the zone, if possible."""
    size = 1 << order
    used, fixed = used_and_fixed(parts, start, end, order)
    blocks = np.flatnonzero((fixed.reshape(-1, size).sum(axis=1) == 0) & used.reshape(-1, size).any(axis=1))
    parts.clock.spend("compact_frame", end - start)
    parts.counters.count("compact_migrate_scanned", int(used.sum()))
    for block in (start + blocks * size).tolist():
        if _empty(parts, zone, block, order):
            zone.compaction.cursor = block + size
            return True
    return False


def used_and_fixed(parts: Parts, start: int, end: int, order: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which frames are in use, and which of them cannot be moved: bool each, shape (end - start,)."""
    memory = parts.memory
    frames = np.arange(start, end)
    heads = memory.heads(frames)
    flags = memory.flags[heads]
    used: NDArray[np.bool_] = (flags & Fl.ALLOCATED) != 0
    sizes = np.left_shift(1, memory.order[heads].astype(np.int64))
    explained = parts.rmap.mapcounts(frames, heads) + sizes * ((flags & Fl.SWAPCACHE) != 0)
    # A folio in a batch gets on its list when compaction begins.
    waiting = np.isin(heads, parts.lru.waiting)
    explained += ((flags & Fl.OWNED) != 0) + waiting.astype(np.int64)
    fixed = used & (
        (((flags & Fl.LRU) == 0) & ~waiting)
        | ((flags & Fl.LOCKED) != 0)
        | (explained != memory.refcount[heads])
        | ((memory.flags[frames] & Fl.POISONED) != 0)
        # Moving a folio as large as the block takes a free block as large: nothing is gained.
        | (memory.order[heads] >= order)
    )
    return used, fixed


def _empty(parts: Parts, zone: Zone, block: int, order: int) -> bool:
    """Move all pages out of a block, and free it; return False if there is no room for all of them."""
    memory, size = parts.memory, 1 << order
    # The block's own free frames first, so that no page moves from one end of the block to the other.
    claimed = zone.claim(block, order)
    frames = np.arange(block, block + size)
    heads = np.unique(memory.heads(frames[(memory.flags[memory.heads(frames)] & Fl.ALLOCATED) != 0])).tolist()
    target: dict[int, int] = {}
    # Pages are moved into page blocks of movable memory alone (suitable_migration_target(), mm/compaction.c).
    with zone.without(memory.unmovable, parts.geometry.pmd_order):
        # The largest first, while large free blocks are left.
        for head in sorted(heads, key=lambda head: -int(memory.order[head])):
            new = zone.alloc(int(memory.order[head]))
            if new is None:
                break
            target[head] = new
    parts.counters.count("compact_isolated", sum(memory.size(head) for head in target))
    relocate(parts, target)
    # After the pages have left, so that the frames merge into one block.
    for head, at in claimed:
        zone.free(head, at)
    if len(target) < len(heads):
        parts.counters.count("pgmigrate_fail", len(heads) - len(target))
        return False
    return True


def relocate(parts: Parts, target: dict[int, int]) -> None:
    """Move folios with all their state to frames taken for them, and free the old frames.

    Args:
        target: new head by old head, of folios with no references but from mappings and the swap cache.
    """
    if not target:
        return
    memory = parts.memory
    old = np.concatenate([np.arange(head, head + memory.size(head)) for head in target])
    new = np.concatenate([np.arange(to, to + memory.size(head)) for head, to in target.items()])
    first, last = int(old.min()), int(old.max())
    # The new frame of each old one; 0 for those in between, which stay.
    place = np.zeros(last - first + 1, np.int64)
    place[old - first] = new
    for mapped in mappings_of(parts, first, len(place)):
        frames = mapped.frames()
        mapped.set(mapped.bits(), np.where(place[frames - first], place[frames - first], frames))
    for column in (memory.flags, memory.order, memory.refcount, memory.mapcount, memory.content, memory.cgroup):
        column[new] = column[old]
    for head, to in target.items():
        order = int(memory.order[head])
        if memory.has(to, Fl.SWAPCACHE):
            parts.swap.moved(head, to)
        for queue in (memory.deferred, memory.cache):
            if head in queue:
                del queue[head]
                queue[to] = None
        memory.give_back(head, order)
    parts.counters.count("pgmigrate_success", len(old))
    parts.clock.spend("migrate_folio", len(target))
    parts.clock.spend("copy_byte", len(old) * parts.geometry.page_size)
