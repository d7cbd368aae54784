"""Predict how many free folios compaction makes of a machine's memory, while a plan takes and frees pages.

Compaction has two scanners (compact_zone(), mm/compaction.c). One goes up from the start of a zone and takes all pages
that can be moved; the other goes down from the end and takes free pages for them, until the two meet. Therefore

- below the meeting point, a block becomes free unless a page in it stays: one such page is enough;
- free pages beside a page that stays are used above the meeting point, and lost below it.

The pages that a plan frees lie among others, so each compaction meets further up, until one makes no block free. Memory
is followed as an amount in each block and not page by page, which is enough for the sum over many blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.freememory import FreeMemory, MemoryBlocks

MOST_COMPACTIONS = 100
"""Compactions after which a prediction ends. Most take less than ten."""

_NONE = 0.5
"""Pages below which a block has none: amounts are fractions."""

_ALIKE = 4
"""Unknown pages of a block that are taken to be unknown independently: those of one program lie together."""

_FEW = 4
"""Unknown pages of a block up to which they count as listed, which are scattered: the kernel's own lie together."""

_ROUNDED = 1e-3
"""Share of a folio by which sums of fractions may miss it."""

Amounts = NDArray[np.float64]


@dataclass(frozen=True)
class Trimmed:
    """Folios that are trimmed before.

    Attributes:
        pages, gains: int64, shape (blocks,): pages of these folios in each block, and those that become free.
    """

    pages: NDArray[np.int64]
    gains: NDArray[np.int64]


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

    Args:
        free: the free memory of the machine.
        blocks: its memory in blocks of the plan's smallest order.
        own: by order of a folio that is taken, the pages in each block that become free when all of the order are
            made; float64, shape (blocks,).
        trimmed: what is trimmed before.
    """

    def __init__(
        self, free: FreeMemory, blocks: MemoryBlocks, own: Mapping[int, Amounts], trimmed: Trimmed | None = None
    ) -> None:
        self._zones, self._blocks = free.zones, blocks
        size = 1 << blocks.order
        stays = size - blocks.free - blocks.movable - blocks.unknown
        listed = _listed(free, blocks)
        self._free: Amounts = blocks.free + listed * blocks.unknown
        self._movable: Amounts = blocks.movable.astype(np.float64)
        # The probability that no page of a block stays.
        self._sure: Amounts = np.where(stays > 0, 0.0, listed ** np.minimum(blocks.unknown, _ALIKE))
        if trimmed is not None:
            self._free += trimmed.gains
            left = np.maximum(self._movable - trimmed.gains, trimmed.pages - trimmed.gains)
            self._movable = np.where(trimmed.pages > 0, left, self._movable)
            self._sure[trimmed.pages == size] = 1.0
        # Pages move to blocks of the type Movable (suitable_migration_target(), mm/compaction.c). The type of a single
        # block is not visible, but blocks with pages of programs nearly always have it.
        self._target: NDArray[np.bool_] = (self._movable > 0) | (self._sure > 0)
        self._own = {order: pages.copy() for order, pages in own.items()}

    def make(self, order: int, freed: NDArray[np.int64], bounds: Bounds, holes: float = 0.0) -> int:
        """Make folios of `order`; return the number that can be made.

        Args:
            freed: pages of `own` that each planned folio frees.
            holes: pages of each folio that become free again.
        """
        most = bounds.most
        left = np.append(np.cumsum(freed[::-1])[::-1], 0)
        made = compactions = 0
        while made < most:
            able = self._able(order)
            if number := min(sum(able), most - made, bounds.at_once):
                self._take(order, number, able, holes)
                self._release(order, float(left[made] - left[made + number]) / max(1, int(left[made])))
                made += number
                if number == bounds.at_once:
                    break
                continue
            compactions += 1
            most = min(most, max(made, bounds.compacted))
            # The kernel first leaves out blocks in which a page stays (COMPACT_PRIO_ASYNC, mm/compaction.c).
            self._compact(order, everywhere=False)
            if not sum(self._able(order)):
                self._compact(order, everywhere=True)
            if compactions > MOST_COMPACTIONS or not sum(self._able(order)):
                break
        return made

    def _able(self, order: int) -> list[int]:
        """Return the number of folios of `order` that each zone can supply without compaction."""
        counts = np.bincount(self._zone_of(order), self._empty(order), len(self._zones)) * self._blocks.weight
        return [
            max(0, min(int(number + _ROUNDED), spare >> order))
            for number, spare in zip(counts.tolist(), self._spare_by_zone(), strict=True)
        ]

    def _zone_of(self, order: int) -> NDArray[np.int8]:
        """Return the zone of each block of `order`."""
        return self._blocks.zone[:: 1 << order - self._blocks.order]

    def _empty(self, order: int) -> Amounts:
        """Return the probability that each block of `order` is free."""
        empty = np.where(self._movable < _NONE, self._sure, 0.0)
        least: Amounts = empty.reshape(-1, 1 << order - self._blocks.order).min(axis=1)
        return least

    def _take(self, order: int, count: int, able: list[int], holes: float) -> None:
        """Take `count` free blocks of `order`, from the last zone first, as the kernel does."""
        empty, zones, parts = self._empty(order), self._zone_of(order), 1 << order - self._blocks.order
        for zone in reversed(range(len(able))):
            number = min(count, able[zone])
            count -= number
            rows = np.flatnonzero((zones == zone) & (empty > 0))
            sums = np.cumsum(empty[rows]) * self._blocks.weight
            rows = rows[: int(np.searchsorted(sums, number - _ROUNDED)) + 1] if number else rows[:0]
            taken = (rows[:, None] * parts + np.arange(parts)).ravel()
            self._free[taken] = self._free[taken] * (1.0 - self._sure[taken]) + holes / parts
            self._sure[taken] = 0.0

    def _release(self, order: int, share: float) -> None:
        """Free this share of the pages that the folios of `order` still to be made will free."""
        freed = self._own[order] * share
        self._own[order] -= freed
        self._movable = np.maximum(self._movable - freed, 0.0)
        self._free += freed

    def _spare_by_zone(self) -> list[int]:
        """Return the free pages of each zone beyond what is kept."""
        sums = np.bincount(self._blocks.zone, self._free, len(self._zones)) * self._blocks.weight
        return [int(pages) - zone.kept for pages, zone in zip(sums.tolist(), self._zones, strict=True)]

    def _compact(self, order: int, *, everywhere: bool) -> None:
        """Compact the zones with two folios of `order` free beyond what is kept (compact_gap(), mm/internal.h)."""
        for zone, spare in enumerate(self._spare_by_zone()):
            rows = np.flatnonzero(self._blocks.zone == zone)
            if len(rows) and spare >= 2 << order:
                self._compact_zone(slice(rows[0], rows[-1] + 1), everywhere=everywhere)

    def _compact_zone(self, zone: slice, *, everywhere: bool) -> None:
        """Move pages up until the scanners meet: out of all blocks, or of those alone in which no page stays."""
        free, movable = self._free[zone], self._movable[zone]
        leaving = movable if everywhere else np.where(self._sure[zone] > 0, movable, 0.0)
        # Pages are not moved to blocks that are free already.
        room = np.where(self._target[zone], free, 0.0) * np.where(movable < _NONE, 1.0 - self._sure[zone], 1.0)
        below = np.concatenate(([0.0], np.cumsum(leaving)))
        above = np.concatenate((np.cumsum(room[::-1])[::-1], [0.0]))
        met = int(np.flatnonzero(below <= above)[-1])
        # The highest free pages are used first.
        higher = above[met + 1 :]
        used = np.clip(below[met] - higher, 0.0, room[met:])
        for pages in self._own.values():
            moved = np.minimum(pages[zone][:met], leaving[:met])
            pages[zone][:met] -= moved
            pages[zone][met:] += moved.sum() / max(below[met], 1.0) * used
        free[:met] += leaving[:met]
        movable[:met] -= leaving[:met]
        movable[met:] += used
        free[met:] -= used


def _listed(free: FreeMemory, blocks: MemoryBlocks) -> Amounts:
    """Return the probability that the unknown pages of each block are in lists of processors: shape (blocks,)."""
    # A block with the kernel's pages alone hardly has any of these.
    mixed = (blocks.free + blocks.movable > 0) & (blocks.unknown > 0)
    listed = np.zeros(len(mixed))
    for number, zone in enumerate(free.zones):
        rows = np.flatnonzero(mixed & (blocks.zone == number))
        rows = rows[np.argsort(blocks.unknown[rows], kind="stable")]
        unknown, pages = blocks.unknown[rows], zone.listed / blocks.weight
        listed[rows] = min(1.0, pages / max(1, int(unknown.sum())))
        listed[rows[(unknown <= _FEW) & (np.cumsum(unknown) <= pages)]] = 1.0
    return listed
