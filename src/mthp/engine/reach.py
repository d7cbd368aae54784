"""Predict how much of a plan the memory of a machine allows: at this moment, after compaction, and after a trim.

A collapse takes a free block of its folio's order, and the base pages that it copied become free afterwards. These do
not move: they make a larger block only if they fill it completely, or after compaction moves the pages between them
(:mod:`mthp.engine.packing`). A split takes a block of the PMD order for each PMD range, one after the other.

Pinned pages do not move, and are not known here. Reclaim, which a collapse makes as well, is not counted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mthp.engine.packing import Packing, Shape
from mthp.freememory import FreeMemory
from mthp.ptes import ColumnTable


class Limit(enum.Enum):
    """The reason why a folio cannot be made."""

    NOTHING = "nothing"
    FOLIOS = "folios"
    KEPT = "kept"
    ROOM = "room"


@dataclass(frozen=True)
class Steps(ColumnTable):
    """Steps of a plan, the blocks of one order together, as columns of pages.

    Attributes:
        order: int8, order of the free block that a step takes.
        folio: int8, order of the folios that it becomes.
        holes: int64, pages of the block that become free.
        filled: int64, pages by which the target grows.
    """

    DTYPES = (np.int8, np.int8, np.int64, np.int64)

    order: NDArray[np.int8]
    folio: NDArray[np.int8]
    holes: NDArray[np.int64]
    filled: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Supply:
    """The memory that new folios are made of.

    Attributes:
        free: free memory of the machine.
        room: pages by which the target may grow, the old pages and the new folio together; None without a bound.
        packing: the machine's memory, which is compacted when no free block is left; None without compaction. It
            changes with every step.
        hidden: pages that stay in lists of processors after they were freed, where no allocation at this moment finds
            them. Compaction drains the lists.
        room_of_machine: whether `room` is that of MemAvailable, which does not count hidden pages.
        merged: by order, the aligned blocks of that order that become completely free once a step, and all before it,
            are done: int64, shape (steps,).
    """

    free: FreeMemory
    room: int | None = None
    packing: Packing | None = None
    hidden: int = 0
    room_of_machine: bool = False
    merged: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)


def reachable(steps: Steps, supply: Supply) -> tuple[NDArray[np.bool_], dict[int, Limit]]:
    """Return which steps can be done, and what limits those of each order.

    Returns:
        bool, shape (steps,); and the limit by order, in the order of the steps.
    """
    done = np.zeros(len(steps), np.bool_)
    limits: dict[int, Limit] = {}
    for order in dict.fromkeys(steps.order.tolist()):
        rows = np.flatnonzero(steps.order == order)
        stops = _stops(steps, supply, done, rows, order)
        count = _count(stops)
        if supply.packing is not None and count:
            made = _made(steps, supply.packing, rows[:count], _at_once(supply, 1 << order))
            if made < count:
                count = made
                stops[made] = _LIMITS.index(Limit.FOLIOS if supply.packing.compacted else Limit.ROOM)
        done[rows[:count]] = True
        limits[order] = Limit.NOTHING if count == len(rows) else _LIMITS[int(stops[count])]
    return done, limits


_LIMITS = tuple(Limit)

_UNBOUNDED = 1 << 62


def _stops(
    steps: Steps, supply: Supply, done: NDArray[np.bool_], rows: NDArray[np.intp], order: int
) -> NDArray[np.int8]:
    """Return what stops each step of one order if all before it were done: int8, shape (rows,), index in `_LIMITS`.

    Args:
        done: bool, shape (steps,): steps of earlier orders that were done.
    """
    free, size, before = supply.free, 1 << order, steps[done]
    run = steps[rows]
    # Each sum is of the steps before a step.
    grown = int(before.filled.sum()) + _sums(run.filled)
    spare = free.spare - grown + (free.listed if supply.packing else 0)
    stops, hidden = np.zeros(len(rows), np.int8), np.zeros(len(rows), np.int64)
    if supply.packing is None:
        freed = int(_freed(before).sum()) + _sums(_freed(run))
        hidden = np.minimum(freed, supply.hidden)
        merged = supply.merged.get(order, np.zeros(len(steps), np.int64))
        # The oldest pages leave the lists first.
        flushed = np.searchsorted(freed, freed - supply.hidden, side="right") - 1
        taken = int((np.int64(1) << np.maximum(before.order.astype(np.int64) - order, 0)).sum())
        blocks = free.folios(order) - taken - np.arange(len(rows)) + int(merged[done].sum())
        blocks += np.append(0, np.cumsum(merged[rows]))[np.maximum(flushed, 0)]
        stops[blocks < 1] = _LIMITS.index(Limit.FOLIOS)
    stops[spare - hidden < size] = _LIMITS.index(Limit.KEPT)
    if supply.room is not None:
        stops[supply.room - grown - (hidden if supply.room_of_machine else 0) < size] = _LIMITS.index(Limit.ROOM)
    return stops


def _made(steps: Steps, packing: Packing, rows: NDArray[np.intp], at_once: int) -> int:
    """Return how many steps, which take blocks of one order, memory allows.

    Args:
        at_once: the most before the first compaction.
    """
    made = 0
    # Blocks that become folios of another order are taken after the others.
    for run in np.split(rows, np.flatnonzero(np.diff(steps.folio[rows])) + 1):
        shape = Shape(int(steps.order[run[0]]), int(steps.folio[run[0]]), int(steps.holes[run].mean()))
        number = packing.make(shape, run, at_once - made)
        made += number
        if number < len(run):
            break
    return made


def _at_once(supply: Supply, size: int) -> int:
    """Return the folios of `size` pages that can be made until lists of processors must be drained."""
    if supply.room is None or not supply.room_of_machine or supply.room - size >= supply.hidden:
        return _UNBOUNDED
    return max(0, supply.room // size)


def _freed(steps: Steps) -> NDArray[np.int64]:
    """Return the pages that each step frees: int64, shape (steps,)."""
    freed: NDArray[np.int64] = (np.int64(1) << steps.order.astype(np.int64)) - steps.filled
    return freed


def _count(stops: NDArray[np.int8]) -> int:
    """Return the number of steps before the first that is stopped."""
    return int(np.argmax(stops != 0)) if stops.any() else len(stops)


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of all values before each: int64, the shape of `values`."""
    sums: NDArray[np.int64] = np.cumsum(values) - values
    return sums
