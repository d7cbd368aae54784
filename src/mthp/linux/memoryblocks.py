"""Read what lies in the blocks of a machine's memory: free pages, pages that compaction moves, and pages that stay.

A page that compaction cannot move keeps its block from becoming one folio, however much is free elsewhere. The migrate
type of the block does not show this: once memory was short, the kernel's own pages lie in blocks of the type Movable
as well (__rmqueue_steal(), mm/page_alloc.c). ``/proc/kpageflags`` shows it page by page.

But compaction moves pages to blocks of the types Movable and CMA alone. The type of a block is not visible, but
``/proc/pagetypeinfo`` counts the free blocks of each type by order: those of a block of another type are among them.

Pinned pages look like others, and are counted as movable.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mthp.freememory import FREE, MOVES, STAYS, TAIL, UNKNOWN, FreeMemory, MemoryBlocks, parse_closed_blocks
from mthp.linux import abi
from mthp.linux.framewords import PORTION_FRAMES, FrameWords
from mthp.linux.kpageflags import KPAGEFLAGS

MOST_FRAMES = 1 << 22
"""Frames that are read at most, 16 GiB on x86-64. Of more memory a sample is read. To follow compaction in them takes
some seconds."""

# Anonymous pages that wait for their place in the LRU lists are put there when compaction begins (lru_add_drain() in
# compact_zone(), mm/compaction.c). Before Linux 6.16 only KPF_THP marks the tails of a folio of a file.
_MOVABLE = np.uint64(abi.KPF_LRU | abi.KPF_ANON | abi.KPF_THP)
# Of these the kernel has other data where it looks for KPF_ANON (seen in Linux 6.12 and 6.18).
_KERNEL = np.uint64(abi.KPF_SLAB | abi.KPF_PGTABLE | abi.KPF_HUGE)
_FREE = np.uint64(abi.KPF_BUDDY)
_TAIL = np.uint64(abi.KPF_COMPOUND_TAIL)


class MemoryBlockReader(FrameWords):
    """A reader of blocks of memory.

    Args:
        pmd_order: the PMD order; compaction moves no folio as large as this (skip_isolation_on_order()).
        release: of the kernel; that of this machine if not given.

    Raises:
        OSError: kpageflags cannot be opened: it takes root and CAP_SYS_ADMIN.
    """

    def __init__(self, pmd_order: int, path: str = KPAGEFLAGS, release: str = "") -> None:
        super().__init__(path)
        self._moves_folios = _moves_folios(release or os.uname().release)
        self._order = pmd_order
        self._types = Path(path).with_name("pagetypeinfo")

    def read(self, free: FreeMemory, most: int = MOST_FRAMES) -> MemoryBlocks:
        """Return the blocks of the PMD order in the zones of `free`.

        Args:
            most: frames to read at most.
        """
        order = self._order
        spans = [(zone.frames[0] >> order, -(-zone.frames[1] >> order)) for zone in free.zones]
        weight = max(1, -(-sum(end - start for start, end in spans) // max(1, most >> order)))
        ranges = [np.arange(start, end, weight) for start, end in spans]
        # A block that two zones share is counted once.
        numbers, first = np.unique(np.concatenate([*ranges, np.empty(0, np.int64)]), return_index=True)
        zone = np.repeat(np.arange(len(spans)), [len(numbers) for numbers in ranges])[first].astype(np.int8)
        step = max(1, PORTION_FRAMES >> order)
        pieces = [self._kinds(numbers[at : at + step]) for at in range(0, len(numbers), step)]
        none = np.empty((0, 1 << order), np.int8)
        pages, folios = (np.concatenate([none, *part]) for part in zip((none, none), *pieces, strict=True))
        return MemoryBlocks(order, numbers, zone, pages, folios, self._closed(zone, pages, weight), weight)

    def _kinds(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
        """Return the kinds and the folios of the pages of some blocks: int8, shape (numbers, pages) each."""
        size = 1 << self._order
        words = self._load(numbers << self._order, np.full(len(numbers), size)).reshape(-1, size)
        moves = ((words & _MOVABLE) != 0) & ((words & _KERNEL) == 0)
        tails = (words & _TAIL) != 0
        moves[tails[:, 1:].all(axis=1)] = False
        folios = _folios(tails)
        moves &= (folios == 0) | self._moves_folios
        kinds = np.select([(words & _FREE) != 0, moves, words == 0], [FREE, MOVES, UNKNOWN], STAYS)
        return kinds.astype(np.int8), folios

    def _closed(self, zone: NDArray[np.int8], pages: NDArray[np.int8], weight: int) -> NDArray[np.bool_]:
        """Return the blocks to which compaction moves nothing: bool, shape (blocks,).

        Args:
            zone, pages: of the blocks, as in MemoryBlocks.
            weight: blocks that each stands for.
        """
        free, moves = pages == FREE, (pages == MOVES).sum(axis=1)
        others = pages.shape[1] - free.sum(axis=1) - moves
        mixed: NDArray[np.bool_] = free.any(axis=1) & (others > 0)
        try:
            types = parse_closed_blocks(self._types.read_text())
        except OSError:
            # Blocks with pages of programs nearly always have the type Movable.
            mixed &= moves == 0
            return mixed
        closed = np.zeros(len(zone), np.bool_)
        by_order = _free_blocks(free)
        for number, counts in enumerate(types):
            rows = np.flatnonzero(mixed & (zone == number))
            # Those without movable pages first, and of these those with the most free blocks: they fit least by chance.
            rows = rows[np.lexsort((-by_order[rows].sum(axis=1), moves[rows] > 0))]
            closed[rows[_fitting(by_order[rows], counts, weight)]] = True
        return closed


def _moves_folios(release: str) -> bool:
    """Return whether compaction moves large folios (Linux kernel commit 733aea0b3a7b, in v6.9)."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is None or (int(found[1]), int(found[2])) >= (6, 9)


