"""Looks at the page tables, before something is collapsed and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import ORDER_UNKNOWN, AddressSpace, Pte
from mthp.metrics import Scope, measure
from mthp.planning import BLOCK_PMD_RANGES
from mthp.space_plan import Folios, Ranges, SpacePlan


@dataclass(frozen=True, slots=True)
class Look:
    """What is in some PMD ranges at one moment.

    Attributes:
        pmd_mapped: bool, shape (ranges,): one PMD entry maps it.
        contents: int64, shape (ranges,): pages that are present and not zero, or swapped out.
        swapped: int64, shape (ranges,): those that are swapped out.
    """

    pmd_mapped: NDArray[np.bool_]
    contents: NDArray[np.int64]
    swapped: NDArray[np.int64]


def look_at(space: AddressSpace, addresses: NDArray[np.uint64]) -> Look:
    """Read the PMD ranges that begin at `addresses`: uint64, shape (ranges,)."""
    geometry = space.geometry
    columns = space.read([(address, address + geometry.pmd_size) for address in addresses.tolist()])
    shape = (-1, geometry.ptes_per_pmd)
    present = (columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)).reshape(shape)
    swapped = columns.has(Pte.SWAP).reshape(shape).sum(axis=1)
    mapped = columns.has(Pte.PMD_MAPPED).reshape(shape)[:, 0] & present[:, 0]
    return Look(mapped, present.sum(axis=1) + swapped, swapped)


@dataclass(frozen=True, slots=True)
class BlockLook:
    """What is in some blocks of one order at one moment.

    Attributes:
        exact: bool, shape (blocks,): all of it lies in folios of that order, as far as that can be seen.
        large: bool, shape (blocks,): all of it lies in folios of that order or larger ones.
        seen: bool, shape (blocks,): whether the orders can be seen.
        contents: int64, shape (blocks,): pages that are present and not zero, or swapped out.
        swapped: int64, shape (blocks,): those that are swapped out.
    """

    exact: NDArray[np.bool_]
    large: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    contents: NDArray[np.int64]
    swapped: NDArray[np.int64]


def look_at_blocks(space: AddressSpace, addresses: Sequence[int], order: int) -> BlockLook:
    """Read the blocks of `order` that begin at `addresses`."""
    size = space.geometry.size_of(order)
    columns = space.read([(address, address + size) for address in addresses])
    shape = (len(addresses), 1 << order)
    real = (columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)).reshape(shape)
    orders = columns.folio_order.reshape(shape)
    exact: NDArray[np.bool_] = np.logical_and.reduce(real & (orders == order), axis=1)
    large: NDArray[np.bool_] = np.logical_and.reduce(real & (orders >= order), axis=1)
    swapped = columns.has(Pte.SWAP).reshape(shape).sum(axis=1)
    return BlockLook(
        exact=exact,
        large=large,
        seen=~(orders == ORDER_UNKNOWN).any(axis=1),
        contents=real.sum(axis=1) + swapped,
        swapped=swapped,
    )


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
        contents = look_at_blocks(space, chosen, order).contents
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
