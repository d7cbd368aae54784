"""The collapse of one PMD range: scan it, walk over it, try the runs that are full enough.

One function serves khugepaged and MADV_COLLAPSE. It does not touch pages: :class:`RangeTarget` reads and collapses, and
the policy decides which runs are worth an attempt. Follows collapse_single_pmd(), collapse_scan_pmd() and
mthp_collapse() of mm/khugepaged.c.

All policies walk alike; only series that scan each run on its own, like Dev Jain's, walk differently
(:func:`scan_runs`). If every attempt ends as predicted from its PTEs, the walk makes the attempts of
:class:`~mthp.engine.walk.Walk`, which plans. The series have bugs: a target keeps them if it is ``as_it_was``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mthp.engine.policy import Policy, Rules
from mthp.results import DONE_THERE, LOWER_ORDERS_MAY_SUCCEED, ScanResult
from mthp.sim.collapse.fullness import Fullness


@dataclass(frozen=True, slots=True)
class RangeScan:
    """Result of the scan of one PMD range, or of one run where each run is scanned on its own.

    Attributes:
        result: SUCCEED if a collapse may be tried, or why not.
        fullness: which runs are full enough; None unless `result` is SUCCEED.
        row: row of the range in `fullness`.
        referenced, none_or_zero, unmapped: entries counted until the scan ended.
        behind: address at which the walk continues after a large folio, if not behind the run.
    """

    result: ScanResult
    fullness: Fullness | None = None
    row: int = 0
    referenced: int = 0
    none_or_zero: int = 0
    unmapped: int = 0
    behind: int | None = None


class RangeTarget(Protocol):
    """A mapping of an address space, as the collapse of one of its PMD ranges uses it."""

    @property
    def as_it_was(self) -> bool:
        """Whether the bugs of a policy's series are kept (:mod:`mthp.sim.collapse.single_pmd`)."""

    def scan_pmd(self, address: int) -> RangeScan:
        """Scan the PMD range at `address` (collapse_scan_pmd up to its walk)."""

    def scan_run(self, address: int, order: int) -> RangeScan:
        """Scan one run under the limits of its order, for policies that scan each run on its own."""

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        """Try to collapse the aligned run at `address` to one folio of `order` (collapse_huge_page)."""

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        """Note the final result of the range (mm_khugepaged_scan_pmd)."""


_SUCCEED_ALONE = frozenset({ScanResult.SUCCEED})

_NO_TABLE = frozenset({ScanResult.NO_PTE_TABLE, ScanResult.PMD_MAPPED})
"""Results of a run's scan without a page table."""


def collapse_single_pmd(target: RangeTarget, address: int, policy: Policy, rules: Rules) -> ScanResult:
    """Collapse the runs of the PMD range at `address` that `policy` wants collapsed.

    Args:
        rules: the orders enabled for the mapping, the trigger and the limits.

    Returns:
        SUCCEED if anything was collapsed, else the result of the scan or of the last attempt.
    """
    scan = target.scan_pmd(address)
    result = scan.result
    if result is ScanResult.SUCCEED:
        if policy.scans_each_run:
            scan, result = scan_runs(target, address, scan, policy, rules)
        else:
            result = mthp_collapse(target, address, scan, policy, rules)
    target.scanned(address, scan, result)
    return result


