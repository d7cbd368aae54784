"""The lru_add batch: folios wait in a batch of their CPU before they get on an LRU list.

This batch explains most of the erratic results of a real khugepaged: a failed collapse puts back the pages that it had
isolated. They land in the batch, have one reference more than their mappings explain, and fail the next attempt with
PAGE_COUNT.
"""

from __future__ import annotations

import numpy as np

from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import Fl, Memory

BATCH_SIZE = 31
"""Folios that a batch holds (FOLIO_BATCH_SIZE, include/linux/folio_batch.h)."""


class LruAddBatch:
    """The lru_add batch of the one CPU on which the machine runs."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._waiting: list[int] = []

    @property
    def waiting(self) -> tuple[int, ...]:
        """Heads of the folios in the batch, in the order in which they were queued."""
        return tuple(self._waiting)

    def add(self, head: int) -> None:
        """Queue a folio (folio_add_lru); a large one drains the batch at once."""
        # cpu_fbatches.lru_add (mm/swap.c; mm/folio.c in 7.3) holds a reference until it is drained.
        self._memory.refcount[head] += 1
        self._waiting.append(head)
        # Large folios never wait (folio_may_be_lru_cached()).
        if len(self._waiting) >= BATCH_SIZE or self._memory.order[head]:
            self.drain()

    def add_small(self, pfns: Frames) -> None:
        """Queue folios of order 0, in this order.

        Args:
            pfns: int64, shape (pages,), without duplicates.
        """
        through = (len(self._waiting) + len(pfns)) // BATCH_SIZE * BATCH_SIZE
        if through:
            # The batch fills and drains repeatedly: all but the remainder at the end go straight to their lists.
            passing = through - len(self._waiting)
            self.drain()
            self._memory.flags[pfns[:passing]] |= Fl.LRU
            pfns = pfns[passing:]
        self._memory.refcount[pfns] += 1
        self._waiting += pfns.tolist()

    def add_large(self, heads: Frames) -> None:
        """Queue large folios, which drains the batch and leaves it empty.

        Args:
            heads: int64, shape (folios,), without duplicates.
        """
        self.drain()
        self._memory.flags[heads] |= Fl.LRU

    def drain(self) -> None:
        """Drain the batch (lru_add_drain): its folios get on their lists, or are freed."""
        if not self._waiting:
            return
        memory = self._memory
        heads = np.array(self._waiting, np.int64)
        self._waiting.clear()
        memory.flags[heads] |= Fl.LRU
        large = memory.order[heads] > 0
        memory.put_small(heads[~large])
        for head in heads[large].tolist():
            memory.put(head)

    def isolate(self, heads: Frames) -> None:
        """Take folios off their lists, with a reference (folio_isolate_lru). All must be on a list."""
        self._memory.flags[heads] &= ~Fl.LRU
        self._memory.refcount[heads] += 1

    def putback_small(self, pfns: Frames) -> None:
        """Undo :meth:`isolate` for folios of order 0, in this order (folio_putback_lru)."""
        # The batch takes its reference before that of the isolation is dropped.
        self.add_small(pfns)
        self._memory.put_small(pfns)

    def putback(self, head: int) -> None:
        """Undo :meth:`isolate` for one folio."""
        self.add(head)
        self._memory.put(head)
