"""The order of each page's folio, from the runs that a walk collapses, eight pages at a time.

The result is as large as the plane of present pages, so writing it is a good part of the cost of a plan. The orders of
eight pages depend on which of them are present, a byte of the packed plane, and on how they are collapsed, their
*state*. A table has the eight orders for each pair of these, so that the result is written once, and the plane is not
read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import PART_ORDER, Bits, repeated

States = NDArray[np.uint8]
"""How each eight pages, or the pages of each part, are collapsed: uint8, shape (ranges, of these per range).

An order plus 1: all pages lie in a folio of this order. Values below 4 of eight pages are bits: bit 0 if the first four
become a folio of order 2, bit 1 if the last four do.
"""

REST_SHARE = 0.4
"""If at most this share of the parts does not lie in one folio, the orders are written part by part."""

PIECE = 1 << 15
"""States per lookup: their indices take 256 KiB, and stay in the processor's cache."""


def states_of(collapsed: Mapping[int, Bits], ranges: int, top: int, bottom: int = 3) -> States:
    """Return the states of the runs of order `bottom`: at least one in each of some PMD ranges, or parts.

    Args:
        collapsed: by order, the runs that become one folio: bool, shape (ranges, runs per range).
        top: the order of a range.
    """
    states: States = np.zeros((ranges, 1), np.uint8)
    for order in range(top, bottom - 1, -1):
        if order < top:
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
    # Two bools read as one little-endian word: bit 0 is the first run's, bit 8 the second's.
    pairs = runs.view("<u2")
    states: States = ((pairs | pairs >> 7) & 3).astype(np.uint8)
    return states


def write_orders(
    wholes: States,
    rest: tuple[NDArray[np.intp], States],
    present: NDArray[np.uint8],
    out: NDArray[np.int8],
    top: int,
) -> None:
    """Write the order of each page's folio: 0 for base pages, -1 for none.

    Args:
        wholes: states of the parts.
        rest: indices of parts that become smaller folios, and the states of their pages.
        present: the packed plane of present pages.
        out: int8, shape (ranges, ptes_per_pmd).
        top: the order of a range.
    """
    others = np.flatnonzero(wholes == 0)
    if len(others) > REST_SHARE * wholes.size:
        states = repeated(repeated(repeated(wholes)))
        states.view(np.uint64).reshape(-1)[rest[0]] = rest[1].view(np.uint64)[:, 0]
        look_up_orders(states, present, out, top)
        return
    parts = out.reshape(-1, 1 << PART_ORDER)
    _part_table(top).take(wholes.reshape(-1).astype(np.intp), axis=0, out=parts, mode="wrap")
    in_rest = np.zeros(wholes.size, np.bool_)
    in_rest[rest[0]] = True
    states = np.zeros((len(others), 8), np.uint8)
    states[in_rest[others]] = rest[1]
    some = np.empty((len(others), 1 << PART_ORDER), np.int8)
    look_up_orders(states, present.view(np.uint64).reshape(-1, 1)[others].view(np.uint8), some, top)
    parts[others] = some


def look_up_orders(states: States, present: NDArray[np.uint8], out: NDArray[np.int8], top: int) -> None:
    """Write the order of each page's folio; arguments as :func:`write_orders`, with the `states` of its pages."""
    index: NDArray[np.uint16] = states * np.uint16(256)
    index |= present
    _look_up(_order_table(top), index, out)


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
    """Return the orders of eight pages, a word each, by state, then by the byte of present pages."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.tile(bits.view(np.int8) - np.int8(1), (max(pmd_order + 2, 4), 1, 1))
    table[[1, 3], :, :4] = 2
    table[[2, 3], :, 4:] = 2
    for order in range(3, pmd_order + 1):
        table[order + 1] = order
    return table.view(np.uint64).reshape(-1)


@lru_cache
def _part_table(pmd_order: int) -> NDArray[np.int8]:
    """Return the orders of the pages of a part that all lie in one folio, by state."""
    return np.repeat(np.arange(-1, pmd_order + 1, dtype=np.int8)[:, None], 1 << PART_ORDER, axis=1)
