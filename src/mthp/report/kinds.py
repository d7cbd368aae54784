"""The kinds of memory that pictures distinguish, each with its class and its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.ptes import ORDER_UNKNOWN, Pte, PteColumns


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of memory.

    Attributes:
        key: CSS class.
        label: text in the legend.
    """

    key: str
    label: str


class Kinds:
    """The kinds of memory on a geometry: the orders from the largest to 0, unknown order, swapped out, and added.

    Attributes:
        all: every kind, from the bottom of a column to its top.
        of_order: int8, shape (128,): the number of the kind of each folio order; orders above the PMD order count as
            the PMD order.
        unknown, swap, added: numbers of the other kinds.
    """

    def __init__(self, geometry: Geometry) -> None:
        # Anonymous folios have no order 1, but those of files may.
        orders = (*reversed(geometry.anon_orders), 1, 0)
        self.of_order: NDArray[np.int8] = np.zeros(128, np.int8)
        for number, order in enumerate(orders):
            self.of_order[order] = number
        self.unknown, self.swap, self.added = (np.int8(len(orders) + at) for at in range(3))
        self.all = [Kind(f"o{_shade(order, geometry)}", _label(order, geometry)) for order in orders]
        self.all += [
            Kind("unknown", "size not visible"),
            Kind("swap", "swapped out"),
            Kind("added", "added by the collapse"),
        ]

    def __len__(self) -> int:
        return len(self.all)

    def of(self, order: int) -> Kind:
        """Return the kind of folios of `order`."""
        return self.all[int(self.of_order[order])]

    def numbers(self, columns: PteColumns) -> NDArray[np.int8]:
        """Return the number of the kind of every page: int8, shape (pages,); -1 for none."""
        order = columns.folio_order
        kind = np.full(len(order), -1, np.int8)
        resident = (columns.state & np.uint16(Pte.PRESENT | Pte.ZERO)) == Pte.PRESENT
        # ORDER_UNKNOWN is below 0; its pages get their kind in the next line.
        kind[resident] = self.of_order[np.maximum(order[resident], 0)]
        kind[resident & (order == ORDER_UNKNOWN)] = self.unknown
        kind[columns.has(Pte.SWAP)] = self.swap
        # After SWAP, which is set with it: guard markers have no contents.
        kind[columns.has(Pte.GUARD)] = -1
        return kind


def _shade(order: int, geometry: Geometry) -> int:
    """Return which of the ten shades an order has: 0 for base pages, 9 for the PMD order."""
    # Base pages keep a shade of their own.
    return 0 if order == 0 else max(1, round(9 * order / geometry.pmd_order))


def _label(order: int, geometry: Geometry) -> str:
    return f"{geometry.label(order)} folios" if order else f"{geometry.label(0)} pages"
