"""Predict how many free folios compaction makes of a machine's memory, while a plan takes and frees pages.

Compaction of all memory, which a write to ``/proc/sys/vm/compact_memory`` starts, is followed chunk by chunk
(:mod:`mthp.compaction`). The pages that a plan frees lie among others, so each compaction meets further up, until
one makes no block free.

An allocation that finds no free block compacts by itself, and wakes kcompactd. Both take free pages from their lists,
and so overlook fewer, but leave out blocks in which compaction failed before. They are not followed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.compaction import NO_STEP, ZonePages, compact
from mthp.freememory import FREE, MOVES, STAYS, TAIL, UNKNOWN, FreeMemory, MemoryBlocks

MOST_COMPACTIONS = 100
"""Compactions after which a prediction ends. Most take less than ten."""

_FEW = 4
"""Unknown pages of a block up to which they count as listed, which are scattered: the kernel's own lie together."""

_MADE = -2
"""In place of a step: the first page of a folio that was made."""

Frames = NDArray[np.int64]


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
    """The pages of folios that are trimmed before. All arrays have the shape (pages,).

    Attributes:
        frame: int64, frames.
        freed: bool, whether they become free.
        folio: int8, order of the folio that begins with each afterwards, TAIL for its other pages, 0 for base pages.
        zero: bool, pages with zeroes alone, freed or not.
    """

    frame: Frames
    freed: NDArray[np.bool_]
    folio: NDArray[np.int8]
    zero: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shape:
    """A block that is taken, and what it becomes.

    Attributes:
        order: of the block.
        folio: order of the folios that it becomes.
        holes: its pages that become free again.
    """

    order: int
    folio: int
    holes: int = 0


class Packing:
    """A machine's memory, which a plan and compaction change.

    Attributes:
        compacted: whether it was compacted.

    Args:
        free: the free memory of the machine.
        blocks: its memory in blocks of the PMD order.
        own: the pages that the plan frees.
        trimmed: what is trimmed before.
    """

    def __init__(self, free: FreeMemory, blocks: MemoryBlocks, own: Freed, trimmed: Trimmed | None = None) -> None:
        self._zones, self._blocks, self._made, self.compacted = free.zones, blocks, 0, False
        self._kinds = np.where(blocks.pages == UNKNOWN, STAYS, blocks.pages).astype(np.int8)
        listed = _listed(free, blocks)[:, None] & (blocks.pages == UNKNOWN)
        self._kinds[listed] = FREE
        self._folios, count = blocks.folios.copy(), self._kinds.size
        self._pages = ZonePages(
            self._kinds.reshape(-1),
            self._folios.reshape(-1),
            np.zeros(count, np.bool_),
            np.full(count, NO_STEP, np.int32),
        )
        if trimmed is not None:
            at, known = blocks.at(trimmed.frame)
            at, freed = at[known], trimmed.freed[known]
            self._pages.kind[at] = np.where(freed, FREE, MOVES)
            self._pages.folio[at] = trimmed.folio[known]
            self._pages.zero[at] = trimmed.zero[known] & ~freed
        self._zero_pages = self._pages.zero.sum()
        at, known = blocks.at(own.frame)
        self._pages.step[at[known]] = own.step[known]

    @property
    def emptied(self) -> int:
        """Pages with zeroes that became free when compaction split their folios."""
        return int(self._zero_pages - self._pages.zero.sum()) * self._blocks.weight

    @property
    def broken(self) -> float:
        """Share of the folios below the PMD order that compaction split after they were made."""
        small = (self._pages.folio > 0) & (self._pages.folio < self._blocks.order)
        left = int((small & (self._pages.step == _MADE)).sum())
        return 1 - left / self._made if self._made else 0.0

    def make(self, shape: Shape, steps: NDArray[np.intp], at_once: int) -> int:
        """Make folios of blocks; return the number of blocks that can be taken.

        Args:
            shape: of each block.
            steps: the steps that take them, in their order.
            at_once: the most that can be taken before the first compaction.
        """
        made = rounds = 0
        while made < len(steps):
            able = self._able(shape.order)
            bound = len(steps) if self.compacted else min(len(steps), at_once)
            if number := min(sum(able), bound - made):
                self._take(shape, number, able)
                self._release(steps[made : made + number])
                made += number
                continue
            if made >= bound:
                break
            rounds += 1
            self.compacted = True
            self._compact()
            if rounds > MOST_COMPACTIONS or not sum(self._able(shape.order)):
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
        empty: NDArray[np.bool_] = (self._pages.kind.reshape(-1, 1 << order) == FREE).all(axis=1)
        return empty

    def _take(self, shape: Shape, count: int, able: list[int]) -> None:
        """Take `count` free blocks, from the last zone first, as the kernel does."""
        empty, zones, pages = self._empty(shape.order), self._zone_of(shape.order), self._pages
        kinds, folios, steps = (
            column.reshape(-1, 1 << shape.order) for column in (pages.kind, pages.folio, pages.step)
        )
        at, size = np.arange(1 << shape.order), 1 << shape.folio
        # What remains in front of the first whole folio are base pages.
        inside = at >= -(-shape.holes // size) * size
        folio = np.where(inside, np.where(at % size, TAIL, shape.folio), 0)
        # Compaction moves no folio of the PMD order.
        kind = np.where(at < shape.holes, FREE, STAYS if shape.folio >= self._blocks.order else MOVES)
        for zone in reversed(range(len(able))):
            number = min(count, able[zone])
            count -= number
            rows = np.flatnonzero(empty & (zones == zone))[: -(-number // self._blocks.weight)]
            kinds[rows], folios[rows], steps[rows] = kind, folio, np.where(folio > 0, _MADE, NO_STEP)
            if shape.folio < self._blocks.order:
                self._made += len(rows) * int((folio > 0).sum())

    def _release(self, steps: NDArray[np.intp]) -> None:
        """Free the pages that some steps free."""
        step = self._pages.step
        chosen = np.zeros(max(int(step.max(initial=0)), int(steps.max(initial=0))) + 3, np.bool_)
        chosen[steps] = True
        # `NO_STEP` and `_MADE` are indexes of the last two, which no step has.
        freed = np.flatnonzero(chosen[step])
        self._pages.kind[freed], self._pages.folio[freed], step[freed] = FREE, 0, NO_STEP

    def _spare_by_zone(self) -> list[int]:
        """Return the free pages of each zone beyond what is kept."""
        free = (self._kinds == FREE).sum(axis=1)
        sums = np.bincount(self._blocks.zone, free, len(self._zones)) * self._blocks.weight
        return [int(pages) - zone.kept for pages, zone in zip(sums.tolist(), self._zones, strict=True)]

    def _compact(self) -> None:
        """Compact all zones."""
        order = self._blocks.order
        for zone in range(len(self._zones)):
            rows = np.flatnonzero(self._blocks.zone == zone)
            if len(rows):
                first, end = int(rows[0]), int(rows[-1]) + 1
                pages = self._pages[slice(first << order, end << order)]
                compact(pages, order, self._blocks.closed[first:end])


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
