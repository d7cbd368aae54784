"""Deliberate fragmentation: large blocks become hard to allocate although much memory is free.

Memory of a machine that ran for a while is fragmented because unmovable pages are scattered over it. Here a single page
is allocated in one free block after another, chosen by a seed, until the wanted share of the free memory lies in
blocks that are too small. The kernel calls that share the *unusable free space index* of an order
(``/sys/kernel/debug/extfrag/unusable_index``): 0 if all free memory can be had in blocks of that order, 1 if none can.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.sim.frames.buddy import Frames, Zone
from mthp.sim.frames.memory import Fl
from mthp.sim.parts import Parts


def fragment(parts: Parts, index: float, order: int, *, movable: float = 0.0, seed: int = 0) -> int:
    """Fragment the free memory of every node.

    Args:
        index: least ``Zone.unusable_index`` of `order` to reach, including the fragmentation that exists already.
        order: order of the blocks that become scarce. Smaller ones do not: one page spoils a block of this order.
        movable: share of the allocated pages that are page cache, which compaction moves and reclaim drops; the
            others are the kernel's own, and stay.
        seed: chooses the blocks and the places in them; the same on any machine.

    Returns:
        Pages allocated.

    Raises:
        UsageError: an index or a share is outside 0 to 1, or the allocator does not have the order.
    """
    memory = parts.memory
    if not 0 <= index <= 1:
        raise UsageError(f"fragmentation index {index} is not within 0 to 1")
    if not 0 <= movable <= 1:
        raise UsageError(f"share of movable pages {movable} is not within 0 to 1")
    if not 1 <= order <= memory.max_order:
        raise UsageError(f"order {order} cannot be fragmented: blocks have orders up to {memory.max_order}")
    count = 0
    for zone in memory.zones:
        frames = _chosen(zone, index, order, seed)
        for frame in frames.tolist():
            zone.take(frame)
        # 53 bits: as many as a float has, so that the comparison is exact.
        of_cache = (random_numbers(frames, seed + 1) >> np.uint64(11)) < movable * 2**53
        memory.own(frames[~of_cache])
        memory.own(frames[of_cache], Fl.LRU, Fl.UPTODATE)
        memory.cache.update(dict.fromkeys(frames[of_cache].tolist()))
        count += len(frames)
    return count


def _chosen(zone: Zone, index: float, order: int, seed: int) -> Frames:
    """Return one frame in each block to spoil."""
    blocks, size = zone.blocks_of(order), 1 << order
    unusable = zone.free_frames - len(blocks) * size
    # Each page takes one frame from the free ones and makes size - 1 of them unusable.
    wanted = math.ceil((index * zone.free_frames - unusable) / (size - 1 + index))
    keys = random_numbers(blocks, seed)
    chosen = np.argsort(keys, kind="stable")[: max(wanted, 0)]
    frames: Frames = blocks[chosen] + (keys[chosen] & np.uint64(size - 1)).astype(np.int64)
    return frames


def random_numbers(numbers: Frames, seed: int) -> NDArray[np.uint64]:
    """Return a random number for each number, the same on any machine (SplitMix64): uint64, shape of `numbers`."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)) * step + step
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
