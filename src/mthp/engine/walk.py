"""The walk of a collapse over many PMD ranges at once.

The kernel walks one PMD range at a time, depth first: it tries the largest order; if that fails, the halves, the left
one first; it goes on behind each collapsed run. The runs are the nodes of a binary tree. If every attempt ends as
its PTEs predict, a node depends only on its ancestors: a run is scanned exactly if none of the runs around it was
collapsed or skipped. So the walk can go order by order instead, from the PMD order down, for all PMD ranges together,
each order with a few operations on arrays of counts (:mod:`mthp.engine.occupancy`). Policies differ in the methods of
:mod:`mthp.engine.policy`. Single PTEs are read only for runs that counts do not decide (:mod:`mthp.engine.checks`).

Most memory becomes folios of order 6 or larger. So below that order the walk goes on over only those *parts* of the PMD
ranges that are left, if they are few: runs with bits that fill one word (:data:`~mthp.engine.bits.PART_ORDER`).

One policy walks no tree: it scans each run separately (:meth:`Walk._walk_runs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mthp.engine.attempts import Attempts
from mthp.engine.bits import PART_ORDER, Bits, repeated
from mthp.engine.checks import PolicyChecks, scan_results
from mthp.engine.countchecks import stopped_by_counts
from mthp.engine.occupancy import Occupancy, Runs
from mthp.engine.pageorders import States, look_up_orders, states_of, write_orders
from mthp.engine.planes import Planes
from mthp.results import ScanResult

REST_SHARE = 0.75
"""If at most this share of the parts is left, only these are walked further."""


@dataclass(frozen=True, slots=True)
class Level:
    """The results of the runs of one order. Bool arrays of the shape (ranges, runs per range)."""

    attempted: Bits
    succeeded: Bits


class Walk:
    """One walk over some PMD ranges. Its results are computed at first use.

    Args:
        planes: planes of the ranges.
        checks: the policy's orders and checks.
        barred: by order, runs that must not be collapsed, with the result of an attempt at them: int8
            :class:`~mthp.results.ScanResult`, shape (ranges, runs per range), SUCCEED for runs that may be.

    Attributes:
        checks, barred: the arguments.
        ranges: number of PMD ranges, or of parts.
        passed: bool, shape (ranges,): whether each passes the scan.
        levels: by order, the results of its runs.
        rest: if few parts are left after PART_ORDER, their indices, and the rest of the walk over them.
        occupancy: occupancy of the ranges as the policy sees them.
        there: occupancy of the ranges as they are; it differs only for policies that remember filled pages.
    """

    def __init__(
        self, planes: Planes, checks: PolicyChecks, barred: Mapping[int, NDArray[np.int8]] | None = None
    ) -> None:
        there = seen = Occupancy(planes, checks.rules.geometry)
        if checks.policy.remembers_filled and planes.filled is not None:
            seen = Occupancy(planes.without_filled(), checks.rules.geometry)
        self._begin(len(planes.present), checks.rules.geometry.pmd_order, there, seen, checks, barred or {})
        self.passed = self._passed()
        if self.policy.scans_each_run:
            self._walk_runs(checks.orders)
        elif checks.orders:
            self._walk(self._order, self.passed[:, None])

    def _begin(
        self,
        ranges: int,
        order: int,
        there: Occupancy,
        seen: Occupancy,
        checks: PolicyChecks,
        barred: Mapping[int, NDArray[np.int8]],
    ) -> None:
        self.ranges, self._order, self._reached = ranges, order, 0
        self.there, self.occupancy, self.checks, self.barred = there, seen, checks, barred
        self.policy, self.rules = checks.policy, checks.rules
        self.levels: dict[int, Level] = {}
        self.rest: tuple[NDArray[np.intp], Walk] | None = None

    @classmethod
    def _rest_of(cls, walk: Walk, parts: NDArray[np.intp]) -> Walk:
        """Return the walk over only these parts, from below their order on."""
        rest = cls.__new__(cls)
        there = walk.there.parts(parts)
        seen = there if walk.occupancy is walk.there else walk.occupancy.parts(parts)
        barred = {
            order: results.reshape(-1, 1 << PART_ORDER - order)[parts]
            for order, results in walk.barred.items()
            if order < PART_ORDER
        }
        rest._begin(len(parts), PART_ORDER, there, seen, walk.checks, barred)
        rest._walk(PART_ORDER - 1, np.ones((len(parts), 2), np.bool_))
        return rest

    @property
    def planes(self) -> Planes:
        """The planes of the ranges as the policy sees them."""
        return self.occupancy.planes

    # The scan of whole PMD ranges.

    def _passed(self) -> Bits:
        """Return which PMD ranges pass the scan: bool, shape (ranges,)."""
        whole = self.occupancy.runs(self._order)
        passed: Bits = (whole.occupied + whole.swap)[:, 0] > 0
        if self.planes.pmd_mapped is not None:
            passed &= ~self.planes.pmd_mapped
        stopped = None if self.checks.scan is None else stopped_by_counts(whole, self.checks.scan)
        return passed if stopped is None else passed & ~stopped[:, 0]

    def scanned(self) -> NDArray[np.int8]:
        """Return the scan's result of each PMD range: int8 ScanResult, shape (ranges,), SUCCEED if it passes."""
        result: NDArray[np.int8] = np.full(self.ranges, ScanResult.SUCCEED, np.int8)
        rows = np.flatnonzero(~self.passed)
        if (checks := self.checks.scan) is not None:
            result[rows] = scan_results(self.planes, self._order, rows, np.zeros_like(rows), checks)
        whole = self.occupancy.runs(self._order)
        empty = (whole.occupied + whole.swap)[:, 0] == 0
        zero = self.occupancy.count("zero", self._order)[:, 0] > 0
        result[empty & ~zero] = ScanResult.NO_PTE_TABLE
        if self.checks.orders:
            result[empty & zero] = ScanResult.EXCEED_NONE_PTE
        if self.planes.pmd_mapped is not None:
            result[self.planes.pmd_mapped] = ScanResult.PMD_MAPPED
        return result

    def scanned_ptes(self) -> int:
        """Return the PTEs that the scan reads: of each range that no PMD entry maps, or of every run that is scanned.

        PTEs that a scan skips by ending early are counted. Isolation's own check of a run is not.
        """
        if self.policy.scans_each_run:
            return self._reached
        mapped = 0 if self.planes.pmd_mapped is None else int(np.count_nonzero(self.planes.pmd_mapped))
        return int(self.ranges - mapped) << self._order

    # The walk, order by order.

    def _walk(self, first: int, reached: Bits) -> None:
        """Walk from the order `first` down, over those of its runs that are `reached`."""
        orders = self.checks.orders
        # Disabled orders are passed too: the tree halves runs one order at a time, whether they may be tried or not.
        for order in range(first, orders[-1] - 1, -1):
            if order in orders:
                attempted, succeeded, skipped = self._tried(order, reached)
                self.levels[order] = Level(attempted, succeeded)
                if order == orders[-1]:
                    break
                reached = self._onward(order, reached, self.levels[order], skipped)
            left = np.count_nonzero(reached)
            if not left:
                break
            # Gathering the parts costs about as much as one order, so it is done only if few are left.
            if order == PART_ORDER and left <= REST_SHARE * reached.size:
                parts = np.flatnonzero(reached)
                self.rest = parts, self._rest_of(self, parts)
                break
            reached = repeated(reached)

    def _onward(self, order: int, reached: Bits, level: Level, skipped: Bits | None) -> Bits:
        """Return which of the `reached` runs of `order` are split into halves to walk next."""
        # a > b of two bools is a & ~b, in one operation.
        onward: Bits = np.greater(reached, level.succeeded)
        if order == self._order and self.policy.fail_ends_range and "guard" in self.occupancy.given:
            onward &= ~self._fails(order, level.attempted & (self.occupancy.count("guard", order) > 0))
        return onward if skipped is None or self.policy.halves_after_failure else onward & ~skipped

    def _tried(self, order: int, reached: Bits) -> tuple[Bits, Bits, Bits | None]:
        """Return which of the `reached` runs are attempted, collapsed, and skipped for a large folio (None: none)."""
        runs = self.occupancy.runs(order)
        if "outside" in self.occupancy.given:
            reached = reached & (self.occupancy.count("outside", order) == 0)
        enough = self.policy.full_enough(runs, self.rules)
        attempted: Bits = reached if enough is None else reached & enough
        hindered, skipped = self._hindered(runs, attempted)
        succeeded: Bits = attempted if hindered is None else attempted > hindered
        if (barred := self.barred.get(order)) is not None:
            succeeded = succeeded & (barred == ScanResult.SUCCEED)
        return attempted, succeeded, skipped

    def _walk_runs(self, orders: tuple[int, ...]) -> None:
        """Walk with a scan of each run: each order up to its first run that fails, then the next smaller one.

        An order that failed once is not tried again in the PMD range. (Dev Jain's series goes on at any page behind a
        large folio, and so makes unaligned folios. A plan goes on behind the run; the simulated machine does as it.)
        """
        n, outside = self.rules.geometry.ptes_per_pmd, self.planes.outside
        begin = 0 if outside is None else outside.argmin(axis=1)
        at: NDArray[np.intp] = np.where(self.passed, begin, n)
        for order in orders:
            if not (at < n).any():
                break
            # `at` is a multiple of the larger orders before, so no run of this order is cut by it.
            number = np.arange(n >> order)
            ahead: Bits = number >= (at >> order)[:, None]
            if outside is not None:
                ahead &= self.occupancy.count("outside", order) == 0
            attempted, succeeded, skipped = self._tried(order, ahead)
            done = succeeded if skipped is None else succeeded | skipped
            failing = ahead & ~done
            first = np.where(failing.any(axis=1), failing.argmax(axis=1), n >> order)
            self._reached += int(np.count_nonzero(ahead & (number <= first[:, None]))) << order
            before = number < first[:, None]
            tried = done & before
            # An order that does not fit into the mapping is skipped.
            at = np.where(ahead.any(axis=1), first << order, at)
            if "guard" in self.occupancy.given:
                # A guard marker passes the scan of a run as a swap entry, but makes the attempt fail.
                guarded = self.occupancy.count("guard", order) > 0
                failed = self._fails(order, attempted & guarded & (number == first[:, None]))
                tried |= failed
                # The series leaves a range when an attempt, successful or not, has reached the range's end.
                at[failed[:, -1]] = n
            self.levels[order] = Level(tried, succeeded & before)
        self.given_up = at

    def _fails(self, order: int, attempted: Bits) -> Bits:
        """Return which of the `attempted` runs of `order` end in FAIL, which only their single PTEs show."""
        failed: Bits = attempted.copy()
        rows, indices = np.nonzero(attempted)
        checks = self.checks.attempt(order)
        results = scan_results(self.planes, order, rows, indices << order, checks)
        failed[rows, indices] = results == ScanResult.FAIL
        return failed

    def _hindered(self, runs: Runs, attempted: Bits) -> tuple[Bits | None, Bits | None]:
        """Return the runs that cannot be collapsed, and attempted ones skipped for a large folio; None if none."""
        checks = self.checks.attempt(runs.order)
        other = stopped_by_counts(runs, checks)
        largest = runs.largest_folio
        if largest is None or checks.large is None:
            return other, None
        large: Bits = largest >= checks.large
        skipped = attempted & large
        hindered = large if other is None else large | other
        # Counts do not show which obstacle lies at the lower address, and only a large folio met first makes the kernel
        # skip the run instead of trying its halves.
        unclear = skipped if other is None else skipped & other
        if bool(unclear.any()):
            rows, indices = np.nonzero(unclear)
            results = scan_results(self.planes, runs.order, rows, indices << runs.order, checks)
            skipped[rows, indices] = results == ScanResult.PTE_MAPPED_HUGEPAGE
        return hindered, skipped

    # The results of the walk, computed at first use.

    def orders(self, out: NDArray[np.int8]) -> None:
        """Write the order of each page's folio after the walk to `out`: int8, shape (ranges, ptes_per_pmd)."""
        self._write(self.there.packed_present(), out)
        planes = self.there.planes
        if planes.folio_order is not None:
            # -1 for none, 0 for the zero page or a base page, else the order of its present folio: a page that is not
            # collapsed keeps it.
            np.maximum(out, planes.present + planes.occupied * planes.folio_order - 1, out=out)

    def made(self, out: NDArray[np.int8]) -> None:
        """Write the order that each page is collapsed to, 0 if it is not, to `out`, as for :meth:`orders`."""
        self._write(np.full_like(self.there.packed_present(), 255), out)

    def _write(self, present: NDArray[np.uint8], out: NDArray[np.int8]) -> None:
        """Write the orders after the walk of pages with these packed bits to `out`."""
        if self._order < PART_ORDER or min(self.levels, default=PART_ORDER) < PART_ORDER:
            look_up_orders(self._states(), present, out, self._order)
            return
        rest = np.empty(0, np.intp), np.empty((0, 8), np.uint8)
        if self.rest is not None:
            rest = self.rest[0], self.rest[1]._states()
        write_orders(self._states(PART_ORDER), rest, present, out, self._order)

    def _states(self, bottom: int = 3) -> States:
        """Return how the runs of order `bottom` are collapsed, without the rest."""
        collapsed = {order: level.succeeded for order, level in self.levels.items()}
        return states_of(collapsed, self.ranges, self._order, bottom)

    def resident(self) -> NDArray[np.int32]:
        """Return the present, non-zero pages: int32, shape (ranges,)."""
        return self.there.runs(self._order).occupied[:, 0].astype(np.int32)

    @cached_property
    def copied_and_filled(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pages with contents, and PTEs without, in collapsed runs: int32, shape (ranges,) each."""
        copied, pages = np.zeros(self.ranges, np.int32), np.zeros(self.ranges, np.int32)
        for order, level in self.levels.items():
            runs = self.there.runs(order)
            contents = runs.occupied + runs.swap
            copied += (contents * level.succeeded).sum(axis=1, dtype=np.int32)
            pages += level.succeeded.sum(axis=1, dtype=np.int32) << order
        filled = pages - copied
        if self.rest is not None:
            parts, walk = self.rest
            # Several parts may lie in one PMD range, so their counts are added, not stored.
            rows = parts >> self._order - PART_ORDER
            np.add.at(copied, rows, walk.copied_and_filled[0])
            np.add.at(filled, rows, walk.copied_and_filled[1])
        return copied, filled

    @cached_property
    def attempts(self) -> Attempts:
        """All attempts, sorted as the kernel makes them: by range, then address, the larger order first."""
        parts = []
        for order, level in self.levels.items():
            rows, indices = np.nonzero(level.attempted)
            offsets = indices << order
            results: NDArray[np.int8] = np.full(len(rows), ScanResult.SUCCEED, np.int8)
            failed = np.flatnonzero(~level.succeeded[rows, indices])
            results[failed] = scan_results(
                self.planes, order, rows[failed], offsets[failed], self.checks.attempt(order)
            )
            if (barred := self.barred.get(order)) is not None:
                # A bar decides only where the PTEs do not: the kernel checks PTEs before it allocates.
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
        if self.rest is not None:
            part = self.rest[0][(rest := self.rest[1].attempts).range]
            shift = self._order - PART_ORDER
            within = (part & (1 << shift) - 1) << PART_ORDER
            parts.append(replace(rest, range=part >> shift, offset=rest.offset + within.astype(np.int32)))
        attempts = Attempts.joined(parts)
        return attempts[np.lexsort((-attempts.order, attempts.offset, attempts.range))]

    def scan_result(self) -> NDArray[np.int8]:
        """Return one ScanResult per PMD range: int8, shape (ranges,)."""
        result = self.scanned()
        result[result == ScanResult.SUCCEED] = ScanResult.FAIL
        if self.policy.scans_each_run and self.levels:
            self._add_run_scans(result)
        tried = self.attempts
        # Of several values stored at one index the last one stays, which is the last attempt's.
        result[tried.range] = tried.result
        result[tried.succeeded.range] = ScanResult.SUCCEED
        return result

    def _add_run_scans(self, result: NDArray[np.int8]) -> None:
        """Set the result of ranges that were given up: that of the last run that was scanned."""
        smallest = min(self.levels)
        rows = np.flatnonzero((self.given_up < self.rules.geometry.ptes_per_pmd) & (result == ScanResult.FAIL))
        stopped = scan_results(self.planes, smallest, rows, self.given_up[rows], self.checks.attempt(smallest))
        # A run that fails no check was not full enough for its policy, and so was not scanned.
        stopped[stopped == ScanResult.SUCCEED] = ScanResult.FAIL
        result[rows] = stopped
