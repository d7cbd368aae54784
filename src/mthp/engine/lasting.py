"""Predict what the kernel's khugepaged will make of small folios, which it may collapse although they were wanted.

With max_ptes_none at its default of 511 it makes one PMD folio of every eligible PMD range that holds a page
(collapse_scan_pmd(), mm/khugepaged.c), with its holes filled, within a full scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.engine.select import ORDERS_ENABLED, PlanOptions, base_rules, jobs_of
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import Geometry
from mthp.tunables import Switches, Tunables

MAX_PTES_NONE = "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none"


def lasting_on(switches: Switches, tunables: Tunables, geometry: Geometry) -> tuple[str, str]:
    """Return what khugepaged does to folios below the PMD order, and the remedy; ``""`` if none is needed.

    prctl(PR_SET_THP_DISABLE) and advice decide for each process; :func:`remade` reads those, too.
    """
    pmd = geometry.label(geometry.pmd_order)
    if geometry.pmd_order not in switches.orders(advised=True):
        return f"khugepaged leaves them as they are, since the size {pmd} is off", ""
    everywhere = geometry.pmd_order in switches.orders(advised=False)
    where = "in every process that did not switch THP off" if everywhere else "with MADV_HUGEPAGE"
    if not tunables.max_ptes_none:
        return f"khugepaged makes folios of {pmd} of full PMD ranges only, {where}", ""
    most = tunables.max_ptes_none
    what = f"khugepaged makes one folio of {pmd} of every PMD range with at most {most} empty pages, {where}"
    remedy = (
        f"0 in {MAX_PTES_NONE}, or keep_max_ptes_none = 0 in the rules file of mthp daemon, keeps those in ranges that"
        " are not full"
    )
    return what, remedy


@dataclass(frozen=True, slots=True)
class Remade:
    """PMD ranges that khugepaged will make one folio of again.

    Attributes:
        ranges: number of PMD ranges.
        max_ptes_none: the present value of the tunable.
        keeps: the largest max_ptes_none at which it leaves all of them alone; None if it never does.
    """

    JSON: ClassVar = "remade_ranges=ranges max_ptes_none keeps"

    ranges: int = 0
    max_ptes_none: int = 0
    keeps: int | None = None

    @property
    def remark(self) -> str:
        """The prediction and its remedy, as a sentence; ``""`` if nothing will happen."""
        if not self.ranges:
            return ""
        remedy = "MADV_NOHUGEPAGE keeps them as they are"
        if self.keeps is not None:
            remedy = f"{MAX_PTES_NONE} at {self.keeps} or less keeps them as they are"
        return (
            f"the kernel's khugepaged will make huge folios of {self.ranges} PMD ranges again"
            f" (max_ptes_none {self.max_ptes_none}): {remedy}"
        )


def remade(space: AddressSpace, addresses: NDArray[np.uint64], none: NDArray[np.int64]) -> Remade:
    """Predict of which PMD ranges khugepaged will make one folio.

    Args:
        addresses: uint64, shape (ranges,), start of each range.
        none: int64, shape (ranges,), PTEs of each that are none or map the zero page.
    """
    choice = PlanOptions(policy="pmd-only", orders=ORDERS_ENABLED)
    base = base_rules(space, choice)
    jobs, _ = jobs_of(space, choice, base)
    pmd_order, limit = space.geometry.pmd_order, base.tunables.max_ptes_none
    eligible = np.zeros(len(addresses), np.bool_)
    for job in jobs:
        if pmd_order in job.rules.orders:
            for start, end in job.segments:
                eligible |= (addresses >= np.uint64(start)) & (addresses < np.uint64(end))
    # A range without any page has nothing to collapse, whatever the limit is.
    again = eligible & (none <= limit) & (none < space.geometry.ptes_per_pmd)
    if not again.any():
        return Remade(max_ptes_none=limit)
    fewest = int(none[again].min())
    return Remade(int(again.sum()), limit, fewest - 1 if fewest else None)


def remade_of_plan(space: AddressSpace, plan: SpacePlan) -> Remade:
    """Predict what khugepaged will make of the PMD ranges in which `plan` has folios below the PMD order."""
    geometry, ranges = plan.geometry, plan.ranges
    small = plan.folios.address[plan.folios.order < geometry.pmd_order]
    if not len(small):
        return Remade(max_ptes_none=space.tunables.max_ptes_none)
    size = np.uint64(geometry.pmd_size)
    chosen = np.isin(ranges.address, small // size * size)
    none = geometry.ptes_per_pmd - ranges.resident[chosen].astype(np.int64) - ranges.filled[chosen]
    return remade(space, ranges.address[chosen], none)