def _folios(tails: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return the order of the folio that begins with each page, TAIL for its other pages: int8, shape (blocks, pages).

    Args:
        tails: bool, shape (blocks, pages): pages of a folio that are not its first.
    """
    begins = ~tails
    begins[:, 0] = True
    at = np.flatnonzero(begins)
    folios = np.full(tails.size, TAIL, np.int8)
    folios[at] = np.log2(np.diff(np.append(at, tails.size))).astype(np.int8)
    return folios.reshape(tails.shape)


def _fitting(blocks: NDArray[np.int64], types: list[list[int]], weight: int) -> NDArray[np.bool_]:
    """Return which rows are among the blocks that are counted by type: bool, shape (rows,).

    Args:
        blocks: int64, shape (rows, orders): free blocks of each row by order, the most likely rows first.
        types: free blocks of each type by order.
        weight: rows that each stands for.
    """
    left = np.zeros((len(types), blocks.shape[1]), np.int64)
    for row, counts in zip(left, types, strict=True):
        row[: len(counts)] = [count // weight for count in counts[: len(row)]]
    fits = np.zeros(len(blocks), np.bool_)
    sizes = np.int64(1) << np.arange(blocks.shape[1])
    for at, some in enumerate(blocks):
        after = left - some
        able = np.flatnonzero((after >= 0).all(axis=1))
        if len(able):
            # That of which it leaves least.
            best = able[np.argmin(after[able] @ sizes)]
            left[best] = after[best]
            fits[at] = True
    return fits


def _free_blocks(free: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of free blocks by order, as the buddy allocator merges them: int64, shape (rows, orders).

    Args:
        free: bool, shape (rows, pages): free pages.
    """
    counts = []
    while free.shape[1] > 1:
        both = free[:, ::2] & free[:, 1::2]
        counts.append(free.sum(axis=1) - 2 * both.sum(axis=1))
        free = both
    return np.stack([*counts, free[:, 0]], axis=1).astype(np.int64)


def memory_blocks(
    free: FreeMemory, pmd_order: int, *, most: int = MOST_FRAMES, path: str = KPAGEFLAGS, release: str = ""
) -> MemoryBlocks | None:
    """Return the blocks of the PMD order in the zones of `free`; None without the rights."""
    try:
        reader = MemoryBlockReader(pmd_order, path, release)
    except OSError:
        return None
    with reader:
        return reader.read(free, most)
