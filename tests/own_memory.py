"""Moves memory of the test's own process by the seam, with a journal of the test."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mthp.errors import UsageError
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


def collapse_buffer_to(buffer: ArrayLike, order: int, *, journal: SwitchJournal | None = None) -> list[BlockOutcome]:
    """As :func:`collapse_own`, for the memory of an object with the buffer interface."""
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"no buffer: {error}") from None
    with view:
        if not view.c_contiguous:
            raise UsageError("the buffer is not contiguous")
        address = np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0
        return collapse_own(address, view.nbytes, order, journal=journal)
