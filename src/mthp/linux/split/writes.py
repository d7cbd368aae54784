"""Choose the writes to ``split_huge_pages`` that divide a folio into a layout: few writes, of few pages.

A write splits one folio to equal parts or, where the kernel can split around a page, to the halves on the way to that
page, each of which keeps its size. So a half that is to become base pages throughout can stay whole until one write
splits all of it, instead of one write for every small part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import MIN_ANON_ORDER

WRITE_PAGES = 64
"""Fixed cost of a write, in units of the cost of unmapping and mapping one page of the folio that it splits.

On Linux 6.18 a split of 512 pages to order 4 takes about 30 us, and a write that splits 16 pages 3 to 5 us."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a folio: the page of the folio that it begins at, and its order."""

    offset: int
    order: int

    @property
    def pages(self) -> slice:
        """Return its pages in the folio."""
        return slice(self.offset, self.offset + (1 << self.order))


@dataclass(frozen=True, slots=True)
class SplitWrite:
    """A write for one part of a folio.

    Attributes:
        apart: a part that is a folio of its own afterwards, which proves the split.
        at: the page of the part around which it is split; None for equal parts.
        left: parts that have to be divided further.
    """

    apart: Part
    at: int | None
    left: list[Part]


class SplitWrites:
    """The writes for one folio.

    The folio, its halves, their halves, and so on are numbered as in a heap: 1, then 2 and 3, then 4 to 7.

    Args:
        layout: int8, shape (pages,): the order of the folio that each page is to lie in.
        offset: whether the kernel can split around a page.
    """

    def __init__(self, layout: NDArray[np.int8], *, offset: bool) -> None:
        self._order, self._offset = len(layout).bit_length() - 1, offset
        # Folios are of MIN_ANON_ORDER at least, so that the pages of a part of that order are equal.
        leaves: list[int] = layout[:: 1 << MIN_ANON_ORDER].tolist()
        self._largest, self._smallest = _up(leaves, max), _up(leaves, min)
        self._costs: dict[int, int] = {}
        self._ways: dict[int, tuple[int, int]] = {}

    def next(self, part: Part) -> SplitWrite | None:
        """Return the write for `part`, a folio of its own; None if it has its final order."""
        # The heap's numbers of one order begin at 2**(depth of that order).
        number = (1 << self._order - part.order) + (part.offset >> part.order)
        largest = self._largest[number]
        if largest == part.order:
            return None
        if largest == 0:
            return SplitWrite(Part(part.offset, 0), None, [])
        mixed = self._smallest[number] != largest
        # For one block of 64K in 2M: 6 writes instead of 32, because each half on the way is split by one write.
        if self._offset and mixed and self._way(number)[0] < self._equal(number)[0]:
            return self._around(number)
        _, order = self._equal(number)
        parts = self._below(number, order)
        return SplitWrite(self._part(parts[0]), None, [self._part(each) for each in parts if self._cost(each)])

    def _around(self, number: int) -> SplitWrite:
        """Return the write that splits a part around a page: on the way down to it the other halves stay whole."""
        parts = []
        end = number
        while end == number or self._way_goes_on(end):
            end = self._way(end)[1]
            # The sibling in the heap: the half that stays whole.
            parts.append(end ^ 1)
        apart = self._part(end)
        left = [self._part(each) for each in (*parts, end) if self._cost(each)]
        return SplitWrite(apart, apart.offset - self._part(number).offset, left)

    def _part(self, number: int) -> Part:
        order = self._order - number.bit_length() + 1
        return Part((number - (1 << self._order - order)) << order, order)

    def _below(self, number: int, order: int) -> range:
        """Return the parts of an order within a part."""
        down = self._order - number.bit_length() + 1 - order
        return range(number << down, number + 1 << down)

    def _cost(self, number: int) -> int:
        """Return the cost of bringing a part that is a folio to its layout, in pages."""
        order, largest = self._order - number.bit_length() + 1, self._largest[number]
        if largest == order:
            return 0
        write = WRITE_PAGES + (1 << order)
        # Equal parts throughout: one write, whatever their number.
        if self._smallest[number] == largest:
            return write
        if number not in self._costs:
            cost = self._equal(number)[0]
            self._costs[number] = write + (min(cost, self._way(number)[0]) if self._offset else cost)
        return self._costs[number]

    def _equal(self, number: int) -> tuple[int, int]:
        """Return the cost of equal parts after the write that makes them, and the best order for them."""
        half = self._order - number.bit_length()
        orders = {half, self._largest[number]}
        return min((sum(map(self._cost, self._below(number, order))), order) for order in orders)

    def _way(self, number: int) -> tuple[int, int]:
        """Return the cost of the parts after a split around a page of one half, and that half."""
        if number not in self._ways:
            self._ways[number] = min(
                (self._end(half) + self._cost(half ^ 1), half) for half in (2 * number, 2 * number + 1)
            )
        return self._ways[number]

    def _end(self, number: int) -> int:
        return self._way(number)[0] if self._way_goes_on(number) else self._cost(number)

    def _way_goes_on(self, number: int) -> bool:
        """Return whether it is better to split a part on the way down further than to leave it whole.

        Parts of any size can become base pages, and a part with its final order is not split.
        """
        order, largest = self._order - number.bit_length() + 1, self._largest[number]
        return largest not in (0, order) and self._way(number)[0] < self._cost(number)


def _up(leaves: list[int], choose: Callable[[int, int], int]) -> list[int]:
    """Return one value for each part by its number, from the values of the smallest parts."""
    values = [0] * len(leaves) + leaves
    for number in range(len(leaves) - 1, 0, -1):
        values[number] = choose(values[2 * number], values[2 * number + 1])
    return values
