"""The order of each page's folio, from the runs that a walk collapses, eight pages at a time.

The result is as large as the plane of present pages, so writing it is a good part of the cost of a plan. The orders of
eight pages depend on which of them are present, a byte of the packed plane, and on how they are collapsed, their
*state*. A table has the eight orders for each pair of these, so that the result is written once, and the plane is not
read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mthp.engine.occupancy import Bits
from mthp.geometry import Geometry

Repeated = TypeVar("Repeated", np.bool_, np.uint8)

States = NDArray[np.uint8]
"""How each eight pages of a PMD range are collapsed: uint8, shape (ranges, ptes_per_pmd / 8), at least one a range.

An order plus 1: all eight lie in a folio of this order. Values below 4 are bits: bit 0 if the first four pages become a
folio of order 2, bit 1 if the last four do.
"""

FILL_SHARE = 0.25
"""If at most this share of the ranges do not become one folio, all are filled with the PMD order first."""

PIECE = 1 << 15
"""States per lookup: their indices take 256 KiB, and stay in the processor's cache."""


def states_of(collapsed: Mapping[int, Bits], ranges: int, geometry: Geometry) -> States:
    """Return the state of the pages of some PMD ranges.

    Args:
        collapsed: by order, the runs that become one folio: bool, shape (ranges, runs per range).
    """
    states: States = np.zeros((ranges, 1), np.uint8)
    for order in range(geometry.pmd_order, 2, -1):
        if order < geometry.pmd_order:
            states = repeated(states)
        if order in collapsed:
            states |= collapsed[order].view(np.uint8) * np.uint8(order + 1)
    if 2 in collapsed:
        states |= _halves(collapsed[2])
    return states


def _halves(runs: Bits) -> States:
    """Return the states of pages whose runs of order 2 are collapsed where `runs` is set."""
    if runs.shape[1] == 1:  # A PMD range has four pages.
        return runs.view(np.uint8)
    pairs = runs.view("<u2")
    states: States = ((pairs | pairs >> 7) & 3).astype(np.uint8)
    return states


def write_orders(states: States, present: NDArray[np.uint8], out: NDArray[np.int8], geometry: Geometry) -> None:
    """Write the order of each page's folio: 0 for base pages, -1 for none.

    Args:
        states: states of the pages.
        present: the packed plane of present pages, in the shape of `states`.
        out: int8, shape (ranges, ptes_per_pmd).
    """
    table, order = _order_table(geometry.pmd_order), geometry.pmd_order
    # A range that becomes one folio has one state throughout. Filling memory is several times faster than lookups.
    others = np.flatnonzero(states[:, 0] != order + 1)
    if len(others) > FILL_SHARE * len(out):
        _look_up(table, _index(states, present), out)
        return
    out.fill(order)
    some = np.empty((len(others), out.shape[1]), np.int8)
    _look_up(table, _index(states[others], present[others]), some)
    out[others] = some


def _index(states: States, present: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the index into the table of orders for each eight pages."""
    index: NDArray[np.uint16] = states * np.uint16(256)
    index |= present
    return index


def write_made(states: States, out: NDArray[np.int8], geometry: Geometry) -> None:
    """Write the order that each page is collapsed to, 0 if it is not; arguments as :func:`write_orders`."""
    _look_up(_made_table(geometry.pmd_order), states, out)


def _look_up(table: NDArray[np.uint64], index: NDArray[np.unsignedinteger], out: NDArray[np.int8]) -> None:
    """Write the eight orders that `table` has for each element of `index`."""
    ranges, ptes = out.shape
    whole = out if ptes >= 8 else np.empty((ranges, 8), np.int8)
    index, eights = index.reshape(-1), whole.reshape(-1).view(np.uint64)
    places = np.empty(PIECE, np.intp)
    for start in range(0, len(index), PIECE):
        piece = index[start : start + PIECE]
        at = places[: len(piece)]
        at[:] = piece
        # All indices lie inside the table. With any other mode NumPy writes to a buffer first.
        table.take(at, out=eights[start : start + PIECE], mode="wrap")
    if whole is not out:
        out[:] = whole[:, :ptes]


@lru_cache
def _order_table(pmd_order: int) -> NDArray[np.uint64]:
    """Return the orders of eight pages by state, then by the byte of present pages."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return _table(bits.view(np.int8) - np.int8(1), pmd_order)


@lru_cache
def _made_table(pmd_order: int) -> NDArray[np.uint64]:
    """Return the orders that eight pages are collapsed to, by state."""
    return _table(np.zeros((1, 8), np.int8), pmd_order)


def _table(uncollapsed: NDArray[np.int8], pmd_order: int) -> NDArray[np.uint64]:
    """Return a table of eight orders a word, by state and by row of `uncollapsed`, the orders in state 0."""
    table = np.tile(uncollapsed, (max(pmd_order + 2, 4), 1, 1))
    table[[1, 3], :, :4] = 2
    table[[2, 3], :, 4:] = 2
    for order in range(3, pmd_order + 1):
        table[order + 1] = order
    return table.view(np.uint64).reshape(-1)


def repeated(runs: NDArray[Repeated]) -> NDArray[Repeated]:
    """Return every element of each row twice: the runs of an order, as those of the order below.

    The product of a wide word does it, because ``np.repeat`` is slow for small repeats.
    """
    product = runs.view(np.uint8).astype(np.uint16, order="C")
    product *= 257
    return product.view(runs.dtype)
