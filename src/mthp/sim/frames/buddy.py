"""The binary buddy allocator: free blocks of 2**order frames.

Follows the shape of mm/page_alloc.c: the frame number of a block's buddy differs in the bit of the block's order; a
freed block is merged with its buddy while that is free and of the same order. A zone allocates nothing that would
bring it below its ``min`` watermark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Watermarks of a zone, in free frames (``/proc/zoneinfo``).

    Attributes:
        min: below it, allocations fail.
        low: below it, reclaim starts.
        high: at it, reclaim stops.
    """

    min: int = 0
    low: int = 0
    high: int = 0

    @classmethod
    def above(cls, min: int) -> Watermarks:
        """Return the kernel's watermarks for a zone that keeps `min` frames free (__setup_per_zone_wmarks)."""
        return cls(min, min + min // 4, min + min // 2)


@dataclass(slots=True)
class Compaction:
    """State of compaction in a zone (defer_compaction, mm/compaction.c).

    Attributes:
        cursor: frame from which it continues.
        considered: calls deferred since the last failure.
        defer_shift: after a failure, 2**defer_shift calls are deferred.
        order_failed: smallest order that it failed for.
    """

    cursor: int
    considered: int = 0
    defer_shift: int = 0
    order_failed: int = 1 << 30


class Zone:
    """A contiguous range of frames with its free lists.

    Args:
        start: first frame; a multiple of 2**max_order.
        max_order: order of the largest free block.
        node: number of its node.
        name: name in ``/proc/buddyinfo``.

    Attributes:
        reserve: frames kept for allocations that can use only this zone (lowmem_reserve), on top of a watermark.
        compaction: state of compaction.
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
        # By order. A dict finds and removes a buddy in constant time, and keeps the same order in every run.
        self._free: list[dict[int, None]] = [{} for _ in range(max_order + 1)]
        self.free_range(start, frames)

    @property
    def end(self) -> int:
        """The frame behind the last one."""
        return self.start + self.frames

    def alloc(self, order: int, *, low: bool = False) -> int | None:
        """Take a block of `order`; return its first frame, or None.

        Args:
            low: keep to the ``low`` watermark instead of ``min``.

        Returns:
            None if no block is free or the watermark forbids it.
        """
        at = self._order_of_block(order, low=low)
        if at is None:
            return None
        # The one freed last, as from the head of the kernel's list.
        head, _ = self._free[at].popitem()
        while at > order:
            at -= 1
            # expand(): the upper halves go back to the lists.
            self._free[at][head + (1 << at)] = None
        self.free_frames -= 1 << order
        return head

    def has(self, order: int, *, low: bool = False) -> bool:
        """Return whether :meth:`alloc` would succeed."""
        return self._order_of_block(order, low=low) is not None

    def _order_of_block(self, order: int, *, low: bool) -> int | None:
        """Return the order of the free block that :meth:`alloc` would take or split."""
        kept = self.reserve + (self.watermarks.low if low else self.watermarks.min)
        # Checked for the frames left over, not for the present ones (__zone_watermark_ok(), mm/page_alloc.c).
        if self.free_frames - (1 << order) < kept:
            return None
        return next((at for at in range(order, self.max_order + 1) if self._free[at]), None)

    def alloc_pages(self, count: int, *, low: bool = False) -> list[tuple[int, int]]:
        """Take up to `count` frames, in the largest blocks that are free; return (first frame, frames) for each."""
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
        """Free a block, and merge it with its buddies while they are free."""
        self.free_frames += 1 << order
        # Merging ends at the first buddy that is in use, or is free in smaller parts only.
        while order < self.max_order:
            buddy = head ^ (1 << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            head &= ~(1 << order)
            order += 1
        self._free[order][head] = None

    def free_range(self, start: int, frames: int) -> None:
        """Free any contiguous frames, in blocks as large as their alignment allows."""
        end = start + frames
        while start < end:
            # As large as the rest of the range, and as the alignment of its start.
            order = min(self.max_order, (end - start).bit_length() - 1)
            if start:
                order = min(order, (start & -start).bit_length() - 1)
            self.free(start, order)
            start += 1 << order

    def take(self, frame: int) -> None:
        """Take one free frame, and free the rest of the block that it lies in.

        Raises:
            ValueError: the frame is not free.
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
        """Take all free blocks within an aligned block of `order`; return (first frame, order) for each."""
        claimed, end = [], start + (1 << order)
        for at in range(order + 1):
            blocks = self._free[at]
            # Whichever is shorter: the list of free blocks, or that of the possible heads.
            if len(blocks) < 1 << (order - at):
                inside = [head for head in blocks if start <= head < end]
            else:
                inside = [head for head in range(start, end, 1 << at) if head in blocks]
            for head in inside:
                del blocks[head]
                self.free_frames -= 1 << at
                claimed.append((head, at))
        return claimed

    @contextlib.contextmanager
    def without(self, hidden: NDArray[np.bool_], order: int) -> Iterator[None]:
        """Take nothing from some aligned blocks of `order` meanwhile; what is free there counts for the watermarks.

        Args:
            hidden: bool, shape (blocks,): which ones, of all of the machine.
        """
        kept: list[tuple[dict[int, None], list[int]]] = []
        for blocks in self._free[:order] if hidden.any() else []:
            heads = np.fromiter(blocks, np.int64, len(blocks))
            kept.append((blocks, heads[hidden[heads >> order]].tolist()))
            for head in kept[-1][1]:
                del blocks[head]
        yield
        for blocks, inside in kept:
            blocks.update(dict.fromkeys(inside))

    def unusable_index(self, order: int) -> float:
        """Return the share of free memory in blocks too small for `order`.

        Follows unusable_free_index() (mm/vmstat.c). 0: all of it can be allocated in blocks of that order. 1: none can,
        or no memory is free.
        """
        if not self.free_frames:
            return 1.0
        return 1.0 - self.usable_frames(order) / self.free_frames

    def usable_frames(self, order: int) -> int:
        """Return the number of free frames in blocks of `order` and above."""
        return sum(len(blocks) << at for at, blocks in enumerate(self._free) if at >= order)

    def blocks_of(self, order: int) -> Frames:
        """Return the first frames of all free aligned blocks of `order`: int64, shape (blocks,), ascending."""
        parts = [np.zeros(0, np.int64)]
        for at in range(order, self.max_order + 1):
            heads = np.fromiter(self._free[at], np.int64, len(self._free[at]))
            parts.append((heads[:, None] + (np.arange(1 << (at - order)) << order)).ravel())
        return np.sort(np.concatenate(parts))

    def free_counts(self) -> list[int]:
        """Return the number of free blocks of each order, as in a line of ``/proc/buddyinfo``."""
        return [len(blocks) for blocks in self._free]

    def free_blocks(self) -> list[tuple[int, int]]:
        """Return every free block as (first frame, order), by order."""
        return [(head, order) for order, blocks in enumerate(self._free) for head in blocks]


def runs_of(frames: Frames) -> list[tuple[int, int]]:
    """Cut frame numbers into contiguous runs; return (first frame, length) for each.

    Args:
        frames: int64, shape (frames,), ascending, without duplicates.
    """
    if not len(frames):
        return []
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(frames)])))
    return list(zip(frames[starts].tolist(), lengths.tolist(), strict=True))
