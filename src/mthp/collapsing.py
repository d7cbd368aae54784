"""What `mthp collapse` does: carry out the plan of an address space, within a budget, and say what came of it.

The kernel's call succeeds for a range that was huge before, and fails with one errno for many reasons. So nothing
that it returns is counted as work: the page table entries of every batch are read before and after, and a range
counts as collapsed when one PMD entry maps it now and did not before. The same reading before tells what filling
the range would cost at this moment, so that a bloat budget stops before it is overspent, and leaves out what went
away since the plan was made.

Ranges are collapsed one call each: a call over many stops at the first that cannot be collapsed. The fullest come
first, so that a budget buys as much as it can.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace, Mechanism, Pte
from mthp.errors import TargetVanishedError, UnsupportedError, UsageError
from mthp.planning import BLOCK_PMD_RANGES, PlanOptions, SpacePlan, plan_space
from mthp.results import ScanResult

BATCH = 32
"""PMD ranges between two looks at the page tables at most: few enough that what was seen still holds."""

PACE = 0.1
"""Seconds: with a rate, no more is collapsed between two rests than the rate allows in this time."""

Progress = Callable[[int, int], None]
"""Told (ranges done, ranges in all) after every range."""


@dataclass(frozen=True, slots=True)
class CollapseOptions:
    """How far a collapse may go.

    Attributes:
        plan: what shall be collapsed.
        mechanism: by what means.
        max_bloat: bytes by which resident memory may grow; None for no bound.
        rate: bytes collapsed per second, or tried to be; None for as fast as it goes.
        dry_run: plan only.

    Raises:
        UsageError: a mechanism that does not exist, a budget below 0, or a rate that is not above 0.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)
    mechanism: Mechanism = "auto"
    max_bloat: int | None = None
    rate: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            known = ", ".join(get_args(Mechanism))
            raise UsageError(f"unknown mechanism {self.mechanism!r}", help=f"use one of {known}")
        if self.max_bloat is not None and self.max_bloat < 0:
            raise UsageError(f"a budget of {self.max_bloat} bytes of bloat is below 0")
        if self.rate is not None and self.rate <= 0:
            raise UsageError(f"a rate of {self.rate} bytes a second is not above 0")


@dataclass(frozen=True, slots=True)
class Durations:
    """How long the calls took, in seconds. While one runs, the target may wait for its memory; it waits no longer.

    Attributes:
        count: calls.
        p50, p99, max, total: of their durations; 0.0 if there were none.
    """

    count: int
    p50: float
    p99: float
    max: float
    total: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> Durations:
        """Summarise `seconds`: float64, shape (calls,)."""
        if not len(seconds):
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p50, p99 = np.percentile(seconds, [50, 99])
        return cls(len(seconds), float(p50), float(p99), float(seconds.max()), float(seconds.sum()))


@dataclass
class CollapseReport:
    """What a collapse did. Counts of PMD ranges unless said otherwise.

    Attributes:
        plan: what was to be done.
        dry_run: nothing was done.
        collapsed: ranges that are mapped by one PMD entry now and were not before.
        unchanged: ranges that were so already when their turn came.
        failed: ranges that could not be collapsed, by scan result; ANY_PROCESS also where the target exited before
            it could be seen what became of them.
        over_budget: ranges left alone because filling them would have exceeded `max_bloat`.
        needs_move: folios of orders below the PMD order, by order: the kernel's call cannot make them.
        copied_bytes, filled_bytes: contents of the collapsed ranges, and what they grew by.
        durations: of the calls.
        elapsed: seconds, rests included.
        coverage: share of the planned mappings' resident memory that PMD entries map afterwards.
        not_tried: ranges left when it ended early.
        interrupted: it was told to stop.
        vanished: the target exited meanwhile.
    """

    plan: SpacePlan
    dry_run: bool = False
    collapsed: int = 0
    unchanged: int = 0
    failed: Counter[ScanResult] = field(default_factory=Counter)
    over_budget: int = 0
    needs_move: dict[int, int] = field(default_factory=dict)
    copied_bytes: int = 0
    filled_bytes: int = 0
    durations: Durations = field(default_factory=lambda: Durations.of(np.empty(0)))
    elapsed: float = 0.0
    coverage: float = 0.0
    not_tried: int = 0
    interrupted: bool = False
    vanished: bool = False

    @property
    def collapsed_bytes(self) -> int:
        """Bytes that PMD entries map now and did not before."""
        return self.collapsed * self.plan.geometry.pmd_size

    @property
    def complete(self) -> bool:
        """Whether everything that was planned is as it was to be."""
        left = self.failed.total() + self.over_budget + self.not_tried + sum(self.needs_move.values())
        return self.dry_run or not (left or self.interrupted or self.vanished)


