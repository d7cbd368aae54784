"""The plan of memory that a caller named: every block of it."""

from __future__ import annotations

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.blockstates import states_of
from mthp.engine.select import BLOCK_PMD_RANGES
from mthp.engine.space_plan import Folios, Ranges, SpacePlan
from mthp.metrics import Scope, measure
from mthp.ptes import segments_of


def plan_blocks(space: AddressSpace, start: int, end: int, order: int) -> SpacePlan:
    """The plan that makes every aligned block of `order` between two addresses one folio, if it holds anything.

    It says nothing about PMD ranges.

    Raises:
        UsageError: there is no such order.
    """
    geometry = space.geometry
    size = geometry.size_of(geometry.check_order(order))
    addresses = range(-(-start // size) * size, end // size * size, size)
    at_a_time = max(1, BLOCK_PMD_RANGES * geometry.pmd_size // size)
    parts = []
    for first in range(0, len(addresses), at_a_time):
        chosen = addresses[first : first + at_a_time]
        blocks = [(address, order) for address in chosen]
        contents = states_of(space.read(segments_of(blocks, geometry.page_size)), blocks, geometry).contents
        filled = ((1 << order) - contents).astype(np.int32)
        folios = Folios(np.array(chosen, np.uint64), np.full(len(chosen), order, np.int8), filled)
        parts.append(folios[contents > 0])
    folios = Folios.joined(parts)
    scope = Scope((start, end), files=True)
    measured = measure(space, space.vmas(), scope, addresses=folios.address, orders=folios.order)
    return SpacePlan(
        label=space.label,
        geometry=geometry,
        policy="every block",
        orders=(order,),
        trigger="madvise",
        tunables=space.tunables,
        ranges=Ranges.joined([]),
        folios=folios,
        refused=(),
        planned_bytes=len(addresses) * size,
        asked_order=order,
        scope=scope,
        before=measured.now,
        after=measured.planned,
        eligible=measured.now,
    )
