"""The collapse of one PMD range: scan it, walk over it, try the runs that are full enough.

One function for khugepaged and for MADV_COLLAPSE, for the simulated machine and for a live process. It decides
nothing about pages: what can be seen and done lies behind :class:`~mthp.collapse.machine_seam.RangeTarget`, and the
limits are the policy's. Follows collapse_single_pmd(), collapse_scan_pmd() and mthp_collapse() of mm/khugepaged.c.
"""

from __future__ import annotations

import numpy as np

from mthp.collapse.machine_seam import RangeScan, RangeTarget
from mthp.collapse.policy import Mainline, PmdOnly, Policy, Rules
from mthp.errors import UnsupportedError
from mthp.results import ScanResult

LOWER_ORDERS_MAY_SUCCEED = frozenset(
    {
        ScanResult.ALLOC_HUGE_PAGE_FAIL,
        ScanResult.LACK_REFERENCED_PAGE,
        ScanResult.EXCEED_NONE_PTE,
        ScanResult.EXCEED_SWAP_PTE,
        ScanResult.EXCEED_SHARED_PTE,
        ScanResult.PAGE_LOCK,
        ScanResult.PAGE_COUNT,
        ScanResult.PAGE_NULL,
        ScanResult.DEL_PAGE_LRU,
        ScanResult.PTE_NON_PRESENT,
        ScanResult.PTE_UFFD,
        ScanResult.PAGE_LAZYFREE,
    }
)
"""Results of an attempt after which smaller orders are tried at the same place. After any other, success and a folio
that is large enough aside, nothing more is tried in the PMD range."""

DONE_THERE = frozenset({ScanResult.SUCCEED, ScanResult.PTE_MAPPED_HUGEPAGE})
"""Results of an attempt after which the walk goes on behind the run."""


_WALKS_LIKE_MAINLINE = (Policy.full_enough, Mainline.full_enough, PmdOnly.full_enough)


def check_policy(policy: Policy) -> Policy:
    """Give `policy` back if the walk of this module is its walk: limits alone say which run is full enough.

    Raises:
        UnsupportedError: it has a threshold of its own, or scans each run for itself (``rfc``, ``per-order``).
    """
    if policy.scans_each_run or type(policy).full_enough not in _WALKS_LIKE_MAINLINE:
        raise UnsupportedError(f"policy {policy.name!r} can be planned, not yet carried out range by range")
    return policy


def collapse_single_pmd(target: RangeTarget, address: int, policy: Policy, rules: Rules) -> ScanResult:
    """Collapse what `policy` wants collapsed in the PMD range at `address`.

    Args:
        rules: the orders enabled for the mapping, the trigger and the limits.

    Returns:
        SUCCEED if anything was collapsed, else the scan's hindrance, or the last attempt's.
    """
    scan = target.scan_pmd(address)
    result = scan.result
    if result is ScanResult.SUCCEED:
        result = mthp_collapse(target, address, scan, policy, rules)
    target.scanned(address, scan, result)
    return result


def mthp_collapse(target: RangeTarget, address: int, scan: RangeScan, policy: Policy, rules: Rules) -> ScanResult:
    """Walk over a scanned PMD range and try the runs that are full enough, the larger before the smaller.

    At an offset the orders are tried downwards; behind a run that was collapsed, or that has a large folio already, or
    at which the smallest order failed, the walk goes on with the largest order that the new offset's alignment allows.
    """
    assert scan.occupied is not None, "only a range that passed the scan is walked"
    geometry = rules.geometry
    orders = policy.orders_walked(rules)
    needed = {order: _needed(order, policy, rules) for order in orders}
    highest = [next((order for order in orders if order <= most), None) for most in range(geometry.pmd_order + 1)]
    # before[i]: occupied entries in front of entry i.
    before = [0, *np.cumsum(scan.occupied).tolist()]
    last, collapsed, alloc_failed = ScanResult.FAIL, False, False
    offset, order = 0, highest[-1]
    while order is not None and offset < geometry.ptes_per_pmd:
        occupied = before[offset + (1 << order)] - before[offset]
        if order == geometry.pmd_order:
            occupied += scan.unmapped
        result = None
        if occupied >= needed[order]:
            result = target.collapse_huge_page(address + offset * geometry.page_size, order, scan)
            collapsed |= result is ScanResult.SUCCEED
            alloc_failed |= result is ScanResult.ALLOC_HUGE_PAGE_FAIL
            last = last if result in DONE_THERE else result
            if result not in DONE_THERE and result not in LOWER_ORDERS_MAY_SUCCEED:
                break
        if result not in DONE_THERE and (lower := highest[order - 1]) is not None:
            order = lower
        else:
            # Every offset is a multiple of the smallest order, so one of the orders fits there.
            offset += 1 << order
            order = highest[min(_alignment(offset), geometry.pmd_order)]
    if collapsed:
        return ScanResult.SUCCEED
    return ScanResult.ALLOC_HUGE_PAGE_FAIL if alloc_failed else last


def _needed(order: int, policy: Policy, rules: Rules) -> int:
    """Occupied entries that a run of `order` must have to be tried."""
    return 0 if rules.forced else (1 << order) - policy.limits(order, rules).none


def _alignment(offset: int) -> int:
    """The largest order to which an offset above 0 is aligned."""
    return (offset & -offset).bit_length() - 1
