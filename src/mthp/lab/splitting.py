"""Splits and trims on planes of bits: the price of collapsing whole PMD ranges, and the pages that are given back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import Bits
from mthp.engine.plan import Plan
from mthp.engine.planes import Planes
from mthp.geometry import Geometry
from mthp.lab.makers import Maker
from mthp.trimming import SMALLEST_LARGE, TrimBy


@dataclass(frozen=True, slots=True)
class Split:
    """The result of a plan, of which splits may make the folios below the PMD order.

    Attributes:
        made: int8, shape (ranges, ptes_per_pmd): order that each page is collapsed to; 0 if it is not.
        ranges: bool, shape (ranges,): PMD ranges that are split.
        copied, filled: pages with contents that are copied, and PTEs that become memory.
    """

    made: NDArray[np.int8]
    ranges: Bits
    copied: int
    filled: int


def made_by(maker: Maker, planes: Planes, plan: Plan) -> Split:
    """Return the result of `maker` carrying out `plan` of `planes`."""
    if maker.splits:
        return by_splitting(planes, plan)
    whole = np.zeros(len(plan), np.bool_)
    return Split(plan.made, whole, int(plan.copied.sum(dtype=np.int64)), int(plan.filled.sum(dtype=np.int64)))


def by_splitting(planes: Planes, plan: Plan) -> Split:
    """Return the result of carrying out `plan` of `planes` by splitting.

    A PMD range is copied as a whole, and left alone if pages outside of its blocks forbid that
    (:mod:`mthp.splitchecks`).
    """
    made = plan.made
    small = (made > 0) & (made < plan.geometry.pmd_order)
    ranges: Bits = np.logical_or.reduce(small, axis=1)
    # MADV_COLLAPSE reads these back, copies them, or keeps them; within blocks the plan wants that.
    for plane in (planes.swap, planes.shared, planes.lazyfree):
        if plane is not None:
            ranges &= ~np.logical_or.reduce(plane & (made == 0), axis=1)
    # One of these fails the collapse of the whole range, in a block or not (mthp.splitchecks).
    for plane in (planes.guard, planes.uffd):
        if plane is not None:
            ranges &= ~np.logical_or.reduce(plane, axis=1)
    made = np.where(small & ~ranges[:, None], np.int8(0), made)
    inside = made != 0
    # Outside of blocks pages are copied, but holes that were filled there are given back.
    contents = planes.occupied if planes.swap is None else planes.occupied | planes.swap
    copied = np.count_nonzero(contents & (inside | ranges[:, None]))
    return Split(made, ranges, int(copied), int(np.count_nonzero(inside & ~contents)))


def given_back(planes: Planes, split: Split, empty: Bits) -> tuple[Planes, Bits]:
    """Return the planes after pages of zeroes of split ranges are given back, and these pages.

    Args:
        planes: the planes after the split.
        empty: pages that contain only zeroes: bool, shape (ranges, ptes_per_pmd).
    """
    gone: Bits = empty & planes.occupied & split.ranges[:, None] & (split.made == 0)
    if planes.folio_order is not None:
        # Large folios that existed before are not split.
        gone &= planes.folio_order == 0
    zero = gone if planes.zero is None else planes.zero | gone
    filled = None if planes.filled is None else planes.filled & ~gone
    return replace(planes, zero=zero, filled=filled), gone


def trimmed(planes: Planes, empty: Bits, by: TrimBy, share: float, geometry: Geometry) -> int:
    """Return the number of pages that a trim frees.

    Args:
        empty: pages that contain only zeroes: bool, shape (ranges, ptes_per_pmd).
        by: the way to trim.
        share: the part of a folio's pages that must contain only zeroes.
    """
    if planes.folio_order is None or not empty.any():
        return 0
    occupied, back = planes.occupied, 0
    block = SMALLEST_LARGE // geometry.page_size
    for order in np.unique(planes.folio_order).tolist():
        size = 1 << order
        # Anonymous folios of order 1 do not exist (THP_ORDERS_ALL_ANON, include/linux/huge_mm.h).
        if not 2 <= order <= geometry.pmd_order:
            continue
        whole = ((planes.folio_order == order) & occupied).reshape(-1, size).all(axis=1)
        folios = empty.reshape(-1, size)[whole]
        folios = folios[folios.sum(axis=1) >= max(1, share * size)]
        # What stays large is made of such folios, so only whole empty ones go back (mthp.trimming.given_back).
        if by == "split" and 1 < block <= size:
            back += block * int(folios.reshape(-1, block).all(axis=1).sum())
        else:
            back += int(folios.sum())
    return back
