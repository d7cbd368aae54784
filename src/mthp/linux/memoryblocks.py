"""Read what lies in the blocks of a machine's memory: free pages, pages that compaction moves, and pages that stay.

A page that compaction cannot move keeps its block from becoming one folio, however much is free elsewhere. The migrate
type of the block (/proc/pagetypeinfo) does not show this: once memory was short, the kernel's own pages lie in blocks
of the type Movable as well (__rmqueue_steal(), mm/page_alloc.c). ``/proc/kpageflags`` shows it page by page.

Pinned pages look like others, and are counted as movable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.freememory import FreeMemory, MemoryBlocks
from mthp.linux import abi
from mthp.linux.framewords import BLOCK_FRAMES, FrameWords
from mthp.linux.kpageflags import KPAGEFLAGS

MOST_FRAMES = 1 << 24
"""Frames that are read at most, 64 GiB on x86-64, which takes some 2 seconds. Of more memory a sample is read."""

# Anonymous pages that wait for their place in the LRU lists are put there when compaction begins (lru_add_drain() in
# compact_zone(), mm/compaction.c). Before Linux 6.16 only KPF_THP marks the tails of a folio of a file.
_MOVABLE = np.uint64(abi.KPF_LRU | abi.KPF_ANON | abi.KPF_THP)
_FREE, _HUGETLB = np.uint64(abi.KPF_BUDDY), np.uint64(abi.KPF_HUGE)
_TAIL = np.uint64(abi.KPF_COMPOUND_TAIL)


class MemoryBlockReader(FrameWords):
    """A reader of blocks of memory.

    Args:
        pmd_order: the PMD order; compaction moves no folio as large as this (skip_isolation_on_order()).

    Raises:
        OSError: kpageflags cannot be opened: it takes root and CAP_SYS_ADMIN.
    """

    def __init__(self, pmd_order: int, path: str = KPAGEFLAGS) -> None:
        super().__init__(path)
        self._pmd_order = pmd_order

    def read(self, free: FreeMemory, order: int, most: int = MOST_FRAMES) -> MemoryBlocks:
        """Return the blocks of `order` in the zones of `free`.

        Args:
            order: at most the PMD order.
            most: frames to read at most.
        """
        top = self._pmd_order
        spans = [(zone.frames[0] >> top, -(-zone.frames[1] >> top)) for zone in free.zones]
        weight = max(1, -(-sum(end - start for start, end in spans) // max(1, most >> top)))
        ranges = [np.arange(start, end, weight) for start, end in spans]
        # A block that two zones share is counted once.
        large, first = np.unique(np.concatenate([*ranges, np.empty(0, np.int64)]), return_index=True)
        zone = np.repeat(np.arange(len(spans)), [len(numbers) for numbers in ranges])[first].astype(np.int8)
        step = max(1, BLOCK_FRAMES >> top)
        pieces = [self._counted(large[at : at + step], order) for at in range(0, len(large), step)]
        counts = np.concatenate([np.empty((0, 3), np.int64), *pieces])
        parts = 1 << top - order
        numbers = (large[:, None] * parts + np.arange(parts)).ravel()
        return MemoryBlocks(order, numbers, np.repeat(zone, parts), counts[:, 0], counts[:, 1], counts[:, 2], weight)

    def _counted(self, large: NDArray[np.int64], order: int) -> NDArray[np.int64]:
        """Return free, movable and unknown pages of the blocks of `order` in `large`: int64, shape (blocks, 3)."""
        size = 1 << self._pmd_order
        words = self._load(large << self._pmd_order, np.full(len(large), size)).reshape(-1, size)
        free = (words & _FREE) != 0
        movable = ((words & _MOVABLE) != 0) & ~free & ((words & _HUGETLB) == 0)
        movable[(words[:, 1:] & _TAIL).all(axis=1)] = False
        each = (-1, 1 << order)
        return np.stack([bits.reshape(each).sum(axis=1) for bits in (free, movable, words == 0)], axis=1)


def memory_blocks(
    free: FreeMemory, order: int, pmd_order: int, *, most: int = MOST_FRAMES, path: str = KPAGEFLAGS
) -> MemoryBlocks | None:
    """Return the blocks of `order` in the zones of `free`; None without the rights."""
    try:
        reader = MemoryBlockReader(pmd_order, path)
    except OSError:
        return None
    with reader:
        return reader.read(free, order, most)
