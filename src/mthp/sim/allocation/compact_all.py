"""Compaction of all memory, as a write to ``/proc/sys/vm/compact_memory`` starts it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.compaction import ZonePages, compact
from mthp.freememory import FREE, MOVES, STAYS, TAIL, MemoryBlocks
from mthp.sim.allocation.compact import relocate, used_and_fixed
from mthp.sim.frames.buddy import Compaction, Zone
from mthp.sim.frames.memory import ZERO_CONTENT, Fl
from mthp.sim.page_tables.split import split_folio
from mthp.sim.parts import Parts


def compact_all(parts: Parts) -> None:
    """Compact every zone once (compact_node(), mm/compaction.c)."""
    parts.lru.drain()
    for zone in parts.memory.zones:
        # It goes over the whole zone, and compaction for an allocation begins there again (whole_zone).
        zone.compaction = Compaction(zone.start)
        # Free pages are not isolated below the watermark (__isolate_free_page(), mm/page_alloc.c).
        if zone.free_frames > zone.watermarks.min:
            _compact(parts, zone)


def memory_blocks(parts: Parts) -> MemoryBlocks:
    """Return the machine's memory in blocks of the PMD order."""
    zones, order = parts.memory.zones, parts.geometry.pmd_order
    numbers = [np.arange(zone.start >> order, zone.end >> order) for zone in zones]
    zone_of = np.repeat(np.arange(len(zones), dtype=np.int8), [len(part) for part in numbers])
    kinds, folios = (np.concatenate(column) for column in zip(*(_pages(parts, zone) for zone in zones), strict=True))
    shape, joined = (-1, 1 << order), np.concatenate(numbers)
    return MemoryBlocks(
        order, joined, zone_of, kinds.reshape(shape), folios.reshape(shape), parts.memory.unmovable[joined]
    )


def _pages(parts: Parts, zone: Zone) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return kind and folio of each page of a zone, as in MemoryBlocks: int8, shape (pages,)."""
    memory, frames = parts.memory, np.arange(zone.start, zone.end)
    heads = memory.heads(frames)
    used, fixed = used_and_fixed(parts, zone.start, zone.end, parts.geometry.pmd_order)
    # A folio stays if one of its pages does.
    fixed = np.isin(heads, heads[fixed])
    folios = np.where(heads == frames, memory.order[heads], TAIL)
    kinds = np.select([~used, fixed], [FREE, STAYS], MOVES).astype(np.int8)
    return kinds, np.where(used, folios, 0).astype(np.int8)


def _compact(parts: Parts, zone: Zone) -> None:
    """Let the scanners go over a zone, then split and move what they found."""
    memory, order = parts.memory, parts.geometry.pmd_order
    kinds, folios = _pages(parts, zone)
    zero = memory.content[zone.start : zone.end] == ZERO_CONTENT
    # In place of a step, where each page was.
    pages = ZonePages(kinds, folios, zero, np.arange(len(kinds), dtype=np.int32))
    split = compact(pages, order, memory.unmovable[zone.start >> order : zone.end >> order])
    parts.clock.spend("compact_frame", len(kinds))
    for head in split:
        split_folio(parts, zone.start + head)
    moved = np.flatnonzero((kinds == MOVES) & (folios != TAIL) & (pages.step != np.arange(len(kinds))))
    target: dict[int, int] = {}
    for new, old in zip((zone.start + moved).tolist(), (zone.start + pages.step[moved]).tolist(), strict=True):
        # A page of a folio that could not be split, or that became free with it, stays where it is.
        size = 1 << int(folios[new - zone.start])
        if memory.has(old, Fl.ALLOCATED) and memory.size(old) == size and int(memory.heads(np.array([old]))[0]) == old:
            for frame in range(new, new + size):
                zone.take(frame)
            target[old] = new
    parts.counters.count("compact_isolated", sum(memory.size(old) for old in target))
    relocate(parts, target)
