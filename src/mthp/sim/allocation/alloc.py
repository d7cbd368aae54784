"""Where folios come from, and what is done when there are none (__alloc_pages_slowpath, mm/page_alloc.c).

Allocations first leave what lies below the low watermark of the zones. Where that does not suffice, reclaim is woken in
the background, and allocations may go down to the min watermark. If there still is nothing, those that may wait compact
memory (for a large folio) and reclaim some themselves; those that may not go without.
"""

from __future__ import annotations

from collections.abc import Sequence

from mthp.sim.allocation.compact import compact
from mthp.sim.allocation.reclaim import balance, reclaim
from mthp.sim.frames.buddy import Frames
from mthp.sim.parts import Parts

_RETRIES = 16
"""Times that reclaim is tried again as long as it makes progress (MAX_RECLAIM_RETRIES, mm/internal.h)."""


def take_folio(parts: Parts, order: int, nodes: Sequence[int] = (), *, may_wait: bool) -> int | None:
    """A new folio with one reference, charged to nobody: its head, or None.

    Args:
        nodes: no others are asked; by default all.
        may_wait: compact and reclaim memory for it, if there is none.
    """
    head = parts.memory.alloc(order, nodes, low=True)
    if head is None:
        balance(parts)
        head = parts.memory.alloc(order, nodes)
    if head is None and may_wait:
        head = _large(parts, order, nodes) if order else _small(parts, nodes)
    if head is not None:
        parts.clock.spend("alloc_large" if order else "alloc_small")
    return head


def _small(parts: Parts, nodes: Sequence[int]) -> int | None:
    """A folio of order 0, for which memory is reclaimed as long as there is any."""
    for _ in range(_RETRIES):
        freed = reclaim(parts, 1)
        head = parts.memory.alloc(0, nodes)
        if head is not None or not freed:
            return head
    return None


def _large(parts: Parts, order: int, nodes: Sequence[int]) -> int | None:
    """A large folio: compaction, then reclaim of as much as it needs, then compaction once more."""
    if compact(parts, order, nodes) and (head := parts.memory.alloc(order, nodes)) is not None:
        return head
    if not reclaim(parts, 2 << order):
        return None
    head = parts.memory.alloc(order, nodes)
    if head is None and compact(parts, order, nodes):
        head = parts.memory.alloc(order, nodes)
    return head


def charge(parts: Parts, head: int, cgroup: int, *, may_wait: bool) -> bool:
    """Charge a new folio to a memory cgroup (mem_cgroup_charge); False if that, or one above it, is at its limit.

    Args:
        may_wait: reclaim memory of the cgroup that is at its limit.
    """
    memory = parts.memory
    for _ in range(_RETRIES):
        if memory.charge(head, cgroup):
            return True
        full = memory.cgroups.full(cgroup, memory.size(head))
        if not may_wait or full is None or not reclaim(parts, memory.size(head), full):
            return False
    return memory.charge(head, cgroup)


def new_folio(parts: Parts, order: int, cgroup: int, *, may_wait: bool) -> int | None:
    """A new folio with one reference, charged and clear: its head, or None."""
    head = take_folio(parts, order, may_wait=may_wait)
    if head is None:
        return None
    if not charge(parts, head, cgroup, may_wait=may_wait):
        parts.memory.put(head)
        return None
    parts.clock.spend("zero_byte", parts.geometry.size_of(order))
    return head


def take_folios(parts: Parts, order: int, cgroup: int, count: int) -> Frames:
    """Many new folios of one order, each with one reference, charged and clear, as far as they can be had at once.

    Nothing is compacted or reclaimed for them: where that is needed, the caller asks for each one.

    Returns:
        int64, shape (folios,): their heads; `count` or fewer.
    """
    memory = parts.memory
    heads = memory.alloc_many(order, min(count, memory.cgroups.room(cgroup) >> order))
    memory.cgroups.try_charge(cgroup, len(heads) << order)
    memory.cgroup[heads] = cgroup
    parts.clock.spend("alloc_large" if order else "alloc_small", len(heads))
    return heads
