"""The part of a collapse that makes folios of the PMD order: one call of the kernel for each PMD range."""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

from mthp.collapsing.look import Look, look_at
from mthp.collapsing.work import Work
from mthp.errors import MthpError, TargetVanishedError
from mthp.results import ScanResult

BATCH = 32
"""PMD ranges between two looks at the page tables at most: few enough that what was seen still holds."""


class Ranges:
    """Collapses PMD ranges.

    Args:
        addresses: uint64, shape (ranges,), in the order in which they are to be collapsed.

    Attributes:
        seconds: how long each call took.
    """

    def __init__(self, work: Work, addresses: NDArray[np.uint64]) -> None:
        self._work = work
        self._addresses = addresses
        self._geometry = work.space.geometry
        self.seconds: list[float] = []

    def carry_out(self) -> None:
        """Collapse them all.

        Raises:
            MthpError: it cannot go on; the report holds what was done until then.
        """
        # The target does not stand still, so batches that a rate makes long are to be small.
        size = self._work.most_at_once(self._geometry.pmd_size, BATCH)
        for start in range(0, len(self._addresses), size):
            self._work.keep_pace()
            self._batch(self._addresses[start : start + size])
            if self._work.report.ended_early:
                break

    def _batch(self, addresses: NDArray[np.uint64]) -> None:
        """Collapse some PMD ranges, between two looks at their page tables."""
        report = self._work.report
        self._work.room.renew()
        before = look_at(self._work.space, addresses)
        tried: dict[int, ScanResult] = {}
        try:
            for index, address in enumerate(addresses.tolist()):
                if self._work.told_to_stop():
                    break
                report.not_tried -= 1
                if before.pmd_mapped[index]:
                    report.unchanged += 1
                elif before.contents[index] == 0:
                    report.failed[ScanResult.NO_PTE_TABLE] += 1
                elif not self._affords(before, tried, index):
                    report.over_budget += 1
                elif not self._fits(before, index):
                    report.over_reserve += 1
                else:
                    tried[index] = ScanResult.ANY_PROCESS
                    tried[index] = self._collapse(address)
                    self._work.tried_with(tried[index])
                self._work.step(self._geometry.pmd_size, self._geometry.label(self._geometry.pmd_order))
        except MthpError as error:
            if tried and not isinstance(error, TargetVanishedError):
                tried[max(tried)] = ScanResult.FAIL
            with contextlib.suppress(TargetVanishedError):
                self._account(addresses, before, tried)
            raise
        self._account(addresses, before, tried)

    def _collapse(self, address: int) -> ScanResult:
        self._work.tried(self._geometry.pmd_size)
        outcome = self._work.space.collapse(address, self._geometry.pmd_order)
        self._work.began()
        self.seconds.append(outcome.elapsed_ns / 1e9)
        return outcome.result

    def _affords(self, before: Look, tried: dict[int, ScanResult], index: int) -> bool:
        """Whether filling the range at `index` on top of what was filled so far stays within the budget."""
        filled = [each for each, result in tried.items() if result == ScanResult.SUCCEED]
        return self._work.affords(self._fill_bytes(before, [*filled, index]))

    def _fits(self, before: Look, index: int) -> bool:
        """Whether collapsing the range at `index` stays within the target's memory limits.

        The kernel charges a whole new folio, and reads back what was swapped out, before it frees the old pages
        (collapse_huge_page(), mm/khugepaged.c).
        """
        swapped = int(before.swapped[index]) * self._geometry.page_size
        return self._work.fits(self._fill_bytes(before, [index]) + swapped, self._geometry.pmd_size + swapped)

    def _fill_bytes(self, before: Look, indices: list[int]) -> int:
        pages = self._geometry.ptes_per_pmd * len(indices) - int(before.contents[indices].sum())
        return pages * self._geometry.page_size

    def _account(self, addresses: NDArray[np.uint64], before: Look, tried: dict[int, ScanResult]) -> None:
        """Look again at the ranges that were tried, and count what became of them.

        Raises:
            TargetVanishedError: it cannot be seen; nothing is said to be collapsed then.
        """
        if not tried:
            return
        indices = list(tried)
        try:
            after = look_at(self._work.space, addresses[indices])
        except TargetVanishedError:
            self._work.report.failed[ScanResult.ANY_PROCESS] += len(tried)
            raise
        worked = [index for index, mapped in zip(indices, after.pmd_mapped, strict=True) if mapped]
        report = self._work.report
        report.collapsed += len(worked)
        report.filled_bytes += self._fill_bytes(before, worked)
        report.copied_bytes += int(before.contents[worked].sum()) * self._geometry.page_size
        for index in set(indices) - set(worked):
            # A call that succeeded on a range that is not huge now: it was split or unmapped again at once.
            result = tried[index]
            report.failed[ScanResult.PTE_NON_PRESENT if result == ScanResult.SUCCEED else result] += 1
