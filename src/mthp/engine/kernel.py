"""The collapse of some orders by the kernel's own khugepaged: in windows, as long as they bring something.

khugepaged goes by its own order, so nothing is left out for a budget: it fills no holes unless there is no budget.
"""

from __future__ import annotations

import dataclasses

from mthp.engine.space_plan import Folios
from mthp.engine.work import Work
from mthp.results import BlockOutcome, ScanResult

_LARGE_BEFORE = (ScanResult.PMD_MAPPED, ScanResult.PTE_MAPPED_HUGEPAGE)


def in_windows(work: Work, folios: Folios) -> None:
    """Let the machine's khugepaged at `folios` until a window brings nothing new.

    Raises:
        MthpError: it cannot go on; the report holds what was done until then.
    """
    blocks = list(zip(folios.address.tolist(), folios.order.tolist(), strict=True))
    means = dataclasses.replace(work.options.means, mechanism="khugepaged")
    outcomes: list[BlockOutcome] = []
    while blocks and not work.told_to_stop():
        work.room.renew()
        if not work.fits(0, work.space.geometry.pmd_size):
            for _, order in blocks:
                work.report.folios[order].not_tried -= 1
                work.report.folios[order].over_reserve += 1
            return
        outcomes = work.space.collapse_blocks(blocks, means)
        work.began()
        left = _account(work, outcomes)
        if len(left) == len(blocks):
            break
        blocks = [(outcome.address, outcome.order) for outcome in left]
        outcomes = left
    for outcome in outcomes:
        if not work.report.interrupted:
            tally = work.report.folios[outcome.order]
            tally.not_tried -= 1
            tally.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1


def _account(work: Work, outcomes: list[BlockOutcome]) -> list[BlockOutcome]:
    """Count what is made after a window: the outcomes of the other blocks."""
    left = []
    geometry, report = work.space.geometry, work.report
    for outcome in outcomes:
        tally = report.folios[outcome.order]
        if outcome.result is ScanResult.SUCCEED:
            tally.made += 1
            report.copied_bytes += outcome.copied * geometry.page_size
            report.filled_bytes += outcome.filled * geometry.page_size
        elif outcome.result in _LARGE_BEFORE:
            tally.unchanged += 1
        else:
            left.append(outcome)
            continue
        tally.not_tried -= 1
        work.step(geometry.size_of(outcome.order), geometry.label(outcome.order))
    return left
