"""The price of folios made by a collapse and splits: the whole PMD range is copied for a few blocks.

MADV_COLLAPSE copies the contents of a PMD range into one folio, also the pages that are in no planned folio. Then the
folio is split, one write for each part that is not yet as planned (:mod:`mthp.linux.split.divide`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.engine.space_plan import Folios, SpacePlan
from mthp.geometry import Geometry
from mthp.units import format_size

RANGES_AT_ONCE = 4096
"""PMD ranges per count of writes: 2 MiB of orders on x86-64."""


@dataclass(frozen=True, slots=True)
class SplitPrice:
    """The cost of the mechanism ``split``.

    Attributes:
        ranges: PMD ranges that are collapsed as a whole.
        copied: pages with contents that this copies.
        wanted: those of `copied` that end up in planned folios.
        writes: splits, each into equal parts; a kernel that splits around one page needs fewer.
    """

    JSON: ClassVar = (
        "split_ranges=ranges split_copied_bytes=copied_bytes split_wanted_bytes=wanted_bytes split_writes=writes"
    )

    ranges: int = 0
    copied: int = 0
    wanted: int = 0
    writes: int = 0

    def copied_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of `copied`."""
        return self.copied * geometry.page_size

    def wanted_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of `wanted`."""
        return self.wanted * geometry.page_size

    def remark(self, geometry: Geometry) -> str:
        """Return the price as a sentence; ``""`` if no folios are made by splits."""
        if not self.ranges:
            return ""
        return (
            f"to make folios by splits, {self.ranges} PMD ranges are collapsed as a whole: this copies"
            f" {format_size(self.copied_bytes(geometry))} for {format_size(self.wanted_bytes(geometry))} in planned"
            f" folios, and takes at most {self.writes} splits (--min-split-share leaves out ranges of which little is"
            " planned)"
        )


class SplitRanges:
    """The PMD ranges of a plan in which folios are made by splits.

    Args:
        plan: the plan.
        orders: the orders that are made by splits.

    Attributes:
        share: float64, shape (folios,): for each folio of the plan, the part of the contents of its PMD range that lies
            in planned folios; 1.0 for folios that are made otherwise.
        copied: int64, shape (folios,): pages with contents that are copied to make each: its own, and for those made
            by splits their part of the others in the PMD range.
    """

    def __init__(self, plan: SpacePlan, orders: Collection[int]) -> None:
        self._geometry = plan.geometry
        by_split = np.isin(plan.folios.order, list(orders))
        self._folios: Folios = plan.folios[by_split]
        size = np.uint64(plan.geometry.pmd_size)
        self._ranges, self._at = np.unique(self._folios.address // size * size, return_inverse=True)
        contents = (1 << self._folios.order.astype(np.int64)) - self._folios.filled
        self._wanted = np.bincount(self._at, weights=contents, minlength=len(self._ranges)).astype(np.int64)
        # A plan of blocks alone has no ranges, so at least the planned contents are copied.
        self._resident = np.maximum(resident_in(plan, self._ranges), self._wanted)
        self.share = np.ones(len(plan.folios))
        self.share[by_split] = (self._wanted / np.maximum(self._resident, 1))[self._at]
        self.copied = (np.int64(1) << plan.folios.order.astype(np.int64)) - plan.folios.filled
        self.copied[by_split] = contents * self._resident[self._at] // np.maximum(self._wanted, 1)[self._at]

    def price(self, least_share: float) -> SplitPrice:
        """Return the price of the ranges of which at least `least_share` of the contents are planned."""
        chosen = self._wanted >= least_share * self._resident
        writes = 0
        rows = np.flatnonzero(chosen)
        for first in range(0, len(rows), RANGES_AT_ONCE):
            writes += _writes(self._layouts(rows[first : first + RANGES_AT_ONCE]), self._geometry.pmd_order)
        return SplitPrice(len(rows), int(self._resident[chosen].sum()), int(self._wanted[chosen].sum()), writes)

    def _layouts(self, rows: NDArray[np.intp]) -> NDArray[np.int8]:
        """Return the planned orders of the pages of some ranges, which ascend: int8, shape (rows, pages)."""
        orders = np.zeros((len(rows), self._geometry.ptes_per_pmd), np.int8)
        chosen = np.isin(self._at, rows)
        row = np.searchsorted(rows, self._at[chosen])
        folios = self._folios[chosen]
        first = ((folios.address - self._ranges[self._at[chosen]]) // np.uint64(self._geometry.page_size)).astype(int)
        for order in np.unique(folios.order).tolist():
            of_order = folios.order == order
            pages = first[of_order][:, None] + np.arange(1 << order)
            orders[row[of_order][:, None], pages] = order
        return orders


def resident_in(plan: SpacePlan, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the pages with contents of the PMD ranges at `addresses`; 0 for ranges that are not in the plan."""
    at = np.minimum(np.searchsorted(plan.ranges.address, addresses), max(0, len(plan.ranges) - 1))
    resident = np.zeros(len(addresses), np.int64)
    if len(plan.ranges):
        known = plan.ranges.address[at] == addresses
        resident[known] = plan.ranges.resident[at[known]]
    return resident


def _writes(orders: NDArray[np.int8], pmd_order: int) -> int:
    """Return the number of writes that split PMD folios into `orders`: int8, shape (ranges, pages)."""
    parts = {order: np.zeros((len(orders), orders.shape[1] >> order), np.bool_) for order in range(pmd_order + 1)}
    parts[pmd_order][:] = True
    writes = 0
    for order in range(pmd_order, 0, -1):
        largest = orders.reshape(len(orders), -1, 1 << order).max(axis=2)
        split = parts[order] & (largest < order)
        writes += int(split.sum())
        # One write splits a folio into equal parts of the largest order planned in it. Parts with smaller plans are
        # split again.
        for smaller in np.unique(largest[split]).tolist():
            if smaller:
                into = np.repeat(split & (largest == smaller), 1 << order - smaller, axis=1)
                parts[smaller] |= into
    return writes
