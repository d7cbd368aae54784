"""Allocation of folios, and its slow path (__alloc_pages_slowpath, mm/page_alloc.c).

Allocations that may wait compact memory (for a large folio) and reclaim some themselves; the others fail.
"""

from __future__ import annotations

from collections.abc import Sequence

from mthp.sim.allocation.compact import compact
from mthp.sim.allocation.reclaim import balance, reclaim
from mthp.sim.frames.buddy import Frames
from mthp.sim.parts import Parts

_RETRIES = 16
"""Times that reclaim is repeated while it makes progress (MAX_RECLAIM_RETRIES, mm/internal.h)."""


def take_folio(parts: Parts, order: int, nodes: Sequence[int] = (), *, may_wait: bool) -> int | None:
    """Allocate a folio with one reference, not charged; return its head, or None.

    Args:
        nodes: nodes to try; by default all.
        may_wait: compact and reclaim memory if no block is free.
    """
    # At first down to the low watermark (ALLOC_WMARK_LOW in __alloc_frozen_pages_noprof()).
    head = parts.memory.alloc(order, nodes, low=True)
    if head is None:
        # The kernel wakes kswapd and goes on down to the min watermark; here kswapd has done its work at once.
        balance(parts)
        head = parts.memory.alloc(order, nodes)
    if head is None and may_wait:
        head = _large(parts, order, nodes) if order else _small(parts, nodes)
    if head is not None:
        parts.clock.spend("alloc_large" if order else "alloc_small")
    return head


def _small(parts: Parts, nodes: Sequence[int]) -> int | None:
    """Allocate a folio of order 0, reclaiming memory while that makes progress."""
    for _ in range(_RETRIES):
        freed = reclaim(parts, 1)
        head = parts.memory.alloc(0, nodes)
        if head is not None or not freed:
            return head
    return None


def _large(parts: Parts, order: int, nodes: Sequence[int]) -> int | None:
    """Allocate a large folio after compaction, then after reclaim, then after compaction again."""
    # Compaction comes before reclaim for orders that are costly (can_compact in __alloc_pages_slowpath()).
    if compact(parts, order, nodes) and (head := parts.memory.alloc(order, nodes)) is not None:
        return head
    # Twice the folio, so that compaction has frames to move pages to (compact_gap(), include/linux/compaction.h).
    if not reclaim(parts, 2 << order):
        return None
    head = parts.memory.alloc(order, nodes)
    if head is None and compact(parts, order, nodes):
        head = parts.memory.alloc(order, nodes)
    return head


def charge(parts: Parts, head: int, cgroup: int, *, may_wait: bool) -> bool:
    """Charge a new folio to a memory cgroup (mem_cgroup_charge).

    Args:
        may_wait: reclaim memory of the cgroup that is at its limit.

    Returns:
        False if the cgroup, or an ancestor, is at its limit.
    """
    memory = parts.memory
    for _ in range(_RETRIES):
        if memory.charge(head, cgroup):
            return True
        full = memory.cgroups.full(cgroup, memory.size(head))
        # In the cgroup that is full, not in the one that is charged: its siblings may hold the memory.
        if not may_wait or full is None or not reclaim(parts, memory.size(head), full):
            return False
    return memory.charge(head, cgroup)


def new_folio(parts: Parts, order: int, cgroup: int, *, may_wait: bool) -> int | None:
    """Allocate a folio with one reference, charged and cleared; return its head, or None."""
    head = take_folio(parts, order, may_wait=may_wait)
    if head is None:
        return None
    if not charge(parts, head, cgroup, may_wait=may_wait):
        parts.memory.put(head)
        return None
    parts.clock.spend("zero_byte", parts.geometry.size_of(order))
    return head


def take_folios(parts: Parts, order: int, cgroup: int, count: int) -> Frames:
    """Allocate many folios of one order, without compaction or reclaim.

    Each has one reference, and is charged and cleared. The caller allocates the rest one by one.

    Returns:
        int64, shape (folios,): their heads; `count` or fewer.
    """
    memory = parts.memory
    heads = memory.alloc_many(order, min(count, memory.cgroups.room(cgroup) >> order))
    memory.cgroups.try_charge(cgroup, len(heads) << order)
    memory.cgroup[heads] = cgroup
    parts.clock.spend("alloc_large" if order else "alloc_small", len(heads))
    return heads
