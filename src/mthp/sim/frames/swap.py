"""Swap: slots with their counts, and the swap cache.

The count of a slot is the number of page table entries that refer to it. A folio in the swap cache keeps its slots
whatever their counts, and the cache holds one reference to it per page.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.sim.frames.memory import Fl, Memory


class Swap:
    """One swap device.

    Args:
        slots: pages that it holds.
        synchronous: reading needs no context switch, as with zram (SWP_SYNCHRONOUS_IO); only then are several pages
            read back into one large folio.

    Attributes:
        count: uint16, shape (slots + 1,): page table entries that refer to the slot. Slot 0 is the header, never used.
        content: uint32, same shape: content written to the slot.
        cached: int64, same shape: frame that holds the slot's page in the swap cache, 0 for none.
    """

    def __init__(self, memory: Memory, slots: int, *, synchronous: bool = True) -> None:
        self.synchronous = synchronous
        self.count: NDArray[np.uint16] = np.zeros(slots + 1, np.uint16)
        self.content: NDArray[np.uint32] = np.zeros(slots + 1, np.uint32)
        self.cached: NDArray[np.int64] = np.zeros(slots + 1, np.int64)
        self._memory = memory
        self._slot_of: dict[int, int] = {}
        self._next = 1

    @property
    def slots(self) -> int:
        """Pages that the device holds."""
        return len(self.count) - 1

    def free_slots(self) -> NDArray[np.intp]:
        """Return the slots that no entry refers to and no folio keeps: intp, shape (free slots,), ascending."""
        # A slot without entries may still be kept by a folio in the cache, which could then be dropped without being
        # written.
        free = (self.count == 0) & (self.cached == 0)
        # The header of the device.
        free[0] = False
        return np.flatnonzero(free)

    def has_room(self) -> bool:
        """Return whether a slot is free."""
        return bool(((self.count[1:] == 0) & (self.cached[1:] == 0)).any())

    def take(self, slot: int, content: int) -> None:
        """Write a page to a free slot, for one page table entry.

        Raises:
            UsageError: the slot does not exist, or is in use.
        """
        if not 1 <= slot <= self.slots or self.count[slot] or self.cached[slot]:
            raise UsageError(f"swap slot {slot} is not one of the free slots from 1 to {self.slots}")
        self.count[slot] = 1
        self.content[slot] = content

    def take_many(self, slots: NDArray[np.int64], contents: NDArray[np.uint32]) -> None:
        """Write pages to free slots, each for one page table entry.

        Args:
            slots: int64, shape (pages,), some of :meth:`free_slots`.
            contents: uint32, same shape.
        """
        self.count[slots] = 1
        self.content[slots] = contents

    def free_cluster(self, order: int) -> int | None:
        """Return the first of 2**order adjoining free slots, aligned to their number; None if there are none."""
        if not order:
            free = self.free_slots()
            return int(free[0]) if len(free) else None
        size = 1 << order
        whole = len(self.count) // size * size
        used = (self.count[:whole] != 0) | (self.cached[:whole] != 0)
        if whole:
            used[0] = True
        free = np.flatnonzero(~used.reshape(-1, size).any(axis=1))
        return int(free[0]) * size if len(free) else None

    def write(self, head: int, slot: int) -> None:
        """Write a folio's pages to the free slots from `slot` on; their counts stay 0."""
        size = self._memory.size(head)
        self.content[slot : slot + size] = self._memory.content[head : head + size]

    def split_cache(self, head: int, size: int) -> None:
        """Assign each page of a folio in the swap cache its own slot, because the folio was split."""
        slot = self._slot_of[head]
        self._slot_of |= {head + i: slot + i for i in range(size)}

    def moved(self, old: int, new: int) -> None:
        """Note that a folio in the swap cache was moved."""
        slot, size = self._slot_of.pop(old), self._memory.size(new)
        self._slot_of[new] = slot
        self.cached[slot : slot + size] = np.arange(new, new + size)

    def slot_of(self, head: int) -> int:
        """Return the first slot of a folio in the swap cache."""
        return self._slot_of[head]

    def add_to_cache(self, head: int, slot: int) -> None:
        """Put a folio into the swap cache, with its pages at `slot` and behind (__swap_cache_add_folio)."""
        size = self._memory.size(head)
        self.cached[slot : slot + size] = np.arange(head, head + size)
        self._slot_of[head] = slot
        self._memory.set(head, Fl.SWAPCACHE)
        # One reference for each page (__swap_cache_add_folio(), mm/swap_state.c).
        self._memory.refcount[head] += size

    def free_cache(self, head: int) -> bool:
        """Remove a folio with unused slots from the swap cache (folio_free_swap).

        The caller has a reference of its own. Return whether it was removed.
        """
        if not self._memory.has(head, Fl.SWAPCACHE):
            return False
        slot, size = self._slot_of[head], self._memory.size(head)
        # Entries still refer to the slots, and what reads them must find this folio.
        if self.count[slot : slot + size].any():
            return False
        self.leave_cache(head)
        return True

    def leave_cache(self, head: int) -> None:
        """Remove a folio from the swap cache if it is there; its slots keep their content.

        The caller has a reference of its own.
        """
        if not self._memory.has(head, Fl.SWAPCACHE):
            return
        slot, size = self._slot_of.pop(head), self._memory.size(head)
        self.cached[slot : slot + size] = 0
        self._memory.clear(head, Fl.SWAPCACHE)
        self._memory.put(head, size)

    def drop(self, slot: int) -> None:
        """Drop one page table entry's reference to a slot (swap_free).

        With the last one, a folio that is not mapped but kept the slot in the cache is freed.
        """
        self.count[slot] -= 1
        pfn = int(self.cached[slot])
        if self.count[slot] or not pfn:
            return
        head = self._memory.head(pfn)
        size = self._memory.size(head)
        if not self._memory.mapcount[head : head + size].any():
            self._memory.refcount[head] += 1
            self.free_cache(head)
            self._memory.put(head)
