"""The checks of a scan or an attempt, PTE by PTE in the kernel's order.

The kernel walks the PTEs of a run upwards and stops at the first failed check. Which check fails first decides what
happens next: a run with a large folio is skipped, one with too many shared pages is tried at smaller orders.
Counts decide almost all runs of a plan. This module reads the single PTEs of the runs that counts do not decide: it
finds the position at which each check fails, and the smallest position wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import Bits
from mthp.engine.planes import Planes
from mthp.engine.policy import Limits, Policy, Rules
from mthp.results import ScanResult

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks that apply to runs of one order.

    Attributes:
        limits: the most PTEs of each kind.
        zero_none_if_armed: none PTEs are not allowed where the mapping is armed with userfaultfd.
        uffd, lazyfree: write-protected PTEs, and clean lazyfree pages, are refused.
        large: a page in a folio of this order or larger is refused; None to allow it.
        large_first: a large folio is checked before a shared page is counted.
        page: a run without contents is refused.
        swap_in: swap entries are read back before all other checks, so too many of them are met first.
        guard: guard markers are refused, because they cannot be read back.
        references: a run without a referenced page has LACK_REFERENCED_PAGE; above 1, so has a run with swap entries
            and fewer referenced pages than this.
    """

    limits: Limits
    zero_none_if_armed: bool = True
    uffd: bool = False
    lazyfree: bool = False
    large: int | None = None
    large_first: bool = False
    page: bool = False
    swap_in: bool = False
    guard: bool = False
    references: int = 0


class PolicyChecks:
    """The orders and the checks of a policy under some rules, computed once for all blocks of a plan.

    Attributes:
        policy, rules: the arguments.
        orders: the orders at which a collapse is attempted, descending; empty if the policy does not run at all.
        scan: the checks of the scan of a PMD range; None if the policy has no such scan, or does not run.
    """

    def __init__(self, policy: Policy, rules: Rules) -> None:
        self.policy = policy
        self.rules = rules
        self._attempts: dict[int, Checks] = {}
        self.orders = policy.orders_walked(rules)
        # A policy that tries no order in a mapping does not scan it either.
        limits = policy.scan_limits(rules) if self.orders else None
        self.scan = None if limits is None else self._scan(limits)

    def _scan(self, limits: Limits) -> Checks:
        rules = self.rules
        return Checks(
            limits,
            zero_none_if_armed=self.policy.scan_honours_uffd(rules),
            uffd=True,
            lazyfree=not rules.forced,
            references=0 if rules.forced else rules.geometry.ptes_per_pmd // 2,
        )

    def attempt(self, order: int) -> Checks:
        """Return the checks of a run of `order`: those of isolation, or of the run's own scan."""
        if order not in self._attempts:
            rules, policy = self.rules, self.policy
            own_scan = policy.scans_each_run
            self._attempts[order] = Checks(
                policy.attempt_limits(order, rules),
                uffd=own_scan,
                lazyfree=own_scan and not rules.forced,
                large=order if order < rules.geometry.pmd_order else None,
                large_first=policy.large_before_shared,
                page=rules.forced and policy.leaves_empty_runs,
                swap_in=not own_scan,
                guard=True,
                references=0 if rules.forced else (1 << order) // 2 if own_scan else 1,
            )
        return self._attempts[order]


def scan_results(
    planes: Planes, order: int, rows: NDArray[np.intp], offsets: NDArray[np.intp], checks: Checks
) -> NDArray[np.int8]:
    """Return the scan result of each of some runs of one order.

    Args:
        rows: int, shape (runs,): index of the PMD range of each run.
        offsets: int, shape (runs,): its first PTE, a multiple of 2**order.
        checks: the checks that apply.

    Returns:
        int8, shape (runs,): :class:`~mthp.results.ScanResult`, SUCCEED where no check fails.
    """
    run = _RunPlanes(planes, order, rows, offsets)
    swap = run.plane("swap")
    occupied = run.plane("present") & ~run.plane("zero")
    contents = occupied | swap
    # One limit a run, because each range may belong to another mapping.
    none_limit: NDArray[np.intp] = np.full(len(rows), checks.limits.none)
    if checks.zero_none_if_armed and planes.uffd_armed is not None:
        none_limit[planes.uffd_armed[rows]] = 0

    first = _First(len(rows), 1 << order)
    first.meet(_exceeds(~contents, none_limit), ScanResult.EXCEED_NONE_PTE)
    too_much_swap = _exceeds(swap, np.full(len(rows), checks.limits.swap))
    first.meet(too_much_swap, ScanResult.EXCEED_SWAP_PTE)
    if checks.uffd:
        first.meet(_first_set(run.plane("uffd") & contents), ScanResult.PTE_UFFD)
    if checks.lazyfree:
        clean = run.plane("lazyfree") & occupied
        if planes.droppable is not None:
            clean &= ~planes.droppable[rows, None]
        first.meet(_first_set(clean), ScanResult.PAGE_LAZYFREE)
    for positions, result in _shared_and_large(planes, run, occupied, checks):
        first.meet(positions, result)
    guard = run.plane("guard") if checks.guard else np.zeros_like(swap)
    # Swap entries are read back before isolation reads the first PTE (__collapse_huge_page_swapin(), mm/khugepaged.c),
    # so these failures precede all others, wherever they lie.
    if checks.swap_in:
        first.override(_first_set(guard), ScanResult.FAIL)
        first.override(too_much_swap, ScanResult.EXCEED_SWAP_PTE)
    if checks.page:
        first.finish(np.count_nonzero(contents, axis=1) == 0, ScanResult.PAGE_RO)
    if checks.references:
        lacking = _lacks_references(occupied & ~run.plane("unreferenced"), swap, checks.references)
        first.finish(lacking, ScanResult.LACK_REFERENCED_PAGE)
    first.finish(np.count_nonzero(guard, axis=1) > 0, ScanResult.FAIL)
    return first.result


