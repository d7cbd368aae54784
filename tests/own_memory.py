"""Moves memory of the test's own process by the seam, with a journal of the test."""

from __future__ import annotations

from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from mthp.means import Means
from mthp.results import BlockOutcome


def collapse_own(
    address: int, length: int, order: int, *, guarded: bool = True, journal: SwitchJournal | None = None
) -> list[BlockOutcome]:
    """Collapse all whole blocks of `order` between two addresses: the outcome of each, by ascending address."""
    with open_live("self") as space:
        space.guarded = guarded
        space._mover = space._make_mover(journal)
        size = space.geometry.size_of(space.geometry.check_order(order))
        first, last = -(-address // size) * size, (address + length) // size * size
        return space.collapse_blocks([(block, order) for block in range(first, last, size)], Means("madvise,move"))
