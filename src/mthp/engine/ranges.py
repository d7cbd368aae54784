"""The part of a collapse that makes folios of the PMD order: one call of the kernel for each PMD range."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import USUAL_MEANS, Block, PteColumns
from mthp.blockstates import BlockStates, states_of
from mthp.engine.work import Work
from mthp.errors import MthpError, TargetVanishedError
from mthp.ptes import segments_of
from mthp.results import ScanResult

BATCH = 32
"""PMD ranges that are read together at most: few enough that what was seen still holds."""


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
        """Collapse some PMD ranges, whose page tables are read together."""
        report, geometry = self._work.report, self._geometry
        self._work.room.renew()
        blocks = [(address, geometry.pmd_order) for address in addresses.tolist()]
        columns = self._work.space.read(segments_of(blocks, geometry.page_size))
        before = states_of(columns, blocks, geometry)
        for index, block in enumerate(blocks):
            if self._work.told_to_stop():
                break
            report.not_tried -= 1
            if before.large[index]:
                report.unchanged += 1
            elif before.contents[index] == 0:
                report.failed[ScanResult.NO_PTE_TABLE] += 1
            elif not self._work.affords(self._fill_bytes(before, index)):
                report.over_budget += 1
            elif not self._fits(before, index):
                report.over_reserve += 1
            else:
                self._collapse(block, columns)
            self._work.step(geometry.pmd_size, geometry.label(geometry.pmd_order))

    def _collapse(self, block: Block, columns: PteColumns) -> None:
        """Collapse one PMD range, and count what came of it.

        Raises:
            MthpError: as the seam; the range is counted.
        """
        report = self._work.report
        self._work.tried(self._geometry.pmd_size)
        try:
            (outcome,) = self._work.space.collapse_blocks([block], USUAL_MEANS, columns)
        except MthpError as error:
            vanished = isinstance(error, TargetVanishedError)
            report.failed[ScanResult.ANY_PROCESS if vanished else ScanResult.FAIL] += 1
            raise
        self._work.began()
        self.seconds.append(outcome.elapsed_ns / 1e9)
        self._work.tried_with(outcome.result)
        if outcome.result is ScanResult.SUCCEED:
            report.collapsed += 1
            report.copied_bytes += outcome.copied * self._geometry.page_size
            report.filled_bytes += outcome.filled * self._geometry.page_size
        else:
            report.failed[outcome.result] += 1

    def _fits(self, before: BlockStates, index: int) -> bool:
        """Whether collapsing the range at `index` stays within the target's memory limits.

        The kernel charges a whole new folio, and reads back what was swapped out, before it frees the old pages
        (collapse_huge_page(), mm/khugepaged.c).
        """
        swapped = int(before.swapped[index]) * self._geometry.page_size
        return self._work.fits(self._fill_bytes(before, index) + swapped, self._geometry.pmd_size + swapped)

    def _fill_bytes(self, before: BlockStates, index: int) -> int:
        return (self._geometry.ptes_per_pmd - int(before.contents[index])) * self._geometry.page_size