def collapse_space(
    space: AddressSpace,
    options: CollapseOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> CollapseReport:
    """Plan `space` and carry the plan out.

    Args:
        stop: asked before every range; once it says True nothing more is begun, and the report says what was done.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        NotPermittedError: these rights do not suffice to collapse in the target.
        UnsupportedError: the backend or this kernel cannot collapse, or not by this mechanism.
        TargetVanishedError: the process exited before anything was done.
    """
    if options.mechanism == "move":
        raise UnsupportedError(
            "the move mechanism is not there yet", help="use --mechanism madvise, which makes folios of the PMD order"
        )
    plan = plan_space(space, options.plan)
    report = CollapseReport(plan, dry_run=options.dry_run, coverage=plan.coverage)
    pmd_order = space.geometry.pmd_order
    report.needs_move = {order: count for order, count in plan.folios_by_order.items() if order != pmd_order}
    targets = plan.folios[plan.folios.order == pmd_order]
    # Stable, so that ranges equally full are collapsed by ascending address.
    addresses = targets.address[np.argsort(targets.filled, kind="stable")]
    report.not_tried = len(addresses)
    if not options.dry_run:
        _Run(space, options, report, progress, stop).carry_out(addresses)
    return report


class _Run:
    """One carrying-out of a plan."""

    def __init__(
        self,
        space: AddressSpace,
        options: CollapseOptions,
        report: CollapseReport,
        progress: Progress | None,
        stop: Callable[[], bool],
    ) -> None:
        self._space = space
        self._options = options
        self._report = report
        self._progress = progress
        self._stop = stop
        self._seconds: list[float] = []
        self._started = time.monotonic()

    def carry_out(self, addresses: NDArray[np.uint64]) -> None:
        """Collapse the PMD ranges at `addresses`, uint64, in that order."""
        report, total = self._report, len(addresses)
        size = self._batch_size()
        try:
            for start in range(0, total, size):
                self._keep_pace()
                self._batch(addresses[start : start + size], total)
                if report.interrupted:
                    break
            report.coverage = pmd_coverage(self._space, report.plan.ranges.address)
        except TargetVanishedError:
            report.vanished = True
        report.elapsed = time.monotonic() - self._started
        report.durations = Durations.of(np.array(self._seconds))

    def _batch(self, addresses: NDArray[np.uint64], total: int) -> None:
        """Collapse some PMD ranges, between two looks at their page tables."""
        report = self._report
        before = look_at(self._space, addresses)
        tried: dict[int, ScanResult] = {}
        try:
            for index, address in enumerate(addresses.tolist()):
                if self._stop():
                    report.interrupted = True
                    break
                report.not_tried -= 1
                if before.pmd_mapped[index]:
                    report.unchanged += 1
                elif before.contents[index] == 0:
                    report.failed[ScanResult.NO_PTE_TABLE] += 1
                elif not self._affords(before, tried, index):
                    report.over_budget += 1
                else:
                    tried[index] = ScanResult.ANY_PROCESS
                    tried[index] = self._collapse(address)
                if self._progress is not None:
                    self._progress(total - report.not_tried, total)
            self._account(addresses, before, tried)
        except TargetVanishedError:
            report.failed[ScanResult.ANY_PROCESS] += len(tried)
            raise

    def _collapse(self, address: int) -> ScanResult:
        outcome = self._space.collapse(address, self._space.geometry.pmd_order)
        self._seconds.append(outcome.elapsed_ns / 1e9)
        return outcome.result

    def _affords(self, before: Look, tried: dict[int, ScanResult], index: int) -> bool:
        """Whether filling the range at `index` on top of what was filled so far stays within the budget."""
        budget = self._options.max_bloat
        if budget is None:
            return True
        filled = [each for each, result in tried.items() if result == ScanResult.SUCCEED]
        return self._report.filled_bytes + self._fill_bytes(before, [*filled, index]) <= budget

    def _fill_bytes(self, before: Look, indices: list[int]) -> int:
        geometry = self._space.geometry
        pages = geometry.ptes_per_pmd * len(indices) - int(before.contents[indices].sum())
        return pages * geometry.page_size

    def _account(self, addresses: NDArray[np.uint64], before: Look, tried: dict[int, ScanResult]) -> None:
        """Look again at the ranges that were tried, and count what became of them."""
        if not tried:
            return
        indices = list(tried)
        after = look_at(self._space, addresses[indices])
        worked = [index for index, mapped in zip(indices, after.pmd_mapped, strict=True) if mapped]
        report = self._report
        report.collapsed += len(worked)
        report.filled_bytes += self._fill_bytes(before, worked)
        report.copied_bytes += int(before.contents[worked].sum()) * self._space.geometry.page_size
        for index in set(indices) - set(worked):
            # A call that succeeded on a range that is not huge now: it was split or unmapped again at once.
            result = tried[index]
            report.failed[ScanResult.PTE_NON_PRESENT if result == ScanResult.SUCCEED else result] += 1

    def _batch_size(self) -> int:
        """PMD ranges between two looks; fewer if a rate makes them take long, as the target does not stand still."""
        if self._options.rate is None:
            return BATCH
        return min(BATCH, max(1, int(PACE * self._options.rate) // self._space.geometry.pmd_size))

    def _keep_pace(self) -> None:
        """Rest, before a batch, until no more bytes a second were tried than the rate allows."""
        if self._options.rate is None:
            return
        due = self._started + len(self._seconds) * self._space.geometry.pmd_size / self._options.rate
        while (rest := due - time.monotonic()) > 0 and not self._stop():
            time.sleep(min(rest, PACE))


@dataclass(frozen=True, slots=True)
class Look:
    """What is in some PMD ranges at one moment.

    Attributes:
        pmd_mapped: bool, shape (ranges,): one PMD entry maps it.
        contents: int64, shape (ranges,): pages that are present and not zero, or swapped out.
        resident: int64, shape (ranges,): those that are present.
    """

    pmd_mapped: NDArray[np.bool_]
    contents: NDArray[np.int64]
    resident: NDArray[np.int64]


def look_at(space: AddressSpace, addresses: NDArray[np.uint64]) -> Look:
    """Read the PMD ranges that begin at `addresses`: uint64, shape (ranges,)."""
    geometry = space.geometry
    columns = space.read([(address, address + geometry.pmd_size) for address in addresses.tolist()])
    shape = (-1, geometry.ptes_per_pmd)
    present = (columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)).reshape(shape)
    resident = present.sum(axis=1)
    swapped = columns.has(Pte.SWAP).reshape(shape).sum(axis=1)
    return Look(columns.has(Pte.PMD_MAPPED).reshape(shape)[:, 0] & present[:, 0], resident + swapped, resident)


def pmd_coverage(space: AddressSpace, addresses: NDArray[np.uint64]) -> float:
    """The share of the resident pages of some PMD ranges that PMD entries map; 0.0 if none are resident."""
    huge = resident = 0
    for start in range(0, len(addresses), BLOCK_PMD_RANGES):
        look = look_at(space, addresses[start : start + BLOCK_PMD_RANGES])
        huge += int(look.resident[look.pmd_mapped].sum())
        resident += int(look.resident.sum())
    return huge / resident if resident else 0.0
