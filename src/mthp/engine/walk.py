"""The walk of a collapse over many PMD ranges at once.

The kernel walks one PMD range at a time, depth first: try the largest order; where that is not possible try the
halves, the left one first; go on behind whatever was collapsed. The runs that it looks at are the nodes of a binary
tree, and if every attempt ends as its PTEs foretell, no node depends on another but through its ancestors: a run is
looked at exactly when none of the runs around it was collapsed or skipped. So the walk can be made level by level
instead, from the PMD order down, for all PMD ranges together, each level a few operations on arrays of counts
(:mod:`mthp.engine.occupancy`). What differs between policies is asked of the policy
(:mod:`mthp.engine.policy`); single PTEs are looked at only for runs whose counts leave open what stops them
(:mod:`mthp.engine.checks`).

One policy walks no tree. Where each run is scanned for itself, as ``per-order`` does, an order that failed once is not
tried again in the PMD range. So the walk goes over the runs of the largest order up to the first that fails, then from
there on over those of the next smaller order, and so on: a few operations for each order, too. (Dev Jain's series
itself goes on at any page behind a large folio that it hits, and so makes folios that are not aligned. A plan goes on
behind the run; the simulated machine does as the series.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mthp.columns import Table
from mthp.engine.checks import Checks, first_hindrances
from mthp.engine.occupancy import Bits, Occupancy, Planes, Runs
from mthp.engine.policy import Policy, Rules
from mthp.results import ScanResult

Repeated = TypeVar("Repeated", np.bool_, np.int8)

PIECE_PTES = 1 << 18
"""Pages whose orders are written at a time: 256 KiB, so that what they are made of stays in the processor's cache."""


@dataclass(frozen=True)
class Attempts(Table):
    """Runs that a collapse tries, one row each, in the order in which the kernel would try them.

    Attributes:
        range: int64, index of the PMD range.
        offset: int32, first PTE of the run within its range.
        order: int8.
        filled: int32, PTEs of the run without contents, which its collapse would fill.
        result: int8, :class:`~mthp.results.ScanResult`.
    """

    DTYPES = (np.int64, np.int32, np.int8, np.int32, np.int8)

    range: NDArray[np.int64]
    offset: NDArray[np.int32]
    order: NDArray[np.int8]
    filled: NDArray[np.int32]
    result: NDArray[np.int8]

    @property
    def succeeded(self) -> Attempts:
        """Those that end in a collapse."""
        return self[self.result == ScanResult.SUCCEED]


@dataclass(frozen=True, slots=True)
class Level:
    """What became of the runs of one order. Bool arrays of the shape (ranges, runs per range)."""

    attempted: Bits
    succeeded: Bits


