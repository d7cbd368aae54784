"""Steps of a plan, and memory drawn page by page, to compact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mthp.engine.packing import Freed, Packing, Trimmed
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.freememory import FREE, MOVES, STAYS, TAIL, UNKNOWN, FreeMemory, FreeZone, MemoryBlocks


def steps(order: int, count: int, *, filled: int = 0) -> Steps:
    columns = (np.full(count, number, np.int64) for number in (0, filled))
    orders = np.full(count, order, np.int8)
    return Steps(orders, orders, *columns)


def free(*blocks: int, kept: int = 0) -> FreeMemory:
    return FreeMemory((FreeZone(blocks, kept),))


def made(work: Steps, supply: Supply) -> tuple[int, set[Limit]]:
    done, limits = reachable(work, supply)
    return int(done.sum()), set(limits.values())


def memory_of(*blocks: str, weight: int = 1) -> MemoryBlocks:
    """Return blocks of some pages: F is free, M moves, S stays, U is unknown; a block in lower case is closed.

    4444 is a movable folio of four pages, 22 one of two.
    """
    kinds = {"F": FREE, "M": MOVES, "S": STAYS, "U": UNKNOWN, "2": MOVES, "4": MOVES}
    pages = np.array([[kinds[page] for page in block.upper()] for block in blocks], np.int8)
    folios = np.zeros_like(pages)
    for order, digit in (1, "2"), (2, "4"):
        large = np.array([[page == digit for page in block] for block in blocks])
        folios[large] = TAIL
        folios[:, :: 1 << order][large[:, :: 1 << order]] = order
    closed = np.array([block.islower() for block in blocks])
    order = len(blocks[0]).bit_length() - 1
    return MemoryBlocks(order, np.arange(len(blocks)), np.zeros(len(blocks), np.int8), pages, folios, closed, weight)


def freed(*by_step: Sequence[int]) -> Freed:
    steps = [step for step, frames in enumerate(by_step) for _ in frames]
    return Freed(np.array([frame for frames in by_step for frame in frames], np.int64), np.array(steps, np.intp))


def packing(memory: FreeMemory, *blocks: str, own: Sequence[Sequence[int]] = (), weight: int = 1) -> Packing:
    return Packing(memory, memory_of(*blocks, weight=weight), freed(*own))


def compacted(work: Steps, memory: FreeMemory, packed: Packing, room: int | None = None) -> tuple[int, set[Limit]]:
    return made(work, Supply(memory, room, packed, hidden=20, room_of_machine=True))


def trimmed(freed: Sequence[int], kept: Sequence[int], zero: Sequence[int], order: int) -> Trimmed:
    """Return the pages of a trimmed folio: frames that become free, and frames of folios of `order`."""
    frame = np.array([*freed, *kept], np.int64)
    folio = np.where(frame % (1 << order) == 0, order, TAIL).astype(np.int8)
    return Trimmed(frame, np.isin(frame, freed), folio, np.isin(frame, [*freed, *zero]))
