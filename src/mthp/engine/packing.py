"""Predict how many free folios compaction makes of a machine's memory, while a plan takes and frees pages.

Compaction of all memory, which a write to ``/proc/sys/vm/compact_memory`` starts, has two scanners (compact_zone(),
mm/compaction.c). One goes up from the start of a zone and takes all pages that can be moved; the other goes down from
the end and takes free pages for them, until the two meet. Therefore

- below the meeting point, a block becomes free unless a page in it stays: one such page is enough;
- free pages beside a page that stays are used above the meeting point, and lost below it;
- the scanner of free pages overlooks some (:func:`_found`), which then keep the meeting point low.

The pages that a plan frees lie among others, so each compaction meets further up, until one makes no block free. The
direct compaction of an allocation does less than this: it leaves out blocks in which it failed before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.freememory import COSTLY_ORDER, FREE, MOVES, STAYS, UNKNOWN, FreeMemory, MemoryBlocks

MOST_COMPACTIONS = 100
"""Compactions after which a prediction ends. Most take less than ten."""

_FEW = 4
"""Unknown pages of a block up to which they count as listed, which are scattered: the kernel's own lie together."""

_BATCH = 32
"""Pages for which compaction looks for free ones at a time (COMPACT_CLUSTER_MAX, include/linux/swap.h)."""

_NO_STEP = -1
"""Step of a page that no step frees."""

Frames = NDArray[np.int64]
Kinds = NDArray[np.int8]


@dataclass(frozen=True)
class Freed:
    """The pages that the steps of a plan free.

    Attributes:
        frame, step: int64 and intp, shape (frames,): frames, and the step that frees each.
    """

    frame: Frames
    step: NDArray[np.intp]


