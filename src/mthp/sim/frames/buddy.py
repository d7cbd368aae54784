"""The binary buddy allocator: free blocks of 2**order frames, split on the way down and merged on the way up.

Follows the shape of mm/page_alloc.c: a block's buddy is found by flipping the bit of its order in its frame number;
a free block is always merged with its buddy while that is free and of the same order. A zone hands out nothing that
would bring it below its ``min`` watermark.

Free blocks of an order are kept in a dict without values: it gives the last one freed first, finds and removes a
buddy in constant time, and keeps its order from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Free frames of a zone below which something happens (``/proc/zoneinfo``).

    Attributes:
        min: allocations fail.
        low: reclaim starts.
        high: reclaim rests.
    """

    min: int = 0
    low: int = 0
    high: int = 0

    @classmethod
    def above(cls, min: int) -> Watermarks:
        """Those that the kernel sets for a zone of which `min` frames are kept free (__setup_per_zone_wmarks)."""
        return cls(min, min + min // 4, min + min // 2)


@dataclass(slots=True)
class Compaction:
    """What compaction remembers of a zone (defer_compaction, mm/compaction.c).

    Attributes:
        cursor: the frame from which it goes on.
        considered: calls that were turned away since it failed last.
        defer_shift: 2**defer_shift calls are turned away after a failure.
        order_failed: of the smallest block that it failed for.
    """

    cursor: int
    considered: int = 0
    defer_shift: int = 0
    order_failed: int = 1 << 30


class Zone:
    """A contiguous range of frames with its free lists.

    Args:
        start: first frame; a multiple of 2**max_order.
        max_order: of the largest block that is kept.
        node: that it is a part of.
        name: as in ``/proc/buddyinfo``.

    Attributes:
        reserve: frames that it keeps for those who can use no other zone (lowmem_reserve), on top of a watermark.
        compaction: how far compaction got, and whether it rests.
    """

    def __init__(self, start: int, frames: int, max_order: int, node: int = 0, name: str = "Normal") -> None:
        self.start = start
        self.frames = frames
        self.max_order = max_order
        self.free_frames = 0
        self.node = node
        self.name = name
        self.reserve = 0
        self.watermarks = Watermarks()
        self.compaction = Compaction(start)
        self._free: list[dict[int, None]] = [{} for _ in range(max_order + 1)]
        self.free_range(start, frames)

    @property
    def end(self) -> int:
        """The frame behind the last."""
        return self.start + self.frames

    def alloc(self, order: int, *, low: bool = False) -> int | None:
        """Take a block of `order`: its first frame, or None if there is none or the watermark forbids it.

        Args:
            low: keep to the ``low`` watermark instead of ``min``.
        """
        at = self._order_of_block(order, low=low)
        if at is None:
            return None
        head, _ = self._free[at].popitem()
        while at > order:
            at -= 1
            self._free[at][head + (1 << at)] = None
        self.free_frames -= 1 << order
        return head

    def has(self, order: int, *, low: bool = False) -> bool:
        """Whether :meth:`alloc` would give a block."""
        return self._order_of_block(order, low=low) is not None

    def _order_of_block(self, order: int, *, low: bool) -> int | None:
        """The order of the block that a block of `order` would be taken from."""
        kept = self.reserve + (self.watermarks.low if low else self.watermarks.min)
        if self.free_frames - (1 << order) < kept:
            return None
        return next((at for at in range(order, self.max_order + 1) if self._free[at]), None)

    def alloc_pages(self, count: int, *, low: bool = False) -> list[tuple[int, int]]:
        """Take up to `count` frames, in blocks as large as there are: (first frame, frames) each."""
        taken: list[tuple[int, int]] = []
        order = self.max_order
        while count and order >= 0:
            head = self.alloc(order, low=low) if count >> order else None
            if head is None:
                order -= 1
                continue
            taken.append((head, 1 << order))
            count -= 1 << order
        return taken

    def free(self, head: int, order: int) -> None:
        """Give a block back, and merge it with its buddies as far as they are free."""
        self.free_frames += 1 << order
        while order < self.max_order:
            buddy = head ^ (1 << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            head &= ~(1 << order)
            order += 1
        self._free[order][head] = None

    def free_range(self, start: int, frames: int) -> None:
        """Give back any contiguous frames, in blocks as large as their alignment allows."""
        end = start + frames
        while start < end:
            order = min(self.max_order, (end - start).bit_length() - 1)
            if start:
                order = min(order, (start & -start).bit_length() - 1)
            self.free(start, order)
            start += 1 << order

    def take(self, frame: int) -> None:
        """Take one free frame, and give back the rest of the block that it lies in.

        Raises:
            ValueError: it is not free.
        """
        for order, blocks in enumerate(self._free):
            head = frame & -(1 << order)
            if head in blocks:
                break
        else:
            raise ValueError(f"frame {frame} is not free")
        del self._free[order][head]
        while order:
            order -= 1
            half = 1 << order
            self._free[order][head + half if frame < head + half else head] = None
            head += half * (frame >= head + half)
        self.free_frames -= 1

    def claim(self, start: int, order: int) -> list[tuple[int, int]]:
        """Take all free blocks that lie inside of an aligned block of `order`: (first frame, order) each."""
        claimed, end = [], start + (1 << order)
        for at in range(order + 1):
            blocks = self._free[at]
            if len(blocks) < 1 << (order - at):
                inside = [head for head in blocks if start <= head < end]
            else:
                inside = [head for head in range(start, end, 1 << at) if head in blocks]
            for head in inside:
                del blocks[head]
                self.free_frames -= 1 << at
                claimed.append((head, at))
        return claimed

    def unusable_index(self, order: int) -> float:
        """The part of free memory that lies in blocks too small for `order` (unusable_free_index, mm/vmstat.c).

        0 says that all of it can be had in blocks of that order, 1 that none can; 1 too where nothing is free.
        """
        if not self.free_frames:
            return 1.0
        return 1.0 - self.usable_frames(order) / self.free_frames

    def usable_frames(self, order: int) -> int:
        """Free frames in blocks of `order` and above."""
        return sum(len(blocks) << at for at, blocks in enumerate(self._free) if at >= order)

    def blocks_of(self, order: int) -> Frames:
        """All aligned blocks of `order` that are free: int64, shape (blocks,), their first frames, ascending."""
        parts = [np.zeros(0, np.int64)]
        for at in range(order, self.max_order + 1):
            heads = np.fromiter(self._free[at], np.int64, len(self._free[at]))
            parts.append((heads[:, None] + (np.arange(1 << (at - order)) << order)).ravel())
        return np.sort(np.concatenate(parts))

    def free_counts(self) -> list[int]:
        """Free blocks by order, as a line of ``/proc/buddyinfo`` has them."""
        return [len(blocks) for blocks in self._free]

    def free_blocks(self) -> list[tuple[int, int]]:
        """Every free block as (first frame, order), by order."""
        return [(head, order) for order, blocks in enumerate(self._free) for head in blocks]


def runs_of(frames: Frames) -> list[tuple[int, int]]:
    """Cut frame numbers into contiguous runs: (first frame, length) each.

    Args:
        frames: int64, shape (frames,), ascending, each once.
    """
    if not len(frames):
        return []
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(frames)])))
    return list(zip(frames[starts].tolist(), lengths.tolist(), strict=True))