@dataclass
class Walk:
    """One walk over some PMD ranges. What it amounts to is made when asked for.

    Attributes:
        ranges: how many PMD ranges.
        passed: bool, shape (ranges,): which of them the scan lets pass.
        levels: by order, what became of its runs.
        occupancy: of the ranges as the policy sees them.
        there: of the ranges as they are; the same but for policies that remember what was filled.
        barred: by order, runs that are not to be collapsed, and the result of an attempt at them: int8
            :class:`~mthp.results.ScanResult`, shape (ranges, runs per range), SUCCEED for those that may be.
    """

    planes: Planes
    policy: Policy
    rules: Rules
    levels: dict[int, Level] = field(default_factory=dict)
    barred: Mapping[int, NDArray[np.int8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranges = self.planes.present.shape[0]
        # What is there, and what the policy sees of it; one and the same but for policies that remember.
        self.there = self.occupancy = Occupancy(self.planes, self.rules.geometry)
        if self.policy.remembers_filled and self.planes.filled is not None:
            self.planes = self.planes.without_filled()
            self.occupancy = Occupancy(self.planes, self.rules.geometry)
        self._pmd_order = self.rules.geometry.pmd_order
        self._reached: int = 0
        self.passed = self._passed()
        self._walk()

    def forget_counts(self) -> None:
        """Free the memory of the counts, which are made again when asked for."""
        self.there.forget()
        self.occupancy.forget()

    # The scan of whole PMD ranges.

    def _scan_checks(self) -> Checks | None:
        """What ends the scan of a PMD range; None if the policy has no such scan, or does not run."""
        rules, policy = self.rules, self.policy
        limits = policy.scan_limits(rules) if policy.orders_walked(rules) else None
        if limits is None:
            return None
        return Checks(
            limits,
            zero_none_if_armed=policy.scan_honours_uffd(rules),
            uffd=True,
            lazyfree=not rules.forced,
            references=0 if rules.forced else rules.geometry.ptes_per_pmd // 2,
        )

    def _passed(self) -> Bits:
        """Which PMD ranges the scan lets pass: bool, shape (ranges,)."""
        whole = self.occupancy.runs(self._pmd_order)
        passed: Bits = (whole.occupied + whole.swap)[:, 0] > 0
        if self.planes.pmd_mapped is not None:
            passed &= ~self.planes.pmd_mapped
        checks = self._scan_checks()
        stopped = None if checks is None else self._stopped_by_counts(whole, checks)
        return passed if stopped is None else passed & ~stopped[:, 0]

    def scanned(self) -> NDArray[np.int8]:
        """What the scan says of each PMD range: int8 ScanResult, shape (ranges,), SUCCEED where the walk began."""
        result: NDArray[np.int8] = np.full(self.ranges, ScanResult.SUCCEED, np.int8)
        rows = np.flatnonzero(~self.passed)
        if (checks := self._scan_checks()) is not None:
            result[rows] = first_hindrances(self.planes, self._pmd_order, rows, np.zeros_like(rows), checks)
        whole = self.occupancy.runs(self._pmd_order)
        empty = (whole.occupied + whole.swap)[:, 0] == 0
        zero = self.occupancy.count("zero", self._pmd_order)[:, 0] > 0
        result[empty & ~zero] = ScanResult.NO_PTE_TABLE
        if self.policy.orders_walked(self.rules):
            result[empty & zero] = ScanResult.EXCEED_NONE_PTE
        if self.planes.pmd_mapped is not None:
            result[self.planes.pmd_mapped] = ScanResult.PMD_MAPPED
        return result

    def looked_at(self) -> int:
        """PTEs that the scan reads: those of each range that no PMD entry maps, or of every run where each is scanned.

        What a scan that ends early leaves out is counted, and isolation's own check of a run is not.
        """
        if self.policy.scans_each_run:
            return self._reached
        mapped = 0 if self.planes.pmd_mapped is None else int(np.count_nonzero(self.planes.pmd_mapped))
        return int(self.ranges - mapped) << self._pmd_order

    # The walk, level by level.

    def _walk(self) -> None:
        orders = self.policy.orders_walked(self.rules)
        if self.policy.scans_each_run:
            self._walk_runs(orders)
            return
        if not orders:
            return
        reached: Bits = self.passed[:, None]
        for order in range(self._pmd_order, orders[-1] - 1, -1):
            if order in orders:
                reached = self._step(order, reached)
            if order == orders[-1] or not reached.any():
                break
            reached = _repeated(reached, 1)

    def _step(self, order: int, reached: Bits) -> Bits:
        """Try the `reached` runs of `order`; give those whose halves are looked at next."""
        attempted, succeeded, skipped = self._tried(order, reached)
        self.levels[order] = Level(attempted, succeeded)
        # a > b of two bools is a & ~b, in one operation.
        onward: Bits = np.greater(reached, succeeded)
        if order == self._pmd_order and self.policy.fail_ends_range and self.planes.guard is not None:
            onward &= ~self._fails(order, attempted & (self.occupancy.count("guard", order) > 0))
        return onward if skipped is None or self.policy.halves_after_failure else onward & ~skipped

    def _tried(self, order: int, reached: Bits) -> tuple[Bits, Bits, Bits | None]:
        """Return which of the `reached` runs are attempted, collapsed, and skipped for a large folio (None: none)."""
        runs = self.occupancy.runs(order)
        enough = self.policy.full_enough(runs, self.rules)
        attempted: Bits = reached if enough is None else reached & enough
        hindered, skipped = self._hindered(runs, attempted)
        succeeded: Bits = attempted if hindered is None else attempted > hindered
        if (barred := self.barred.get(order)) is not None:
            succeeded = succeeded & (barred == ScanResult.SUCCEED)
        return attempted, succeeded, skipped

    def _walk_runs(self, orders: tuple[int, ...]) -> None:
        """Walk where each run is scanned for itself: each order as far as its runs pass, then the next smaller one."""
        n = self.rules.geometry.ptes_per_pmd
        at: NDArray[np.intp] = np.where(self.passed, 0, n)
        for order in orders:
            if not (at < n).any():
                break
            number = np.arange(n >> order)
            ahead: Bits = number >= (at >> order)[:, None]
            attempted, succeeded, skipped = self._tried(order, ahead)
            done = succeeded if skipped is None else succeeded | skipped
            failing = ahead & ~done
            first = np.where(failing.any(axis=1), failing.argmax(axis=1), n >> order)
            self._reached += int((np.minimum(first + 1, n >> order) - (at >> order)).clip(0).sum()) << order
            before = number < first[:, None]
            tried = done & before
            at = first << order
            if self.planes.guard is not None:
                # A guard marker passes the scan of a run as a swap entry, and makes the attempt fail.
                guarded = self.occupancy.count("guard", order) > 0
                failed = self._fails(order, attempted & guarded & (number == first[:, None]))
                tried |= failed
                # The series leaves a range when an attempt, successful or not, has reached the range's end.
                at[failed[:, -1]] = n
            self.levels[order] = Level(tried, succeeded & before)
        self.given_up = at

    def _fails(self, order: int, attempted: Bits) -> Bits:
        """Which of the `attempted` runs of `order` end in FAIL, which nothing but a look at their PTEs tells."""
        failed: Bits = attempted.copy()
        rows, indices = np.nonzero(attempted)
        checks = self.attempt_checks(order)
        results = first_hindrances(self.planes, order, rows, indices << order, checks)
        failed[rows, indices] = results == ScanResult.FAIL
        return failed

    def _hindered(self, runs: Runs, attempted: Bits) -> tuple[Bits | None, Bits | None]:
        """Which runs of an order cannot be collapsed, and which of the attempted ones are skipped for a large folio.

        None stands for "none of them".
        """
        checks = self.attempt_checks(runs.order)
        other = self._stopped_by_counts(runs, checks)
        largest = runs.largest_folio
        if largest is None or checks.large is None:
            return other, None
        large: Bits = largest >= checks.large
        skipped = attempted & large
        hindered = large if other is None else large | other
        unclear = skipped if other is None else skipped & other
        if bool(unclear.any()):
            rows, indices = np.nonzero(unclear)
            results = first_hindrances(self.planes, runs.order, rows, indices << runs.order, checks)
            skipped[rows, indices] = results == ScanResult.PTE_MAPPED_HUGEPAGE
        return hindered, skipped

    def attempt_checks(self, order: int) -> Checks:
        """What is checked of a run of `order`: by isolation, or by the run's own scan, under the policy's limits."""
        rules = self.rules
        size = 1 << order
        own_scan = self.policy.scans_each_run
        return Checks(
            self.policy.attempt_limits(order, rules),
            uffd=own_scan,
            lazyfree=own_scan and not rules.forced,
            large=order if order < self._pmd_order else None,
            large_first=self.policy.large_before_shared,
            page=rules.forced and self.policy.leaves_empty_runs,
            swap_in=not own_scan,
            guard=True,
            references=0 if rules.forced else size // 2 if own_scan else 1,
        )

    def _stopped_by_counts(self, runs: Runs, checks: Checks) -> Bits | None:
        """Which runs anything but a large folio stops; None if no run can be stopped."""
        stopped: Bits | None = None
        for bits in self._stops(runs, checks):
            stopped = bits if stopped is None else stopped | bits
        return stopped

    def _stops(self, runs: Runs, checks: Checks) -> Iterator[Bits]:
        """Yield the runs that each hindrance but a large folio stops."""
        planes, count = self.planes, self.occupancy.count
        if checks.limits.none < runs.size:
            contents = runs.occupied if planes.swap is None else runs.occupied + runs.swap
            yield contents < runs.size - checks.limits.none
        if checks.zero_none_if_armed and planes.uffd_armed is not None:
            yield planes.uffd_armed[:, None] & (runs.none_or_zero > 0)
        if planes.swap is not None and checks.limits.swap < runs.size:
            yield runs.swap > checks.limits.swap
        if planes.shared is not None and checks.limits.shared < runs.size:
            yield runs.shared > checks.limits.shared
        if checks.guard and planes.guard is not None:
            yield count("guard", runs.order) > 0
        if checks.uffd and planes.uffd is not None:
            yield count("uffd", runs.order) > 0
        if checks.lazyfree and planes.lazyfree is not None:
            yield count("lazyfree", runs.order) > 0
        if checks.page:
            yield (runs.occupied == 0) if planes.swap is None else (runs.occupied + runs.swap == 0)
        if checks.references:
            # A run that may not be filled throughout has a page; it is referenced unless pages say otherwise.
            if checks.limits.none >= runs.size - 1 or planes.unreferenced is not None or planes.swap is not None:
                yield runs.referenced == 0
            if planes.swap is not None and checks.references > 1:
                yield (runs.swap > 0) & (runs.referenced < checks.references)

    # What the walk amounts to, made when asked for.

    def orders(self, out: NDArray[np.int8]) -> None:
        """Write the order of each page's folio afterwards to `out`: int8, shape (ranges, ptes_per_pmd)."""
        # All values are one higher until the end, so that 0 stands for "none", and "not collapsed".
        planes = self.there.planes
        for rows, collapsed in self._collapsed_in_pieces():
            piece = planes.chosen(rows)
            now = piece.present.view(np.int8)
            if piece.folio_order is not None:
                now = now + piece.occupied * piece.folio_order
            np.maximum(now, collapsed, out=collapsed)
            np.subtract(collapsed, 1, out=out[rows])

    def made(self, out: NDArray[np.int8]) -> None:
        """Write the order of the folio that each page would be collapsed into, 0 if none, to `out`: int8, as above."""
        for rows, collapsed in self._collapsed_in_pieces():
            np.subtract(collapsed, collapsed != 0, out=out[rows])

    def _collapsed_in_pieces(self) -> Iterator[tuple[slice, NDArray[np.int8]]]:
        """Yield some PMD ranges, and one more than the order of the folio that each page is collapsed into, 0 if none.

        They are few enough that what is made of their pages stays in the processor's caches.
        """
        smallest = min(self.levels, default=self._pmd_order)
        collapsed: NDArray[np.int8] = np.zeros((self.ranges, 1), np.int8)
        for order in range(self._pmd_order, smallest - 1, -1):
            if order in self.levels:
                collapsed |= self.levels[order].succeeded.view(np.int8) * np.int8(order + 1)
            if order > smallest:
                collapsed = _repeated(collapsed, 1)
        step = max(1, PIECE_PTES >> self._pmd_order)
        for start in range(0, self.ranges, step):
            rows, order = slice(start, start + step), smallest
            pages = collapsed[rows]
            for shift in (3, 2, 1):
                while order >= shift:
                    pages, order = _repeated(pages, shift), order - shift
            yield rows, pages

    def resident(self) -> NDArray[np.int32]:
        """Present, non-zero pages: int32, shape (ranges,)."""
        return self.there.runs(self._pmd_order).occupied[:, 0].astype(np.int32)

    @cached_property
    def copied_and_filled(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pages with contents, and PTEs without, in collapsed runs: int32, shape (ranges,) each."""
        copied, pages = np.zeros(self.ranges, np.int32), np.zeros(self.ranges, np.int32)
        for order, level in self.levels.items():
            runs = self.there.runs(order)
            contents = runs.occupied + runs.swap
            copied += (contents * level.succeeded).sum(axis=1, dtype=np.int32)
            pages += level.succeeded.sum(axis=1, dtype=np.int32) << order
        return copied, pages - copied

    @cached_property
    def attempts(self) -> Attempts:
        """All attempts, sorted as the kernel makes them: by range, then address, the larger order first."""
        parts = []
        for order, level in self.levels.items():
            rows, indices = np.nonzero(level.attempted)
            offsets = indices << order
            results: NDArray[np.int8] = np.full(len(rows), ScanResult.SUCCEED, np.int8)
            failed = np.flatnonzero(~level.succeeded[rows, indices])
            results[failed] = first_hindrances(
                self.planes, order, rows[failed], offsets[failed], self.attempt_checks(order)
            )
            if (barred := self.barred.get(order)) is not None:
                free = failed[results[failed] == ScanResult.SUCCEED]
                results[free] = barred[rows[free], indices[free]]
            none = np.broadcast_to(self.there.runs(order).none_or_zero, level.attempted.shape)
            parts.append(
                Attempts(
                    rows.astype(np.int64),
                    offsets.astype(np.int32),
                    np.full(len(rows), order, np.int8),
                    none[rows, indices].astype(np.int32),
                    results,
                )
            )
        attempts = Attempts.joined(parts)
        return attempts[np.lexsort((-attempts.order, attempts.offset, attempts.range))]

    def scan_result(self) -> NDArray[np.int8]:
        """One ScanResult per PMD range: int8, shape (ranges,)."""
        result = self.scanned()
        result[result == ScanResult.SUCCEED] = ScanResult.FAIL
        if self.policy.scans_each_run and self.levels:
            self._add_run_scans(result)
        tried = self.attempts
        # Of several values stored at one place the last one stays: the last attempt's.
        result[tried.range] = tried.result
        for level in self.levels.values():
            result[level.succeeded.any(axis=1)] = ScanResult.SUCCEED
        return result

    def _add_run_scans(self, result: NDArray[np.int8]) -> None:
        """Say what stopped the last run that was scanned, where the rest of a PMD range was given up."""
        smallest = min(self.levels)
        rows = np.flatnonzero((self.given_up < self.rules.geometry.ptes_per_pmd) & (result == ScanResult.FAIL))
        stopped = first_hindrances(self.planes, smallest, rows, self.given_up[rows], self.attempt_checks(smallest))
        # A run that nothing hinders was not full enough for its policy, and so not scanned.
        stopped[stopped == ScanResult.SUCCEED] = ScanResult.FAIL
        result[rows] = stopped


_WIDE = {1: np.uint16, 2: np.uint32, 3: np.uint64}


def _repeated(runs: NDArray[Repeated], shift: int) -> NDArray[Repeated]:
    """Every element of each row 2**shift times: the runs of an order, as those of `shift` orders below. Up to 3.

    Through the product of a wide word, because ``np.repeat`` is slow for small repeats.
    """
    wide = _WIDE[shift]
    product = np.ascontiguousarray(runs).view(np.uint8).astype(wide)
    product *= wide((1 << 8 * (1 << shift)) // 255)
    return product.view(runs.dtype)