@dataclass(frozen=True)
class Trimmed:
    """The pages of folios that are trimmed before.

    Attributes:
        freed, kept: int64: frames that become free, and frames that compaction then moves.
        zero: int64: frames in folios that are kept, with zeroes alone. They become free when compaction moves their
            folio: without a free block of its order it splits it (compaction_alloc(), mm/compaction.c, and
            migrate_pages_batch(), mm/migrate.c), which maps the shared page of zeroes in their place.
    """

    freed: Frames
    kept: Frames
    zero: Frames


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of the folios to be made.

    Attributes:
        most: in all.
        compacted: after which no more can be made of compacted memory.
        at_once: without compaction.
    """

    most: int
    compacted: int
    at_once: int


class Packing:
    """A machine's memory, which a plan and compaction change.

    Attributes:
        emptied: pages with zeroes that became free when compaction split their folios.

    Args:
        free: the free memory of the machine.
        blocks: its memory in blocks of the PMD order.
        own: the pages that the plan frees.
        trimmed: what is trimmed before.
    """

    def __init__(self, free: FreeMemory, blocks: MemoryBlocks, own: Freed, trimmed: Trimmed | None = None) -> None:
        self._zones, self._blocks = free.zones, blocks
        self._kinds = np.where(blocks.pages == UNKNOWN, STAYS, blocks.pages).astype(np.int8)
        listed = _listed(free, blocks)[:, None] & (blocks.pages == UNKNOWN)
        self._kinds[listed] = FREE
        self._flat = self._kinds.reshape(-1)
        self.emptied = 0
        self._zero = np.zeros(len(self._flat), np.bool_)
        if trimmed is not None:
            for kind, frames in (FREE, trimmed.freed), (MOVES, trimmed.kept), (MOVES, trimmed.zero):
                at, known = blocks.at(frames)
                self._flat[at[known]] = kind
            self._zero[at[known]] = True
        at, known = blocks.at(own.frame)
        self._step = np.full(len(self._flat), _NO_STEP, np.int32)
        self._step[at[known]] = own.step[known]

    def make(self, order: int, steps: NDArray[np.intp], bounds: Bounds, holes: float = 0.0) -> int:
        """Make folios of `order`; return the number that can be made.

        Args:
            steps: the steps that make them, in their order.
            holes: pages of each folio that become free again.
        """
        most = bounds.most
        made = compactions = 0
        while made < most:
            able = self._able(order)
            if number := min(sum(able), most - made, bounds.at_once):
                self._take(order, number, able, int(holes))
                self._release(steps[made : made + number])
                made += number
                if number == bounds.at_once:
                    break
                continue
            compactions += 1
            most = min(most, max(made, bounds.compacted))
            self._compact(order)
            if compactions > MOST_COMPACTIONS or not sum(self._able(order)):
                break
        return made

    def _able(self, order: int) -> list[int]:
        """Return the number of folios of `order` that each zone can supply without compaction."""
        counts = np.bincount(self._zone_of(order), self._empty(order), len(self._zones)) * self._blocks.weight
        return [
            max(0, min(int(number), spare >> order))
            for number, spare in zip(counts.tolist(), self._spare_by_zone(), strict=True)
        ]

    def _zone_of(self, order: int) -> NDArray[np.int8]:
        """Return the zone of each block of `order`."""
        return np.repeat(self._blocks.zone, 1 << self._blocks.order - order)

    def _empty(self, order: int) -> NDArray[np.bool_]:
        """Return the blocks of `order` that are free."""
        empty: NDArray[np.bool_] = (self._flat.reshape(-1, 1 << order) == FREE).all(axis=1)
        return empty

    def _take(self, order: int, count: int, able: list[int], holes: int) -> None:
        """Take `count` free blocks of `order`, from the last zone first, as the kernel does."""
        empty, zones, folios = self._empty(order), self._zone_of(order), self._flat.reshape(-1, 1 << order)
        for zone in reversed(range(len(able))):
            number = min(count, able[zone])
            count -= number
            rows = np.flatnonzero(empty & (zones == zone))[: -(-number // self._blocks.weight)]
            folios[rows] = STAYS
            folios[rows, :holes] = FREE

    def _release(self, steps: NDArray[np.intp]) -> None:
        """Free the pages that some steps free."""
        chosen = np.zeros(max(int(self._step.max(initial=0)), int(steps.max(initial=0))) + 2, np.bool_)
        chosen[steps] = True
        # The last is that of `_NO_STEP`.
        freed = np.flatnonzero(chosen[self._step])
        self._flat[freed], self._step[freed] = FREE, _NO_STEP

    def _spare_by_zone(self) -> list[int]:
        """Return the free pages of each zone beyond what is kept."""
        free = (self._kinds == FREE).sum(axis=1)
        sums = np.bincount(self._blocks.zone, free, len(self._zones)) * self._blocks.weight
        return [int(pages) - zone.kept for pages, zone in zip(sums.tolist(), self._zones, strict=True)]

    def _compact(self, order: int) -> None:
        """Compact the zones with two folios of `order` free beyond what is kept (compact_gap(), mm/internal.h)."""
        for zone, spare in enumerate(self._spare_by_zone()):
            rows = np.flatnonzero(self._blocks.zone == zone)
            above = self._zones[zone].above if order > COSTLY_ORDER else 0
            if len(rows) and spare - above >= 2 << order:
                self._compact_zone(slice(rows[0], rows[-1] + 1))

    def _compact_zone(self, zone: slice) -> None:
        """Move pages up until the scanners meet."""
        kinds, order = self._kinds[zone], self._blocks.order
        zero = self._zero[zone.start << order : zone.stop << order]
        sources = np.flatnonzero((kinds.reshape(-1) == MOVES) & ~zero)
        targets = self._targets(kinds, self._blocks.closed[zone])
        # The first pages move up, the last ones would move down.
        pairs = min(len(sources), len(targets))
        number = int((sources[:pairs] >> order < targets[:pairs] >> order).sum())
        # Folios before the first page that does not move were split.
        end = np.append(sources, sources[-1:] + 1)[number] if number else 0
        split = np.flatnonzero(zero[:end])
        sources, targets = sources[:number], targets[:number]
        flat, steps = kinds.reshape(-1), self._step[zone.start << order : zone.stop << order]
        flat[targets], flat[sources] = MOVES, FREE
        flat[split], zero[split] = FREE, False
        self.emptied += len(split) * self._blocks.weight
        steps[targets], steps[sources] = steps[sources], _NO_STEP

    def _targets(self, kinds: Kinds, closed: NDArray[np.bool_]) -> Frames:
        """Return the indexes of free pages in the order in which the scanner finds them (isolate_freepages())."""
        free, order, longest = kinds == FREE, self._blocks.order, self._blocks.stride
        moves = (kinds == MOVES).sum(axis=1)
        below = np.cumsum(moves) - moves
        # Pages are not moved to blocks that are free already. The scanner goes down.
        rows = np.flatnonzero(~closed & ~free.all(axis=1))[::-1]
        counts = free[rows].sum(axis=1)
        some, none = (np.append(np.flatnonzero(which), len(rows)) for which in (counts > 0, counts == 0))
        found, number, stride, at = [np.empty(0, np.int64)], 0, 1, 0
        # Until there is room for all pages of lower blocks.
        while at < len(rows) and number < below[rows[at]]:
            if not counts[at]:
                at, passed = int(some[np.searchsorted(some, at)]), at
                stride = min(stride << min(at - passed, longest), longest)
                continue
            if stride == 1:
                chosen = rows[at : none[np.searchsorted(none, at)]]
                block, page = np.nonzero(free[chosen])
                pages = (chosen[block] << order) + page
            else:
                chosen = rows[at : at + 1]
                pages = (rows[at] << order) + _found(free[rows[at]], stride, _BATCH - number % _BATCH)
                stride = 1 if len(pages) else min(2 * stride, longest)
            found.append(pages)
            number += len(pages)
            at += len(chosen)
        return np.concatenate(found)


def _found(free: NDArray[np.bool_], stride: int, wanted: int) -> Frames:
    """Return the free pages that the scanner finds in one block, ascending.

    After a block without any it looks at half as many pages of the next, down to every 32nd. It takes a free block
    only if it looks at its first page (isolate_freepages_block(); Linux kernel commit 4fca9730c51d, in v5.1).

    Args:
        free: bool, shape (pages,): free pages of the block.
        stride: pages from one that it looks at to the next.
        wanted: pages for which it looks. Having found them it stops, and later continues there page by page.
    """
    if not free[::stride].any():
        return np.empty(0, np.int64)
    sizes = _chunks(free).tolist()
    begins, at = [np.empty(0, np.int64)], 0
    while at < len(sizes):
        if size := sizes[at]:
            begins.append(np.arange(at, at + size))
            wanted -= size
            stride = stride if wanted > 0 else 1
            at += size - 1
        at += stride
    return np.concatenate(begins)


def _chunks(free: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Return the size of the free block that begins at each page, as the buddy allocator merges them; 0 elsewhere.

    Args:
        free: bool, shape (pages,): free pages of one block.
    """
    chunks: NDArray[np.int16] = free.astype(np.int16)
    size = 1
    while size < len(free):
        # Two free halves of a larger block are one.
        halves = chunks[:: 2 * size], chunks[size :: 2 * size]
        both = (halves[0] == size) & (halves[1] == size)
        halves[0][both], halves[1][both] = 2 * size, 0
        size *= 2
    return chunks


def _listed(free: FreeMemory, blocks: MemoryBlocks) -> NDArray[np.bool_]:
    """Return the blocks whose unknown pages count as pages in lists of processors: bool, shape (blocks,)."""
    unknown = blocks.count(UNKNOWN)
    # A block with the kernel's pages alone hardly has any of these.
    mixed = (blocks.count(FREE) + blocks.count(MOVES) > 0) & (unknown > 0) & (unknown <= _FEW)
    listed = np.zeros(len(mixed), np.bool_)
    for number, zone in enumerate(free.zones):
        rows = mixed & (blocks.zone == number)
        # If the lists hold fewer pages than that, most of these are the kernel's.
        listed |= rows & (unknown[rows].sum() * blocks.weight <= zone.listed)
    return listed
