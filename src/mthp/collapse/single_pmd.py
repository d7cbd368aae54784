"""The collapse of one PMD range: scan it, walk over it, try the runs that are full enough.

One function for khugepaged and for MADV_COLLAPSE, for the simulated machine and for a live process. It decides
nothing about pages: what can be seen and done lies behind :class:`~mthp.collapse.machine_seam.RangeTarget`, and which
runs are worth an attempt is the policy's to say. Follows collapse_single_pmd(), collapse_scan_pmd() and
mthp_collapse() of mm/khugepaged.c.

All policies walk alike. The runs of a PMD range are the nodes of a binary tree, and whether one keeps an explicit
stack of (order, offset) and pushes the halves of what was not collapsed, as the seed does, or counts an offset
upwards and lets its alignment say which order comes next, as mainline does, the nodes are met in the same order:
depth first, the left half first. The policies differ in which nodes are full enough, in whether each run is scanned
for itself, in what follows when every order failed at an address, and in what an attempt that failed ends. If every
attempt ends as its PTEs foretell, the walk makes the attempts of :class:`~mthp.collapse.walk.Walk`, which plans.
"""

from __future__ import annotations

from mthp.collapse.machine_seam import RangeScan, RangeTarget
from mthp.collapse.policy import Policy, Rules
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
    assert scan.fullness is not None, "only a range that passed the scan is walked"
    geometry = rules.geometry
    scans_runs = policy.scans_each_run and not rules.forced
    orders = policy.orders_walked(rules)
    highest = [next((order for order in orders if order <= most), None) for most in range(geometry.pmd_order + 1)]
    last, collapsed, alloc_failed = ScanResult.FAIL, False, False
    offset, order = 0, highest[-1]
    while order is not None and offset < geometry.ptes_per_pmd:
        result = None
        if scan.fullness.enough(order, scan.row, offset >> order):
            at = address + offset * geometry.page_size
            result = _try_run(target, at, order, scan, scans_runs=scans_runs)
            collapsed |= result is ScanResult.SUCCEED
            alloc_failed |= result is ScanResult.ALLOC_HUGE_PAGE_FAIL
            last = last if result in DONE_THERE else result
            if result not in DONE_THERE and not _goes_on(result, order, policy, rules):
                break
        if result not in DONE_THERE and (lower := highest[order - 1]) is not None:
            order = lower
        elif result not in DONE_THERE and scans_runs:
            break
        else:
            # Every offset is a multiple of the smallest order, so one of the orders fits there.
            offset += 1 << order
            order = highest[min(_alignment(offset), geometry.pmd_order)]
    if collapsed:
        return ScanResult.SUCCEED
    return ScanResult.ALLOC_HUGE_PAGE_FAIL if alloc_failed else last


def _try_run(target: RangeTarget, address: int, order: int, scan: RangeScan, *, scans_runs: bool) -> ScanResult:
    """Attempt one run, after a scan of its own where the policy wants that."""
    if scans_runs:
        scan = target.scan_run(address, order)
        if scan.result is not ScanResult.SUCCEED:
            return scan.result
    return target.collapse_huge_page(address, order, scan)


def _goes_on(result: ScanResult, order: int, policy: Policy, rules: Rules) -> bool:
    """Whether an attempt that failed leaves the rest of the PMD range to be tried."""
    if result is ScanResult.FAIL:
        return order < rules.geometry.pmd_order or not policy.fail_ends_range
    return result in LOWER_ORDERS_MAY_SUCCEED


def _alignment(offset: int) -> int:
    """The largest order to which an offset above 0 is aligned."""
    return (offset & -offset).bit_length() - 1
