"""Where folios come from, and what is done when there are none (__alloc_pages_slowpath, mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Sequence

from mthp.sim.buddy import Frames
from mthp.sim.parts import Parts


def take_folio(parts: Parts, order: int, nodes: Sequence[int] = (), *, may_wait: bool) -> int | None:
    """A new folio with one reference, charged to nobody: its head, or None.

    Args:
        nodes: to be asked first.
        may_wait: compact and reclaim memory for it, if there is none.
    """
    head = parts.memory.alloc(order, nodes)
    if head is not None:
        parts.clock.spend("alloc_large" if order else "alloc_small")
    return head


def charge(parts: Parts, head: int, cgroup: int, *, may_wait: bool) -> bool:
    """Charge a new folio to a memory cgroup; False if that is at its limit.

    Args:
        may_wait: reclaim memory of the cgroup for it.
    """
    return parts.memory.charge(head, cgroup)


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
