"""The collapse of some orders by the kernel's own khugepaged: in windows, as long as they bring something.

khugepaged goes by its own order, so nothing is left out for a budget: it fills no holes unless there is no budget. What
is counted is what the page tables show after each window.
"""

from __future__ import annotations

import dataclasses

from mthp.addrspace import Block, CollapseOutcome
from mthp.collapsing.look import look_at_blocks
from mthp.collapsing.work import Work
from mthp.space_plan import Folios


def in_windows(work: Work, folios: Folios) -> None:
    """Let the machine's khugepaged at `folios` until a window brings nothing new.

    Raises:
        MthpError: it cannot go on; the report holds what was done until then.
    """
    blocks = list(zip(folios.address.tolist(), folios.order.tolist(), strict=True))
    means = dataclasses.replace(work.options.means, mechanism="khugepaged")
    contents = _contents(work, blocks)
    outcomes: list[CollapseOutcome] = []
    while blocks and not work.told_to_stop():
        work.room.renew()
        if not work.fits(0, work.space.geometry.pmd_size):
            for _, order in blocks:
                work.report.folios[order].not_tried -= 1
                work.report.folios[order].over_reserve += 1
            return
        outcomes = work.space.collapse_blocks(blocks, means)
        work.began()
        left = _account(work, blocks, contents)
        if len(left) == len(blocks):
            break
        blocks = left
    for (_, order), outcome in zip(blocks, outcomes, strict=False):
        if not work.report.interrupted:
            tally = work.report.folios[order]
            tally.not_tried -= 1
            tally.failed[outcome.result, outcome.reason or outcome.result.meaning] += 1


def _contents(work: Work, blocks: list[Block]) -> dict[Block, int]:
    """Pages that each of `blocks` holds, where it is not in a folio of its order already; those count as unchanged."""
    found = {}
    for order, addresses in _by_order(blocks).items():
        look = look_at_blocks(work.space, addresses, order)
        for address, large, contents in zip(addresses, look.large.tolist(), look.contents.tolist(), strict=True):
            found[address, order] = -1 if large else int(contents)
    return found


def _account(work: Work, blocks: list[Block], contents: dict[Block, int]) -> list[Block]:
    """Look at `blocks` after a window, and count what is made: the others."""
    left = []
    geometry, report = work.space.geometry, work.report
    for order, addresses in _by_order(blocks).items():
        tally = report.folios[order]
        look = look_at_blocks(work.space, addresses, order)
        for address, made in zip(addresses, look.large.tolist(), strict=True):
            held = contents[address, order]
            if not made:
                left.append((address, order))
                continue
            tally.not_tried -= 1
            work.step(geometry.size_of(order), geometry.label(order))
            if held < 0:
                tally.unchanged += 1
            else:
                tally.made += 1
                report.copied_bytes += held * geometry.page_size
                report.filled_bytes += ((1 << order) - held) * geometry.page_size
    return left


def _by_order(blocks: list[Block]) -> dict[int, list[int]]:
    """The addresses of `blocks` by their order."""
    found: dict[int, list[int]] = {}
    for address, order in blocks:
        found.setdefault(order, []).append(address)
    return found
