"""Follow a compaction of a zone as a write to ``/proc/sys/vm/compact_memory`` starts it.

The scanner of pages to move goes up from the start of the zone, the scanner of free pages goes down from its end, until
they meet (compact_zone(), mm/compaction.c). Therefore

- below the meeting point, a block becomes free unless a page in it stays: one such page is enough;
- free pages beside a page that stays are used above the meeting point, and lost below it;
- what the scanner of free pages overlooks keeps the meeting point low.

That scanner begins with every page of a block. After a block in which it finds nothing it looks at half as many pages
of the next, down to every 32nd (isolate_freepages(); Linux kernel commit 4fca9730c51d, in v5.1). It takes a free block
of the buddy allocator only if it looks at its first page. It goes over a large folio at once, and from its last page on
by the same stride; so it overlooks most of what is free between folios of 64 KiB (isolate_freepages_block()).

A large folio moves to the first of the smallest free blocks that hold it. If there is none it is split, and the shared
page of zeroes takes the place of pages with zeroes (compaction_alloc(); migrate_pages_batch(), mm/migrate.c). Before
Linux 6.9 large folios do not move, and before 6.12 pages with zeroes stay.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.freememory import FREE, MOVES, TAIL

CLUSTER = 32
"""Pages after which the scanner of pages to move stops for the first time in a block; and pages from one at which the
scanner of free pages looks to the next, at most (COMPACT_CLUSTER_MAX, include/linux/swap.h)."""

NO_STEP = -1
"""Step of a page that no step frees."""

Indexes = NDArray[np.int64]


@dataclass(frozen=True)
class ZonePages:
    """The pages of some blocks of one zone, which change with each compaction. All arrays have the shape (pages,).

    Attributes:
        kind: int8, as in :class:`mthp.freememory.MemoryBlocks`.
        folio: int8, order of the folio that begins with a page, TAIL for its other pages, 0 elsewhere.
        zero: bool, pages with zeroes of trimmed folios.
        step: int32, step that frees a page, NO_STEP if none does; or any other number that is to move with a page.
    """

    kind: NDArray[np.int8]
    folio: NDArray[np.int8]
    zero: NDArray[np.bool_]
    step: NDArray[np.int32]

    def __getitem__(self, part: slice) -> ZonePages:
        return ZonePages(self.kind[part], self.folio[part], self.zero[part], self.step[part])

    def move(self, source: Indexes, target: Indexes) -> None:
        """Move pages to free ones: int64, shape (moved,) each."""
        for column, empty in (self.kind, FREE), (self.folio, 0), (self.zero, False), (self.step, NO_STEP):
            column[target] = column[source]
            column[source] = empty

    def split(self, head: int, order: int) -> Indexes:
        """Split a folio, and return the indexes of its pages that remain: int64."""
        pages = np.arange(head, head + (1 << order))
        zero = pages[self.zero[pages]]
        self.folio[pages] = 0
        self.kind[zero], self.zero[zero], self.step[zero] = FREE, False, NO_STEP
        left: Indexes = pages[self.kind[pages] != FREE]
        return left


class FreeScanner:
    """The scanner of free pages, and the free blocks that it found.

    Attributes:
        block: the block in which it is; the blocks above were searched.

    Args:
        pages: the pages of a zone.
        order: order of its blocks.
        closed: bool, shape (blocks,): blocks to which nothing is moved.
    """

    def __init__(self, pages: ZonePages, order: int, closed: NDArray[np.bool_]) -> None:
        self._pages, self._order = pages, order
        free = (pages.kind == FREE).reshape(-1, 1 << order).sum(axis=1)
        # Nothing is moved to blocks that are free already (suitable_migration_target()).
        self._open: list[bool] = (~closed & (free < 1 << order)).tolist()
        self._with_free: list[bool] = (free > 0).tolist()
        self._lists: list[deque[int]] = [deque() for _ in range(order + 1)]
        self._listed = 0
        self.block, self._at = len(free) - 1, 0
        self._chunks: tuple[int, NDArray[np.int16]] = (-1, np.empty(0, np.int16))

    def take_pages(self, count: int, lowest: int, wanted: int) -> Indexes:
        """Take free pages, the smallest free blocks first; return their indexes: int64, at most `count` of them.

        Args:
            lowest: the lowest block to search.
            wanted: pages that are to be moved, which are searched for at once.
        """
        parts, left = [np.empty(0, np.int64)], count
        while left:
            order = next((order for order, found in enumerate(self._lists) if found), None)
            if order is None:
                self._search(lowest, wanted - (count - left))
                if not self._listed:
                    break
                continue
            found = self._lists[order]
            heads = [found.popleft() for _ in range(min(len(found), -(-left >> order)))]
            pages = (np.array(heads, np.int64)[:, None] + np.arange(1 << order)).reshape(-1)
            self._listed -= len(pages)
            if len(pages) > left:
                self._give_back(heads[-1] + (1 << order) - (len(pages) - left), heads[-1] + (1 << order))
            parts.append(pages[:left])
            left -= len(parts[-1])
        return np.concatenate(parts)

    def take_folio(self, order: int, lowest: int, wanted: int) -> int | None:
        """Take a free block of `order`, and return the index of its first page; None if there is none.

        `lowest` and `wanted` are those of :meth:`take_pages`.
        """
        for searched in (False, True):
            larger = next((larger for larger in range(order, self._order + 1) if self._lists[larger]), None)
            if larger is not None:
                head = self._lists[larger].popleft()
                self._listed -= 1 << larger
                self._give_back(head + (1 << order), head + (1 << larger))
                return head
            if not searched:
                self._search(lowest, wanted)
        return None

    def _give_back(self, start: int, end: int) -> None:
        """Put the rest of a free block into the lists of smaller ones, which are empty."""
        while start < end:
            # The largest aligned block; the end of the rest is aligned to a larger one.
            order = (start & -start).bit_length() - 1
            self._lists[order].append(start)
            self._listed += 1 << order
            start += 1 << order

    def _search(self, lowest: int, wanted: int) -> None:
        """Search blocks down to `lowest` for free pages, until `wanted` are listed (isolate_freepages()).

        If as many are listed before, one more free block is looked for, in one block.
        """
        stride = 1
        while self.block >= lowest:
            if not self._open[self.block]:
                self._leave()
                continue
            before = self._listed
            end = self._search_block(stride, wanted) if self._with_free[self.block] else 1 << self._order
            if end == 1 << self._order:
                self._leave()
            else:
                self._at = end
            if self._listed >= wanted:
                break
            stride = 1 if self._listed > before else min(2 * stride, CLUSTER)

    def _leave(self) -> None:
        self.block, self._at = self.block - 1, 0

    def _search_block(self, stride: int, wanted: int) -> int:
        """Search the present block from the present page on; return the page behind what was found."""
        base, size, at = self.block << self._order, 1 << self._order, self._at
        chunks = self._chunks_of(self.block)
        if stride == 1:
            heads = at + np.flatnonzero(chunks[at:])
            sizes = chunks[heads]
            sums = self._listed + np.cumsum(sizes)
            count = int(np.searchsorted(sums, wanted)) + 1
            for head, length in zip(heads[:count].tolist(), sizes[:count].tolist(), strict=True):
                self._add(base + head, length)
            return int(heads[count - 1] + sizes[count - 1]) if count <= len(heads) else size
        folios: list[int] = self._pages.folio[base : base + size].tolist()
        sizes_here: list[int] = chunks.tolist()
        while at < size:
            if count := sizes_here[at]:
                self._add(base + at, count)
                at += count
                if self._listed >= wanted:
                    return at
                at += stride - 1
                continue
            if folios[at] > 0 and at + (1 << folios[at]) <= size:
                at += (1 << folios[at]) - 1
            at += stride
        return size

    def _add(self, head: int, count: int) -> None:
        self._lists[count.bit_length() - 1].append(head)
        self._listed += count

    def _chunks_of(self, block: int) -> NDArray[np.int16]:
        """Return the size of the free block that begins at each page of a block; 0 elsewhere."""
        if self._chunks[0] != block:
            kinds = self._pages.kind[block << self._order : block + 1 << self._order]
            self._chunks = block, _chunks(kinds == FREE)
        return self._chunks[1]


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


def compact(pages: ZonePages, order: int, closed: NDArray[np.bool_]) -> list[int]:
    """Compact a zone once: move pages up until the scanners meet.

    Args:
        pages, order, closed: as those of :class:`FreeScanner`.

    Returns:
        Indexes of the first pages of the folios that were split.
    """
    movers = _Movers(pages, order, FreeScanner(pages, order, closed))
    moves = (pages.kind == MOVES) & (pages.folio != TAIL)
    for block in np.flatnonzero(moves.reshape(-1, 1 << order).any(axis=1)).tolist():
        movers.empty(block)
    return movers.split


class _Movers:
    """The scanner of pages to move.

    Attributes:
        split: indexes of the first pages of folios that were split.
    """

    def __init__(self, pages: ZonePages, order: int, free: FreeScanner) -> None:
        self._pages, self._order, self._free = pages, order, free
        self.split: list[int] = []

    def empty(self, block: int) -> None:
        """Move the pages of a block, unless the scanners have met.

        After the first pages the rest of the block is emptied at once (finish_pageblock in compact_zone()).
        """
        start, end = block << self._order, block + 1 << self._order
        pages = self._pages[slice(start, end)]
        heads = np.flatnonzero((pages.kind == MOVES) & (pages.folio != TAIL))
        orders = pages.folio[heads].astype(np.int64)
        first = int(np.searchsorted(np.cumsum(np.int64(1) << orders), CLUSTER)) + 1
        heads += start
        for part, at_end in (slice(first), first > len(heads)), (slice(first, None), True):
            some, of = heads[part], orders[part]
            if len(some) and self._free.block > block:
                # At the end of the block the scanner is at the next one. Nothing is moved to the block where it is.
                is_at_next = at_end or some[-1] + (1 << of[-1]) == end
                self._migrate(some, of, block + (2 if is_at_next else 1))

    def _migrate(self, heads: Indexes, orders: Indexes, lowest: int) -> None:
        """Move folios, as long as there are free pages.

        Args:
            heads, orders: int64, shape (folios,): first page and order of each, ascending.
            lowest: the lowest block to move them to.
        """
        left = int((np.int64(1) << orders).sum())
        rest = [np.empty(0, np.int64)]
        # Isolated folios are put before the others in a list.
        heads, orders = heads[::-1], orders[::-1]
        # Runs of base pages, and each large folio alone.
        cuts = np.flatnonzero((orders[1:] > 0) | (orders[:-1] > 0)) + 1
        for run, order in zip(np.split(heads, cuts), orders[np.append(0, cuts)].tolist(), strict=True):
            if order:
                target = self._free.take_folio(order, lowest, left)
                if target is None:
                    self.split.append(int(run[0]))
                    rest.append(self._pages.split(int(run[0]), order))
                    continue
                pages = np.arange(1 << order)
                self._pages.move(run[0] + pages, target + pages)
                left -= 1 << order
                continue
            targets = self._free.take_pages(len(run), lowest, left)
            self._pages.move(run[: len(targets)], targets)
            left -= len(targets)
            if len(targets) < len(run):
                return
        pages = np.concatenate(rest)
        targets = self._free.take_pages(len(pages), lowest, left)
        self._pages.move(pages[: len(targets)], targets)
