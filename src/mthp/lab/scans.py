"""The scans of some PMD ranges under one setting, and their pages after each.

A scan is planned (:mod:`mthp.engine.plan`) and the plan is carried out on the planes of bits. The next scan sees the
result, until nothing changes any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import Bits
from mthp.engine.plan import plan_planes
from mthp.engine.planes import Planes
from mthp.engine.policy import Rules
from mthp.engine.trim import TrimOptions
from mthp.geometry import Geometry
from mthp.lab.figures import MAX_ORDER
from mthp.lab.makers import Maker
from mthp.lab.splitting import Split, given_back, made_by, trimmed
from mthp.trimming import TrimBy

MAX_SCANS = 64
"""The most scans of a comparison until nothing changes; creep needs one for every order, and few more."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The state after a scan, in pages.

    Attributes:
        by_order: int64, shape (MAX_ORDER + 1,): resident pages by the order of their folio.
        pmd_mapped: resident pages that PMD entries map.
        copied, filled: pages that collapses copied, and made where none were, of all scans together.
        folios: int64, shape (MAX_ORDER + 1,): folios made by order, of all scans together.
        scanned: PTEs that this scan read.
        split: PMD ranges that were split, of all scans together.
        trimmable: pages that a trim would give back.
        hot: part of the observed accesses that go to memory that PMD entries map.
    """

    by_order: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_ORDER + 1, np.int64))
    pmd_mapped: int = 0
    copied: int = 0
    filled: int = 0
    folios: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_ORDER + 1, np.int64))
    scanned: int = 0
    split: int = 0
    trimmable: int = 0
    hot: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def scan_at(scans: Sequence[Counts], index: int) -> Counts:
    """Return the state after a scan; after the last scan nothing changes."""
    return scans[min(index, len(scans) - 1)]


@dataclass(frozen=True, slots=True)
class RangeState:
    """Some PMD ranges at one moment.

    Attributes:
        planes: their planes.
        empty: pages known to contain only zeroes: bool, shape (ranges, ptes_per_pmd); None if none are known.
        hot: the part of the observed accesses that each range has: float64, shape (ranges,); None if none were seen.
        by: the way in which a trim would give pages back.
    """

    planes: Planes
    empty: Bits | None = None
    hot: NDArray[np.float64] | None = None
    by: TrimBy = "cold"

    def counts(self, geometry: Geometry) -> Counts:
        """Return the resident pages, those that a trim would give back, and the accesses to huge memory."""
        planes, empty = self.planes, self.empty
        back = 0 if empty is None else trimmed(planes, empty, self.by, TrimOptions().zero, geometry)
        huge = planes.pmd_mapped
        hot = 0.0 if self.hot is None or huge is None else float(self.hot[huge].sum())
        return replace(counted(planes, geometry), trimmable=back, hot=hot)

    def after(self, split: Split, geometry: Geometry) -> RangeState:
        """Return the state after the folios of `split` are made."""
        planes = self.planes
        had = planes.occupied if planes.swap is None else planes.occupied | planes.swap
        # Pages that a collapse fills are zeroes, and the program is not modelled.
        empty: Bits = (split.made != 0) & ~had
        if self.empty is not None:
            empty |= self.empty
        planes = carried_out(planes, split.made, geometry)
        if split.ranges.any():
            # Of a range that is collapsed whole, pages of zeroes outside of its blocks are freed after the split.
            planes, gone = given_back(planes, split, empty)
            empty &= ~gone
        return replace(self, planes=planes, empty=empty)


def settled(planes: Planes, maker: Maker, rules: Rules, limit: int) -> Planes:
    """Return the planes of some PMD ranges after a scan makes nothing any more, or after `limit` scans."""
    for _ in range(limit):
        made = made_by(maker, planes, plan_planes(planes, maker.policy, rules)).made
        if not made.any():
            break
        planes = carried_out(planes, made, rules.geometry)
    return planes


def history(state: RangeState, maker: Maker, rules: Rules, limit: int) -> list[Counts]:
    """Take some PMD ranges through scans until one makes nothing, or `limit` are done.

    Returns:
        The state before the first scan and after each, including a last one that made nothing.
    """
    scans = [state.counts(rules.geometry)]
    for _ in range(limit):
        plan, last = plan_planes(state.planes, maker.policy, rules), scans[-1]
        split = made_by(maker, state.planes, plan)
        # The last scan costs time, too, though it makes nothing.
        if not split.copied + split.filled:
            scans.append(replace(last, scanned=plan.scanned_ptes))
            break
        state = state.after(split, rules.geometry)
        scans.append(
            replace(
                state.counts(rules.geometry),
                copied=last.copied + split.copied,
                filled=last.filled + split.filled,
                folios=last.folios + _folios_by_order(split.made),
                scanned=plan.scanned_ptes,
                split=last.split + int(split.ranges.sum()),
            )
        )
    return scans


def _folios_by_order(made: NDArray[np.int8]) -> NDArray[np.int64]:
    folios = np.zeros(MAX_ORDER + 1, np.int64)
    for order in range(1, int(made.max(initial=0)) + 1):
        # `made` has an entry for each page.
        folios[min(order, MAX_ORDER)] += np.count_nonzero(made == order) >> order
    return folios


def carried_out(planes: Planes, made: NDArray[np.int8], geometry: Geometry) -> Planes:
    """Return the planes of some PMD ranges after the folios of `made` are made in them."""
    inside: Bits = made != 0
    outside = ~inside

    def kept(plane: Bits | None) -> Bits | None:
        return None if plane is None else plane & outside

    had = planes.occupied if planes.swap is None else planes.occupied | planes.swap
    filled = inside & ~had
    # A folio of the PMD order begins at the first page of its range.
    huge = made[:, 0] == geometry.pmd_order
    orders = made if planes.folio_order is None else np.where(inside, made, planes.folio_order)
    return replace(
        planes,
        present=planes.present | inside,
        # A new folio is private, present and just written: the marks of the old entries are gone.
        zero=kept(planes.zero),
        swap=kept(planes.swap),
        guard=kept(planes.guard),
        shared=kept(planes.shared),
        lazyfree=kept(planes.lazyfree),
        uffd=kept(planes.uffd),
        unreferenced=kept(planes.unreferenced),
        folio_order=orders,
        filled=filled if planes.filled is None else planes.filled | filled,
        pmd_mapped=huge if planes.pmd_mapped is None else planes.pmd_mapped | huge,
    )


def counted(planes: Planes, geometry: Geometry) -> Counts:
    """Return the resident pages of some PMD ranges: by the order of their folio, and those that PMD entries map."""
    occupied = planes.occupied
    by_order = np.zeros(MAX_ORDER + 1, np.int64)
    by_order[0] = np.count_nonzero(occupied)
    orders = planes.folio_order
    for order in range(1, 0 if orders is None else int(orders.max(initial=0)) + 1):
        pages = np.count_nonzero((orders == order) & occupied)
        by_order[min(order, MAX_ORDER)] += pages
        by_order[0] -= pages
    huge = 0 if planes.pmd_mapped is None else int(np.count_nonzero(occupied[planes.pmd_mapped]))
    return Counts(by_order, huge)
