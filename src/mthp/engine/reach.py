"""Predict how much of a plan the memory of a machine allows: at this moment, after compaction, and after a trim.

A collapse takes a free block of its folio's order, and the base pages that it copied become free afterwards. These do
not move: they make a larger block only if they fill it completely, or after compaction moves the pages between them. A
split takes a block of the PMD order for each PMD range, one after the other.

Compaction empties page blocks of the migrate type Movable into other such blocks, so the free memory in these bounds
what it can make (suitable_migration_target(), mm/compaction.c). Pinned pages, and the kernel's own pages in such
blocks, do not move, and are not known here. Reclaim, which a collapse makes as well, is not counted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
        released: int64, pages of the target that become free in page blocks of movable memory.
        holes: int64, pages of the block that become free.
        filled: int64, pages by which the target grows.
    """

    DTYPES = (np.int8, np.int64, np.int64, np.int64)

    order: NDArray[np.int8]
    released: NDArray[np.int64]
    holes: NDArray[np.int64]
    filled: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Supply:
    """The memory that new folios are made of.

    Attributes:
        free: free memory of the machine.
        room: pages by which the target may grow, the old pages and the new folio together; None without a bound.
        compacted: whether memory is compacted when no free block is left.
        merged: by order, the aligned blocks of that order that become completely free once a step, and all before it,
            are done: int64, shape (steps,).
    """

    free: FreeMemory
    room: int | None = None
    compacted: bool = False
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
        count = int(np.argmin(stops == 0)) if stops.any() else len(rows)
        done[rows[:count]] = True
        limits[order] = Limit.NOTHING if count == len(rows) else _LIMITS[int(stops[count])]
    return done, limits


_LIMITS = tuple(Limit)


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
    spare = free.spare - grown
    merged = supply.merged.get(order, np.zeros(len(steps), np.int64))
    taken = int((np.int64(1) << np.maximum(before.order.astype(np.int64) - order, 0)).sum())
    blocks = free.folios(order) - taken + int(merged[done].sum()) + _sums(merged[rows] - 1)
    stops = np.where(blocks < 1, np.int8(_LIMITS.index(Limit.FOLIOS)), np.int8(0))
    if supply.compacted:
        left = free.compactable(order) - _lost(before).sum() - _sums(_lost(run))
        stops[(left >= size) & (spare >= 2 * size)] = 0
    stops[spare < size] = _LIMITS.index(Limit.KEPT)
    if supply.room is not None:
        stops[supply.room - grown < size] = _LIMITS.index(Limit.ROOM)
    return stops


def _lost(steps: Steps) -> NDArray[np.int64]:
    """Return the free pages that each step takes from page blocks of movable memory: int64, shape (steps,)."""
    lost: NDArray[np.int64] = (np.int64(1) << steps.order.astype(np.int64)) - steps.holes - steps.released
    return lost


def _sums(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of all values before each: int64, the shape of `values`."""
    sums: NDArray[np.int64] = np.cumsum(values) - values
    return sums