def mthp_collapse(target: RangeTarget, address: int, scan: RangeScan, policy: Policy, rules: Rules) -> ScanResult:
    """Walk over a scanned PMD range and try the runs that are full enough.

    At an offset, larger orders are tried before smaller ones. Behind a run that was collapsed, that has a large folio
    already, or at which the smallest order failed, the walk continues with the largest order that the new offset's
    alignment allows.
    """
    assert scan.fullness is not None, "only a range that passed the scan is walked"
    geometry = rules.geometry
    done_there = _SUCCEED_ALONE if policy.halves_after_failure else DONE_THERE
    # The seed allocates folios of orders that are not enabled.
    orders = policy.orders_allocated(rules) if target.as_it_was else policy.orders_walked(rules)
    highest = [next((order for order in orders if order <= most), None) for most in range(geometry.pmd_order + 1)]
    last, collapsed, alloc_failed = ScanResult.FAIL, False, False
    offset, order = 0, highest[-1]
    # Mainline's offset and the seed's stack of (order, offset) visit the runs in the same order: depth first, left half
    # first.
    while order is not None and offset < geometry.ptes_per_pmd:
        result = None
        if scan.fullness.enough(order, scan.row, offset >> order):
            at = address + offset * geometry.page_size
            result = target.collapse_huge_page(at, order, scan)
            collapsed |= result is ScanResult.SUCCEED
            alloc_failed |= result is ScanResult.ALLOC_HUGE_PAGE_FAIL
            # The kernel keeps no result of a run that was collapsed, or has a folio that is large enough already.
            last = last if result in done_there else result
            if result not in done_there and not _goes_on(result, order, policy, rules):
                break
        if result not in done_there and (lower := highest[order - 1]) is not None:
            order = lower
        else:
            # Every offset is a multiple of the smallest order, so one of the orders fits there.
            offset += 1 << order
            order = highest[min(_alignment(offset), geometry.pmd_order)]
    if collapsed:
        return ScanResult.SUCCEED
    if target.as_it_was and policy.halves_after_failure:
        # The seed has no other result without a collapse, so khugepaged does not rest after a failed allocation.
        return ScanResult.FAIL
    return ScanResult.ALLOC_HUGE_PAGE_FAIL if alloc_failed else last


def scan_runs(
    target: RangeTarget, address: int, scan: RangeScan, policy: Policy, rules: Rules
) -> tuple[RangeScan, ScanResult]:
    """Scan and try to collapse one run after another.

    Follows hpage_collapse_scan_ptes() of Dev Jain's series. It begins with the largest order.

    Returns:
        The scan of the last run, and the result of the range.
    """
    page, left = rules.geometry.page_size, list(policy.orders_walked(rules))
    last, collapsed, alloc_failed = ScanResult.FAIL, False, False
    at, end, whole = address, address + rules.geometry.pmd_size, scan
    order = left[0] if left else None
    while order is not None and (target.as_it_was or at < end):
        behind, result = at + (page << order), None
        if _full(whole, order, (at - address) // page):
            scan = target.scan_run(at, order)
            last = result = scan.result
            if result in _NO_TABLE:
                break
            if result is ScanResult.SUCCEED:
                last = result = target.collapse_huge_page(at, order, scan)
                collapsed |= result is ScanResult.SUCCEED
                alloc_failed |= result is ScanResult.ALLOC_HUGE_PAGE_FAIL
                # The series returns after an attempt that reaches the end of the range, whatever its result.
                if behind == end:
                    break
        if result in DONE_THERE:
            # Behind a large folio any page may follow, aligned or not, in the series even behind the PMD range.
            at = behind if scan.behind is None else scan.behind
            # The order of the address's alignment, unless that has failed: then the largest one left.
            order = aligned if (aligned := _alignment(at // page)) in left else left[0]
        else:
            # An order that failed once is not tried again in this range, and without any left the walk ends.
            left = [other for other in left if other != order]
            order = left[0] if left else None
    if target.as_it_was:
        # In the series the result of the range is that of the last run only.
        return scan, last
    return scan, ScanResult.SUCCEED if collapsed else ScanResult.ALLOC_HUGE_PAGE_FAIL if alloc_failed else last


def _full(scan: RangeScan, order: int, offset: int) -> bool:
    """Return whether the run of `order` at `offset` is full enough.

    Unaligned runs occur only in a series that does not check.

    Args:
        scan: scan of the PMD range.
    """
    fullness = scan.fullness
    assert fullness is not None, "only a range that passed the scan is walked"
    return fullness.of(order) is None or fullness.enough(order, scan.row, offset >> order)


def _goes_on(result: ScanResult, order: int, policy: Policy, rules: Rules) -> bool:
    """Return whether the rest of the PMD range is tried after an attempt that failed."""
    if policy.halves_after_failure:
        return True
    if result is ScanResult.FAIL:
        return order < rules.geometry.pmd_order or not policy.fail_ends_range
    # The cases of the switch in mthp_collapse(); any other result ends the range.
    return result in LOWER_ORDERS_MAY_SUCCEED


def _alignment(offset: int) -> int:
    """Return the largest order to which an offset above 0 is aligned."""
    return (offset & -offset).bit_length() - 1