def _shared_and_large(
    planes: Planes, run: _RunPlanes, occupied: Bits, checks: Checks
) -> list[tuple[NDArray[np.intp], ScanResult]]:
    """Return where too many shared pages and large folios are met, in the order in which the kernel checks a PTE."""
    shared = run.plane("shared") & occupied
    met = [(_exceeds(shared, np.full(len(shared), checks.limits.shared)), ScanResult.EXCEED_SHARED_PTE)]
    if checks.large is not None and planes.folio_order is not None:
        large = run.of(planes.folio_order) >= checks.large
        # At one PTE the check made first wins, and the kernels differ in which of these two that is.
        met.insert(0 if checks.large_first else 1, (_first_set(large & occupied), ScanResult.PTE_MAPPED_HUGEPAGE))
    return met


def _lacks_references(referenced: Bits, swap: Bits, with_swap: int) -> Bits:
    """Return which runs have no referenced page, or fewer than `with_swap` together with swap entries."""
    count = np.count_nonzero(referenced, axis=1)
    lacking: Bits = (count == 0) | (swap.any(axis=1) & (count < with_swap))
    return lacking


class _RunPlanes:
    """The PTEs of some runs, cut out of planes."""

    def __init__(self, planes: Planes, order: int, rows: NDArray[np.intp], offsets: NDArray[np.intp]) -> None:
        self._planes = planes
        self._size = 1 << order
        self._rows = rows
        self._indices = offsets >> order

    def of(self, plane: NDArray[T]) -> NDArray[T]:
        """Return the runs' part of `plane`: shape (runs, 2**order)."""
        cut: NDArray[T] = plane.reshape(plane.shape[0], -1, self._size)[self._rows, self._indices]
        return cut

    def plane(self, name: str) -> Bits:
        """Return the runs' part of the plane called `name`; all clear if the planes have none."""
        plane: Bits | None = getattr(self._planes, name)
        return np.zeros((len(self._rows), self._size), np.bool_) if plane is None else self.of(plane)


class _First:
    """The failed check at the lowest position of each run; at the same PTE, the one that was met first."""

    def __init__(self, runs: int, size: int) -> None:
        self._at = np.full(runs, size, np.intp)
        self._size = size
        self.result: NDArray[np.int8] = np.full(runs, ScanResult.SUCCEED, np.int8)

    def meet(self, positions: NDArray[np.intp], result: ScanResult) -> None:
        """Record a check that fails at `positions`; 2**order where it does not fail."""
        earlier = positions < self._at
        self._at[earlier] = positions[earlier]
        self.result[earlier] = result

    def override(self, positions: NDArray[np.intp], result: ScanResult) -> None:
        """Record a check that precedes all others wherever it fails."""
        self.result[positions < self._size] = result

    def finish(self, lacking: Bits, result: ScanResult) -> None:
        """Record a check that is made only after the last PTE."""
        self.result[lacking & (self.result == ScanResult.SUCCEED)] = result


def _first_set(bits: Bits) -> NDArray[np.intp]:
    """Return the position of the first set bit of each row; the row's length if none is set."""
    positions: NDArray[np.intp] = np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1])
    return positions


def _exceeds(bits: Bits, limit: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the position at which the set bits of each row exceed `limit`; the row's length if they never do."""
    return _first_set(np.cumsum(bits, axis=1, dtype=np.uint16) > limit[:, None])
